"""The lm-evaluation-harness on the trained model, offline: a task of its own kind, scored as our own grading scores it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dllm_export.errors import UsageError
from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pipeline import export
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import DllmCache
from dllm_export.runtime.session import SessionOptions
from dllm_export.runtime.transfers import Threshold
from dllm_export.tools.worksheets import held_out

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra lm-eval, which `make test EXTRAS=lm-eval` installs")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the harness's own dependencies

MODEL = Path(__file__).resolve().parents[2] / "models" / "worksheets-4m"
TASK = """
task: worksheets_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["{stop}"]
  max_gen_toks: 48
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(MODEL, tmp_path_factory.mktemp("harness") / "bundle", ExportOptions()).path


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four worksheets, of which one has a wrong answer, as a local task without any download."""
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    sheets = held_out(4, seed=3, problems=6)
    answers = [*(sheet.answer for sheet in sheets[:3]), "wrong"]
    lines = [json.dumps({"prompt": one.prompt, "answer": text}) for one, text in zip(sheets, answers, strict=True)]
    (tmp_path / "sheets.jsonl").write_text("\n".join(lines) + "\n")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "worksheets.yaml").write_text(TASK.format(file=tmp_path / "sheets.jsonl", stop="never"))
    return folder


def test_the_command_line_of_the_harness_scores_a_local_task(bundle: Path, tasks: Path, tmp_path: Path) -> None:
    settings = f"bundle={bundle},policy=dllm-cache,update_ratio=0.5,transfer=threshold,threads=1"
    command = [sys.executable, "-m", "dllm_export.tools.lm_harness", "--model", "dllm-export", "--model_args", settings]
    done = subprocess.run(
        [*command, "--tasks", "worksheets_local", "--include_path", str(tasks), "--output_path", str(tmp_path / "out")],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (result,) = (tmp_path / "out").rglob("results_*.json")
    scores = json.loads(result.read_text())["results"]["worksheets_local"]
    assert scores["exact_match,none"] == 0.75


def test_an_answer_is_what_generate_gives_cut_at_the_stop_text(bundle: Path) -> None:
    from lm_eval.api.instance import Instance

    from dllm_export.tools.lm_harness import HarnessModel

    sheet = held_out(1, seed=3, problems=6)[0]
    with DiffusionLM.from_pretrained(bundle, SessionOptions(threads=1)) as lm:
        whole = lm.generate([sheet.prompt], GenerationOptions(gen_length=48), DllmCache(), Threshold())[0].text
    model = HarnessModel(str(bundle), "dllm-cache", "threshold", threads=1, batch_size=1)
    for stop in ("C", "\n", "never"):
        task = {"until": [stop, "D"], "max_gen_toks": 48}
        request = Instance(request_type="generate_until", doc={}, arguments=(sheet.prompt, task), idx=0)
        assert model.generate_until([request]) == [whole.split(stop)[0].split("D")[0]]


def test_what_cannot_be_answered_is_refused(bundle: Path) -> None:
    from dllm_export.tools.lm_harness import HarnessModel

    with pytest.raises(UsageError, match="model_args has thrashold, which no option"):
        HarnessModel(str(bundle), transfer="threshold", thrashold=0.5)
    model = HarnessModel(str(bundle), threads=1)
    for ask in (model.loglikelihood, model.loglikelihood_rolling):
        with pytest.raises(UsageError, match="take tasks whose output_type is generate_until"):
            ask([])
