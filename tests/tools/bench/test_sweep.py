"""A sweep from the command line to its files, and what is refused. Figures are not tested, a busy machine has none."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import msgspec
import pytest

from dllm_export.errors import UsageError
from dllm_export.graphs import ModelShape
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.policies import DllmCache
from dllm_export.tools import cli
from dllm_export.tools.bench.measure import Measurement
from dllm_export.tools.bench.page import make_sweep_page
from dllm_export.tools.bench.request import BenchOptions, Request, ShapeOptions, plan_sweep
from dllm_export.tools.bench.sweep import Sweep, SweepPoint, SweepReport, make_growth, measure_sweep, read_sweep
from dllm_export.tools.bench.sweep_plots import adaptive_lines, limit_line, speed_lines
from dllm_export.tools.bench.sweep_tables import growth_rows, point_rows, sweep_markdown

VALUES = (8, 40)
SMALL = BenchOptions(prompt_length=8, gen_length=8, threads=1, device="cpu", columns="torch")
TINIEST = ShapeOptions(layers=1, hidden=16, heads=1, mlp=16, vocab=16)


@dataclass(frozen=True, slots=True)
class Done:
    """A finished sweep: its report, what people read, and the files beside it."""

    report: SweepReport
    out: str
    folder: Path


@pytest.fixture(scope="module")
def swept(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Two prompt lengths on one provider, and one that is not there."""
    folder = tmp_path_factory.mktemp("sweep")
    arguments = (
        "--threads 1 --gen-length 8 --steps 4 --warmup 0 --columns onnxruntime,tensorrt --sweep prompt-length=8,40"
    )
    files = [*("--report", folder / "s.json"), *("--html", folder / "s.html"), *("--chart", folder / "s.png")]
    command = [sys.executable, "-m", "dllm_export.tools.cli", "bench", str(tiny_bundle.path), *arguments.split()]
    done = subprocess.run([*command, *map(str, files)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = msgspec.json.decode((folder / "s.json").read_bytes(), type=SweepReport)
    return Done(report, done.stdout + done.stderr, folder)


# -- a real sweep
def test_every_point_is_a_whole_benchmark_of_its_own(swept: Done) -> None:
    (axis,) = swept.report.axes
    assert (axis.name, axis.unit) == ("prompt-length", "prompt token")
    assert (
        [point.value for point in axis.points] == [point.report.settings.prompt for point in axis.points] == [*VALUES]
    )
    for point in axis.points:
        assert list(point.report.columns) == ["onnxruntime"]
        assert "GPU" in point.report.failures["tensorrt"]
        assert point.report.limits is not None
        assert {one.policy for one in point.report.agreement} == {"dllm-cache"}
        assert [run.passes for run in point.report.columns["onnxruntime"].runs] == [4, 4]
        assert (point.report.products_ms, point.report.columns["onnxruntime"].raw.graphs) == ({}, ())


def test_the_growth_of_adaptive_steps_is_set_beside_reading_keys_and_values(swept: Done, tiny_bundle: Bundle) -> None:
    (axis,) = swept.report.axes
    kinds = {(one.policy, one.kind): one for one in axis.growth}
    assert kinds.keys() == {("none", "full"), ("dllm-cache", "full"), ("dllm-cache", "partial")}
    growth, last = kinds["dllm-cache", "partial"], axis.points[-1].report
    medians = [point.report.columns["onnxruntime"].runs[1].kinds["partial"].times.p50_ms for point in axis.points]
    assert growth.values == VALUES
    assert growth.slopes.slope_ms == pytest.approx((medians[1] - medians[0]) / 32)
    assert growth.slopes.between_ms == pytest.approx([growth.slopes.slope_ms])
    shape = tiny_bundle.manifest.shape
    bytes_a_row = shape.layers * 2 * shape.kv_heads * shape.head_dim * 4
    assert last.limits is not None
    assert growth.slopes.reading_ms == pytest.approx(1e3 * bytes_a_row / last.limits.bytes_per_second)
    assert growth.slopes.at_most_linear is None


def test_tables_page_and_picture_show_every_run_at_every_point(swept: Done) -> None:
    (axis,) = swept.report.axes
    assert len(list(point_rows(axis))) == 4
    for row in (*point_rows(axis), *growth_rows(axis)):
        assert re.search(r" +".join(re.escape(cell) for cell in row[:3]), swept.out), row
    assert (swept.folder / "s.md").read_text() == sweep_markdown(swept.report)
    page = (swept.folder / "s.html").read_text()
    for row in (*point_rows(axis), *growth_rows(axis)):
        assert all(f">{cell}<" in page for cell in row), row
    assert page.count("<svg") == 1
    assert not re.search(r"<script|<link|src=|@import|url\(http", page)
    assert make_sweep_page(swept.report) == make_sweep_page(swept.report)
    assert (swept.folder / "s.png").read_bytes().startswith(b"\x89PNG")
    assert [values for _, values, _ in speed_lines(axis)] == [[*VALUES], [*VALUES]]
    assert [(title, values) for title, values, _ in adaptive_lines(axis)] == [("onnxruntime dllm-cache", [*VALUES])]
    limit = limit_line(axis)
    assert limit is not None
    assert limit[1] == [*VALUES]


def test_the_json_fits_its_published_schema(swept: Done) -> None:
    schema = json.loads((Path(__file__).resolve().parents[3] / "docs/sweep.schema.json").read_text())
    found = json.loads((swept.folder / "s.json").read_text())
    assert set(found) == set(schema["$defs"]["SweepReport"]["properties"])
    assert set(found["axes"][0]["growth"][0]["slopes"]) == set(schema["$defs"]["Slopes"]["properties"])


# -- what is planned
def plan(request: Request, *texts: str) -> list[Measurement]:
    with plan_sweep(request, [read_sweep(text) for text in texts]) as planned:
        found = []
        for point in planned:
            with point.open() as what:
                found.append(what)
        return found


def test_every_axis_changes_one_thing_and_leaves_the_others(tiny_bundle: Bundle) -> None:
    request = Request(path=tiny_bundle.path, options=SMALL, policy=DllmCache(), transfer=None, shape=ShapeOptions())
    found = plan(request, "prompt-length=4,6", "gen-length=5,9", "batch=2,3")
    rows = [(one.settings.prompt, one.settings.response, one.settings.batch, len(one.prompts)) for one in found]
    assert rows == [(4, 8, 1, 1), (6, 8, 1, 1), (8, 5, 1, 1), (8, 9, 1, 1), (8, 8, 2, 2), (8, 8, 3, 3)]
    assert [one.settings.steps for one in found] == [8, 8, 5, 9, 8, 8]
    assert len({one.settings.bundle for one in found}) == 1
    assert not any(one.graphs or one.products for one in found)


def test_layers_make_a_model_each_and_long_prompts_one_that_takes_them() -> None:
    request = Request(path=None, options=SMALL, policy=DllmCache(), transfer=None, shape=TINIEST)
    found = plan(request, "layers=1,3", "prompt-length=8,8192")
    shapes: list[ModelShape] = [one.settings.shape for one in found]
    assert [one.layers for one in shapes] == [1, 3, 1, 1]
    assert {one.max_length for one in shapes} == {8200}


def test_a_sweep_that_is_cut_short_has_saved_the_points_before() -> None:
    """A column that cannot run here needs no process: what is looked at is the order of things."""
    request = Request(
        path=None, options=replace(SMALL, columns="tensorrt"), policy=DllmCache(), transfer=None, shape=TINIEST
    )
    saved: list[SweepReport] = []

    def stop() -> NoReturn:
        raise KeyboardInterrupt

    with plan_sweep(request, [Sweep("batch", (1, 2))]) as (first, second), pytest.raises(KeyboardInterrupt):
        measure_sweep([first, replace(second, open=stop)], "c", lambda *_: None, saved.append)
    assert [[point.value for point in one.axes[0].points] for one in saved] == [[1]]


def test_a_column_that_is_missing_at_a_point_grows_over_the_others(swept: Done) -> None:
    first, last = swept.report.axes[0].points
    gap = SweepPoint(value=20, report=msgspec.structs.replace(first.report, columns={}))
    assert {one.values for one in make_growth([first, gap, last])} == {VALUES}
    assert list(make_growth([first, gap])) == []


# -- what is refused
@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--sweep width=1,2", "--sweep is width=1,2, expected one of prompt-length, gen-length, batch, layers"),
        ("--sweep batch", "--sweep is batch, expected one of"),
        ("--sweep batch=", "--sweep batch has nothing, expected two or more rising whole numbers from 1 up"),
        ("--sweep batch=2", "--sweep batch has 2, expected two or more"),
        ("--sweep batch=1,x", "--sweep batch has 1,x, expected"),
        ("--sweep batch=0,1", "--sweep batch has 0,1, expected"),
        ("--sweep batch=4,2", "--sweep batch has 4,2, expected"),
        ("--sweep batch=1,2 --sweep batch=4,8", "--sweep batch is given twice"),
        ("--sweep gen-length=4,8 --steps 6", "--steps is 6, expected at most --gen-length, 4"),
        ("--sweep batch=1,2 --trace t.json", "leave it out with --sweep"),
        ("--chart c.png", "--chart draws a sweep: add --sweep"),
        ("--sweep batch=1,2 --chart c.txt", "expected a name in .png, .svg or .pdf"),
        ("--sweep batch=1,2 --prompt-file README.md", "--sweep batch takes random prompts: leave out --prompt-file"),
    ],
)
def test_sweeps_that_make_no_sense_are_refused_before_anything_runs(
    line: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["bench", *line.split()]) == UsageError.exit_code
    assert sentence in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--sweep layers=1,2", "--sweep layers makes random models: leave out BUNDLE"),
        ("--gen-length 8 --sweep prompt-length=8,600", "make 608 rows, the model takes 512"),
    ],
)
def test_a_bundle_limits_what_can_be_swept(
    line: str, sentence: str, tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["bench", str(tiny_bundle.path), *line.split()]) == UsageError.exit_code
    assert sentence in " ".join(capsys.readouterr().err.split())
