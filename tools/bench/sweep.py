"""The benchmark at several prompt lengths, response lengths, batches or depths: one report for every point, and the slopes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise

from dllm_export import __version__
from dllm_export.errors import UsageError
from dllm_export.tools.bench.growth import Sample, Slopes, measure_slopes
from dllm_export.tools.bench.measure import Measurement, measure
from dllm_export.tools.bench.records import BenchReport, Record
from dllm_export.tools.bench.summary import all_runs, find_run
from dllm_export.tools.output import Report

SWEEP_SCHEMA = 1
AXES = {"prompt-length": "prompt token", "gen-length": "response token", "batch": "sequence", "layers": "layer"}
"""What can be swept, and what one more of it is."""


class SweepPoint(Record, frozen=True):
    """The whole benchmark at one value."""

    value: int
    report: BenchReport


class Growth(Record, frozen=True):
    """How the median time of a kind of step grows along an axis, where the column ran at two points or more."""

    column: str
    policy: str
    kind: str
    values: tuple[int, ...]
    slopes: Slopes


class Axis(Record, frozen=True):
    """One thing that was varied, everything else as asked for."""

    name: str
    unit: str
    """What one more of it is."""
    points: tuple[SweepPoint, ...]
    growth: tuple[Growth, ...]


class SweepReport(Record, frozen=True):
    """All axes of a sweep."""

    schema: int
    tool: str
    version: str
    command: str
    seconds: float
    axes: tuple[Axis, ...]


@dataclass(frozen=True, slots=True)
class Sweep:
    """An axis and its values, in rising order."""

    axis: str
    values: tuple[int, ...]

    @property
    def field(self) -> str:
        """The option's name."""
        return self.axis.replace("-", "_")


@dataclass(frozen=True, slots=True)
class Planned:
    """A point that can be measured: what opens its bundle and says what to measure there."""

    axis: str
    value: int
    open: Callable[[], AbstractContextManager[Measurement]]


def read_sweep(text: str) -> Sweep:
    """`batch=1,2,4` -> an axis with its values."""
    axis, equals, listed = text.partition("=")
    if axis not in AXES or not equals:
        raise UsageError(f"--sweep is {text}, expected one of {', '.join(AXES)}, then = and values, as in batch=1,2,4")
    parts = [part.strip() for part in listed.split(",")]
    values = tuple(int(part) for part in parts if part.isdecimal())
    rising = all(low < high for low, high in pairwise(values))
    if len(values) != len(parts) or len(values) < 2 or values[0] < 1 or not rising:
        raise UsageError(
            f"--sweep {axis} has {listed or 'nothing'}, expected two or more rising whole numbers from 1 up, as in 256,512,1024"
        )
    return Sweep(axis, values)


def read_sweeps(texts: Sequence[str]) -> tuple[Sweep, ...]:
    """All axes, each once."""
    sweeps = tuple(read_sweep(text) for text in texts)
    names = [sweep.axis for sweep in sweeps]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"--sweep {twice} is given twice: put all its values behind one")
    return sweeps


def measure_sweep(
    planned: Sequence[Planned], command: str, progress: Report, save: Callable[[SweepReport], None]
) -> SweepReport:
    """Every point, one after the other; what is known is saved after each, so that a sweep that is cut short is not lost."""
    start = time.perf_counter()
    points: dict[str, list[SweepPoint]] = {}
    report = summarize_sweep(points, command, 0.0)
    for number, point in enumerate(planned):

        def advance(name: str, done: int, total: int, number: int = number, point: Planned = point) -> None:
            progress(f"{point.axis} {point.value}: {name}", number * total + done, len(planned) * total)

        with point.open() as what:
            outcome = measure(what, command, advance)
        points.setdefault(point.axis, []).append(SweepPoint(value=point.value, report=outcome))
        report = summarize_sweep(points, command, time.perf_counter() - start)
        save(report)
    return report


def summarize_sweep(points: dict[str, list[SweepPoint]], command: str, seconds: float) -> SweepReport:
    """The points with what follows from them."""
    return SweepReport(
        schema=SWEEP_SCHEMA,
        tool="dllm-export bench --sweep",
        version=__version__,
        command=command,
        seconds=seconds,
        axes=tuple(
            Axis(name=name, unit=AXES[name], points=tuple(made), growth=tuple(make_growth(made)))
            for name, made in points.items()
        ),
    )


def make_growth(points: Sequence[SweepPoint]) -> Iterator[Growth]:
    """The slopes of every kind of step of every run that is there at two points or more."""
    known = [point.report.limits.bytes_per_second for point in points if point.report.limits is not None]
    for column, policy, kind in list_kinds(points):
        samples = list(collect_samples(points, column, policy, kind))
        if len(samples) > 1:
            here = all(
                point.report.columns[column].raw.place == point.report.settings.device
                for point in points
                if column in point.report.columns
            )
            slopes = measure_slopes(samples, known[-1] if known and here else None)
            values = tuple(sample.value for sample in samples)
            yield Growth(column=column, policy=policy, kind=kind, values=values, slopes=slopes)


def list_kinds(points: Sequence[SweepPoint]) -> Iterable[tuple[str, str, str]]:
    """Column, policy and kind of step of everything that ran somewhere."""
    return dict.fromkeys(
        (column, run.policy, kind)
        for point in points
        for column, run in all_runs(point.report.columns)
        for kind in run.kinds
    )


def collect_samples(points: Sequence[SweepPoint], column: str, policy: str, kind: str) -> Iterator[Sample]:
    """A kind of step at every point where it occurs, all rounds together."""
    for point in points:
        if find_run(point.report.columns, column, policy) is None:
            continue
        steps = [
            step
            for run in point.report.columns[column].runs
            if run.policy == policy
            for step in run.raw.steps
            if step.kind == kind
        ]
        if steps:
            read = [step.work.weight_bytes + step.work.cache_bytes for step in steps]
            yield Sample(value=point.value, seconds=[step.seconds for step in steps], read_bytes=sum(read) / len(read))
