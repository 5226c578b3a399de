"""The benchmark in its quick form: what its report holds. Its figures are not tested, a busy machine has none."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dllm_export.errors import UsageError
from dllm_export.tools.bench.command import BenchOptions
from dllm_export.tools.bench_columns import Column, Step, run_in_turns
from dllm_export.tools.bench_report import agreement, ratio
from dllm_export.tools.machine import Others

NAMES = ["eager none", "eager dllm-cache 25/5/0.25", "onnxruntime none", "onnxruntime dllm-cache 25/5/0.25"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The report as JSON, and what was printed for people."""
    file = tmp_path_factory.mktemp("bench") / "report.json"
    command = [
        sys.executable,
        "-m",
        "dllm_export.tools.cli",
        "bench",
        "--quick",
        "--threads",
        "1",
        "--report",
        str(file),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return json.loads(file.read_text(encoding="utf-8")), done.stderr


def test_the_report_says_what_was_measured_where_and_how_to_do_it_again(quick: tuple[dict[str, Any], str]) -> None:
    report, _ = quick
    assert report["command"].startswith("dllm-export bench --quick --threads 1 --report ")
    assert {"cpu", "cores", "threads", "python", "torch", "onnxruntime"} <= report["machine"].keys()
    settings = report["settings"]
    assert (settings["prompt"], settings["response"], settings["batch"], settings["dtype"]) == (24, 55, 1, "float32")
    assert settings["policy"]["prompt_interval"] == 25
    assert settings["shape"]["layers"] == 3
    assert len(settings["bundle"]) == 64
    assert report["others"] is None or 0 <= report["others"] <= 1


def test_every_column_makes_the_same_number_of_passes_and_splits_its_time_by_kind(
    quick: tuple[dict[str, Any], str],
) -> None:
    report, _ = quick
    assert [column["name"] for column in report["columns"]] == NAMES
    for column in report["columns"]:
        assert column["passes"] == column["tokens"] == 55
        assert math.isclose(column["tokens_per_second"], 55 / column["seconds"])
        expected = {"full": 3, "refresh_response": 8, "partial": 44} if "cache" in column["name"] else {"full": 55}
        assert {kind: times["steps"] for kind, times in column["kinds"].items()} == expected
        assert all(0 < kind["p10_ms"] <= kind["p50_ms"] <= kind["p90_ms"] for kind in column["kinds"].values())
        outside = column["outside_engines"]
        assert outside is None if "eager" in column["name"] else 0 < outside < 1


def test_every_ratio_stands_beside_its_bar_and_its_spread(quick: tuple[dict[str, Any], str]) -> None:
    report, _ = quick
    assert [(one["baseline"], one["bar"]) for one in report["ratios"]] == [(NAMES[2], 3), (NAMES[0], 4), (NAMES[1], 2)]
    for one in report["ratios"]:
        assert one["column"] == NAMES[3]
        assert 0 < one["low"] <= one["high"]
        assert one["met"] == (one["value"] >= one["bar"])
    worst = max(column["outside_engines"] or 0 for column in report["columns"])
    assert report["outside_engines_met"] == (worst <= report["outside_engines_bar"])


def test_columns_that_compute_the_same_give_the_same_tokens(quick: tuple[dict[str, Any], str]) -> None:
    pairs = {(one["column"], one["reference"]): one for one in quick[0]["agreement"]}
    for column, reference in ((NAMES[2], NAMES[0]), (NAMES[3], NAMES[1])):
        assert pairs[column, reference]["share"] == 1.0
        assert pairs[column, reference]["first_difference"] is None
    assert pairs[NAMES[3], NAMES[2]]["share"] < 1.0, (
        "the cache of a random model changes tokens, and the report says so"
    )


def test_the_tables_show_every_column_and_every_bar(quick: tuple[dict[str, Any], str]) -> None:
    printed = quick[1]
    assert all(name in printed for name in NAMES)
    assert len(re.findall(r"\b(?:met|MISSED)\b", printed)) == 4
    assert "dllm-export bench --quick" in printed


# -- arithmetic on made-up steps
def steps(times: list[float], tokens: list[int]) -> list[Step]:
    return [Step("full", seconds, None, [token]) for seconds, token in zip(times, tokens, strict=True)]  # type: ignore[arg-type]


def column(name: str, made: list[Step], warmup: int = 0) -> Column:
    return Column(name, "", warmup, lambda: iter(made))


def test_a_ratio_compares_totals_and_spreads_over_whole_intervals() -> None:
    fast, slow = [steps([1, 1, 1, 1, 9], [0] * 5)], [steps([2, 2, 4, 4, 9], [0] * 5)]
    columns = [column("fast", fast[0]), column("slow", slow[0])]
    found = ratio(columns, [fast, slow], (0, 1), 2.0, interval=2)
    assert (found.value, found.low, found.high, found.met) == (21 / 13, 2.0, 4.0, False)


def test_agreement_names_the_first_step_that_differs() -> None:
    one, other = [steps([1] * 3, [5, 6, 7])], [steps([1] * 3, [5, 8, 7])]
    columns = [column("one", one[0]), column("other", other[0])]
    assert agreement(columns, [one, other], (0, 1)).first_difference == 2
    assert agreement(columns, [one, other], (0, 1)).share == 1.0
    assert agreement(columns, [one, one], (0, 1)).first_difference is None


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="the system does not tell")
def test_processor_time_of_others_is_told_from_ones_own() -> None:
    def burn(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    with Others() as alone:
        burn(0.3)
    program = "import time\nend = time.perf_counter() + 20\nwhile time.perf_counter() < end: pass"
    other = subprocess.Popen([sys.executable, "-c", program])
    try:
        with Others() as beside:
            burn(0.6)
    finally:
        other.kill()
        other.wait()
    assert alone.share is not None
    assert beside.share is not None
    assert 0 <= alone.share <= 1
    assert beside.share > 0.3 / (os.cpu_count() or 1)


def test_columns_take_turns_and_start_afresh_in_every_round() -> None:
    seen: list[str] = []

    def start(name: str, length: int) -> Column:
        def run() -> Any:
            for made in steps([1.0] * length, list(range(length))):
                seen.append(name)
                yield made

        return Column(name, "", 1, run)

    results = run_in_turns([start("a", 5), start("b", 5)], turn=2, rounds=2, report=lambda step: None)
    assert "".join(seen) == "ab" + "aabbbbaaab" * 2
    assert [[len(round_) for round_ in rounds] for rounds in results] == [[5, 5], [5, 5]]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"rounds": 0}, "--rounds is 0"), ({"gen_length": 0}, "--gen-length"), ({"model": Path("m")}, "belong together")],
)
def test_options_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BenchOptions(**change)
