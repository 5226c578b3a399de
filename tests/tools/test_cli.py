"""The command line: what it prints where, its exit codes, and that every flag does something."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from dllm_export import __version__
from dllm_export.errors import DllmExportError, IncompatibleError, IntegrityError, MismatchError, ResourceError
from dllm_export.exporter.verify import Check, Report
from dllm_export.runtime.policies import POLICIES
from dllm_export.runtime.policies.contract import suits
from dllm_export.runtime.session import CaptureReport, SessionOptions, SessionReport
from dllm_export.tools import cli, doctor, inspect_bundle
from dllm_export.tools.demo_checkpoint import save_checkpoint
from dllm_export.tools.demo_layouts import END
from dllm_export.tools.demo_model import draw_weights
from dllm_export.tools.generate_text import session_line
from dllm_export.tools.train import TrainOptions

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "help"
SHAPE = replace(TrainOptions(), layers=2, hidden=64, heads=2, mlp=96).shape
MASK_TEXT = "<|mdm_mask|>"
CHAT_TEMPLATE = "<{{ messages[0]['content'] }}>"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command line gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its standard output, parsed."""
        return json.loads(self.out)


Invoke = Callable[..., Outcome]


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Runs a command line in this process; no stream is a terminal, and the help is 80 columns wide."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint whose tokens are bytes and that often wants to stop."""
    directory = tmp_path_factory.mktemp("bytes") / "model"
    weights = draw_weights(SHAPE, torch.Generator().manual_seed(0))
    weights["head"][:, END] *= 8
    save_checkpoint(directory, SHAPE, weights, {})
    return directory


@pytest.fixture(scope="session")
def byte_bundle(byte_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle."""
    target = tmp_path_factory.mktemp("bundles") / "bytes"
    assert cli.run(["export", str(byte_model), "-o", str(target)]) == 0
    return target


@pytest.fixture
def generate(invoke: Invoke, byte_bundle: Path) -> Invoke:
    """`generate` on the byte model with 16 tokens and one thread, unless told otherwise."""

    def call(*arguments: object) -> Outcome:
        return invoke("generate", byte_bundle, "--threads", 1, "--gen-length", 16, *arguments)

    return call


# -- help
@pytest.mark.parametrize("name", ["", *cli.COMMANDS])
def test_help_is_as_recorded(name: str, invoke: Invoke) -> None:
    """After a wanted change: UPDATE_GOLDEN=1 pytest tests/tools/test_cli.py -k help"""
    result = invoke(*filter(None, [name]), "-h")
    file = GOLDEN / f"{name or 'dllm-export'}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(result.out, encoding="utf-8")
    assert (result.code, result.err) == (0, "")
    assert result.out == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_is_listed_with_the_first_sentence_of_its_help(name: str) -> None:
    command = cli.cli.get_command(click.Context(cli.cli), name)
    assert command is not None
    assert (command.help or "").splitlines()[0] == cli.COMMANDS[name].summary


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_json_and_debug(name: str, invoke: Invoke) -> None:
    text = invoke(name, "-h").out
    assert "--json " in text
    assert "--debug " in text


def test_the_documentation_has_every_command_and_exit_code() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for name in cli.COMMANDS:
        assert f"## {name}\n" in text
    errors: list[type[DllmExportError]] = [DllmExportError, *DllmExportError.__subclasses__()]
    for code in {0, cli.INTERRUPTED, cli.CLOSED_PIPE, *(error.exit_code for error in errors)}:
        assert f"\n| {code} |" in text


def test_no_command_shows_the_help_as_an_error(invoke: Invoke) -> None:
    result = invoke()
    assert (result.code, result.out) == (2, "")
    assert "Commands:" in result.err


def test_version(invoke: Invoke) -> None:
    assert invoke("--version").out == f"dllm-export, version {__version__}\n"


def loaded_after(arguments: list[str]) -> set[str]:
    """Top-level modules that a fresh process has loaded after a command line."""
    program = f"from dllm_export.tools.cli import run\nassert run({arguments!r}) == 0\n"
    program += "import sys\nprint('\\n' + ' '.join({name.split('.')[0] for name in sys.modules}))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines()[-1].split())


def test_the_list_of_commands_loads_nothing_heavy() -> None:
    assert not loaded_after(["-h"]) & {"numpy", "onnx", "onnxruntime", "rich", "tokenizers", "torch"}


def test_inspect_loads_no_provider_and_no_onnx(byte_bundle: Path) -> None:
    assert not loaded_after(["inspect", str(byte_bundle)]) & {"onnx", "onnxruntime", "torch"}


# -- results, quietly
def test_piped_export_prints_the_path_and_nothing_else(invoke: Invoke, byte_model: Path, tmp_path: Path) -> None:
    result = invoke("export", byte_model, "-o", tmp_path / "bundle")
    assert result == Outcome(0, f"{tmp_path / 'bundle'}\n", "")


def test_piped_generation_prints_the_text_and_nothing_else(generate: Invoke) -> None:
    result = generate("--prompt", "abc")
    assert (result.code, result.err) == (0, "")
    assert result.out.removesuffix("\n") == generate("--prompt", "abc", "--json").json["text"].removesuffix("\n")


def test_every_command_prints_one_json_value(
    invoke: Invoke, byte_model: Path, byte_bundle: Path, tmp_path: Path
) -> None:
    commands: tuple[tuple[tuple[object, ...], str], ...] = (
        (("export", byte_model, "-o", tmp_path / "bundle"), "weight_bytes"),
        (("verify", byte_bundle, "--threads", 1), "checks"),
        (("generate", byte_bundle, "--prompt", "a", "--gen-length", 2), "tokens"),
        (("inspect", byte_bundle), "graphs"),
        (("doctor", byte_bundle), "providers"),
        (("demo", "--model", byte_model, "-o", tmp_path / "demo", "--sheets", 1, "--threads", 1), "policies"),
    )
    for arguments, key in commands:
        result = invoke(*arguments, "--json")
        assert result.code == 0, result.err
        assert key in result.json, arguments


def test_generation_as_json_holds_result_figures_and_settings(generate: Invoke) -> None:
    result = generate("--prompt", "abc", "--policy", "dllm-cache", "--json").json
    assert len(result["tokens"]) == len(result["confidence"]) == result["passes"] == 16
    assert result["finish_reason"] in ("stop", "length")
    assert sum(result["steps_by_kind"].values()) == 16
    assert result["partial_share"] == 1 - result["steps_by_kind"]["full"] / 16
    assert 0 < result["engine_seconds"] < result["engine_seconds"] + result["strategy_seconds"] < result["seconds"]
    assert result["tokens_per_second"] == pytest.approx(16 / result["seconds"])
    assert result["settings"]["policy"]["update_ratio"] == 0.25
    assert result["settings"]["options"]["gen_length"] == 16


def test_generation_as_json_says_what_the_session_held(generate: Invoke) -> None:
    session = generate("--prompt", "abc", "--json").json["session"]
    assert session["provider"] == "onnxruntime"
    assert session["library"].startswith("onnxruntime ")
    assert (session["captures"], session["memory"], session["peak_memory"]) == ([], {}, 0)


def test_the_line_of_a_tensorrt_session_has_captures_and_memory_by_purpose() -> None:
    report = SessionReport(
        provider="tensorrt",
        library="tensorrt 8.6.0",
        captures=(CaptureReport(calls="embed, 2 layer_full", replays=61), CaptureReport(calls="head", replays=62)),
        capture_limit=2,
        memory={"weights": 16_000_000_000, "workspace": 300_000_000, "buffers": 2_000_000},
        peak_memory=16_302_000_000,
    )
    captured, memory = "2 CUDA graphs replayed 123 times", "weights 16.0 GB, workspace 300.0 MB, buffers 2.0 MB"
    assert session_line(report) == f"tensorrt 8.6.0: {captured}; device memory: {memory}; at most 16.3 GB"
    assert f"{captured}, 3 evicted (--captures is 2); " in session_line(replace(report, evicted=3))
    one = replace(report, captures=report.captures[:1])
    assert "1 CUDA graph replayed 61 times" in session_line(one)


def test_several_prompts_give_a_list_of_the_same_results_as_alone(generate: Invoke) -> None:
    prompts = ["abc", "some longer prompt"]
    both = generate("--prompt", prompts[0], "--prompt", prompts[1], "--json").json
    assert [one["tokens"] for one in both] == [
        generate("--prompt", prompt, "--json").json["tokens"] for prompt in prompts
    ]


def test_report_is_what_json_prints(generate: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    assert generate("--prompt", "abc", "--json", "--report", file).json == json.loads(file.read_text())


def test_watching_prints_plain_frames_on_stderr(generate: Invoke) -> None:
    result = generate("--prompt", "abc", "--watch")
    assert result.out == generate("--prompt", "abc").out
    assert "step 16/16" in result.err
    assert "\x1b" not in result.err


# -- prompts
def test_a_prompt_comes_from_a_flag_a_file_or_stdin(
    generate: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_text("ab\nc", encoding="utf-8")
    expected = generate("--prompt", "ab\nc").out
    assert generate("--prompt-file", tmp_path / "prompt.txt").out == expected
    assert generate("--prompt-ids", "97, 98 10 99").out == expected
    for flags in ((), ("--prompt-file", "-")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\nc")))
        assert generate(*flags).out == expected


def test_infilling_prints_the_whole_text(invoke: Invoke, byte_bundle: Path) -> None:
    flags = ("--infill", f"abc{MASK_TEXT * 3}", "--logits-eos-inf")
    result = invoke("generate", byte_bundle, *flags, "--json").json
    assert result["text"].startswith("abc")
    assert len(result["tokens"]) == 3


def test_json_of_given_tokens_has_no_confidence(invoke: Invoke, byte_bundle: Path) -> None:
    result = invoke("generate", byte_bundle, "--infill", f"{MASK_TEXT}bc", "--json").json
    assert result["confidence"][1:] == [None, None]


def test_chat_uses_the_models_template(invoke: Invoke, byte_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in byte_model.iterdir():
        (model / file.name).symlink_to(file)
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    assert invoke("export", model, "-o", tmp_path / "chat").code == 0
    flags = ("--gen-length", 8, "--json")
    chat = invoke("generate", tmp_path / "chat", "--prompt", "abc", "--chat", *flags).json
    assert chat["tokens"] == invoke("generate", tmp_path / "chat", "--prompt", "<abc>", *flags).json["tokens"]


def test_a_bundle_without_tokenizer_takes_and_gives_ids(invoke: Invoke, byte_model: Path, tmp_path: Path) -> None:
    assert invoke("export", byte_model, "-o", tmp_path / "ids", "--no-tokenizer").code == 0
    result = invoke("generate", tmp_path / "ids", "--prompt-ids", "1 2 3", "--gen-length", 4)
    assert len([int(word) for word in result.out.split()]) == 4
    assert "no tokenizer" in invoke("generate", tmp_path / "ids", "--prompt", "a").err


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if suits(policy, by_blocks=False)])
def test_every_policy_generates(name: str, generate: Invoke, tmp_path: Path) -> None:
    (tmp_path / "prefix.txt").write_text("ab")
    shared = ("--prefix-file", tmp_path / "prefix.txt", "--prefix-depth", 1)
    needed = {"dkv-greedy": ("--remasking", "random"), "shared-prefix": shared}.get(name, ())
    result = generate("--prompt", "abc", "--prompt", "ab", "--block-length", 8, "--policy", name, *needed, "--json")
    assert result.code == 0, result.err
    for one in result.json:
        assert one["settings"]["policy"]["name"] == name
        assert (len(one["tokens"]), sum(one["steps_by_kind"].values())) == (16, 16)


# -- every flag of generate
CACHED = "--policy dllm-cache"
BLOCKS = "--block-length 4 --policy"
GREEDY = "--remasking random --refresh-interval 0 --policy dkv-greedy"
KLASS = "--transfer klass --threshold 0 --kl-limit 9"
SLOW = "--gen-length 24 --transfer slow-fast --threshold 0.2 --span-confidence 0.5"
CREDIT = "--transfer credit --threshold 0.2"
WINO = "--transfer wino --accept-least 2 --verify-threshold 0"
BOLD = f"{WINO} --accept-threshold 0 --accept-share 0.4"
EDIT = "--transfer token-editing --threshold 0 --editing-threshold"
DYNAMIC = "--policy dynamic-dllm --layer-budget 2 --window 2 --bucket 1"
SPA = "--policy spa --peak-ratio 0.5"
EFFECTS = {
    # flag: (command line without it, with it, what differs in the JSON)
    "--steps": ("", "--steps 8", "passes"),
    "--gen-length": ("", "--gen-length 12", "passes"),
    "--block-length": ("--steps 8", "--steps 8 --block-length 4", "confidence"),
    "--temperature": ("", "--temperature 1", "tokens"),
    "--top-p": ("--temperature 1", "--temperature 1 --top-p 0.1", "tokens"),
    "--top-k": ("--temperature 1", "--temperature 1 --top-k 1", "tokens"),
    "--alg-temp": ("--transfer dream", "--transfer dream --alg-temp 9", "confidence"),
    "--eps": ("--transfer ddpm", "--transfer ddpm --eps 0.5", "confidence"),
    "--seed": ("--temperature 1", "--temperature 1 --seed 1", "tokens"),
    "--cfg-scale": ("", "--cfg-scale 1.5", "passes"),
    "--cfg-interval": ("--cfg-scale 1.5", "--cfg-scale 1.5 --cfg-interval 4", "passes"),
    "--remasking": ("", "--remasking random", "confidence"),
    "--logits-eos-inf": ("", "--logits-eos-inf", "tokens"),
    "--confidence-eos-eot-inf": ("", "--confidence-eos-eot-inf", "confidence"),
    "--early-stop": ("--block-length 4", "--block-length 4 --early-stop", "passes"),
    "--policy": ("", CACHED, "steps_by_kind"),
    "--prompt-interval": (CACHED, f"{CACHED} --prompt-interval 3", "steps_by_kind"),
    "--response-interval": (CACHED, f"{CACHED} --response-interval 2", "steps_by_kind"),
    "--update-ratio": (CACHED, f"{CACHED} --update-ratio 0.75", "confidence"),
    "--first-layer-rule": (CACHED, f"{CACHED} --no-first-layer-rule", "confidence"),
    "--before": (f"{BLOCKS} window --after 0", f"{BLOCKS} window --after 0 --before 0", "confidence"),
    "--after": (f"{BLOCKS} window --before 0", f"{BLOCKS} window --before 0 --after 0", "confidence"),
    "--refresh-interval": (f"{BLOCKS} window", f"{BLOCKS} window --refresh-interval 2", "steps_by_kind"),
    "--keep-ratio": (f"{BLOCKS} sparse", f"{BLOCKS} sparse --keep-ratio 0.1", "confidence"),
    "--bucket": (f"{BLOCKS} dkv-decode", f"{BLOCKS} dkv-decode --bucket 1", "settings"),
    "--nearest": (f"{GREEDY}", f"{GREEDY} --nearest 0", "confidence"),
    "--layer-budget": (DYNAMIC, f"{DYNAMIC} --layer-budget 3", "confidence"),
    "--window": (DYNAMIC, f"{DYNAMIC} --window 6", "confidence"),
    "--variant": (DYNAMIC, f"{DYNAMIC} --variant released", "confidence"),
    "--peak-depth": (SPA, f"{SPA} --peak-depth 0.2", "confidence"),
    "--peak-ratio": (SPA, f"{SPA} --peak-ratio 0.9", "confidence"),
    "--start-ratio": (SPA, f"{SPA} --start-ratio 0.4", "confidence"),
    "--end-ratio": (SPA, f"{SPA} --peak-depth 0.1 --end-ratio 0.01", "confidence"),
    "--min-ratio": (SPA, f"{SPA} --min-ratio 0.6", "confidence"),
    "--transfer": ("", "--transfer hierarchy", "passes"),
    "--threshold": ("--transfer threshold", "--transfer threshold --threshold 0.05", "passes"),
    "--sub-block": ("--transfer sub-blocks", "--transfer sub-blocks --sub-block 2 --threshold 0", "passes"),
    "--editing-threshold": (f"{EDIT} 1", f"{EDIT} 0", "tokens"),
    "--max-post-steps": (f"{EDIT} 0", f"{EDIT} 0 --max-post-steps 1", "passes"),
    "--factor": ("--transfer factor", "--transfer factor --factor 20", "passes"),
    "--gamma": ("--transfer entropy-bound", "--transfer entropy-bound --gamma 50", "passes"),
    "--low": ("--transfer hierarchy", "--transfer hierarchy --low 0.01 --high 0.9", "passes"),
    "--high": ("--transfer hierarchy", "--transfer hierarchy --low 0 --high 0.01", "passes"),
    "--kl-limit": (KLASS, f"{KLASS} --kl-limit 0", "passes"),
    "--kl-steps": (KLASS, f"{KLASS} --kl-steps 5", "passes"),
    "--span-confidence": (SLOW, f"{SLOW} --span-confidence 0", "passes"),
    "--explore-steps": (SLOW, f"{SLOW} --explore-steps 1", "passes"),
    "--alpha": ("--transfer apd", "--transfer apd --alpha 0.5", "passes"),
    "--beta": ("--transfer apd --alpha 0.05", "--transfer apd --alpha 0.05 --beta 9", "passes"),
    "--credit-weight": (CREDIT, f"{CREDIT} --credit-weight 9", "confidence"),
    "--credit-decay": (CREDIT, f"{CREDIT} --credit-decay 0", "confidence"),
    "--credit-power": (CREDIT, f"{CREDIT} --credit-power 3", "confidence"),
    "--accept-threshold": (WINO, f"{WINO} --accept-threshold 0", "passes"),
    "--verify-threshold": (BOLD, f"{BOLD} --verify-threshold 1", "passes"),
    "--accept-share": (BOLD, f"{BOLD} --accept-share 1", "passes"),
    "--accept-least": (BOLD, f"{BOLD} --accept-least 9", "passes"),
    "--accept-most": (BOLD, f"{BOLD} --accept-most 2", "passes"),
    "--provider": ("", "--provider torch", "settings"),
    "--threads": ("", "--threads 2", "settings"),
    "--prepack": ("--prepack on", "--prepack off", "settings"),
}
TESTED_APART = {
    *("--prompt", "--prompt-file", "--prompt-ids", "--infill", "--chat"),
    *("--base", "--prefix-file", "--prefix-depth", "--prefix-profile", "--prefix-budget"),  # test_prefix_flags.py
    "--sub-block-cache",  # of models that attend by blocks: runtime/test_blocks.py
    "--score-temperature",  # of continuous models: runtime/test_plaid.py
    "--predictor",  # of models that see the noise level: runtime/test_time_families.py
    "--allow-host-code",  # of provider tensorrt: runtime/test_tensorrt_compatibility.py, runtime/test_tensorrt_session.py
    *("--watch", "--report", "--json", "--debug", "--device", "--captures", "--compile"),
}


@pytest.mark.parametrize("flag", EFFECTS)
def test_flag_has_an_effect(flag: str, generate: Invoke) -> None:
    without, given, key = EFFECTS[flag]
    results = [generate("--prompt", "abcdefgh", *line.split(), "--json").json[key] for line in (without, given)]
    assert results[0] != results[1]


def test_no_flag_of_generate_goes_untested() -> None:
    command = cli.cli.get_command(click.Context(cli.cli), "generate")
    assert command is not None
    flags = {parameter.opts[0] for parameter in command.params if isinstance(parameter, click.Option)}
    assert flags == set(EFFECTS) | TESTED_APART


# -- wrong input
WRONG = {
    "--prompt a --transfer treshold": "; did you mean threshold?",
    "--prompt a --threshold 0.5": "--threshold belongs to the decoding rule: threshold",
    "--prompt a --transfer threshold --steps 4": "--steps has no effect with --transfer threshold",
    "--prompt a --policy dlm-cache": f"there are: {', '.join(POLICIES)}; did you mean dllm-cache?",
    "--prompt a --update-ratio 0.5": "--update-ratio is no option of the cache policy 'none', it belongs to: dllm-cache",
    "--prompt a --policy dkv-greedy": "which takes --remasking random and --transfer quota, or --transfer ddpm",
    "--prompt a --policy sparse --keep-ratio 2": "--keep-ratio is 2.0, expected a share from 0 to 1",
    "--prompt a --policy window --before -1": "--before is -1, expected at least 0",
    "--prompt a --policy dllm-cache --update-ratio 2": "--update-ratio is 2.0, expected a share from 0 to 1",
    "--prompt a --block-length 3": "--gen-length 16 is not divisible by --block-length 3",
    "--prompt a --steps 0": "--steps is 0, expected at least 1",
    "--prompt a --steps x": "'x' is not a valid integer",
    "--prompt a --gen-lenght 4": "--gen-length",
    "--prompt a --provider onxruntime": "is not one of 'onnxruntime'",
    "--prompt a --infill b": "--prompt and --infill exclude one another",
    "--infill a --chat": "--chat applies to --prompt, not to --infill",
    "--infill abc": f"holds no mask token; this model writes it {MASK_TEXT}",
    "--prompt a --chat": "no chat template",
    "--prompt-ids 1,x": "is not a list of whole numbers",
    "--prompt-ids 999": "outside 0..263",
    "--prompt-file missing.txt": "cannot read the prompt from missing.txt",
    "--prompt a --report missing/file.json": "the directory missing does not exist",
    "": "no prompt was given",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_named_in_one_or_two_lines(line: str, generate: Invoke) -> None:
    result = generate(*line.split())
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert WRONG[line] in result.err
    assert result.err.count("\n") <= 2


def test_an_empty_prompt_is_refused(generate: Invoke) -> None:
    assert "is empty" in generate("--prompt", "").err


def test_a_prompt_that_is_not_utf8_is_refused(generate: Invoke, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(b"ab\xff")
    result = generate("--prompt-file", tmp_path / "prompt.txt")
    assert result.code == 2
    assert "is not UTF-8 text (byte 2)" in result.err
    assert "not UTF-8 text" in generate("--prompt", "ab\udcff").err


@pytest.mark.parametrize("name", ["verify", "inspect", "doctor", "generate"])
def test_a_missing_bundle_is_named(name: str, invoke: Invoke, tmp_path: Path) -> None:
    result = invoke(name, tmp_path / "nothing", *(("--prompt", "a") if name == "generate" else ()))
    assert result.code == 2
    assert "nothing is not a bundle" in result.err


def test_a_damaged_bundle_is_refused_with_its_own_code(invoke: Invoke, byte_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    for file in (path for path in byte_bundle.rglob("*") if path.is_file()):
        (copy / file.relative_to(byte_bundle)).parent.mkdir(parents=True, exist_ok=True)
        (copy / file.relative_to(byte_bundle)).write_bytes(file.read_bytes())
    (copy / "graphs" / "head.onnx").unlink()
    for arguments in (("inspect", copy, "--json"), ("doctor", copy), ("generate", copy, "--prompt", "a")):
        result = invoke(*arguments)
        assert result.code == 5
        assert "error: graphs/head.onnx is missing" in result.err


def test_an_unknown_command_names_the_nearest(invoke: Invoke) -> None:
    result = invoke("exprt", "x")
    assert result.code == 2
    assert "did you mean export?" in result.err


def test_a_missing_model_is_named(invoke: Invoke, tmp_path: Path) -> None:
    assert "is not a directory" in invoke("export", tmp_path / "nothing", "-o", tmp_path / "b").err


def test_the_demo_without_its_model_says_where_it_comes_from(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dllm_export.tools.demo.MODEL", Path("/nowhere"))
    result = invoke("demo")
    assert result.code == 2
    assert "pass --model DIR" in result.err


# -- exit codes
def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make `inspect` fail."""

    def read_manifest(bundle: Path) -> None:
        raise error

    monkeypatch.setattr(inspect_bundle, "read_manifest", read_manifest)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (MismatchError("differs"), 3, "error: differs\n"),
        (IncompatibleError("two\nlines"), 4, "error: two\nlines\n"),
        (IntegrityError("damaged"), 5, "error: damaged\n"),
        (ResourceError("full"), 6, "error: full\n"),
        (MemoryError(), 6, "error: memory ran out"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), 6, "error: memory ran out"),
        (OSError(errno.ENOSPC, "No space left", "/x/y"), 6, "error: no space left on the disk of /x/y"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 2, "error: /x/y: Permission denied\n"),
        (ModuleNotFoundError("No module", name="onnx.helper"), 4, "pip install 'dllm-export[export]'\n"),
        (ModuleNotFoundError("No module", name="something"), 1, "unexpected ModuleNotFoundError"),
        (ZeroDivisionError("first\nsecond"), 1, "error: unexpected ZeroDivisionError: first\nthis is a bug"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_every_failure_has_its_code_and_no_traceback(
    error: BaseException, code: int, text: str, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, error)
    result = invoke("inspect", "bundle")
    assert result.code == code
    assert text in result.err
    assert "Traceback" not in result.err


def test_debug_shows_the_traceback(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, ZeroDivisionError("oops"))
    assert "Traceback" in invoke("inspect", "bundle", "--debug").err


def test_a_failed_verification_is_reported_and_names_the_checks(
    invoke: Invoke, byte_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(bundle: object, options: SessionOptions, progress: object) -> Report:
        good, bad = (Check(name=name, passed=name == "a", worst=0.1, tolerance=0.2) for name in "ab")
        return Report(
            provider=options.provider,
            device=options.device,
            dtype="float32",
            passed=False,
            checks=(good, bad),
            agreement=0.5,
            first_difference=3,
        )

    monkeypatch.setattr("dllm_export.exporter.verify.verify", fail)
    result = invoke("verify", byte_bundle, "--report", tmp_path / "report.json")
    assert result.code == 3
    assert "FAILED  b" in result.out
    assert "1 of 2 checks passed" in result.out
    assert "1 of 2 checks failed: b" in result.err
    assert json.loads((tmp_path / "report.json").read_text())["first_difference"] == 3


def test_doctor_exits_with_4_when_no_provider_works(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(provider: str, device: str) -> str:
        raise IncompatibleError("not installed: pip install it")

    monkeypatch.setattr(doctor, "PROBES", dict.fromkeys(("onnxruntime", "torch"), refuse))
    result = invoke("doctor")
    assert result.code == 4
    assert "not installed: pip install it" in result.out
    assert "error: no provider works here" in result.err


def test_an_unavailable_device_is_incompatible(generate: Invoke) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert generate("--prompt", "a", "--provider", "torch", "--device", "cuda").code == 4


@pytest.fixture
def closed_pipe() -> Iterator[int]:
    """The writing end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def test_a_closed_pipe_ends_quietly(byte_bundle: Path, closed_pipe: int) -> None:
    command = [sys.executable, "-m", "dllm_export.tools.cli", "inspect", str(byte_bundle)]
    result = subprocess.run(command, stdout=closed_pipe, stderr=subprocess.PIPE, check=False)
    assert (result.returncode, result.stderr) == (cli.CLOSED_PIPE, b"")
