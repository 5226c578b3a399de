"""One column: reads a ColumnTask as JSON on stdin, measures it, and prints a RawColumn as JSON in the last line of stdout.

Runs in a process of its own, so that columns share neither memory nor threads. A column of the runtime needs only what the
runtime needs: no torch and no onnx.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from dllm_export.runtime.bundle import Bundle, open_bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.plugins import find_policy
from dllm_export.runtime.policies import CachePolicy, DllmCache
from dllm_export.runtime.schedule import commit_counts
from dllm_export.runtime.session import Session, open_session
from dllm_export.runtime.transfers import Quota
from dllm_export.tools.bench.columns import COLUMNS, ColumnKind
from dllm_export.tools.bench.graph_runs import time_graphs
from dllm_export.tools.bench.metering import MeteredSession
from dllm_export.tools.bench.processes import answer
from dllm_export.tools.bench.ranges import NoRanges, NvtxRanges
from dllm_export.tools.bench.records import ColumnTask, RawColumn, RawRun, StepRecord, WorkRecord
from dllm_export.tools.bench.roofline import Model, Work
from dllm_export.tools.bench.session_runs import SessionRequest, foresee, session_steps, to_request
from dllm_export.tools.bench.step import Step
from dllm_export.tools.machine import Others, ask_gpu

WARMUP_UNCACHED, WARMUP_CACHED = 4, 27
"""Steps before the clock on a CPU: every kind of step that the published settings make, and both halves of the caches."""

Start = Callable[[], Iterator[Step]]


def measure_column(task: ColumnTask) -> RawColumn:
    """Open, then time graphs, then steps."""
    kind, start = COLUMNS[task.column], time.perf_counter()
    bundle = open_bundle(task.bundle)
    policies = [find_policy(record.name)(**record.settings) for record in task.settings.policies]
    if kind.way == "session":
        return measure_session(task, kind, bundle, policies, start)
    return measure_eager(task, kind, bundle, policies, start)


def measure_session(
    task: ColumnTask, kind: ColumnKind, bundle: Bundle, policies: Sequence[CachePolicy], start: float
) -> RawColumn:
    """A provider under the runtime."""
    settings, manifest = task.settings, bundle.manifest
    ranges = NvtxRanges() if task.nvtx else NoRanges()
    session = open_column(kind, bundle, settings.device, settings.threads)
    metered = MeteredSession(session, Model(bundle.specs, manifest.shape, manifest.dtype))
    with DiffusionLM(bundle, metered) as lm:
        opened = time.perf_counter() - start
        # Sizes that no step has would be compiled too, and make PyTorch compile the steps' for any size.
        wanted = task.graphs and not kind.compile
        timed = (
            time_graphs(bundle, session, settings.prompt, settings.response, task.rows, settings.batch)
            if wanted
            else ()
        )
        graphs, runs, request = tuple(timed), [], to_request(task.prompts, settings)
        for policy in policies:

            def begin(policy: CachePolicy = policy) -> Iterator[Step]:
                return session_steps(lm, metered.meter, request, policy, ranges)

            runs.append(time_run(begin, policy.name, task, kind, manifest.tokens.mask))
        held = session.inspect()
        return RawColumn(
            library=held.library,
            python=platform.python_version(),
            place=kind.where(settings.device),
            open_seconds=opened,
            host_memory=peak_memory(),
            device_memory=used_memory(kind, settings.device),
            device_state=device_state(kind, settings.device),
            graphs=graphs,
            runs=tuple(runs),
            session=held,
        )


def measure_eager(
    task: ColumnTask, kind: ColumnKind, bundle: Bundle, policies: Sequence[CachePolicy], start: float
) -> RawColumn:
    """Plain PyTorch: no cache, or the one published cache that it has."""
    import torch

    from dllm_export.tools.bench.eager_runs import EagerRequest
    from dllm_export.tools.bench.eager_weights import unfuse_eager
    from dllm_export.tools.eager import load_eager

    settings, place = task.settings, kind.where(task.settings.device)
    torch.set_num_threads(settings.threads)
    dtype = getattr(torch, bundle.manifest.dtype)
    stored = task.checkpoint
    model = unfuse_eager(bundle, dtype, place) if stored is None else load_eager(Path(stored), dtype, place)
    opened, asked = time.perf_counter() - start, to_request(task.prompts, settings)
    # Another rule than the quota is the runtime's alone: plain PyTorch then decides one token a step.
    asked = asked if isinstance(asked.rule, Quota) else SessionRequest(prompts=task.prompts, response=settings.response)
    counts = tuple(commit_counts(np.array([settings.response]), asked.steps)[0].tolist())
    request = EagerRequest(model, task.prompts, settings.response, counts)
    cached = next((one for one in policies if isinstance(one, DllmCache)), None) if kind.way != "eager" else None
    policy = cached or policies[0]

    def begin() -> Iterator[Step]:
        return request.steps(request.four_feature(cached) if cached else whole, policy)

    whole = request.uncached(compiled=kind.compile, captured=kind.captures > 0)
    work = foresee(bundle, asked, settings.steps, policy).work
    run = time_run(begin, policy.name, task, kind, model.mask_token, work)
    return RawColumn(
        library=f"torch {torch.__version__}",
        python=platform.python_version(),
        place=place,
        open_seconds=opened,
        host_memory=peak_memory(),
        device_memory=used_memory(kind, settings.device),
        device_state=device_state(kind, settings.device),
        graphs=(),
        runs=(run,),
        session=None,
    )


def open_column(kind: ColumnKind, bundle: Bundle, device: str, threads: int) -> Session:
    """The column's session."""
    options = kind.session(device, threads)
    if kind.flavour is not None:
        from dllm_export.runtime.sessions.tensorrt import TensorRtSession

        return TensorRtSession(bundle, options, flavours=(kind.flavour,))
    return open_session(bundle, options)


def time_run(
    start: Start, policy: str, task: ColumnTask, kind: ColumnKind, mask: int, work: Sequence[Work] = ()
) -> RawRun:
    """Some steps of a generation to warm up, and those of another one on the clock."""
    for _ in islice(start(), count_warmup(task, kind, policy)):
        pass
    with Others() as others:
        steps = list(islice(start(), task.settings.steps))
    records, before = [], [mask] * task.settings.response * task.settings.batch
    for number, step in enumerate(steps):
        after = step.tokens.tolist()
        decided = tuple((row, token) for row, token in enumerate(after) if token != before[row])
        done = work[number] if work else step.work
        records.append(
            StepRecord(
                kind=step.kind,
                seconds=step.seconds,
                engine_seconds=step.engine_seconds,
                work=WorkRecord(flops=done.flops, weight_bytes=done.weight_bytes, cache_bytes=done.cache_bytes),
                decided=decided,
            )
        )
        before = after
    return RawRun(policy=policy, steps=tuple(records), tokens=tuple(before), others=others.share)


def count_warmup(task: ColumnTask, kind: ColumnKind, policy: str) -> int:
    """Steps before the clock: all of the timed ones where steps are captured or compiled at their first runs."""
    settings = task.settings
    if settings.warmup is not None:
        return settings.warmup
    sizes_change = kind.compile and kind.way == "session"  # plain PyTorch always computes every row
    if sizes_change or kind.where(settings.device) == "cuda":
        return settings.steps
    return min(settings.steps, WARMUP_UNCACHED if policy == "none" else WARMUP_CACHED)


def peak_memory() -> int:
    """Most bytes that this process has held; 0 where the system does not tell. getrusage would count the parent's too."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def used_memory(kind: ColumnKind, device: str) -> int | None:
    """Bytes of memory in use on the first GPU."""
    found = ask_gpu("memory.used") if kind.where(device) == "cuda" else ""
    return int(found) * 2**20 if found.isdecimal() else None


def device_state(kind: ColumnKind, device: str) -> str:
    """Clocks, power and temperature of the first GPU."""
    fields = "clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    found = ask_gpu(fields) if kind.where(device) == "cuda" else ""
    return f"{fields}: {found}" if found else ""


if __name__ == "__main__":
    sys.exit(answer(ColumnTask, measure_column))
