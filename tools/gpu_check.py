"""The GPU check: export, build, answer and measure with every provider, each in a process of its own, into one report.

A provider that is missing or fails gets a line that says why; the others run. Providers may live in other Python
environments (TensorRT 8.6 needs Python 3.10, say): name the command that starts each.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from dllm_export import __version__
from dllm_export.errors import UsageError
from dllm_export.graphs import ModelShape
from dllm_export.runtime.options import flag, option
from dllm_export.tools.demo import MODEL
from dllm_export.tools.flags import Command, from_fields, report_flag, shared_flags
from dllm_export.tools.machine import inspect_machine
from dllm_export.tools.output import make_table, print_json, print_note, print_table, write_report

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


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuCheckOptions:
    """What to run, and where each provider lives."""

    device: str = option("cuda", "where torch and onnxruntime run", choices=("cuda", "cpu"))
    columns: str = option(
        "tensorrt,onnxruntime,torch,eager", "providers to measure, with a comma between; eager is plain PyTorch"
    )
    tensorrt: str = option("", "command that starts the Python with TensorRT; default: this Python")
    onnxruntime: str = option("", "command that starts the Python with onnxruntime-gpu; default: this Python")
    layers: int = option(
        32, "layers of the random LLaDA-8B-shaped model; 32 need 34 GB of disk and 20 GB of GPU memory"
    )
    prompt: int = option(893, "prompt tokens")
    response: int = option(256, "response tokens")
    steps: int = option(60, "steps that are timed, one token each")
    answers: bool = option(True, "compare the demo model's answers too")
    quick: bool = option(False, "a tiny model: shows that everything works, its figures mean nothing")
    work: Path | None = option(None, "keep checkpoints and bundles in this folder, and use what is there")

    def __post_init__(self) -> None:
        for name in ("layers", "prompt", "response", "steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{flag(name)} is {getattr(self, name)}, expected at least 1")
        unknown = set(self.names) - {"tensorrt", "onnxruntime", "torch", "eager"}
        if unknown or not self.names:
            raise UsageError(f"--columns has {', '.join(sorted(unknown)) or 'nothing'}; see --help for what there is")
        if self.steps > self.response:
            raise UsageError(f"--steps is {self.steps}, expected at most --response, {self.response}: one token a step")

    @property
    def names(self) -> tuple[str, ...]:
        """The columns asked for."""
        return tuple(name.strip() for name in self.columns.split(",") if name.strip())

    def python(self, provider: str) -> list[str]:
        """How to start the Python of a provider."""
        return shlex.split(getattr(self, provider, "")) or [sys.executable]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Tokens of the demo model on one provider against the torch reference in float32 on the CPU."""

    provider: str
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
    machine: Any
    shape: ModelShape
    dtype: str
    seconds: Mapping[str, float]
    """Time of checkpoint, export and build."""
    answers: Sequence[Answer]
    columns: Mapping[str, Any]
    """Name -> what tools/gpu_column.py or tools/gpu_eager.py measured."""
    failures: Mapping[str, str]
    """Name -> why a column is missing."""


class Failed(Exception):
    """A process of the check that did not succeed; its last line says why."""


def run(command: Sequence[str]) -> str:
    """Standard output of a process, or Failed with the last line of its standard error."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise Failed((lines or [f"exit code {result.returncode}"])[-1][:500])
    return result.stdout


def cli(python: Sequence[str], arguments: str, *paths: Path | str) -> str:
    """`dllm-export` under a Python."""
    words = shlex.split(arguments)
    return run([*python, "-m", "dllm_export.tools.cli", words[0], *map(str, paths), *words[1:]])


# -- the demo model's answers
def compare_answers(work: Path, options: GpuCheckOptions) -> Iterator[Answer]:
    """Every provider's tokens in float32 and float16 against the reference."""
    prompt = MODEL / "example.txt"
    shared = f"--prompt-file {shlex.quote(str(prompt))} --gen-length 64 --json"
    for dtype in ("float32", "float16"):
        bundle = work / f"demo-{dtype}"
        if not bundle.exists():
            cli([sys.executable], f"export --dtype {dtype}", MODEL, "-o", bundle)
    reference = {
        name: tokens_of(cli([sys.executable], f"generate --provider torch {shared} {flags}", work / "demo-float32"))
        for name, flags in GENERATIONS.items()
    }
    for provider in options.names:
        if provider == "eager":
            continue
        for dtype in ("float32", "float16"):
            yield from compare_provider(work / f"demo-{dtype}", provider, dtype, shared, reference, options)


def compare_provider(
    bundle: Path,
    provider: str,
    dtype: str,
    shared: str,
    reference: Mapping[str, Sequence[int]],
    options: GpuCheckOptions,
) -> Iterator[Answer]:
    """One provider in one type, with captured steps and without where it captures."""
    python, device = options.python(provider), "cuda" if provider == "tensorrt" else options.device
    known: dict[str, Any] = {"provider": provider, "dtype": dtype}
    if provider == "tensorrt":
        try:
            cli(python, "build --flavour tensorrt --max-length 512 --max-batch 1 --rows 128", bundle)
        except Failed as error:
            yield Answer(**known, generation="build", captures=0, equal=None, failure=str(error))
            return
    for captures in (32, 0) if provider != "torch" else (0,):
        where = f"--provider {provider} --device {device} --captures {captures}"
        for name, flags in GENERATIONS.items():
            try:
                found = tokens_of(cli(python, f"generate {where} {shared} {flags}", bundle))
            except Failed as error:
                yield Answer(**known, generation=name, captures=captures, equal=None, failure=str(error))
                continue
            same = [a == b for a, b in zip(found, reference[name], strict=True)]
            yield Answer(**known, generation=name, captures=captures, equal=sum(same) / len(same))


def tokens_of(output: str) -> list[int]:
    """The tokens in the JSON of `generate`."""
    tokens: list[int] = json.loads(output)["tokens"]
    return tokens


# -- the large model's times
def make_bundle(work: Path, shape: ModelShape, device: str) -> dict[str, float]:
    """A random checkpoint and its bundle in float16 (float32 on the CPU), unless they are there already."""
    import torch

    from dllm_export.exporter.options import ExportOptions
    from dllm_export.exporter.pipeline import export
    from dllm_export.tools.random_checkpoint import write_random_checkpoint

    seconds = {}
    if not (work / "model").exists():
        start = time.perf_counter()
        dtype = torch.float16 if device == "cuda" else torch.float32
        write_random_checkpoint(work / "model", shape, dtype=dtype, device=device)
        seconds["checkpoint"] = time.perf_counter() - start
    if not (work / "bundle").exists():
        start = time.perf_counter()
        export(work / "model", work / "bundle", ExportOptions(dtype=dtype_of(device), no_tokenizer=True))
        seconds["export"] = time.perf_counter() - start
    if device == "cuda":
        torch.cuda.empty_cache()
    return seconds


def dtype_of(device: str) -> Any:
    """Compute type of the large model."""
    return "float16" if device == "cuda" else "float32"


def fixed_sizes(options: GpuCheckOptions) -> str:
    """Sizes of the measured request that engines are tuned for exactly."""
    length, rows = options.prompt + options.response, options.response
    groups = [f"S={length},X={rows},Q={max(1, rows // 4)}", f"S={length}"]
    return ";".join([*groups, *(f"S={length},Q={count}" for count in sorted({64, rows}) if count <= rows)])


def measure_columns(work: Path, options: GpuCheckOptions, seconds: dict[str, float]) -> Iterator[tuple[str, Any, str]]:
    """Name, report and failure of every column."""
    request = ["--prompt", str(options.prompt), "--response", str(options.response), "--steps", str(options.steps)]
    rows = ["--rows", *(str(count) for count in (32, 64, 128, 256) if count <= options.response)]
    module = "dllm_export.tools.gpu_column"
    for provider in options.names:
        python = options.python(provider)
        if provider == "tensorrt":
            start = time.perf_counter()
            sizes = f"--max-length {options.prompt + options.response} --max-batch 1 --rows {options.response}"
            try:
                cli(python, f"build --flavour tensorrt {sizes} --fixed '{fixed_sizes(options)}'", work / "bundle")
            except Failed as error:
                yield provider, None, str(error)
                continue
            seconds["build"] = time.perf_counter() - start
        if provider == "eager":
            eager = [*python, "-m", "dllm_export.tools.gpu_eager", str(work / "model"), "--device", options.device]
            yield column(provider, [*eager, "--dtype", dtype_of(options.device), *request])
            continue
        for captures in (32, 0) if provider in ("tensorrt", "onnxruntime") and options.device == "cuda" else (0,):
            where = ["--provider", provider, "--device", options.device, "--captures", str(captures)]
            name = f"{provider}, captured" if captures else provider
            yield column(name, [*python, "-m", module, str(work / "bundle"), *where, *request, *rows])


def column(name: str, command: Sequence[str]) -> tuple[str, Any, str]:
    """One column's report, or why it is missing."""
    try:
        return name, json.loads(run(command)), ""
    except Failed as error:
        return name, None, str(error)


def print_report(report: GpuReport) -> None:
    """Answers, then graphs, then steps."""
    answers = make_table(
        "provider", "dtype", "generation", "captures", "equal tokens", right=("captures", "equal tokens")
    )
    for answer in report.answers:
        share = f"{answer.equal:.1%}" if answer.equal is not None else f"failed: {answer.failure}"
        answers.add_row(answer.provider, answer.dtype, answer.generation, str(answer.captures), share)
    graphs = make_table("ms per call", *report.columns, right=tuple(report.columns))
    cases: dict[str, dict[str, float]] = {}
    for name, value in report.columns.items():
        for graph in value["graphs"]:
            sizes = " ".join(f"{dim}={size}" for dim, size in graph["sizes"].items() if dim != "B")
            cases.setdefault(f"{graph['graph']} {sizes}", {})[name] = graph["call"]["p50_ms"]
    for case, times in cases.items():
        graphs.add_row(case, *(f"{times[name]:.3f}" if name in times else "-" for name in report.columns))
    steps = make_table("column", "policy", "tokens/s", "ms by kind of step", "sum of parts", right=("tokens/s",))
    for name, value in report.columns.items():
        for single in value["runs"]:
            kinds = ", ".join(f"{kind} {times['p50_ms']:.2f}" for kind, times in single["kinds"].items())
            parts = f"{single['parts_ms']:.2f}" if single["parts_ms"] else ""
            steps.add_row(name, single["policy"], f"{single['tokens_per_second']:.1f}", kinds, parts)
    for table in (answers, graphs, steps):
        print_table(table)
    for name, why in report.failures.items():
        print_note(f"{name}: {why}", "yellow")


@click.command("gpu-check", cls=Command)
@from_fields(GpuCheckOptions, "options", "Options")
@report_flag
@shared_flags
def command(options: GpuCheckOptions, report: Path | None, as_json: bool) -> None:
    """Measure every provider on this machine's GPU, and check its answers."""
    arguments = sys.argv[sys.argv.index("gpu-check") + 1 :] if "gpu-check" in sys.argv else []
    with TemporaryDirectory(prefix="dllm-export-gpu-") as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        shape = TINY if options.quick else ModelShape(**{**asdict(LLADA_8B), "layers": options.layers})
        answers = tuple(compare_answers(work, options)) if options.answers else ()
        seconds = make_bundle(work, shape, options.device)
        measured = list(measure_columns(work, options, seconds))
    outcome = GpuReport(
        tool="tools/gpu_check",
        version=__version__,
        command=shlex.join(["tools/gpu_check", *arguments]),
        machine=inspect_machine(Path()),
        shape=shape,
        dtype=dtype_of(options.device),
        seconds=seconds,
        answers=answers,
        columns={name: value for name, value, failure in measured if not failure},
        failures={name: failure for name, _, failure in measured if failure},
    )
    print_report(outcome)
    if as_json:
        print_json(outcome)
    write_report(report, outcome)
