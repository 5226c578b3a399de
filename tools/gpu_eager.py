"""The PyTorch columns of the GPU check: the model as published, eager, without a cache and with four cached features."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch

from dllm_export.runtime.policies import CachePolicy, DllmCache, NoCache
from dllm_export.runtime.session import SessionReport
from dllm_export.tools.bench_columns import Sizes, Step, eager_steps
from dllm_export.tools.eager import load_eager
from dllm_export.tools.four_feature import FourFeatureCache
from dllm_export.tools.gpu_column import ColumnReport, Request, Run, draw_prompt, summarize, used_memory


def measure_eager(checkpoint: Path, device: str, dtype: str, request: Request) -> ColumnReport:
    """Load the checkpoint in the bundle's type and time both ways of running it."""
    start = time.perf_counter()
    model = load_eager(checkpoint, getattr(torch, dtype), device)
    opened = time.perf_counter() - start
    prompt = draw_prompt(min(model.mask_token, model.eos_token), request)
    sizes = Sizes(tuple(prompt), request.response, len(model.layers))
    context = model.context([0], request.prompt + request.response)
    none, cache = NoCache(), DllmCache()

    def start_none() -> Iterator[Step]:
        return eager_steps(model, lambda tokens, _: model.forward(tokens, context), sizes, none)

    def start_cache() -> Iterator[Step]:
        return eager_steps(model, FourFeatureCache(model, context, request.prompt, cache).forward, sizes, cache)

    runs = (time_steps(none, start_none, request), time_steps(cache, start_cache, request))
    return ColumnReport(
        provider="eager",
        library=f"torch {torch.__version__}",
        device=device,
        captures=0,
        python=platform.python_version(),
        bundle="",
        dtype=dtype,
        request=request,
        open_seconds=opened,
        device_memory=used_memory(),
        graphs=(),
        runs=runs,
        session=SessionReport(provider="eager", library=f"torch {torch.__version__}"),
    )


def time_steps(policy: CachePolicy, start: Callable[[], Iterator[Step]], request: Request) -> Run:
    """One generation to warm up, one on the clock."""
    for _ in islice(start(), request.steps):
        pass
    steps: list[Step] = list(islice(start(), request.steps))
    kinds: dict[str, list[float]] = {}
    for step in steps:
        kinds.setdefault(step.kind, []).append(step.seconds)
    return Run(
        policy=policy.name,
        tokens_per_second=len(steps) / sum(step.seconds for step in steps),
        kinds={kind: summarize(seconds) for kind, seconds in kinds.items()},
        outside_engines=None,
        tokens=steps[-1].tokens.tolist(),
        parts_ms=None,
    )


def main(arguments: Sequence[str]) -> None:
    """Measure and print the column as JSON on stdout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--prompt", type=int, default=893)
    parser.add_argument("--response", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args(arguments)
    request = Request(prompt=given.prompt, response=given.response, steps=given.steps)
    print(json.dumps(asdict(measure_eager(given.checkpoint, given.device, given.dtype, request))))


if __name__ == "__main__":
    main(sys.argv[1:])
