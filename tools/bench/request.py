"""What is asked to be measured: options, the random model, and the points of a sweep as checked measurements."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from dllm_export.errors import IncompatibleError, UsageError
from dllm_export.graphs import ModelShape
from dllm_export.runtime.bundle import Bundle, open_bundle
from dllm_export.runtime.options import option, require_at_least
from dllm_export.runtime.plugins import find_transfer
from dllm_export.runtime.policies import CachePolicy, NoCache
from dllm_export.runtime.session import available_cores
from dllm_export.runtime.transfers import Transfer
from dllm_export.tools.bench.columns import COLUMNS
from dllm_export.tools.bench.measure import Measurement, draw_prompts
from dllm_export.tools.bench.records import Settings, StrategyRecord
from dllm_export.tools.bench.sweep import Planned, Sweep
from dllm_export.tools.flags import (
    describe,
)
from dllm_export.tools.machine import find_gpus
from dllm_export.tools.prompts import read_prompt

SLOW = "torch-compile"
"""Compiles every graph for every size, which on a CPU takes longer than all other columns together."""
SHORT_STEPS = 25
"""One prompt interval of dLLM-Cache as published: the same mix of steps as in a whole generation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to measure."""

    columns: str = option(
        "auto",
        f"what to measure, with a comma between; auto is all but {SLOW} on a CPU, and of a BUNDLE there eager-compile neither: "
        f"{', '.join(COLUMNS)}, all",
    )
    prompt_length: int = option(512, "prompt tokens, random")
    prompt_file: Path | None = option(None, "text of the prompt instead; needs a bundle with a tokenizer")
    gen_length: int = option(128, "tokens of the response")
    batch: int = option(1, "sequences, each with a prompt of its own")
    tokens_per_step: int = option(1, "tokens of each sequence that a step decides, under a rule with a schedule")
    steps: int | None = option(
        None,
        "steps that are timed, so as many forward passes in every column; default: all, and of a BUNDLE on a CPU at most "
        f"{SHORT_STEPS}",
    )
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
        require_at_least(self, 1, "prompt_length", "gen_length", "batch", "tokens_per_step", "steps", "rounds")
        require_at_least(self, 0, "threads", "seed", "warmup")
        most = self.most_steps
        if self.steps is not None and self.steps > most:
            short = "--gen-length" if self.tokens_per_step == 1 else "--gen-length / --tokens-per-step"
            decided = "one token" if self.tokens_per_step == 1 else f"{self.tokens_per_step} tokens"
            raise UsageError(f"--steps is {self.steps}, expected at most {short}, {most}: {decided} a step")
        if self.batch > 1 and self.prompt_file is not None:
            raise UsageError(f"--batch is {self.batch} and --prompt-file has one prompt: leave one of them out")
        unknown = [name for name in self.names if name not in COLUMNS]
        if unknown or not self.names:
            found = ", ".join(unknown) or "nothing"
            raise UsageError(f"--columns has {found}, expected some of: {', '.join(COLUMNS)}, or all")

    @property
    def most_steps(self) -> int:
        """Steps of a whole generation at one rate."""
        return -(-self.gen_length // self.tokens_per_step)

    def shorten(self) -> BenchOptions:
        """On a CPU, where nothing is said of them, fewer steps and no column that compiles: a small model then takes a minute
        or two."""
        if self.place != "cpu":
            return self
        columns = self.columns
        if columns.strip() == "auto":
            columns = ",".join(
                name for name in self.names if not (COLUMNS[name].compile and COLUMNS[name].place == "any")
            )
        return replace(self, columns=columns, steps=self.steps or min(self.most_steps, SHORT_STEPS))

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
    path: Path | None, options: BenchOptions, shape: ShapeOptions, rows: int
) -> Iterator[tuple[Bundle, Path | None]]:
    """The bundle, and the checkpoint that plain PyTorch reads; random ones live in a temporary directory and take `rows`."""
    if path is not None:
        if not is_untouched(shape):
            raise UsageError("a bundle has a shape already: leave out the options of the random model, or BUNDLE")
        yield open_bundle(path), options.model
        return
    import torch

    from dllm_export.exporter.options import ExportOptions
    from dllm_export.exporter.pipeline import export
    from dllm_export.tools.random_checkpoint import write_random_checkpoint

    with TemporaryDirectory(prefix="dllm-export-bench-") as folder:
        made = replace(shape.shape, max_length=max(shape.shape.max_length, rows))
        how = {"dtype": getattr(torch, shape.dtype), "device": options.place, "seed": options.seed}
        checkpoint = write_random_checkpoint(Path(folder, "model"), made, **how)
        exporting = ExportOptions(no_tokenizer=True, dtype=shape.dtype)  # type: ignore[arg-type]
        yield export(checkpoint, Path(folder, "bundle"), exporting), checkpoint


def plan_measurement(
    bundle: Bundle,
    checkpoint: Path | None,
    options: BenchOptions,
    policy: CachePolicy,
    rule: Transfer | None = None,
) -> Measurement:
    """What the options ask for on this bundle; the rule is by default the one of its family."""
    manifest = bundle.manifest
    rule = find_transfer(manifest.sampler.transfer)() if rule is None else rule
    if options.tokens_per_step > 1 and not rule.keeps_schedule:
        raise UsageError(
            f"--tokens-per-step has no effect with --transfer {rule.name}, which decides itself: leave it out"
        )
    if options.prompt_file is not None:
        from dllm_export.runtime.tokenizer import Tokenizer

        record = manifest.tokenizer
        if record is None:
            raise UsageError("--prompt-file: this bundle has no tokenizer; leave it out for a random prompt")
        text = Tokenizer(bundle.file(record.file), record.chat_template, record.bos)
        prompts: tuple[tuple[int, ...], ...] = (tuple(text.encode(read_prompt(options.prompt_file))),)
    else:
        prompts = draw_prompts(bundle, options.prompt_length, options.seed, options.batch)
    length = len(prompts[0])
    if length + options.gen_length > manifest.shape.max_length:
        raise UsageError(
            f"--prompt-length and --gen-length make {length + options.gen_length} rows, the model takes "
            f"{manifest.shape.max_length}"
        )
    policies: list[CachePolicy] = [NoCache(), *([] if isinstance(policy, NoCache) else [policy])]
    settings = Settings(
        bundle=manifest.digest,
        shape=manifest.shape,
        dtype=manifest.dtype,
        prompt=length,
        response=options.gen_length,
        batch=options.batch,
        steps=options.steps or options.most_steps,
        warmup=options.warmup,
        rounds=options.rounds,
        seed=options.seed,
        threads=options.threads or available_cores(),
        device=options.place,
        policies=tuple(StrategyRecord(name=one.name, settings=describe(one)) for one in policies),
        transfer=StrategyRecord(name=rule.name, settings=describe(rule)),
        tokens_per_step=options.tokens_per_step,
    )
    return Measurement(
        bundle=bundle,
        checkpoint=checkpoint,
        prompts=prompts,
        settings=settings,
        columns=options.names,
        rows=tuple(count for count in (32, 64, 128, 256) if count <= options.gen_length),
        graphs=options.graphs,
        nvtx=options.nvtx,
        pythons=options.pythons,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Everything that the command line asks to have measured."""

    path: Path | None
    """Of the bundle; None: the random model."""
    options: BenchOptions
    policy: CachePolicy
    transfer: Transfer | None
    shape: ShapeOptions

    def at(self, axis: Sweep, value: int) -> Request:
        """The same at a point of a sweep."""
        kind = "shape" if axis.field == "layers" else "options"
        return replace(self, **{kind: replace(getattr(self, kind), **{axis.field: value})})

    @property
    def rows(self) -> int:
        """Rows of a sequence."""
        return self.options.prompt_length + self.options.gen_length

    def prepare(self, rows: int) -> AbstractContextManager[tuple[Bundle, Path | None]]:
        """The bundle, and the checkpoint that plain PyTorch reads."""
        return prepare_bundle(self.path, self.options, self.shape, rows)

    def plan(self, bundle: Bundle, checkpoint: Path | None) -> Measurement:
        """What to measure on this bundle."""
        options = self.options if self.path is None else self.options.shorten()
        return plan_measurement(bundle, checkpoint, options, self.policy, self.transfer)


@contextmanager
def plan_sweep(request: Request, sweeps: Sequence[Sweep]) -> Iterator[list[Planned]]:
    """Every point, checked before anything is measured; graphs and products are not timed one by one.

    Points with the same layers share a bundle.
    """
    for sweep in sweeps:
        if sweep.field == "layers" and request.path is not None:
            raise UsageError("--sweep layers makes random models: leave out BUNDLE")
        if sweep.field in ("prompt_length", "batch") and request.options.prompt_file is not None:
            raise UsageError(f"--sweep {sweep.axis} takes random prompts: leave out --prompt-file")
    points = [(sweep, value, request.at(sweep, value)) for sweep in sweeps for value in sweep.values]
    rows = max(point.rows for *_, point in points)

    def shorten(what: Measurement) -> Measurement:
        return replace(what, graphs=False, products=False)

    @contextmanager
    def open_point(point: Request, ready: Measurement | None = None) -> Iterator[Measurement]:
        if ready is not None:
            yield ready
            return
        with point.prepare(rows) as opened:
            yield shorten(point.plan(*opened))

    with ExitStack() as stack:
        planned, shared = [], None
        for sweep, value, point in points:
            if sweep.field == "layers":
                planned.append(Planned(sweep.axis, value, partial(open_point, point)))
                continue
            shared = stack.enter_context(request.prepare(rows)) if shared is None else shared
            planned.append(Planned(sweep.axis, value, partial(open_point, point, shorten(point.plan(*shared)))))
        yield planned
