"""A tiny benchmark from the command line to its files. Figures are not tested, a busy machine has none."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from itertools import islice, product
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import msgspec
import pytest

from dllm_export.errors import IncompatibleError, UsageError
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.policies import POLICIES, DllmCache
from dllm_export.runtime.session import SessionOptions, open_session
from dllm_export.tools import cli
from dllm_export.tools.bench.columns import COLUMNS, find_obstacle
from dllm_export.tools.bench.measure import draw_prompts, find_shortage, measure, need_memory
from dllm_export.tools.bench.metering import MeteredSession, OutlineSession
from dllm_export.tools.bench.page import make_page
from dllm_export.tools.bench.processes import Failed, ask, explain_exit
from dllm_export.tools.bench.ranges import NoRanges, NvtxRanges
from dllm_export.tools.bench.records import BenchReport, ColumnTask, RawColumn
from dllm_export.tools.bench.request import BenchOptions, ShapeOptions, plan_measurement
from dllm_export.tools.bench.roofline import Model
from dllm_export.tools.bench.session_runs import SessionRequest, foresee, session_steps
from dllm_export.tools.bench.statistics import compare_tokens
from dllm_export.tools.bench.summary import make_agreement
from dllm_export.tools.bench.tables import kind_rows, markdown, run_rows
from dllm_export.tools.bench.trace import Trace, make_trace

MEASURED = ["eager", "four-feature", "torch", "onnxruntime"]
CACHE_STEPS = {"full": 2, "refresh_response": 4, "partial": 24}


@dataclass(frozen=True, slots=True)
class Done:
    """A finished benchmark: its report, the same as plain JSON, what people read, and the files beside it."""

    report: BenchReport
    json: dict[str, Any]
    out: str
    folder: Path


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """`bench --quick` with everything that runs on a CPU, and one provider that is not there."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = f"--quick --threads 1 --steps 30 --columns {','.join(MEASURED)},tensorrt,onnxruntime-cuda"
    files = [*("--report", folder / "a.json"), *("--html", folder / "a.html"), *("--trace", folder / "a.trace.json")]
    command = [sys.executable, "-m", "dllm_export.tools.cli", "bench", *arguments.split(), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    data = (folder / "a.json").read_bytes()
    return Done(msgspec.json.decode(data, type=BenchReport), json.loads(data), done.stdout + done.stderr, folder)


# -- the report
def test_the_report_says_what_was_measured_where_and_how_to_do_it_again(bench: Done) -> None:
    report = bench.report
    assert report.command.startswith("dllm-export bench --quick --threads 1 --steps 30")
    settings = report.settings
    assert (settings.prompt, settings.response, settings.steps, settings.batch) == (24, 55, 30, 1)
    assert (settings.dtype, settings.shape.layers, settings.device, settings.threads) == ("float32", 3, "cpu", 1)
    assert [policy.name for policy in settings.policies] == ["none", "dllm-cache"]
    assert settings.policies[1].settings["prompt_interval"] == 25
    assert len(settings.bundle) == 64
    assert report.machine.cpu
    assert {"torch", "onnxruntime"} <= report.machine.packages.keys()


def test_the_report_fits_its_published_schema_and_has_no_unknown_field(bench: Done) -> None:
    schema = json.loads((Path(__file__).resolve().parents[3] / "docs/bench.schema.json").read_text())
    definition = schema["$defs"]["BenchReport"]
    assert definition["additionalProperties"] is False
    assert set(bench.json) == set(definition["properties"])
    bench.json["surprise"] = 1
    with pytest.raises(msgspec.ValidationError, match="surprise"):
        msgspec.json.decode(json.dumps(bench.json), type=BenchReport)
    del bench.json["surprise"]


def test_every_column_that_can_run_is_measured_and_the_others_say_why_in_one_line(bench: Done) -> None:
    assert list(bench.report.columns) == MEASURED
    assert bench.report.failures.keys() == {"tensorrt", "onnxruntime-cuda"}
    for why in bench.report.failures.values():
        assert "\n" not in why
        assert "GPU" in why
        assert why.split(",")[0] in bench.out


def test_every_run_makes_the_same_passes_and_splits_its_time_by_kind(bench: Done) -> None:
    for column in bench.report.columns.values():
        for run in column.runs:
            assert run.passes == run.canvas_tokens == len(run.raw.steps) == 30
            assert math.isclose(run.tokens_per_second, 30 / run.seconds)
            found = {kind: summary.times.samples for kind, summary in run.kinds.items()}
            assert found == ({"full": 30} if run.policy == "none" else CACHE_STEPS)
            for summary in run.kinds.values():
                assert 0 < summary.times.p50_ms <= summary.times.p90_ms <= summary.times.p99_ms
                assert summary.limit_ms is not None
                assert math.isclose(summary.share_of_limit or 0, summary.limit_ms / summary.times.p50_ms)
                assert summary.bound_by in ("reading", "arithmetic")


def test_the_published_cache_and_plain_pytorch_have_one_run_each_and_the_runtime_both(bench: Done) -> None:
    runs = {name: [run.policy for run in column.runs] for name, column in bench.report.columns.items()}
    both = ["none", "dllm-cache"]
    assert runs == {"eager": ["none"], "four-feature": ["dllm-cache"], "torch": both, "onnxruntime": both}
    for name, column in bench.report.columns.items():
        known = [run.outside_engines is not None for run in column.runs]
        assert all(known) == (name in ("torch", "onnxruntime"))


def test_a_step_has_the_same_work_in_every_column(bench: Done) -> None:
    for policy in ("none", "dllm-cache"):
        runs = [run for column in bench.report.columns.values() for run in column.runs if run.policy == policy]
        works = [[step.work for step in run.raw.steps] for run in runs]
        assert works[0] == works[1] == works[2]
    partial = next(step.work for step in runs[0].raw.steps if step.kind == "partial")
    full = next(step.work for step in runs[0].raw.steps if step.kind == "full")
    assert partial.flops < full.flops / 2
    assert partial.cache_bytes == 3 * 2 * 79 * 64 * 4
    assert full.cache_bytes == 0


def test_columns_that_compute_the_same_decide_the_same_tokens(bench: Done) -> None:
    pairs = {(one.column, one.policy, one.reference, one.reference_policy): one for one in bench.report.agreement}
    for column, policy, reference in (
        ("torch", "none", "eager"),
        ("onnxruntime", "none", "eager"),
        ("torch", "dllm-cache", "four-feature"),
        ("onnxruntime", "dllm-cache", "four-feature"),
    ):
        found = pairs[column, policy, reference, policy]
        assert (found.share, found.first_difference) == (1.0, None)
    changed = pairs["onnxruntime", "dllm-cache", "eager", "none"]
    assert changed.share < 1, "the cache of a random model changes tokens, and the report says so"
    assert changed.first_difference is not None


def test_a_token_that_is_changed_shows_in_the_agreement(bench: Done) -> None:
    column = bench.report.columns["onnxruntime"]
    raw = column.runs[0].raw
    (row, token), *rest = raw.steps[11].decided
    steps = list(raw.steps)
    steps[11] = msgspec.structs.replace(steps[11], decided=((row, token + 1), *rest))
    tokens = [*raw.tokens[:row], token + 1, *raw.tokens[row + 1 :]]
    broken = msgspec.structs.replace(raw, steps=tuple(steps), tokens=tuple(tokens))
    run = msgspec.structs.replace(column.runs[0], raw=broken)
    columns = {**bench.report.columns, "onnxruntime": msgspec.structs.replace(column, runs=(run,))}
    found = next(one for one in make_agreement(columns) if (one.column, one.policy) == ("onnxruntime", "none"))
    assert (found.reference, found.first_difference) == ("eager", 12)
    assert math.isclose(found.share, 29 / 30), "undecided rows, equal in both, are no agreement"
    assert compare_tokens(raw, raw) == (1.0, None)


def test_ratios_have_an_interval_around_their_value_and_no_bar_on_another_shape(bench: Done) -> None:
    named = {(one.column, one.policy, one.baseline, one.baseline_policy) for one in bench.report.ratios}
    for baseline in (("eager", "none"), ("four-feature", "dllm-cache"), ("onnxruntime", "none")):
        assert ("onnxruntime", "dllm-cache", *baseline) in named
    for one in bench.report.ratios:
        assert one.low <= one.value <= one.high
        assert (one.bar, one.met) == (None, None)


def test_matrix_products_timed_alone_are_in_the_report(bench: Done) -> None:
    assert bench.report.limits is not None
    assert bench.report.products_ms.keys() == {"none", "dllm-cache"}
    assert 0 < bench.report.products_ms["dllm-cache"] < bench.report.products_ms["none"]
    over = {(one.column, one.policy) for one in bench.report.times_products}
    assert over == {(name, policy) for name in ("torch", "onnxruntime") for policy in ("none", "dllm-cache")}
    for column in bench.report.columns.values():
        assert column.raw.host_memory > 10**7


def test_graphs_are_timed_one_by_one_with_their_work(bench: Done) -> None:
    graphs = bench.report.columns["onnxruntime"].raw.graphs
    assert {graph.graph for graph in graphs} == {"layer_full", "layer_partial", "layer_adaptive", "embed", "head"}
    full = next(graph for graph in graphs if graph.graph == "layer_full")
    assert (full.calls, full.sizes) == (3, {"B": 1, "S": 79})
    assert full.work.flops > 0


# -- what is made of it
def test_the_tables_show_every_run_with_its_agreement(bench: Done) -> None:
    for row in run_rows(bench.report):
        assert re.search(rf"{row[0]} +{row[1]} +{re.escape(row[2])}", bench.out), row
    text = (bench.folder / "a.md").read_text()
    assert text == markdown(bench.report)
    for name in MEASURED:
        assert f"| {name} |" in text
    assert "eager none: 100%" in text


def test_the_page_holds_what_the_json_says_and_loads_nothing(bench: Done) -> None:
    page = (bench.folder / "a.html").read_text()
    for row in (*run_rows(bench.report), *kind_rows(bench.report)):
        for cell in row:
            assert cell in page, cell
    for why in bench.report.failures.values():
        assert why in page
    assert page.count("<svg") == 3
    assert not re.search(r"<script|<link|src=|@import|url\(http", page)
    changed = msgspec.structs.replace(bench.report, warnings=("<b>& doubt",), command="bench '<i>'")
    assert "&lt;b&gt;&amp; doubt" in make_page(changed)
    assert "<i>" not in make_page(changed)
    assert make_page(changed) == make_page(changed)


def test_the_trace_has_every_step_in_the_order_of_time(bench: Done) -> None:
    trace = msgspec.json.decode((bench.folder / "a.trace.json").read_bytes(), type=Trace)
    assert trace == make_trace(bench.report)
    steps = [event for event in trace.traceEvents if event.cat == "step"]
    assert len(steps) == 6 * 30
    for pid, column in enumerate(bench.report.columns.values(), 1):
        for tid, run in enumerate(column.runs, 1):
            own = [event for event in steps if (event.pid, event.tid) == (pid, tid)]
            assert [event.name for event in own] == [step.kind for step in run.raw.steps]
            assert all(event.dur and event.dur > 0 for event in own)
            ends = [event.ts + (event.dur or 0) for event in own]
            assert all(math.isclose(end, after.ts) for end, after in zip(ends, own[1:], strict=False))
    names = {event.args["name"] for event in trace.traceEvents if event.ph == "M"}
    assert {*MEASURED, "none", "dllm-cache"} <= names


# -- columns
def test_a_column_that_fails_says_why_in_its_last_line(tiny_bundle: Bundle) -> None:
    what = plan_measurement(tiny_bundle, None, BenchOptions(gen_length=8, prompt_length=8, threads=1), DllmCache())
    missing = msgspec.structs.replace(what.task("eager"), bundle="/nowhere")
    with pytest.raises(Failed, match="nowhere"):
        ask("column", missing, RawColumn)
    with pytest.raises(Failed, match="cannot be started"):
        ask("column", what.task("eager"), RawColumn, ["no-such-python"])
    with pytest.raises(Failed, match="No module named"):
        ask("column", what.task("eager"), RawColumn, [sys.executable, "-S"])
    assert explain_exit(-9, "") == "was killed, as happens when memory runs out"
    assert explain_exit(3, "a\n\nwhy \n") == "why"


def test_what_was_measured_before_an_interruption_is_saved(tiny_bundle: Bundle) -> None:
    options = BenchOptions(columns="eager,torch", gen_length=8, prompt_length=8, threads=1, graphs=False)
    what = plan_measurement(tiny_bundle, None, options, DllmCache())
    saved: list[BenchReport] = []

    def interrupt(name: str, done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(what, "as asked", interrupt, saved.append)
    assert [[*report.columns] for report in saved] == [["eager"]]
    assert saved[0].command == "as asked"


def test_plain_pytorch_gets_the_weights_of_the_bundle_where_it_has_no_checkpoint(
    tiny_bundles: dict[str, Bundle], tiny_checkpoints: dict[str, Path]
) -> None:
    import torch

    from dllm_export.tools.bench.eager_weights import unfuse_eager
    from dllm_export.tools.eager import load_eager

    unknown = {name: bundle for name, bundle in tiny_bundles.items() if bundle.manifest.family != "llada"}
    assert 0 < len(unknown) < len(tiny_bundles)
    for bundle in unknown.values():
        with pytest.raises(IncompatibleError, match=bundle.manifest.family):
            unfuse_eager(bundle, torch.float32)
    for name in tiny_bundles.keys() - unknown.keys():
        found, expected = unfuse_eager(tiny_bundles[name], torch.float32), load_eager(tiny_checkpoints[name])
        tokens = torch.arange(12).reshape(1, 12)
        ours, theirs = (model.forward(tokens, model.context([0], 12)) for model in (found, expected))
        assert torch.equal(ours, theirs), name


def test_what_cannot_run_here_is_known_without_a_process() -> None:
    assert "NVIDIA GPU" in find_obstacle(COLUMNS["torch-graph"], (), "float32", gpu=False)
    assert "dllm-export build" in find_obstacle(COLUMNS["tensorrt-rtx"], (), "float32", gpu=True)
    assert "bfloat16" in find_obstacle(COLUMNS["onnxruntime"], (), "bfloat16", gpu=True)
    assert find_obstacle(COLUMNS["onnxruntime"], (), "float32", gpu=False) == ""
    assert "--policy dllm-cache" in find_shortage("four-feature", 1, "cpu", ["none", "window"])


def test_a_column_that_does_not_fit_says_how_much_it_needs(tiny_bundle: Bundle) -> None:
    options = BenchOptions(gen_length=32, prompt_length=64, threads=1)
    what = plan_measurement(tiny_bundle, None, options, DllmCache())
    outlooks = {"dllm-cache": foresee(tiny_bundle, SessionRequest(prompts=what.prompts, response=32), 32, DllmCache())}
    needs = {name: need_memory(what, name, outlooks) for name in ("torch", "onnxruntime", "eager")}
    caches = 5 * 2 * (2 * 96 + 32) * 64 * 4  # keys and values of all rows, deltas of the response, two copies
    assert needs["torch"] >= tiny_bundle.weight_bytes + caches
    assert needs["onnxruntime"] > needs["torch"], "it packs a copy of the weights for every layer graph"
    assert re.search(r"needs about 1000000\.0 GB of memory, .* free", find_shortage("session", 10**15, "cpu", []))


def test_what_a_policy_will_do_is_what_it_then_does(tiny_bundle: Bundle) -> None:
    """The work foreseen without computing anything equals that of the calls of a real session, step by step."""
    requests = [SessionRequest(prompts=draw_prompts(tiny_bundle, 20, 0, batch), response=16) for batch in (1, 3)]
    manifest = tiny_bundle.manifest
    kinds = {
        name: kind for name, kind in POLICIES.items() if name in ("none", "dllm-cache", "prefix", "dual", "window")
    }
    assert len(kinds) == 5
    for kind, request, queues in product(kinds.values(), requests, (False, True)):
        outlook = foresee(tiny_bundle, request, 12, kind())
        inner = open_session(tiny_bundle, SessionOptions(provider="torch" if queues else "onnxruntime", threads=1))
        inner.queues = queues
        session = MeteredSession(inner, Model(tiny_bundle.specs, manifest.shape, manifest.dtype))
        with DiffusionLM(tiny_bundle, session) as lm:
            done = list(islice(session_steps(lm, session.meter, request, kind(), NoRanges()), 12))
        assert [step.work for step in done] == list(outlook.work)
        if queues:
            assert session.meter.graphs - outlook.graphs == {"commit"}
            assert session.meter.runs, "the layers of step 13, which nobody asked for"
        else:
            assert outlook.products == session.meter.products


def test_every_step_is_a_range_with_its_index_and_kind(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    nvtx = ModuleType("nvtx")
    nvtx.start_range = lambda name, domain: seen.append(f"{domain}: {name}") or name  # type: ignore[attr-defined]
    nvtx.end_range = lambda name: seen.append(f"end of {name}")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvtx", nvtx)
    session = MeteredSession(OutlineSession("float32"), Model(tiny_bundle.specs, tiny_bundle.manifest.shape, "float32"))
    with DiffusionLM(tiny_bundle, session) as lm:
        list(
            islice(
                session_steps(
                    lm, session.meter, SessionRequest(prompts=((1, 2),), response=8), DllmCache(), NvtxRanges()
                ),
                2,
            )
        )
    first, second = "step 1 full", "step 2 partial"
    assert seen == [f"dllm-export: {first}", f"end of {first}", f"dllm-export: {second}", f"end of {second}"]


def test_ranges_without_their_package_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(IncompatibleError, match="pip install nvtx"):
        NvtxRanges()


# -- options
def test_no_option_of_a_policy_is_called_like_one_of_bench() -> None:
    own = {field.name for kind in (BenchOptions, ShapeOptions) for field in fields(kind)}
    theirs = {field.name for name, kind in POLICIES.items() if name != "shared-prefix" for field in fields(kind)}
    assert not own & theirs


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--rounds 0", "--rounds is 0, expected at least 1"),
        ("--gen-length 8 --steps 9", "--steps is 9, expected at most --gen-length, 8"),
        ("--columns tensort", "--columns has tensort"),
        ("--columns ,", "--columns has nothing"),
        ("--hidden 100 --heads 8", "expected a multiple of twice --heads"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_runs(
    line: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["bench", *line.split()]) == UsageError.exit_code
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_a_bundle_goes_with_no_shape_and_a_prompt_must_fit(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["bench", str(tiny_bundle.path), "--layers", "3"]) == UsageError.exit_code
    assert "a bundle has a shape already" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UsageError, match="the model takes 512"):
        plan_measurement(tiny_bundle, None, BenchOptions(prompt_length=500), DllmCache())
    with pytest.raises(UsageError, match="no tokenizer"):
        plan_measurement(tiny_bundle, None, BenchOptions(prompt_file=Path("x")), DllmCache())


def test_the_prompt_follows_from_the_seed(tiny_bundle: Bundle) -> None:
    options = BenchOptions(prompt_length=20, gen_length=8)
    drawn = [plan_measurement(tiny_bundle, None, one, DllmCache()).prompts for one in (options, options)]
    assert drawn[0] == drawn[1]
    assert plan_measurement(tiny_bundle, None, replace(options, seed=1), DllmCache()).prompts != drawn[0]


def test_a_task_survives_its_way_to_the_process(tiny_bundle: Bundle) -> None:
    task = plan_measurement(tiny_bundle, None, BenchOptions(prompt_length=4, gen_length=4), DllmCache()).task("torch")
    assert msgspec.json.decode(msgspec.json.encode(task), type=ColumnTask) == task


def test_help_names_every_column() -> None:
    command = cli.cli.get_command(click.Context(cli.cli), "bench")
    assert command is not None
    assert all(name in command.get_help(click.Context(command)).replace("\n", "") for name in ("eager", "tensorrt-rtx"))
