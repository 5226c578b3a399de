"""The GPU check: draw a model, build, answer and measure with every provider, each in a process of its own, into one report.

A provider that is missing or fails gets a line that says why; the others run. Providers may live in other Python
environments (TensorRT 8.6 needs Python 3.10, say): name the command that starts each.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby, product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import click

from dllm_export import __version__
from dllm_export.errors import IncompatibleError, UsageError
from dllm_export.graphs import ModelShape
from dllm_export.runtime.bundle import open_bundle
from dllm_export.runtime.options import flag, option
from dllm_export.runtime.policies import DllmCache
from dllm_export.tools.bench.columns import COLUMNS, ColumnKind, find_obstacle
from dllm_export.tools.bench.measure import Measurement, foresee_policy, measure
from dllm_export.tools.bench.processes import Failed, ask, explain_exit
from dllm_export.tools.bench.records import BenchReport, EmbeddedTask, EmbeddedTimes
from dllm_export.tools.bench.request import BenchOptions, plan_measurement
from dllm_export.tools.bench.tables import print_bench
from dllm_export.tools.demo import MODEL
from dllm_export.tools.flags import Command, from_fields, report_flag, shared_flags
from dllm_export.tools.machine import find_gpus
from dllm_export.tools.output import (
    Report,
    make_table,
    print_json,
    print_note,
    print_table,
    show_progress,
    write_report,
)

LLADA_8B = ModelShape(
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=32,
    head_dim=128,
    mlp=12288,
    vocab=126464,
    max_length=4096,
    norm_eps=1e-5,
    rope_theta=5e5,
    indicator_rank=128,
)
TINY = ModelShape(
    layers=2,
    hidden=64,
    heads=2,
    kv_heads=2,
    head_dim=32,
    mlp=128,
    vocab=256,
    max_length=4096,
    norm_eps=1e-5,
    rope_theta=5e5,
)
GENERATIONS: Mapping[str, str] = {
    "none": "",
    "dllm-cache": "--policy dllm-cache --prompt-interval 10 --response-interval 4",
    "guided": "--policy dllm-cache --prompt-interval 10 --response-interval 4 --cfg-scale 0.5",
}
"""Generations of the demo model whose tokens are compared."""
GENERATION_GRAPHS = "embed,layer_full,layer_partial,layer_adaptive,gather,guidance,head,commit"
"""What they run, so that no other engine is built: TensorRT 8.6 takes seconds for each."""

SIDE_BY_SIDE = 4
"""Processes that answer at a time, at most: each takes some of the GPU's memory for itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuCheckOptions:
    """What to run, and where each provider lives."""

    device: str = option("cuda", "where torch runs", choices=("cuda", "cpu"))
    columns: str = option(
        "eager,four-feature,torch,torch-graph,onnxruntime-cuda,tensorrt",
        "what to measure, with a comma between: columns of dllm-export bench",
    )
    tensorrt: str = option("", "command that starts the Python with TensorRT; default: this Python")
    tensorrt_rtx: str = option("", "command that starts the Python with TensorRT for RTX; default: this Python")
    onnxruntime: str = option("", "command that starts the Python with onnxruntime-gpu; default: this Python")
    layers: int = option(
        32, "layers of the random LLaDA-8B-shaped model; 32 need 17 GB of disk and 20 GB of GPU memory"
    )
    prompt: int = option(893, "prompt tokens")
    response: int = option(256, "response tokens")
    steps: int = option(60, "steps that are timed, one token each")
    answers: bool = option(True, "compare the demo model's answers too")
    embedded: bool = option(
        False, "compare a partial layer's engines with weights as inputs and as constants; minutes to build"
    )
    quick: bool = option(False, "a tiny model: shows that everything works, its figures mean nothing")
    work: Path | None = option(None, "keep bundles in this folder, and use what is there")

    def __post_init__(self) -> None:
        for name in ("layers", "prompt", "response", "steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{flag(name)} is {getattr(self, name)}, expected at least 1")
        if self.steps > self.response:
            raise UsageError(f"--steps is {self.steps}, expected at most --response, {self.response}: one token a step")
        if self.embedded and not any(kind.flavour for kind in self.kinds.values()):  # refuses unknown columns, too
            raise UsageError("--embedded compares engines: add tensorrt or tensorrt-rtx to --columns, or leave it out")

    @property
    def bench(self) -> BenchOptions:
        """The same for the benchmark."""
        return BenchOptions(
            columns=self.columns,
            prompt_length=self.prompt,
            gen_length=self.response,
            steps=self.steps,
            device=self.device,
            tensorrt=self.tensorrt,
            tensorrt_rtx=self.tensorrt_rtx,
            onnxruntime=self.onnxruntime,
        )

    @property
    def kinds(self) -> dict[str, ColumnKind]:
        """Columns of the runtime, by name."""
        return {name: COLUMNS[name] for name in self.bench.names if COLUMNS[name].way == "session"}

    def python(self, kind: ColumnKind) -> list[str]:
        """How to start the Python of a column."""
        return [*(self.bench.pythons.get(kind.flavour or kind.provider) or [sys.executable])]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Tokens of the demo model on one provider against the torch reference in float32 on the CPU."""

    column: str
    dtype: str
    generation: str
    captures: int
    equal: float | None
    """Share of equal tokens; None where the provider failed."""
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReport:
    """Everything that a figure needs to be believed."""

    tool: str
    version: str
    command: str
    seconds: Mapping[str, float]
    """Time of the bundle and of the builds."""
    answers: Sequence[Answer]
    bench: BenchReport
    embedded: Mapping[str, EmbeddedTimes]
    """Flavour -> what weights as inputs cost; empty where it was not asked for."""


def run(command: Sequence[str]) -> str:
    """Standard output of a process, or Failed with the last line of its standard error."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise Failed(explain_exit(result.returncode, result.stderr))
    return result.stdout


def cli(python: Sequence[str], arguments: str, *paths: Path | str) -> str:
    """`dllm-export` under a Python."""
    words = shlex.split(arguments)
    return run([*python, "-m", "dllm_export.tools.cli", words[0], *map(str, paths), *words[1:]])


def check_device(options: GpuCheckOptions) -> None:
    """Refuse a GPU that is not there, or that this PyTorch, which draws the model and is measured, cannot use."""
    if options.bench.place == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise IncompatibleError(
                f"--device cuda: there is a GPU, but PyTorch {torch.__version__} sees no CUDA device: install one that is "
                f"built for CUDA, or use --device cpu"
            )


# -- the demo model's answers
def compare_answers(work: Path, options: GpuCheckOptions, progress: Report) -> Iterator[Answer]:
    """Every provider's tokens in float32 and float16 against the reference; nothing is timed, so several run side by side."""
    request = f"--prompt-file {shlex.quote(str(MODEL / 'example.txt'))} --gen-length 64 --json"
    bundles = {dtype: work / f"demo-{dtype}" for dtype in ("float32", "float16")}
    for dtype, bundle in bundles.items():
        if not bundle.exists():
            cli([sys.executable], f"export --dtype {dtype}", MODEL, "-o", bundle)
    gpu = any(find_gpus())
    engines = {
        (str(kind.flavour), dtype): kind for kind in options.kinds.values() if kind.flavour and gpu for dtype in bundles
    }  # columns may share them

    # Processes that each start a thread for every core would wait for one another at every product of this small model.
    cores = os.cpu_count() or 1
    beside = max(1, min(SIDE_BY_SIDE, cores // 2))
    request += f" --threads {max(1, cores // beside)}"

    def refer(flags: str) -> list[int]:
        return tokens_of(cli([sys.executable], f"generate --provider torch {request} {flags}", bundles["float32"]))

    def build(flavour: str, dtype: str) -> str:
        try:
            cli(
                options.python(engines[flavour, dtype]),
                f"build --flavour {flavour} --graphs {GENERATION_GRAPHS} --max-length 512 --max-batch 1 --rows 128",
                bundles[dtype],
            )
        except Failed as error:
            return str(error)
        return ""

    def answer(asked: Answer) -> Answer:
        kind = options.kinds[asked.column]
        where = f"--provider {kind.provider} --device {kind.where(options.device)} --captures {asked.captures}"
        where += " --compile" if kind.compile else ""
        flags = GENERATIONS[asked.generation]
        try:
            found = tokens_of(cli(options.python(kind), f"generate {where} {request} {flags}", bundles[asked.dtype]))
        except Failed as error:
            return replace(asked, failure=str(error))
        same = [a == b for a, b in zip(found, reference[asked.generation], strict=True)]
        return replace(asked, equal=sum(same) / len(same))

    with ThreadPoolExecutor(beside) as pool:
        reference = dict(zip(GENERATIONS, pool.map(refer, GENERATIONS.values()), strict=True))
        failures = dict(zip(engines, pool.map(lambda named: build(*named), engines), strict=True))
        planned = list(plan_answers(options.kinds, tuple(bundles), failures, gpu=gpu))
        for done, one in enumerate(pool.map(lambda one: one if one.failure else answer(one), planned), start=1):
            progress(f"answers: {one.column} in {one.dtype}", done, len(planned))
            yield one


def plan_answers(
    kinds: Mapping[str, ColumnKind], dtypes: Sequence[str], failures: Mapping[tuple[str, str], str], *, gpu: bool
) -> Iterator[Answer]:
    """What is to be asked, still without tokens: with captured steps, and without where it captures; or why it cannot be."""
    for (name, kind), dtype in product(kinds.items(), dtypes):
        known = {"column": name, "dtype": dtype}
        if obstacle := find_obstacle(replace(kind, flavour=None), (), dtype, gpu=gpu):  # engines are built here
            yield Answer(**known, generation="all", captures=0, equal=None, failure=obstacle)
            continue
        if failure := failures.get((str(kind.flavour), dtype)):
            yield Answer(**known, generation="build", captures=0, equal=None, failure=failure)
            continue
        for captures, generation in product((kind.captures, 0) if kind.captures else (0,), GENERATIONS):
            yield Answer(**known, generation=generation, captures=captures, equal=None)


def tokens_of(output: str) -> list[int]:
    """The tokens in the JSON of `generate`."""
    tokens: list[int] = json.loads(output)["tokens"]
    return tokens


# -- the large model's times
def make_bundle(work: Path, shape: ModelShape, device: str) -> dict[str, float]:
    """A bundle of random weights in float16 (float32 on the CPU), unless it is there already; returns the seconds."""
    if (work / "bundle").exists():
        return {}
    import torch

    from dllm_export.tools.random_bundle import write_random_bundle

    start = time.perf_counter()
    write_random_bundle(work / "bundle", shape, dtype=dtype_of(device), device=device)
    if device == "cuda":
        torch.cuda.empty_cache()
    return {"bundle": time.perf_counter() - start}


def dtype_of(device: str) -> Any:
    """Compute type of the large model."""
    return "float16" if device == "cuda" else "float32"


def fixed_sizes(options: GpuCheckOptions) -> str:
    """Sizes of the measured request that engines are tuned for exactly."""
    length, rows = options.prompt + options.response, options.response
    groups = [f"S={length},X={rows},Q={max(1, rows // 4)}", f"S={length}"]
    return ";".join([*groups, *(f"S={length},Q={count}" for count in sorted({64, rows}) if count <= rows)])


def build_engines(what: Measurement, options: GpuCheckOptions) -> Iterator[tuple[str, float]]:
    """Flavour -> seconds of the build of the graphs that are measured; one that fails leaves a column that says so."""
    outlooks = (foresee_policy(what, policy.name, policy.settings) for policy in what.settings.policies)
    # What is foreseen is decided on the host; a device decides by a graph of its own.
    graphs = ",".join(sorted(frozenset({"commit"}).union(*(outlook.graphs for outlook in outlooks))))
    for kind in {kind.flavour: kind for kind in options.kinds.values()}.values():  # columns may share engines
        if kind.flavour:
            start = time.perf_counter()
            sizes = f"--max-length {options.prompt + options.response} --max-batch 1 --rows {options.response}"
            build = f"build --flavour {kind.flavour} --graphs {graphs} {sizes} --fixed '{fixed_sizes(options)}'"
            try:
                cli(options.python(kind), build, what.bundle.path)
            except Failed as error:
                print_note(f"{kind.flavour}: {error}", "yellow")
                continue
            yield f"build {kind.flavour}", time.perf_counter() - start


def compare_weights(bundle: Path, options: GpuCheckOptions, progress: Report) -> Iterator[tuple[str, EmbeddedTimes]]:
    """Flavour -> a partial layer's engines with weights as inputs and as constants, if that is asked for."""
    kinds = {kind.flavour: kind for kind in options.kinds.values() if kind.flavour and options.embedded}
    for place, (flavour, kind) in enumerate(kinds.items()):
        progress(f"weights as constants, {flavour}", place, len(kinds))
        task = EmbeddedTask(
            bundle=str(bundle),
            flavour=flavour,
            length=options.prompt + options.response,
            rows=min(64, options.response),
        )
        try:
            yield flavour, ask("embedded", task, EmbeddedTimes, options.python(kind))
        except Failed as error:
            print_note(f"{flavour}, weights as constants: {error}", "yellow")


def print_weights(flavour: str, found: EmbeddedTimes) -> None:
    """Times of both forms, and how far their outputs are apart."""
    parts = list(found.ms["bound"])
    figures = (*(f"{part}, ms" for part in parts), "plans, MB", "built in, s")
    table = make_table("weights", *figures, right=figures)
    for form, times in found.ms.items():
        cells = (f"{median(times[part]):.4f}" for part in parts)
        table.add_row(form, *cells, f"{found.plan_bytes[form] / 1e6:.1f}", f"{found.build_seconds[form]:.0f}")
    print_table(table)
    ratio = median(found.ms["bound"]["all"]) / median(found.ms["embedded"]["all"])
    print_note(
        f"{flavour}: weights as inputs take {ratio:.3f} times as long as constants; outputs differ by at most "
        f"{found.difference:.1e} of the largest"
    )


def print_answers(answers: Sequence[Answer]) -> None:
    """The demo model's tokens on every column."""
    table = make_table("column", "dtype", "generation", "captures", "equal tokens", right=("captures", "equal tokens"))
    for (column, dtype, failure), same in groupby(answers, lambda one: (one.column, one.dtype, one.failure)):
        several = list(same)
        if failure and len(several) > 1:  # said once
            asked = dict.fromkeys(answer.generation for answer in several)
            table.add_row(column, dtype, ", ".join(asked), "", f"failed: {failure}")
            continue
        for answer in several:
            share = f"{answer.equal:.1%}" if answer.equal is not None else f"failed: {failure}"
            table.add_row(column, dtype, answer.generation, str(answer.captures), share)
    print_table(table)


@click.command("gpu-check", cls=Command)
@from_fields(GpuCheckOptions, "options", "Options")
@report_flag
@shared_flags
def command(options: GpuCheckOptions, report: Path | None, as_json: bool) -> None:
    """Measure every provider on this machine's GPU, and check its answers."""
    check_device(options)
    arguments = sys.argv[sys.argv.index("gpu-check") + 1 :] if "gpu-check" in sys.argv else []
    asked = shlex.join(["tools/gpu_check", *arguments])
    with TemporaryDirectory(prefix="dllm-export-gpu-") as folder, show_progress() as progress:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        shape = TINY if options.quick else replace(LLADA_8B, layers=options.layers)
        answers = tuple(compare_answers(work, options, progress)) if options.answers else ()
        if answers and not as_json:
            print_answers(answers)  # at once: what follows takes minutes, and may be cut short
        seconds = make_bundle(work, shape, options.device)

        def plan() -> Measurement:
            return plan_measurement(open_bundle(work / "bundle"), None, options.bench, DllmCache())

        seconds |= dict(build_engines(plan(), options))
        embedded: dict[str, EmbeddedTimes] = {}

        def finish(bench: BenchReport) -> GpuReport:
            return GpuReport(
                tool="tools/gpu_check",
                version=__version__,
                command=asked,
                seconds=seconds,
                answers=answers,
                bench=bench,
                embedded=embedded,
            )

        def save(bench: BenchReport) -> None:
            write_report(report, finish(bench))

        bench = measure(plan(), asked, progress, save)
        embedded |= dict(compare_weights(work / "bundle", options, progress))
    outcome = finish(bench)
    if as_json:
        print_json(outcome)
    else:
        print_bench(bench)
        for flavour, found in embedded.items():
            print_weights(flavour, found)
    write_report(report, outcome)
