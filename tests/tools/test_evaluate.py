"""Policies and rules on the same tasks: the outcomes of real generations, intervals, reports that go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from dllm_export.errors import UsageError
from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pipeline import export
from dllm_export.runtime.policies import POLICIES
from dllm_export.runtime.transfers import TRANSFERS
from dllm_export.tools import cli
from dllm_export.tools.evaluate import wilson_interval
from dllm_export.tools.worksheets import held_out

MODEL = Path(__file__).resolve().parents[2] / "models" / "worksheets-4m"
Evaluate = Callable[..., Result]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(MODEL, tmp_path_factory.mktemp("evaluate") / "bundle", ExportOptions()).path


@pytest.fixture
def evaluate(bundle: Path) -> Evaluate:
    def run(*arguments: object) -> Result:
        return CliRunner().invoke(cli.cli, ["evaluate", str(bundle), "--threads", "1", *map(str, arguments)])

    return run


def outcomes_of(text: str) -> dict[tuple[str, str], Any]:
    return {(outcome["policy"], outcome["transfer"]): outcome for outcome in json.loads(text)["outcomes"]}


SMALL = ("--sheets", 2, "--problems", 6)


def test_every_pair_answers_the_same_worksheets(evaluate: Evaluate) -> None:
    result = evaluate(*SMALL, "--json")
    assert result.exit_code == 0, result.output
    outcomes, in_any_order = outcomes_of(result.stdout), POLICIES.keys() - {"dkv-greedy"}
    assert outcomes.keys() == {(policy, rule) for policy in in_any_order for rule in TRANSFERS}
    quota = outcomes["none", "quota"]
    assert (quota["asked"], quota["tokens"], quota["passes"]) == (12, 96, 96)
    for outcome in outcomes.values():
        assert (outcome["asked"], outcome["tokens"]) == (12, 96)
        assert outcome["right"] >= 11, "the trained model knows these"
        assert outcome["low"] <= outcome["right"] / 12 <= outcome["high"]
    assert all(outcome["passes"] < 48 for (_, rule), outcome in outcomes.items() if rule != "quota")


def test_a_report_goes_on_where_it_stopped(evaluate: Evaluate, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert evaluate(*SMALL, "--policies", "none", "--transfers", "threshold", "--report", report).exit_code == 0
    first = outcomes_of(report.read_text())
    result = evaluate(*SMALL, "--policies", "none", "--transfers", "factor,threshold", "--report", report)
    assert result.exit_code == 0, result.output
    both = outcomes_of(report.read_text())
    assert both.keys() == {("none", "threshold"), ("none", "factor")}
    assert both["none", "threshold"] == first["none", "threshold"], "not run again: its seconds are the same"


def test_a_report_of_other_settings_is_kept(evaluate: Evaluate, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert evaluate(*SMALL, "--policies", "none", "--transfers", "threshold", "--report", report).exit_code == 0
    before = report.read_bytes()
    result = evaluate("--sheets", 1, "--problems", 6, "--transfers", "threshold", "--report", report)
    assert "measured with other settings" in str(result.exception)
    report.with_name("other.json").write_text("[]")
    result = evaluate(*SMALL, "--report", report.with_name("other.json"))
    assert "is not a report of this command" in str(result.exception)
    assert report.read_bytes() == before


def test_a_suite_of_ones_own(evaluate: Evaluate, tmp_path: Path) -> None:
    sheet = held_out(1, seed=7, problems=6)[0]
    suite = tmp_path / "suite.jsonl"
    records = [{"prompt": sheet.prompt, "answer": answer} for answer in (sheet.answer.strip(), "wrong")]
    suite.write_text("".join(json.dumps(record) + "\n" for record in records))
    choice = ("--suite", suite, "--gen-length", 48, "--policies", "none", "--transfers", "threshold", "--json")
    result = evaluate(*choice)
    assert result.exit_code == 0, result.output
    outcome = outcomes_of(result.stdout)["none", "threshold"]
    assert (outcome["right"], outcome["asked"]) == (1, 2)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "has no line with a prompt and an answer"),
        ("{}", "suite.jsonl, line 1 is not like"),
        ('\n{"prompt": 3, "answer": "a"}', "suite.jsonl, line 2: prompt and answer must be texts"),
    ],
)
def test_a_suite_that_cannot_be_read_names_the_line(
    content: str, sentence: str, evaluate: Evaluate, tmp_path: Path
) -> None:
    (tmp_path / "suite.jsonl").write_text(content)
    result = evaluate("--suite", tmp_path / "suite.jsonl")
    assert isinstance(result.exception, UsageError)
    assert sentence in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--policies", "dlm-cache"), "did you mean dllm-cache?"),
        (("--transfers", "treshold"), "did you mean threshold?"),
        (("--transfers", ","), "nothing to evaluate"),
        (("--suite", "nowhere.jsonl"), "expected demo or a JSONL file"),
        (("--policies", "none,dkv-greedy"), "--policy dkv-greedy must know which rows a step decides"),
        (("--sheets", "0"), "--sheets must be at least 1"),
    ],
)
def test_wrong_options_are_refused(arguments: tuple[str, str], sentence: str, evaluate: Evaluate) -> None:
    result = evaluate(*arguments)
    assert isinstance(result.exception, UsageError)
    assert sentence in str(result.exception)


@given(st.integers(1, 500).flatmap(lambda asked: st.tuples(st.integers(0, asked), st.just(asked))))
def test_intervals_solve_wilsons_equation(pair: tuple[int, int]) -> None:
    """A bound p is where the observed share lies exactly 1.96 standard deviations of p away."""
    right, asked = pair
    for bound in wilson_interval(right, asked):
        distance = (right / asked - bound) ** 2
        assert distance == pytest.approx(1.959964**2 * bound * (1 - bound) / asked, abs=1e-9)
