"""Dumped graph calls: Polygraphy reads them, and onnxruntime computes the same from them bit by bit."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from dllm_export.errors import IncompatibleError, UsageError
from dllm_export.exporter import recording
from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pipeline import export
from dllm_export.graphs import graph_specs
from dllm_export.runtime.bundle import Bundle
from dllm_export.tools import cli, dump_graph
from dllm_export.tools.demo_checkpoint import save_checkpoint
from dllm_export.tools.demo_model import draw_weights
from dllm_export.tools.dump_graph import CALLED_WITH
from dllm_export.tools.train import TrainOptions

pytest.importorskip("polygraphy", reason="needs the extra polygraphy")

# Polygraphy divides by zeros for the relative errors that it prints.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning:polygraphy")

ROOT = Path(__file__).resolve().parents[2]
SHAPE = replace(TrainOptions(), layers=3, hidden=64, heads=2, mlp=96).shape
ALWAYS_CALLED = {"embed", "layer_full", "gather"}
GUIDED = "--policy dllm-cache --prompt-interval 3 --response-interval 2 --cfg-scale 1.5"
GUIDED_CALLS = {*ALWAYS_CALLED, "layer_partial", "layer_adaptive", "guidance", "head"}

Dump = Callable[..., Path]


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint whose tokens are bytes."""
    directory = tmp_path_factory.mktemp("bytes") / "model"
    save_checkpoint(directory, SHAPE, draw_weights(SHAPE, torch.Generator().manual_seed(0)), {})
    return directory


@pytest.fixture(scope="module")
def byte_bundle(byte_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Its bundle."""
    return export(byte_model, tmp_path_factory.mktemp("bundles") / "bytes", ExportOptions())


@pytest.fixture
def dump(byte_bundle: Bundle, tmp_path: Path) -> Dump:
    """Dumps a graph of the byte model and returns the folder; weights are inputs in the generation, too."""

    def call(graph: str, flags: str = "") -> Path:
        folder = tmp_path / "dumps" / graph
        assert run_dump(byte_bundle, graph, "-o", folder, *flags.split()) == 0
        return folder

    return call


def run_dump(bundle: Bundle, *arguments: object) -> int:
    """The exit code of `dump` in this process; one thread, 12 tokens, two prompts."""
    fixed = ["--threads", "1", "--prepack", "off", "--gen-length", "12", "--prompt", "abcde", "--prompt", "abz"]
    return cli.run(["dump", str(bundle.path), *fixed, *map(str, arguments)])


def load(file: Path) -> Any:
    """A JSON file of Polygraphy, decoded by Polygraphy."""
    return importlib.import_module("polygraphy.json").load_json(str(file))


def run_again(folder: Path, graph: str) -> Any:
    """The dumped graph run by Polygraphy's onnxruntime runner on the dumped inputs."""
    backend, comparator = (importlib.import_module(f"polygraphy.{name}") for name in ("backend.onnxrt", "comparator"))
    runner = backend.OnnxrtRunner(backend.SessionFromOnnx(str(folder / f"{graph}.onnx")))
    return comparator.Comparator.run([runner], data_loader=load(folder / "inputs.json"))


def compare_exactly(first: Any, second: Any) -> bool:
    """Polygraphy's comparator without any tolerance."""
    comparator = importlib.import_module("polygraphy.comparator")
    exact = comparator.SimpleCompareFunc(rtol=0, atol=0)
    joined = comparator.RunResults([*first, *second])
    return bool(comparator.Comparator.compare_accuracy(joined, compare_func=exact))


# -- what is in a dump
@pytest.mark.parametrize("graph", sorted(GUIDED_CALLS))
def test_every_graph_of_a_guided_cached_generation_gives_its_dumped_outputs_again(graph: str, dump: Dump) -> None:
    folder = dump(graph, GUIDED)
    spec = graph_specs(SHAPE)[graph]
    ((_, (outputs,)),) = load(folder / "outputs.json")
    assert list(outputs) == [tensor.name for tensor in spec.outputs]
    (feed,) = load(folder / "inputs.json")
    assert list(feed) == [tensor.name for tensor in (*spec.inputs, *spec.weights)]
    assert compare_exactly(run_again(folder, graph), load(folder / "outputs.json"))


def test_the_exact_comparison_sees_one_changed_bit(dump: Dump) -> None:
    folder = dump("layer_full")
    changed = load(folder / "outputs.json")
    hidden = changed[0][1][0]["hidden_out"]
    hidden.flat[0] = np.nextafter(hidden.flat[0], np.float32(np.inf))
    assert not compare_exactly(run_again(folder, "layer_full"), changed)


@pytest.mark.parametrize("graph", CALLED_WITH)
def test_the_flags_that_a_message_names_make_the_graph_run(graph: str, dump: Dump, tmp_path: Path) -> None:
    (tmp_path / "prefix.txt").write_text("ab")
    flags = CALLED_WITH[graph].replace("FILE", str(tmp_path / "prefix.txt"))
    assert (dump(graph, flags) / f"{graph}.onnx").is_file()


def test_what_a_device_would_commit_is_dumped_where_nothing_is_queued(dump: Dump) -> None:
    folder = dump("commit", f"{CALLED_WITH['commit']} --policy dllm-cache --step 2")
    assert compare_exactly(run_again(folder, "commit"), load(folder / "outputs.json"))
    (feed,) = load(folder / "inputs.json")
    ((_, (outputs,)),) = load(folder / "outputs.json")
    assert [(row != new).sum() for row, new in zip(feed["tokens"], outputs["tokens_out"], strict=True)] == [1, 1]


def test_every_graph_has_flags_or_is_always_called() -> None:
    assert set(CALLED_WITH) | ALWAYS_CALLED == set(graph_specs(replace(SHAPE, indicator_rank=1)))
    assert not set(CALLED_WITH) & ALWAYS_CALLED


def test_the_dumped_graph_is_the_one_of_the_bundle(dump: Dump, byte_bundle: Bundle) -> None:
    assert (dump("head") / "head.onnx").read_bytes() == byte_bundle.graph_bytes("head")


def test_the_step_and_the_layer_choose_the_call(byte_bundle: Bundle, tmp_path: Path, capsys: Any) -> None:
    calls = {}
    for name, flags in {"first": "", "late": "--step 3", "second layer": "--step 3 --layer 1"}.items():
        arguments = ("layer_full", "-o", tmp_path / name, "--json", *flags.split())
        capsys.readouterr()
        assert run_dump(byte_bundle, *arguments) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["files"] == {file.name: file.stat().st_size for file in sorted((tmp_path / name).iterdir())}
        calls[name] = (result["step"], result["layer"])
        (feed,) = load(tmp_path / name / "inputs.json")
        np.testing.assert_array_equal(feed["qk"], byte_bundle.graph_weights("layer_full", result["layer"])["qk"])
    assert calls == {"first": (1, 0), "late": (3, 0), "second layer": (3, 1)}


@pytest.mark.parametrize("step", [1, 3, 12])
def test_the_tokens_of_a_step_have_what_the_steps_before_decided(step: int, dump: Dump, byte_bundle: Bundle) -> None:
    (feed,) = load(dump("embed", f"--step {step}") / "inputs.json")
    masked = feed["tokens"] == byte_bundle.manifest.tokens.mask
    np.testing.assert_array_equal(masked.sum(1), [13 - step, 13 - step])


def test_large_weights_are_announced(
    byte_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = sum(array.nbytes for array in byte_bundle.graph_weights("embed", None).values())
    for name, limit, note in (("small", weights + 1, ""), ("large", weights, "writing 67.6 kB of weights")):
        monkeypatch.setattr(dump_graph, "LARGE", limit)
        assert run_dump(byte_bundle, "embed", "-o", tmp_path / name) == 0
        captured = capsys.readouterr()
        assert captured.out == f"{tmp_path / name}\n"
        assert captured.err.split(",")[0] == note


def test_an_input_is_what_it_was_before_the_call(dump: Dump, byte_bundle: Bundle) -> None:
    (embedded,), (layer,) = load(dump("embed") / "outputs.json")[0][1], load(dump("layer_full") / "inputs.json")
    np.testing.assert_array_equal(layer["hidden"], embedded["hidden_out"])
    assert layer["hidden"].shape == (2, 17, SHAPE.hidden)


def test_a_call_of_a_generation_that_overflows_is_dumped(byte_model: Path, tmp_path: Path) -> None:
    weights = draw_weights(SHAPE, torch.Generator().manual_seed(0))
    weights["head"] = weights["head"].sign() * 6e4
    save_checkpoint(tmp_path / "loud", SHAPE, weights, {})
    bundle = export(tmp_path / "loud", tmp_path / "bundle", ExportOptions(dtype="float16"))
    assert run_dump(bundle, "head", "-o", tmp_path / "dump", "--provider", "torch") == 0
    ((_, (outputs,)),) = load(tmp_path / "dump" / "outputs.json")
    assert not np.isfinite(outputs["logsumexp"]).all()


# -- what is refused
WRONG = {
    "hed -o new": "no graph is called 'hed'; there are: embed, layer_full,",
    "head -o new --layer 1": "--layer does not go with graph 'head', which belongs to no layer; leave it out",
    "layer_full -o new --layer 3": "--layer is 3, expected 0 to 2",
    "layer_full -o new --step 0": "--step is 0, expected at least 1",
    "layer_full -o new --step 13": "is not called in step 13 or later in the 12 steps of this generation; its last call "
    "is in step 12",
    "guidance -o new": "is not called in the 12 steps of this generation; one of several steps with --cfg-scale 1.5 "
    "calls it",
    "layer_partial -o new --layer 2 --policy dllm-cache --response-interval 50": "is not called in layer 2 in the 12 steps "
    "of this generation, but it is in: 0",
    "head -o full": "full exists and is not an empty folder; remove it or choose another with -o",
    "head": "Missing option '-o' / '--output'",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_call_is_named_and_nothing_is_written(
    line: str, byte_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    assert run_dump(byte_bundle, *line.split()) == UsageError.exit_code
    captured = capsys.readouterr()
    assert WRONG[line] in captured.err
    assert captured.out == ""
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["full", "mine"]


def test_a_dump_that_fails_leaves_nothing(byte_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, comparator = recording.import_polygraphy()

    def fail(value: object, path: str) -> None:
        data.save_json(value, path)
        raise OSError(28, "No space left on device", path)

    class Full:
        save_json = staticmethod(fail)

    monkeypatch.setattr(recording, "import_polygraphy", lambda: (Full, comparator))
    assert run_dump(byte_bundle, "head", "-o", tmp_path / "dump") == 6
    assert list(tmp_path.iterdir()) == []


def test_a_bfloat16_bundle_is_refused_with_the_remedy(byte_model: Path, tmp_path: Path) -> None:
    bundle = export(byte_model, tmp_path / "bundle", ExportOptions(dtype="bfloat16"))
    with pytest.raises(UsageError, match="numpy has no bfloat16: export with --dtype float16 or float32"):
        recording.check_polygraphy(bundle)
    assert run_dump(bundle, "head", "-o", tmp_path / "dump", "--provider", "torch") == UsageError.exit_code


def test_without_polygraphy_the_pip_line_is_given(byte_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy.json", None)
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    with pytest.raises(IncompatibleError, match=r"pip install 'dllm-export\[polygraphy\]'"):
        recording.check_polygraphy(byte_bundle)


# -- the walk-through of docs/tensorrt.md
def walk_through() -> str:
    """The section on Polygraphy."""
    return (ROOT / "docs" / "tensorrt.md").read_text(encoding="utf-8").split("\n## Polygraphy\n")[1]


def shell_blocks() -> list[str]:
    """Its blocks that run on any machine: fenced as `sh`; those for a GPU are `sh gpu`."""
    return re.findall(r"^```sh\n(.*?)^```", walk_through(), re.MULTILINE | re.DOTALL)


def run_shell(code: str, folder: Path, hidden: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run it as a user with this environment would, less the modules in `hidden`, which cannot be imported."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    if hidden:
        environment["PYTHONPATH"] = os.pathsep.join((str(hidden), os.environ.get("PYTHONPATH", "")))
    return subprocess.run(["sh", "-ec", code], cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def workspace(byte_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the tiny bundle where the walk-through has the demo's."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "build").mkdir()
    (folder / "build" / "demo").symlink_to(byte_bundle.path)
    return folder


@pytest.fixture(scope="module")
def no_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Polygraphy imports torch wherever there is one, six sevenths of each of its dozen starts, and needs none here."""
    folder = tmp_path_factory.mktemp("hidden")
    (folder / "torch.py").write_text('raise ImportError("hidden")\n')
    return folder


def test_the_walk_through_runs_as_printed_and_notices_wrong_outputs(workspace: Path, no_torch: Path) -> None:
    dumping, comparing, reducing = shell_blocks()
    for code, hidden in ((dumping, None), (comparing, no_torch)):
        done = run_shell(code, workspace, hidden)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    outputs = workspace / "dump" / "outputs.json"
    kept, changed = outputs.read_text(), load(outputs)
    changed[0][1][0]["hidden_out"][0, -1, 0] += 0.5
    changed.save(str(outputs))
    failed = run_shell(comparing, workspace, no_torch)
    assert failed.returncode != 0
    assert "FAILED | Output: 'hidden_out'" in failed.stdout + failed.stderr
    outputs.write_text(kept)

    done = run_shell(reducing, workspace, no_torch)
    assert done.returncode == 0, f"{reducing}\n{done.stdout}\n{done.stderr}"
    last = onnx.load(workspace / "reduced.onnx").graph.node[-1]
    assert last.op_type == "Tanh"
    assert f"{last.name} [Op: Tanh]" in done.stdout


def test_polygraphy_accepts_the_comparison_for_a_gpu(workspace: Path, no_torch: Path) -> None:
    (code,) = re.findall(r"^```sh gpu\n(.*?)^```", walk_through(), re.MULTILINE | re.DOTALL)
    (comparing,) = re.findall(r"^polygraphy run .*?\n(?! )", code, re.MULTILINE | re.DOTALL)
    done = run_shell(f"{comparing.rstrip()} --gen-script script.py", workspace, no_torch)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "TrtRunner" in (workspace / "script.py").read_text()
