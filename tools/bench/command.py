"""The benchmark: the runtime on ONNX Runtime against plain PyTorch, without and with the cache.

All columns run the same random LLaDA-shaped model in float32 with the same prompt and the same number of forward passes,
one token a step, in turns of a few steps within one process. Tables go to stderr, JSON where it is asked for.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import torch

from dllm_export import __version__
from dllm_export.errors import UsageError
from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pipeline import export
from dllm_export.graphs import ModelShape
from dllm_export.runtime.bundle import Bundle, open_bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import option
from dllm_export.runtime.policies import DllmCache, NoCache
from dllm_export.runtime.session import SessionOptions, open_session
from dllm_export.tools.bench_columns import Sizes, make_columns, run_in_turns
from dllm_export.tools.bench_report import (
    OUTSIDE_BAR,
    BenchReport,
    Rounds,
    agreement,
    column_report,
    print_report,
    ratio,
)
from dllm_export.tools.eager import EagerModel, load_eager
from dllm_export.tools.flags import Command, from_fields, report_flag, shared_flags
from dllm_export.tools.machine import Others, describe_machine
from dllm_export.tools.output import print_json, show_progress, write_report
from dllm_export.tools.random_checkpoint import write_random_checkpoint

COMMAND = "dllm-export bench"
SHAPE = ModelShape(
    layers=8,
    hidden=512,
    heads=8,
    kv_heads=8,
    head_dim=64,
    mlp=1536,
    vocab=8192,
    max_length=4096,
    norm_eps=1e-5,
    rope_theta=5e5,
)
QUICK_SHAPE = replace(SHAPE, layers=3, hidden=64, heads=2, kv_heads=2, head_dim=32, mlp=128, vocab=256)
TURN = 7
"""Steps of a column before the next one runs; no multiple of a refresh interval, so that no kind of step always comes
first, when the processor's caches hold another column's data."""
EAGER_NONE, EAGER_CACHE, ORT_NONE, ORT_CACHE = range(4)
BARS = (((ORT_CACHE, ORT_NONE), 3.0), ((ORT_CACHE, EAGER_NONE), 4.0), ((ORT_CACHE, EAGER_CACHE), 2.0))
"""(column, baseline) and how many times faster the column is expected to be."""
PAIRS = ((ORT_NONE, EAGER_NONE), (ORT_CACHE, EAGER_CACHE), (ORT_CACHE, ORT_NONE), (EAGER_CACHE, EAGER_NONE))


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to measure."""

    prompt_length: int = option(512, "prompt tokens, random")
    gen_length: int = option(128, "tokens to generate, one a step")
    rounds: int = option(1, "full generations of every column")
    threads: int = option(2, "CPU threads of every column")
    seed: int = option(0, "seed of weights and prompt")
    quick: bool = option(False, "a tiny model and request: shows that everything works, its figures mean nothing")
    model: Path | None = option(None, "measure this LLaDA checkpoint instead of a random one; needs --bundle")
    bundle: Path | None = option(None, "its bundle, exported in float32")

    def __post_init__(self) -> None:
        for name in ("prompt_length", "gen_length", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected at least 1")
        if (self.model is None) != (self.bundle is None):
            raise UsageError(
                "--model and --bundle belong together: PyTorch reads the checkpoint, the runtime its bundle"
            )

    @property
    def request(self) -> tuple[int, int]:
        """Prompt and response length."""
        return (24, 55) if self.quick else (self.prompt_length, self.gen_length)


@contextmanager
def prepare_models(options: BenchOptions) -> Iterator[tuple[EagerModel, Bundle]]:
    """The checkpoint in PyTorch and its bundle; random ones live in a temporary directory."""
    if options.model is not None and options.bundle is not None:
        yield load_eager(options.model), open_bundle(options.bundle)
        return
    with TemporaryDirectory(prefix="dllm-export-bench-") as folder:
        shape = QUICK_SHAPE if options.quick else SHAPE
        checkpoint = write_random_checkpoint(Path(folder, "model"), shape, seed=options.seed)
        bundle = export(checkpoint, Path(folder, "bundle"), ExportOptions(no_tokenizer=True))
        yield load_eager(checkpoint), bundle


def measure(options: BenchOptions, command: str) -> BenchReport:
    """Run all columns in turns and report."""
    none, cache = NoCache(), DllmCache()
    prompt_length, gen_length = options.request
    torch.set_num_threads(options.threads)
    with prepare_models(options) as (model, bundle), ExitStack() as stack, show_progress() as progress:
        shape = bundle.manifest.shape
        ordinary = min(shape.vocab, model.mask_token, model.eos_token)
        prompt = np.random.default_rng(options.seed).integers(0, ordinary, prompt_length)
        sizes = Sizes(tuple(prompt.tolist()), gen_length, shape.layers)
        session = SessionOptions(provider="onnxruntime", threads=options.threads)
        lms = [stack.enter_context(DiffusionLM(bundle, open_session(bundle, session))) for _ in range(2)]
        columns = make_columns((model, lms), sizes, (none, cache))
        with Others() as others:
            times: Sequence[Rounds] = run_in_turns(
                columns, TURN, options.rounds, lambda step: progress("steps", step, gen_length)
            )
    reports = [column_report(column, rounds) for column, rounds in zip(columns, times, strict=True)]
    outside = [report.outside_engines for report in reports if report.outside_engines is not None]
    return BenchReport(
        tool=COMMAND,
        version=__version__,
        command=command,
        machine=describe_machine(options.threads),
        settings={
            "shape": shape,
            "dtype": bundle.manifest.dtype,
            "bundle": bundle.manifest.digest,
            "prompt": prompt_length,
            "response": gen_length,
            "batch": 1,
            "rounds": options.rounds,
            "seed": options.seed,
            "policy": cache,
            "steps_in_turn": TURN,
        },
        columns=reports,
        ratios=[ratio(columns, times, pair, bar, cache.prompt_interval) for pair, bar in BARS],
        outside_engines_bar=OUTSIDE_BAR,
        outside_engines_met=max(outside) <= OUTSIDE_BAR,
        agreement=[agreement(columns, times, pair) for pair in PAIRS],
        others=others.share,
    )


@click.command("bench", cls=Command)
@from_fields(BenchOptions, "options", "Options")
@report_flag
@shared_flags
def command(options: BenchOptions, report: Path | None, as_json: bool) -> None:
    """Measure the runtime against plain PyTorch on this machine, without and with the cache."""
    arguments = sys.argv[sys.argv.index("bench") + 1 :] if "bench" in sys.argv else []
    outcome = measure(options, shlex.join([*COMMAND.split(), *arguments]))
    print_report(outcome)
    if as_json:
        print_json(outcome)
    write_report(report, outcome)
