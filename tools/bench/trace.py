"""A report as Chrome trace events, which Perfetto and chrome://tracing show: a process a column, a thread a policy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from dllm_export.tools.bench.records import BenchReport, Run


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One event; times in microseconds."""

    name: str
    ph: Literal["X", "M", "C"]
    pid: int
    tid: int
    ts: float = 0.0
    dur: float | None = None
    cat: str = ""
    args: dict[str, object] = {}


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """The whole file."""

    traceEvents: tuple[Event, ...]
    displayTimeUnit: Literal["ms"] = "ms"


def make_trace(report: BenchReport) -> Trace:
    """Every step of every run, end to end, with its time in the provider inside."""
    events: list[Event] = []
    for pid, (name, column) in enumerate(report.columns.items(), 1):
        events.append(Event(name="process_name", ph="M", pid=pid, tid=0, args={"name": name}))
        for tid, run in enumerate(column.runs, 1):
            events.append(Event(name="thread_name", ph="M", pid=pid, tid=tid, args={"name": run.policy}))
            events.extend(make_events(run, pid, tid))
    return Trace(traceEvents=tuple(events))


def make_events(run: Run, pid: int, tid: int) -> Iterator[Event]:
    """The steps of a run, one after the other: what lies between two steps was not measured."""
    now = 0.0
    for number, step in enumerate(run.raw.steps, 1):
        length = 1e6 * step.seconds
        facts: dict[str, object] = {
            "step": number,
            "decided": [list(pair) for pair in step.decided],
            "flops": step.work.flops,
            "bytes": step.work.weight_bytes + step.work.cache_bytes,
        }
        yield Event(name=step.kind, ph="X", pid=pid, tid=tid, ts=now, dur=length, cat="step", args=facts)
        if step.engine_seconds is not None:
            inside = 1e6 * step.engine_seconds
            yield Event(name="engines", ph="X", pid=pid, tid=tid, ts=now, dur=min(inside, length), cat="engines")
        now += length
