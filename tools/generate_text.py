"""`dllm-export generate`: prompts in, text out, with the settings and figures of the run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from dllm_export import __version__
from dllm_export.runtime.combinations import check_strategies
from dllm_export.runtime.generate import Frame
from dllm_export.runtime.model import DiffusionLM, Generation
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import CachePolicy
from dllm_export.runtime.request import Request
from dllm_export.runtime.session import SessionOptions, SessionReport
from dllm_export.runtime.transfers import Quota, Transfer
from dllm_export.tools.flags import (
    Command,
    Flag,
    describe,
    from_fields,
    report_flag,
    shared_flags,
    strategy_flags,
)
from dllm_export.tools.output import (
    format_bytes,
    notes,
    on_terminal,
    plural,
    print_json,
    print_note,
    print_result_text,
    show_progress,
    write_report,
)
from dllm_export.tools.prefix_flags import PrefixOptions
from dllm_export.tools.prompts import collect_prompts, make_request, prompt_flags
from dllm_export.tools.watch import Watch


@click.command("generate", cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@prompt_flags
@from_fields(GenerationOptions, "options", "Generation")
@strategy_flags
@from_fields(PrefixOptions, "prefix", "Shared prefix")
@from_fields(SessionOptions, "session", "Provider")
@click.option("--watch", cls=Flag, section="Output", is_flag=True, help="show every step on stderr while it happens")
@report_flag
@shared_flags
def command(
    bundle: Path,
    prompt: tuple[str, ...],
    prompt_file: tuple[Path, ...],
    infill: tuple[str, ...],
    prompt_ids: tuple[str, ...],
    chat: bool,
    options: GenerationOptions,
    policy: CachePolicy,
    transfer: Transfer | None,
    prefix: PrefixOptions,
    session: SessionOptions,
    watch: bool,
    report: Path | None,
    as_json: bool,
) -> None:
    """Generate text, or fill masks in a text.

    Without a prompt option the prompt is read from stdin, unless the model samples without one. The text goes to stdout
    and nothing else does.
    """
    check_strategies(options, policy, transfer or Quota())
    prompts = collect_prompts(prompt, prompt_file, infill, prompt_ids, chat)
    prefix.check(policy)
    with DiffusionLM.from_pretrained(bundle, session, prefix_budget=prefix.prefix_budget) as model:
        request = prefix.share(model, make_request(model, prompts, options))
        settled, rule = model.settle(options, transfer)
        batch = denoise(model, request, settled, policy, rule, watch=watch)
        settings = describe_settings(model, request, settled, session) | describe_strategies(policy, rule)
        if request.prefix is not None:
            settings["prefix"] = describe(request.prefix)
        has_text, held = model.tokenizer is not None, model.session.inspect()
    outcome = [describe_generation(generation, batch, settings, held) for generation in batch]
    value = outcome[0] if len(outcome) == 1 else outcome
    if as_json:
        print_json(value)
    else:
        print_generations(batch, held, has_text=has_text)
    write_report(report, value)


def denoise(
    model: DiffusionLM,
    request: Request,
    options: GenerationOptions,
    policy: CachePolicy,
    transfer: Transfer | None = None,
    *,
    watch: bool,
) -> list[Generation]:
    """Run to the end and show it on the way; the time that the display takes is not counted."""
    frames: list[Frame] = []
    drawing, start = 0.0, time.perf_counter()
    with showing(model, policy.name, watch=watch) as show:
        for frame in model.stream(request, options, policy, transfer, watch=watch):
            frames.append(frame)
            before = time.perf_counter()
            show(frame)
            drawing += time.perf_counter() - before
    return model.summarize(request, frames, time.perf_counter() - start - drawing)


@contextmanager
def showing(model: DiffusionLM, policy: str, *, watch: bool) -> Iterator[Callable[[Frame], None]]:
    """What to call with every frame: the canvas or a progress bar."""
    if watch:
        with Watch(model.tokenizer, model.bundle.manifest.tokens, notes()) as canvas:
            yield canvas.show
    else:
        with show_progress() as progress:
            yield lambda frame: progress(f"denoising, policy {policy}", frame.step, frame.steps)


def describe_settings(
    model: DiffusionLM, request: Request, options: GenerationOptions, session: SessionOptions
) -> dict[str, object]:
    """Everything that determines the result, but for the prompt."""
    return {
        "version": __version__,
        "bundle": str(model.bundle.path),
        "digest": model.bundle.manifest.digest,
        "dtype": model.bundle.manifest.dtype,
        "session": describe(session),
        "options": describe(options),
        "request": {**describe(request.shape), **describe(request.schedule)},
    }


def describe_strategies(policy: CachePolicy, transfer: Transfer) -> dict[str, object]:
    """Cache policy and decoding rule with their settings."""
    return {
        "policy": {"name": policy.name, **describe(policy)},
        "transfer": {"name": transfer.name, **describe(transfer)},
    }


def describe_generation(
    generation: Generation, batch: Sequence[Generation], settings: dict[str, object], held: SessionReport
) -> dict[str, object]:
    """A result as JSON; times, passes, speed and what the session held are those of the whole batch."""
    return {
        "text": generation.text,
        "tokens": generation.tokens,
        "confidence": generation.confidence,
        "finish_reason": generation.finish_reason,
        "passes": generation.passes,
        "steps_by_kind": generation.steps_by_kind,
        "partial_share": generation.partial_share,
        "seconds": generation.seconds,
        "tokens_per_second": count_tokens(batch) / generation.seconds,
        "engine_seconds": generation.engine_seconds,
        "strategy_seconds": generation.strategy_seconds,
        "settings": settings,
        "session": held,
    }


def count_tokens(batch: Sequence[Generation]) -> int:
    """Tokens that were generated: those with a confidence; given text has none."""
    return sum(math.isfinite(value) for generation in batch for value in generation.confidence)


def print_generations(batch: Sequence[Generation], held: SessionReport, *, has_text: bool) -> None:
    """The texts, and on a terminal a line of figures after them; a second one where the session owns device memory."""
    for number, generation in enumerate(batch):
        if len(batch) > 1 and on_terminal():
            print_note(f"-- {number + 1} of {len(batch)}")
        print_result_text(generation.text if has_text else " ".join(map(str, generation.tokens)))
    if on_terminal():
        print_note(summary_line(batch))
        if held.provider == "tensorrt":
            print_note(session_line(held))


def summary_line(batch: Sequence[Generation]) -> str:
    """Tokens, speed, passes, kinds of steps, and the share of time outside the engines."""
    one, tokens = batch[0], count_tokens(batch)
    kinds = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in one.steps_by_kind.items())
    return (
        f"{plural(tokens, 'token')}, {tokens / one.seconds:.1f} tok/s, {plural(one.passes, 'pass', 'passes')}, "
        f"steps: {kinds}; {1 - one.engine_seconds / one.seconds:.0%} of the time outside the engines"
    )


def session_line(held: SessionReport) -> str:
    """Library, captured steps and device memory by purpose."""
    replays = sum(capture.replays for capture in held.captures)
    captured = f"{plural(len(held.captures), 'CUDA graph')} replayed {plural(replays, 'time')}"
    evicted = f", {held.evicted} evicted (--captures is {held.capture_limit})" if held.evicted else ""
    memory = ", ".join(f"{purpose} {format_bytes(size)}" for purpose, size in held.memory.items())
    return f"{held.library}: {captured}{evicted}; device memory: {memory}; at most {format_bytes(held.peak_memory)}"
