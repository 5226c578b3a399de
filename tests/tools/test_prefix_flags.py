"""Shared prefixes on the command line: generate with a depth or a profile, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dllm_export.errors import DllmExportError
from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pipeline import export
from dllm_export.tools import cli
from dllm_export.tools.worksheets import held_out

MODEL = Path(__file__).resolve().parents[2] / "models" / "worksheets-4m"
SHEETS = held_out(3, 7, 6, 4)
Invoke = Callable[..., Result]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(MODEL, tmp_path_factory.mktemp("prefix") / "bundle", ExportOptions()).path


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a prefix and texts that start with it."""
    (tmp_path / "prefix.txt").write_text(SHEETS[0].start(4))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"prompt": sheet.prompt}) + "\n" for sheet in SHEETS))
    return tmp_path


@pytest.fixture
def invoke(bundle: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """A command on the demo model in the folder, one thread."""
    monkeypatch.chdir(files)

    def call(command: str, *arguments: object) -> Result:
        return CliRunner().invoke(cli.cli, [command, str(bundle), "--threads", "1", *map(str, arguments)])

    return call


def generate(invoke: Invoke, *arguments: object) -> Any:
    prompts = [value for sheet in SHEETS for value in ("--prompt", sheet.prompt)]
    result = invoke("generate", *prompts, "--gen-length", 48, "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


SHARED = ("--policy", "shared-prefix", "--prefix-file", "prefix.txt")


def test_a_depth_and_a_profile_that_gives_it_lead_to_the_same(invoke: Invoke, files: Path) -> None:
    measured = ("--texts", "texts.jsonl", "--prefix-file", "prefix.txt", "--gen-length", 48, "-o", "profile.json")
    result = invoke("profile-prefix", *measured, "--json")
    assert result.exit_code == 0, result.output
    profile = json.loads(result.stdout)
    assert profile == json.loads((files / "profile.json").read_text())
    deepest = max(record["depth"] for record in profile["ratios"])
    assert deepest > 0, "the default threshold finds layers to share in the trained model"
    found = generate(invoke, *SHARED, "--prefix-profile", "profile.json")
    depth = found[0]["settings"]["prefix"]["depth"]
    assert 0 < depth <= deepest
    again = generate(invoke, *SHARED, "--prefix-depth", depth, "--prefix-profile", "profile.json")
    assert [one["text"] for one in again] == [one["text"] for one in found] == [sheet.answer for sheet in SHEETS]
    assert found[0]["steps_by_kind"] == {"full": 1, "partial": 45, "split": 2}
    assert found[0]["settings"]["policy"] == {"name": "shared-prefix", "base": {"name": "none"}, "refresh_interval": 16}
    overridden = generate(invoke, *SHARED, "--prefix-depth", 0, "--prefix-profile", "profile.json")
    assert overridden[0]["settings"]["prefix"]["depth"] == 0


def test_options_of_the_base_go_to_the_base(invoke: Invoke) -> None:
    flags = (
        "--base",
        "dllm-cache",
        "--update-ratio",
        0.5,
        "--response-interval",
        12,
        "--prompt-interval",
        24,
        "--prefix-depth",
        2,
    )
    found = generate(invoke, *SHARED, *flags)
    base = found[0]["settings"]["policy"]["base"]
    assert (base["name"], base["update_ratio"], base["response_interval"]) == ("dllm-cache", 0.5, 12)
    assert found[0]["steps_by_kind"]["split"] == 1


def test_a_profile_of_piped_output_is_the_name_of_its_file(invoke: Invoke) -> None:
    result = invoke("profile-prefix", "--texts", "texts.jsonl", "--prefix-file", "prefix.txt", "-o", "a.json")
    assert (result.exit_code, result.stdout) == (0, "a.json\n")


PROFILE = ("--texts", "texts.jsonl", "-o", "a.json", "--prefix-file")


@pytest.mark.parametrize(
    ("command", "arguments", "sentence"),
    [
        (
            "generate",
            ("--prefix-file", "prefix.txt"),
            "--prefix-file has no effect with --policy none: use --policy shared",
        ),
        ("generate", ("--policy", "shared-prefix"), "--policy shared-prefix needs --prefix-file"),
        ("generate", ("--prefix-depth", "1"), "--prefix-depth needs --prefix-file"),
        ("generate", ("--prefix-profile", "a"), "--prefix-profile needs --prefix-file"),
        ("generate", SHARED, "a shared prefix needs a depth: give --prefix-depth, or --prefix-profile"),
        ("generate", (*SHARED, "--prefix-depth", "7"), "--prefix-depth is 7, expected 0 to 6"),
        ("generate", (*SHARED, "--prefix-depth", "1", "--prefix-budget", "9"), "but --prefix-budget keeps 9"),
        ("generate", (*SHARED, "--prefix-depth", "1", "--base", "shared-prefix"), "--base is shared-prefix itself"),
        ("generate", (*SHARED, "--prefix-profile", "prefix.txt"), "--prefix-profile prefix.txt is not a profile"),
        ("generate", (*SHARED, "--prefix-profile", "none.json"), "cannot read --prefix-profile none.json"),
        ("generate", (*SHARED[:3], "texts.jsonl", "--prefix-depth", "1"), "longer than prompt 1"),
        (
            "generate",
            (*SHARED, "--update-ratio", "1"),
            "--update-ratio is no option of the cache policy 'none', it belongs to",
        ),
        ("profile-prefix", (*PROFILE, "prefix.txt", "--threshold", "2"), "--threshold is 2.0, expected a cosine"),
        ("profile-prefix", (*PROFILE, "texts.jsonl"), "longer than prompt 1"),
        ("profile-prefix", ("--texts", "prefix.txt", *PROFILE[2:], "prefix.txt"), "prefix.txt, line 1 is not like"),
    ],
)
def test_what_cannot_be_is_refused_by_the_name_of_its_flag(
    command: str, arguments: tuple[str, ...], sentence: str, invoke: Invoke
) -> None:
    prompt = ("--prompt", SHEETS[0].prompt, "--gen-length", 8) if command == "generate" else ()
    result = invoke(command, *prompt, *arguments)
    assert isinstance(result.exception, DllmExportError), result.output
    assert sentence in str(result.exception)


def test_a_profile_of_another_model_is_refused(invoke: Invoke, files: Path) -> None:
    (files / "other.json").write_text('{"model": "0123456789ab", "threshold": 0.9, "ratios": []}')
    result = invoke("generate", "--prompt", SHEETS[0].prompt, *SHARED, "--prefix-profile", "other.json")
    assert "--prefix-profile was measured with weights 0123456789ab, this bundle has" in str(result.exception)


@pytest.mark.parametrize("base", ["none", "window"])
def test_an_option_that_base_and_wrapper_have_goes_to_the_base(base: str, invoke: Invoke) -> None:
    flags = ("--base", base, "--refresh-interval", 5, "--prefix-depth", 2, "--block-length", 16)
    policy = generate(invoke, *SHARED, *flags)[0]["settings"]["policy"]
    assert (policy["refresh_interval"], policy["base"].get("refresh_interval")) == {
        "none": (5, None),
        "window": (16, 5),
    }[base]
