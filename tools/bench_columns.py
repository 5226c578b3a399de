"""The columns of the benchmark: the same request step by step, on plain PyTorch and on the runtime."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import CachePolicy, DllmCache, StepState
from dllm_export.tools.eager import EagerModel
from dllm_export.tools.four_feature import FourFeatureCache


@dataclass(frozen=True, slots=True)
class Step:
    """One denoising step: its kind, its time, the share of it spent in engines, and the response after it."""

    kind: str
    seconds: float
    engine_seconds: float | None
    tokens: NDArray[np.int64]  # [R]


@dataclass(frozen=True, slots=True)
class Column:
    """A way to run the request. `start` begins a fresh generation; `warmup` steps of one come before the clock."""

    name: str
    what: str
    warmup: int
    start: Callable[[], Iterator[Step]]


@dataclass(frozen=True, slots=True)
class Sizes:
    """The request: one prompt, its response decoded one token a step."""

    prompt: tuple[int, ...]
    gen_length: int
    layers: int

    def kind(self, policy: CachePolicy, step: int) -> str:
        """What a policy does in a step."""
        rows = {"prompt_rows": len(self.prompt), "response_rows": self.gen_length}
        return policy.plan(replace(StepState.first(layers=self.layers, **rows), step=step, block_step=step)).kind


def make_columns(
    models: tuple[EagerModel, Sequence[DiffusionLM]], sizes: Sizes, policies: tuple[CachePolicy, DllmCache]
) -> tuple[Column, ...]:
    """Eager and ONNX Runtime, each without and with the cache; every ONNX column has a DiffusionLM of its own."""
    (model, lms), (none, cache) = models, policies
    context = model.context([0], len(sizes.prompt) + sizes.gen_length)
    setting = f"{cache.prompt_interval}/{cache.response_interval}/{cache.update_ratio:g}"
    long = cache.prompt_interval + 2

    def uncached() -> Iterator[Step]:
        return eager_steps(model, lambda tokens, _: model.forward(tokens, context), sizes, none)

    def four_feature() -> Iterator[Step]:
        return eager_steps(model, FourFeatureCache(model, context, len(sizes.prompt), cache).forward, sizes, cache)

    return (
        Column("eager none", "PyTorch, nothing cached; head on all rows, as in the published code", 2, uncached),
        Column(
            f"eager dllm-cache {setting}", "PyTorch, four features as published; head on all rows", long, four_feature
        ),
        Column("onnxruntime none", "this runtime, nothing cached", 2, lambda: runtime_steps(lms[0], sizes, none)),
        Column(
            f"onnxruntime dllm-cache {setting}",
            "this runtime, cached on the reduced state",
            long,
            lambda: runtime_steps(lms[1], sizes, cache),
        ),
    )


def eager_steps(
    model: EagerModel, logits_of: Callable[[Tensor, int], Tensor], sizes: Sizes, policy: CachePolicy
) -> Iterator[Step]:
    """LLaDA's sampler at temperature 0 over plain PyTorch."""
    canvas = torch.tensor([[*sizes.prompt, *[model.mask_token] * sizes.gen_length]], device=model.device)
    response = canvas[:, len(sizes.prompt) :]
    for step in range(1, sizes.gen_length + 1):
        start = time.perf_counter()
        with torch.inference_mode():
            decide_one(logits_of(canvas, step)[:, len(sizes.prompt) :], response, model.mask_token)
        tokens = response[0].cpu().numpy().copy()  # on a GPU this waits for the step
        seconds = time.perf_counter() - start
        yield Step(sizes.kind(policy, step), seconds, None, tokens)


def decide_one(logits: Tensor, response: Tensor, mask_token: int) -> None:
    """Commit the most confident masked row of [1, R] in place."""
    logits[:, :, mask_token] = -torch.inf
    confidence, tokens = logits.softmax(-1).max(-1)
    row = confidence.where(response == mask_token, -torch.inf).argmax(-1, keepdim=True)
    response.scatter_(1, row, tokens.gather(1, row))


def runtime_steps(lm: DiffusionLM, sizes: Sizes, policy: CachePolicy) -> Iterator[Step]:
    """The same through a DiffusionLM; whatever it does before the first step counts for that step."""
    start = time.perf_counter()
    options = GenerationOptions(gen_length=sizes.gen_length, steps=sizes.gen_length)
    frames = lm.stream(lm.continuation([sizes.prompt], options), options, policy)
    for frame in frames:
        seconds = time.perf_counter() - start
        yield Step(frame.kind, seconds, frame.engine_seconds, frame.tokens[0].astype(np.int64))
        start = time.perf_counter()


def run_in_turns(
    columns: Sequence[Column], turn: int, rounds: int, report: Callable[[int], None]
) -> list[list[list[Step]]]:
    """Steps by column and round. Columns take turns of a few steps, in alternating order, so that drift hits all alike."""
    for column in columns:
        for _ in islice(column.start(), column.warmup):
            pass
    results: list[list[list[Step]]] = [[] for _ in columns]
    for _ in range(rounds):
        runs = [column.start() for column in columns]
        done: list[list[Step]] = [[] for _ in columns]
        for number in count():
            before = len(done[0])
            for place in range(len(runs)) if number % 2 == 0 else reversed(range(len(runs))):
                done[place].extend(islice(runs[place], turn))
            report(len(done[0]))
            if len(done[0]) == before:
                break
        for finished, steps in zip(results, done, strict=True):
            finished.append(steps)
    return results
