"""`dllm-export bench`: every provider and plain PyTorch on the same request, against one another and against the machine."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from dllm_export.errors import IncompatibleError, UsageError
from dllm_export.graphs import ModelShape
from dllm_export.runtime.bundle import Bundle, open_bundle
from dllm_export.runtime.options import option, require_at_least
from dllm_export.runtime.policies import CachePolicy, NoCache
from dllm_export.runtime.session import available_cores
from dllm_export.tools.bench.columns import COLUMNS
from dllm_export.tools.bench.comparison import compare_reports, print_comparison, require_ratios
from dllm_export.tools.bench.measure import Measurement, draw_prompt, measure
from dllm_export.tools.bench.records import PolicyRecord, Settings
from dllm_export.tools.bench.tables import markdown, print_bench
from dllm_export.tools.bench.trace import make_trace
from dllm_export.tools.flags import (
    Command,
    Flag,
    check_report,
    describe,
    file_flag,
    from_fields,
    policy_flags,
    report_flag,
    shared_flags,
)
from dllm_export.tools.machine import find_gpus, pip_line
from dllm_export.tools.output import print_json, show_progress, write_report, write_text
from dllm_export.tools.prompts import read_prompt

COMMAND = "dllm-export bench"
SLOW = "torch-compile"
"""Compiles every graph for every size, which on a CPU takes longer than all other columns together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to measure."""

    columns: str = option(
        "auto", f"what to measure, with a comma between; auto is all but {SLOW} on a CPU: {', '.join(COLUMNS)}, all"
    )
    prompt_length: int = option(512, "prompt tokens, random")
    prompt_file: Path | None = option(None, "text of the prompt instead; needs a bundle with a tokenizer")
    gen_length: int = option(128, "tokens of the response, one a step")
    steps: int | None = option(None, "steps that are timed, so as many forward passes in every column; default: all")
    warmup: int | None = option(None, "steps before the clock; default: as docs/benchmarking.md says")
    rounds: int = option(1, "measure every column this many times, each time in a process of its own")
    threads: int = option(0, "CPU threads of every column; 0 takes all cores")
    device: str = option(
        "auto", "where PyTorch runs; auto takes cuda if there is a GPU", choices=("auto", "cpu", "cuda")
    )
    seed: int = option(0, "seed of the prompt, and of the random weights")
    graphs: bool = option(True, "time every graph by itself too")
    tensorrt: str = option("", "command that starts the Python with TensorRT; default: this Python")
    tensorrt_rtx: str = option("", "command that starts the Python with TensorRT for RTX; default: this Python")
    onnxruntime: str = option("", "command that starts the Python with onnxruntime; default: this Python")
    nvtx: bool = option(False, "name every step for a profiler; needs the package nvtx")
    model: Path | None = option(None, "checkpoint that plain PyTorch reads; default: the bundle's weights")
    quick: bool = option(False, "a tiny model and request: shows that everything works, its figures mean nothing")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "prompt_length", "gen_length", "steps", "rounds")
        require_at_least(self, 0, "threads", "seed", "warmup")
        if self.steps is not None and self.steps > self.gen_length:
            raise UsageError(
                f"--steps is {self.steps}, expected at most --gen-length, {self.gen_length}: one token a step"
            )
        unknown = [name for name in self.names if name not in COLUMNS]
        if unknown or not self.names:
            found = ", ".join(unknown) or "nothing"
            raise UsageError(f"--columns has {found}, expected some of: {', '.join(COLUMNS)}, or all")

    @property
    def names(self) -> tuple[str, ...]:
        """The columns asked for, in the order in which they are measured."""
        asked = [name.strip() for name in self.columns.split(",") if name.strip()]
        if asked == ["all"] or (asked == ["auto"] and self.place == "cuda"):
            return tuple(COLUMNS)
        if asked == ["auto"]:
            return tuple(name for name in COLUMNS if name != SLOW)
        return (*(name for name in COLUMNS if name in asked), *(name for name in asked if name not in COLUMNS))

    @property
    def pythons(self) -> dict[str, Sequence[str]]:
        """Provider or flavour -> the command that starts its Python."""
        given = {"tensorrt": self.tensorrt, "tensorrt-rtx": self.tensorrt_rtx, "onnxruntime": self.onnxruntime}
        return {name: shlex.split(command) for name, command in given.items() if command}

    @property
    def place(self) -> str:
        """cpu or cuda, refused where there is no GPU."""
        gpu = any(find_gpus()) if self.device != "cpu" else False
        if self.device == "cuda" and not gpu:
            raise IncompatibleError("--device cuda: nvidia-smi lists no NVIDIA GPU; use --device cpu")
        return "cuda" if gpu else "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeOptions:
    """The random LLaDA-shaped model that is measured where no bundle is named."""

    layers: int = option(8, "layers")
    hidden: int = option(512, "width")
    heads: int = option(8, "heads; the width must be a multiple")
    mlp: int = option(1536, "inner width of the MLP")
    vocab: int = option(8192, "tokens of the vocabulary")
    dtype: str = option("float32", "compute type", choices=("float32", "float16", "bfloat16"))

    def __post_init__(self) -> None:
        require_at_least(self, 1, "layers", "hidden", "heads", "mlp")
        require_at_least(self, 8, "vocab")
        if self.hidden % self.heads or self.hidden // self.heads % 2:
            raise UsageError(f"--hidden is {self.hidden}, expected a multiple of twice --heads, {self.heads}")

    @property
    def shape(self) -> ModelShape:
        """The model's shape."""
        return ModelShape(
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.hidden // self.heads,
            mlp=self.mlp,
            vocab=self.vocab,
            max_length=4096,
            norm_eps=1e-5,
            rope_theta=5e5,
        )


QUICK_SHAPE = ShapeOptions(layers=3, hidden=64, heads=2, mlp=128, vocab=256)


def is_untouched(shape: ShapeOptions) -> bool:
    """Whether every field has its default."""
    return all(getattr(shape, field.name) == field.default for field in fields(shape))


@contextmanager
def prepare_bundle(
    path: Path | None, options: BenchOptions, shape: ShapeOptions
) -> Iterator[tuple[Bundle, Path | None]]:
    """The bundle, and the checkpoint that plain PyTorch reads; random ones live in a temporary directory."""
    if path is not None:
        if not is_untouched(shape):
            raise UsageError("a bundle has a shape already: leave out the options of the random model, or BUNDLE")
        yield open_bundle(path), options.model
        return
    from dllm_export.exporter.options import ExportOptions
    from dllm_export.exporter.pipeline import export
    from dllm_export.tools.random_checkpoint import write_random_checkpoint

    with TemporaryDirectory(prefix="dllm-export-bench-") as folder:
        checkpoint = write_random_checkpoint(Path(folder, "model"), shape.shape, seed=options.seed)
        made = ExportOptions(no_tokenizer=True, dtype=shape.dtype)  # type: ignore[arg-type]
        yield export(checkpoint, Path(folder, "bundle"), made), checkpoint


def plan_measurement(
    bundle: Bundle, checkpoint: Path | None, options: BenchOptions, policy: CachePolicy
) -> Measurement:
    """What the options ask for on this bundle."""
    manifest = bundle.manifest
    if options.prompt_file is not None:
        from dllm_export.runtime.tokenizer import Tokenizer

        record = manifest.tokenizer
        if record is None:
            raise UsageError("--prompt-file: this bundle has no tokenizer; leave it out for a random prompt")
        text = Tokenizer(bundle.file(record.file), record.chat_template, record.bos)
        tokens = tuple(text.encode(read_prompt(options.prompt_file)))
    else:
        tokens = draw_prompt(bundle, options.prompt_length, options.seed)
    if len(tokens) + options.gen_length > manifest.shape.max_length:
        raise UsageError(
            f"--prompt-length and --gen-length make {len(tokens) + options.gen_length} rows, the model takes "
            f"{manifest.shape.max_length}"
        )
    policies: list[CachePolicy] = [NoCache(), *([] if isinstance(policy, NoCache) else [policy])]
    settings = Settings(
        bundle=manifest.digest,
        shape=manifest.shape,
        dtype=manifest.dtype,
        prompt=len(tokens),
        response=options.gen_length,
        batch=1,
        steps=options.steps or options.gen_length,
        warmup=options.warmup,
        rounds=options.rounds,
        seed=options.seed,
        threads=options.threads or available_cores(),
        device=options.place,
        policies=tuple(PolicyRecord(name=one.name, settings=describe(one)) for one in policies),
    )
    return Measurement(
        bundle=bundle,
        checkpoint=checkpoint,
        tokens=tokens,
        settings=settings,
        columns=options.names,
        rows=tuple(count for count in (32, 64, 128, 256) if count <= options.gen_length),
        graphs=options.graphs,
        nvtx=options.nvtx,
        pythons=options.pythons,
    )


def check_page(context: click.Context, flag: click.Parameter, path: Path | None) -> Path | None:
    """The path, refused before anything runs if it cannot be written or drawn."""
    if path is not None and importlib.util.find_spec("matplotlib") is None:
        raise IncompatibleError(f"--html needs the package matplotlib: {pip_line('matplotlib')}")
    return check_report(context, flag, path)


@click.command("bench", cls=Command)
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@from_fields(BenchOptions, "options", "Options")
@policy_flags("dllm-cache", without=("shared-prefix",))
@from_fields(ShapeOptions, "shape", "Random model, where no bundle is named")
@click.option(
    "--compare",
    cls=Flag,
    section="Compare",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    nargs=2,
    metavar="A B",
    help="measure nothing: how many times less time the runs of report B take than those of A",
)
@click.option("--force", cls=Flag, section="Compare", is_flag=True, help="compare what is not comparable all the same")
@click.option(
    "--fail-below",
    cls=Flag,
    section="Compare",
    type=click.FLOAT,
    metavar="RATIO",
    help="exit with 3 if a run's ratio is surely below this",
)
@report_flag
@file_flag("--html", "write a page with plots to this file; needs the extra plots", check_page)
@file_flag("--trace", "write the steps as Chrome trace events, for Perfetto, to this file")
@shared_flags
def command(
    bundle: Path | None,
    options: BenchOptions,
    policy: CachePolicy,
    shape: ShapeOptions,
    compare: tuple[Path, Path] | None,
    force: bool,
    fail_below: float | None,
    report: Path | None,
    html: Path | None,
    trace: Path | None,
    as_json: bool,
) -> None:
    """Measure every provider and PyTorch on one request, against one another and the machine's limits.

    Each column runs in a process of its own, without a cache and with --policy; one that cannot run says why. Without a
    BUNDLE a random model is measured. docs/benchmarking.md has the rules.
    """
    if compare is not None:
        comparison = compare_reports(*compare, force=force)
        if as_json:
            print_json(comparison)
        else:
            print_comparison(comparison)
        write_report(report, comparison)
        require_ratios(comparison, fail_below)
        return
    if options.quick:
        options = replace(options, prompt_length=24, gen_length=55, steps=min(options.steps or 55, 55))
        shape = QUICK_SHAPE if bundle is None else shape
    arguments = sys.argv[sys.argv.index("bench") + 1 :] if "bench" in sys.argv else []
    with prepare_bundle(bundle, options, shape) as (opened, checkpoint), show_progress() as progress:
        outcome = measure(
            plan_measurement(opened, checkpoint, options, policy), shlex.join([*COMMAND.split(), *arguments]), progress
        )
    if as_json:
        print_json(outcome)
    else:
        print_bench(outcome)
    write_report(report, outcome)
    if report is not None:
        write_text(report.with_suffix(".md"), markdown(outcome))
    if html is not None:
        from dllm_export.tools.bench.page import make_page

        write_text(html, make_page(outcome))
    if trace is not None:
        write_report(trace, make_trace(outcome))
    if not outcome.columns:
        raise IncompatibleError(
            f"no column could be measured; the first reason: {next(iter(outcome.failures.values()))}"
        )
