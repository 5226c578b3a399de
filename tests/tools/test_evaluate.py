"""Policies and rules on the same tasks: the outcomes of real generations, intervals, reports that go on."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Annotation

from dllm_export.errors import UsageError
from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pipeline import export
from dllm_export.runtime.policies import POLICIES
from dllm_export.runtime.transfers import TRANSFERS
from dllm_export.tools import cli
from dllm_export.tools.frontier import Evaluation, Outcome, find_frontier, wilson_interval
from dllm_export.tools.frontier_chart import draw_chart
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
RULES = ("quota", "threshold", "dynamic", "klass", "credit", "wino")
"""One of every kind: with a schedule and without, with each head that keeps a state, and with a shadow."""


def test_every_policy_and_every_kind_of_rule_answer_the_same_worksheets(evaluate: Evaluate) -> None:
    """All policies with two rules, all rules with two policies; runtime/test_shift.py runs all pairs on a tiny model."""
    # One worksheet is enough to see that each of them works.
    fixed = ("--sheets", 1, "--problems", 6, "--json")
    result = evaluate(*fixed, "--transfers", "threshold,klass")
    assert result.exit_code == 0, result.output
    in_any_order = POLICIES.keys() - {"dkv-greedy", "shared-prefix", "block"}
    outcomes = outcomes_of(result.stdout)
    assert outcomes.keys() == {(policy, rule) for policy in in_any_order for rule in ("threshold", "klass")}
    refusals = json.loads(result.stdout)["refusals"]
    assert {(one["policy"], one["transfer"]) for one in refusals} == {
        (policy, rule) for policy in ("dkv-greedy", "shared-prefix") for rule in ("threshold", "klass")
    }
    result = evaluate(*fixed, "--policies", "none,dllm-cache", "--transfers", ",".join(RULES))
    assert result.exit_code == 0, result.output
    more = outcomes_of(result.stdout)
    assert more.keys() == {(policy, rule) for policy in ("none", "dllm-cache") for rule in RULES}
    outcomes |= more
    reasons = {
        "dkv-greedy": "--policy dkv-greedy must know which rows a step decides",
        "shared-prefix": "it needs a prefix: give --prefix-file",
    }
    assert all(reasons[one["policy"]] in one["reason"] for one in refusals)
    quota = outcomes["none", "quota"]
    assert (quota["asked"], quota["tokens"], quota["passes"]) == (6, 48, 48)
    for (policy, _), outcome in outcomes.items():
        assert (outcome["asked"], outcome["tokens"]) == (6, 48)
        # sparse drops half of the keys, which this small model misses where a block takes more than two steps.
        assert outcome["right"] >= 5 or policy == "sparse", "the trained model knows these"
        assert outcome["low"] <= outcome["right"] / 6 <= outcome["high"]
    assert all(outcome["passes"] < 30 for (_, rule), outcome in outcomes.items() if not TRANSFERS[rule].keeps_schedule)


def test_a_report_goes_on_where_it_stopped(evaluate: Evaluate, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert evaluate(*SMALL, "--policies", "none", "--transfers", "threshold", "--report", report).exit_code == 0
    first = outcomes_of(report.read_text())
    result = evaluate(*SMALL, "--policies", "none", "--transfers", "factor,threshold", "--report", report)
    assert result.exit_code == 0, result.output
    both = outcomes_of(report.read_text())
    assert both.keys() == {("none", "threshold"), ("none", "factor")}
    assert both["none", "threshold"] == first["none", "threshold"], "not run again: its seconds are the same"


def test_the_table_and_the_picture_lie_beside_the_report(evaluate: Evaluate, tmp_path: Path) -> None:
    report, chart = tmp_path / "report.json", tmp_path / "chart.png"
    choice = ("--policies", "none,dual", "--transfers", "threshold", "--block-length", 16)
    result = evaluate(*SMALL, *choice, "--report", report, "--chart", chart)
    assert result.exit_code == 0, result.output
    outcomes = outcomes_of(report.read_text())
    header, line, *rows = report.with_suffix(".md").read_text().splitlines()
    speeds = "tokens/s | tokens per pass | right | 95 % interval"
    assert header == f"| policy | rule | {speeds} | outside engines | plan and sampling |"
    assert line.count("---") == 8
    for (policy, rule), one in outcomes.items():
        speed, share = one["tokens"] / one["seconds"], one["right"] / one["asked"]
        cells = f"| {policy} | {rule} | {speed:.0f} | {one['tokens'] / one['passes']:.1f} | {share:.1%} of 12 | "
        assert sum(row.startswith(cells) for row in rows) == 1
        assert 0 <= one["others"] <= 1
        assert 0 < one["engine_seconds"] < one["engine_seconds"] + one["strategy_seconds"] < one["seconds"]
    assert chart.read_bytes().startswith(b"\x89PNG")


REFUSING = """
from dataclasses import dataclass
from typing import ClassVar
from dllm_export.runtime.policies import NoCache
from dllm_export.runtime.transfers import Transfer

@dataclass(frozen=True)
class Picky(Transfer):
    name: ClassVar[str] = "picky"

    def choose(self, state):
        raise ValueError("not these rows")
"""


def test_pairs_that_do_not_go_together_are_listed_and_the_others_run(bundle: Path, tmp_path: Path) -> None:
    """A rule of an installed package that always fails."""
    record = tmp_path / "site" / "picky-1.0.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: picky\nVersion: 1.0\n")
    (record / "entry_points.txt").write_text("[dllm_export.transfers]\npicky = picky:Picky\n")
    (tmp_path / "site" / "picky.py").write_text(REFUSING)
    path = os.pathsep.join((str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dllm_export.tools.cli", "evaluate", str(bundle), "--threads", "1", *arguments]
        return subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
        )

    small = ("--sheets", "1", "--problems", "6", "--policies", "none")
    report = tmp_path / "report.json"
    done = run(*small, "--transfers", "picky,threshold", "--report", str(report), "--json")
    assert done.returncode == 0, done.stderr
    assert outcomes_of(done.stdout).keys() == {("none", "threshold")}
    (refusal,) = json.loads(done.stdout)["refusals"]
    assert (refusal["policy"], refusal["transfer"]) == ("none", "picky")
    assert "the decoding rule 'picky' failed" in refusal["reason"]
    assert "not these rows" in refusal["reason"]
    assert "Not possible: none with picky: the decoding rule 'picky' failed" in report.with_suffix(".md").read_text()
    done = run(*small, "--transfers", "picky")
    assert (done.returncode, done.stdout) == (7, "")
    assert done.stderr.startswith(
        "error: no policy could be run with any rule; the first reason: the decoding rule 'picky'"
    )


def test_a_picture_needs_matplotlib_and_a_name_that_says_its_format(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "expected a name in .png, .svg or .pdf" in evaluate("--chart", tmp_path / "chart.gif").output
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = evaluate("--chart", tmp_path / "chart.png")
    assert str(result.exception) == "--chart needs the package matplotlib: pip install 'dllm-export[plots]'"


def random_evaluation(seed: int, policies: int, rules: int) -> Evaluation:
    """Outcomes that lie on one another and close together, as measured ones do."""
    rng, outcomes = random.Random(seed), []
    for policy, rule in product(range(policies), range(rules)):
        right = 96 - rng.choice((0, 0, 0, 1, 2, 40))
        low, high = wilson_interval(right, 96)
        names = {
            "policy": f"policy-{policy}",
            "transfer": f"a-rule-{rule}",
            "policy_settings": {},
            "transfer_settings": {},
        }
        figures = {"tokens": 768, "passes": rng.choice((48, 50, 768)), "seconds": rng.choice((0.5, 1.0, 1.1)) * 4**rule}
        figures |= {"engine_seconds": figures["seconds"], "strategy_seconds": 0.0}
        outcomes.append(Outcome(**names, **figures, right=right, asked=96, low=low, high=high))
    return Evaluation(settings={}, machine={}, outcomes=outcomes)


@pytest.mark.parametrize(("policies", "rules"), [(1, 1), (2, 3), (6, 5), (10, 9)])
@pytest.mark.parametrize("seed", range(3))
def test_labels_of_the_picture_do_not_overlap(policies: int, rules: int, seed: int, tmp_path: Path) -> None:
    figure = draw_chart(random_evaluation(seed, policies, rules), tmp_path / "chart.png")
    for axes in figure.axes:
        labels = [child for child in axes.get_children() if isinstance(child, Annotation)]
        assert labels, "the frontier is named"
        boxes = [label.get_bbox_patch().get_window_extent() for label in labels]
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
        panel = axes.get_window_extent()
        assert all(panel.x0 <= box.x0 and box.x1 <= panel.x1 and box.y1 <= panel.y1 for box in boxes)
    keys = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert keys == [f"policy-{one}" for one in range(policies)] + [f"a-rule-{one}" for one in range(rules)]
    for legend in figure.legends:
        assert figure.bbox.x1 > legend.get_window_extent().x1
        assert figure.axes[0].get_tightbbox().y0 > legend.get_window_extent().y1


@given(st.lists(st.tuples(st.integers(0, 6).map(float), st.integers(0, 6).map(float)), min_size=1, max_size=12))
def test_the_frontier_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    def beaten(one: tuple[float, float]) -> bool:
        return any(other[0] >= one[0] and other[1] >= one[1] and other != one for other in points)

    found = find_frontier(points)
    assert sorted(found) == [place for place, one in enumerate(points) if not beaten(one)]
    assert [points[place][0] for place in found] == sorted(points[place][0] for place in found)


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


SHARED = ("--problems", 7, "--shared-problems", 5, "--transfers", "threshold,quota", "--prefix-depth", 2, "--json")


def test_a_shared_prefix_beside_its_base_task_by_task(evaluate: Evaluate) -> None:
    result = evaluate("--sheets", 2, *SHARED, "--policies", "none,shared-prefix", "--interleave")
    assert result.exit_code == 0, result.output
    outcomes = outcomes_of(result.stdout)
    assert outcomes.keys() == {
        (policy, rule) for policy in ("none", "shared-prefix") for rule in ("threshold", "quota")
    }
    for outcome in outcomes.values():
        assert (outcome["asked"], outcome["tokens"]) == (14, 112)
        assert outcome["right"] >= 13, "the trained model knows these"
    settings = json.loads(result.stdout)["settings"]
    assert (settings["prefix"]["prefix_depth"], settings["options"]["interleave"]) == (2, True)


def test_shared_prefix_wraps_the_base_that_is_named(evaluate: Evaluate) -> None:
    choice = ("--policies", "shared-prefix", "--base", "dual", "--block-length", 8)
    result = evaluate("--sheets", 1, *SHARED, *choice)
    assert result.exit_code == 0, result.output
    assert {outcome["policy_settings"]["base"]["name"] for outcome in outcomes_of(result.stdout).values()} == {"dual"}


def test_a_prefix_of_ones_own_suite_is_a_file(evaluate: Evaluate, tmp_path: Path) -> None:
    suite, prefix = tmp_path / "suite.jsonl", tmp_path / "prefix.txt"
    sheets = held_out(2, 7, 7, 5)
    suite.write_text("".join(json.dumps({"prompt": sheet.prompt, "answer": sheet.answer}) + "\n" for sheet in sheets))
    prefix.write_text(sheets[0].start(5))
    choice = ("--suite", suite, "--gen-length", 56, "--policies", "shared-prefix", "--transfers", "threshold")
    result = evaluate(*choice, "--prefix-file", prefix, "--prefix-depth", 2, "--json")
    assert result.exit_code == 0, result.output
    assert outcomes_of(result.stdout)["shared-prefix", "threshold"]["right"] == 2
    prefix.write_text("Arbeitsblatt")
    result = evaluate(*choice, "--prefix-file", prefix, "--prefix-depth", 2)
    assert "prompt 1 does not start with the prefix of --prefix-file: its token 1 is 87, expected 65" in str(
        result.exception
    )


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
        (("--sheets", "0"), "--sheets must be at least 1"),
        (("--shared-problems", "12"), "--shared-problems is 12, expected 0 to 11"),
        (("--suite", "a.jsonl", "--shared-problems", "1"), "--shared-problems belongs to --suite demo"),
        (("--prefix-depth", "2"), "--prefix-depth and --prefix-profile need a prefix"),
        (("--policies", "shared-prefix", "--shared-problems", "2"), "a shared prefix needs a depth"),
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
