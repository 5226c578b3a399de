"""All columns of a benchmark, one process after the other, into one report."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from dllm_export import __version__
from dllm_export.graphs.counting_ops import Product
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.plugins import find_policy, find_transfer
from dllm_export.tools.bench.columns import COLUMNS, find_obstacle
from dllm_export.tools.bench.processes import Failed, ask
from dllm_export.tools.bench.records import (
    SCHEMA,
    BenchReport,
    Column,
    ColumnTask,
    LimitsTask,
    MachineRecord,
    MeasuredLimits,
    ProductQuery,
    RawColumn,
    Settings,
)
from dllm_export.tools.bench.roofline import TYPE_BYTES
from dllm_export.tools.bench.session_runs import Outlook, foresee, to_request
from dllm_export.tools.bench.summary import (
    find_doubts,
    make_agreement,
    make_products_ratios,
    make_ratios,
    summarize_run,
    to_limits,
)
from dllm_export.tools.machine import cpu_model, find_free_memory, find_memory, inspect_machine
from dllm_export.tools.output import Report, format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What to measure, and with which interpreters."""

    bundle: Bundle
    checkpoint: Path | None
    prompts: tuple[tuple[int, ...], ...]
    """One of each sequence of the batch, all equally long."""
    settings: Settings
    columns: Sequence[str]
    rows: tuple[int, ...] = ()
    graphs: bool = True
    products: bool = True
    """Whether every matrix product is timed alone."""
    nvtx: bool = False
    pythons: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Provider or flavour -> command that starts its Python; this one where none is named."""

    def task(self, column: str) -> ColumnTask:
        """What the column's process is asked."""
        return ColumnTask(
            column=column,
            bundle=str(self.bundle.path),
            checkpoint=None if self.checkpoint is None else str(self.checkpoint),
            prompts=self.prompts,
            settings=self.settings,
            rows=self.rows,
            graphs=self.graphs,
            nvtx=self.nvtx,
        )

    def python(self, column: str) -> Sequence[str]:
        """The command that starts the column's Python."""
        kind = COLUMNS[column]
        return self.pythons.get(kind.flavour or kind.provider, ())


def measure(
    what: Measurement, command: str, progress: Report, save: Callable[[BenchReport], None] = lambda report: None
) -> BenchReport:
    """Limits first, then every column in every round; one that fails leaves a line and the others run.

    What is known is saved after each column, so that a run that is cut short is not lost.
    """
    start, settings, bundle = time.perf_counter(), what.settings, what.bundle
    machine = inspect_machine(bundle.path)
    outlooks = {record.name: foresee_policy(what, record.name, record.settings) for record in settings.policies}
    limits, limits_failure = ask_limits(what, outlooks)
    raw: dict[str, list[RawColumn]] = {}
    failures: dict[str, str] = {}
    needs = {name: need_memory(what, name, outlooks) for name in what.columns}
    products = count_products(outlooks, limits)

    def summarize() -> BenchReport:
        columns = {
            name: finish_column(what, name, rounds, limits, products, needs[name])
            for name in what.columns
            if (rounds := raw.get(name))
        }
        return BenchReport(
            schema=SCHEMA,
            tool="dllm-export bench",
            version=__version__,
            command=command,
            seconds=time.perf_counter() - start,
            machine=MachineRecord(
                cpu=cpu_model(),
                cores=os.cpu_count() or 1,
                memory=find_memory(),
                system=f"{platform.system()} {platform.machine()}",
                python=platform.python_version(),
                packages=dict(machine.packages),
                gpus=machine.gpus,
            ),
            settings=settings,
            limits=limits,
            limits_failure=limits_failure,
            break_even_rows=to_limits(limits).break_even_rows(TYPE_BYTES[settings.dtype]) if limits else None,
            products_ms={policy: 1e3 * seconds for policy, seconds in products.items()},
            columns=columns,
            failures=failures,
            ratios=tuple(make_ratios(columns, settings)),
            times_products=tuple(make_products_ratios(columns, settings)),
            agreement=tuple(make_agreement(columns)),
            warnings=tuple(find_doubts(columns)),
        )

    total = settings.rounds * len(what.columns)
    for number in range(total):
        turn, place = divmod(number, len(what.columns))
        # Every other round goes backwards, so that drift hits the first and the last column alike.
        name = what.columns[place if turn % 2 == 0 else -1 - place]
        progress(name, number, total)
        if name in failures:
            continue
        kind = COLUMNS[name]
        where = kind.where(settings.device)
        obstacle = find_obstacle(kind, bundle.manifest.engines, settings.dtype, gpu=bool(machine.gpus))
        obstacle = obstacle or find_shortage(kind.way, needs[name], where, [one.name for one in settings.policies])
        try:
            if obstacle:
                raise Failed(obstacle)
            raw.setdefault(name, []).append(ask("column", what.task(name), RawColumn, what.python(name)))
        except Failed as error:
            memory = f"; it needs about {format_bytes(needs[name])}" if "memory" in str(error) and not obstacle else ""
            failures[name] = f"{error}{memory}"
        save(summarize())
    return summarize()


def finish_column(
    what: Measurement,
    name: str,
    rounds: Sequence[RawColumn],
    limits: MeasuredLimits | None,
    products: Mapping[str, float],
    needs: int,
) -> Column:
    """The figures of a column of all rounds. Limits are those of one device: a column that ran elsewhere has none."""
    tokens, settings = what.bundle.manifest.tokens, what.settings
    here = rounds[0].place == settings.device
    bound = to_limits(limits) if limits and here else None
    # Without a schedule what a step decides, and so which products it has, is not foreseen.
    foreseen = find_transfer(settings.transfer.name).keeps_schedule
    timed = products if here and foreseen and COLUMNS[name].way == "session" else {}
    runs = tuple(
        summarize_run(run, bound, timed.get(run.policy), sorted(tokens.ends), tokens.mask, settings.batch)
        for column in rounds
        for run in column.runs
    )
    return Column(what=COLUMNS[name].what, needs=needs, runs=runs, raw=strip_runs(rounds[0]))


def strip_runs(column: RawColumn) -> RawColumn:
    """The column without its runs, which the report has elsewhere."""
    return msgspec.structs.replace(column, runs=())


def foresee_policy(what: Measurement, name: str, settings: Mapping[str, object]) -> Outlook:
    """What a policy's steps will do."""
    policy = find_policy(name)(**settings)
    return foresee(what.bundle, to_request(what.prompts, what.settings), what.settings.steps, policy)


def ask_limits(what: Measurement, outlooks: Mapping[str, Outlook]) -> tuple[MeasuredLimits | None, str]:
    """What the machine does at best, or why that is not known."""
    settings, listed = what.settings, list_products(outlooks) if what.products else []
    task = LimitsTask(
        dtype=settings.dtype,
        device=settings.device,
        threads=settings.threads,
        working_set=max(work.weight_bytes + work.cache_bytes for one in outlooks.values() for work in one.work),
        products=tuple(to_query(product, settings.shape.layers) for product in listed),
    )
    try:
        return ask("machine_limits", task, MeasuredLimits, threads=settings.threads), ""
    except Failed as error:
        return None, str(error)


def list_products(outlooks: Mapping[str, Outlook]) -> list[Product]:
    """Every matrix product that some policy has, once."""
    every: Counter[Product] = Counter()
    for outlook in outlooks.values():
        every |= outlook.products
    return sorted(every)


def to_query(product: Product, layers: int) -> ProductQuery:
    """The product as the process that times it is asked."""
    return ProductQuery(
        rows=product.rows,
        inner=product.inner,
        columns=product.columns,
        count=product.count,
        stored=product.stored,
        weights=layers,
    )


def count_products(outlooks: Mapping[str, Outlook], limits: MeasuredLimits | None) -> dict[str, float]:
    """Policy -> seconds of all matrix products of its timed steps, each timed alone."""
    if limits is None or not limits.product_seconds:
        return {}
    seconds = dict(zip(list_products(outlooks), limits.product_seconds, strict=True))
    return {
        policy: sum(count * seconds[product] for product, count in outlook.products.items())
        for policy, outlook in outlooks.items()
    }


def need_memory(what: Measurement, column: str, outlooks: Mapping[str, Outlook]) -> int:
    """Bytes that a column takes, roughly."""
    settings = what.settings
    logits = settings.batch * (settings.prompt + settings.response) * settings.shape.vocab * 4
    return COLUMNS[column].memory(
        weights=what.bundle.weight_bytes,
        buffers=max(outlook.buffer_bytes for outlook in outlooks.values()),
        logits=logits,
        layer_graphs=max(outlook.layer_graphs for outlook in outlooks.values()),
    )


def find_shortage(way: str, needs: int, where: str, policies: Sequence[str]) -> str:
    """Why a column cannot run that the machine could run otherwise."""
    if way == "four-feature" and "dllm-cache" not in policies:
        return "the published code has dLLM-Cache only: add --policy dllm-cache"
    free = find_free_memory(where)
    if free is not None and needs > free:
        return f"needs about {format_bytes(needs)} of memory, {format_bytes(free)} are free"
    return ""


def draw_prompts(bundle: Bundle, count: int, seed: int, batch: int = 1) -> tuple[tuple[int, ...], ...]:
    """Random ordinary tokens, the same for every column; the first prompts are the same in every batch."""
    manifest = bundle.manifest
    ordinary = min(manifest.shape.vocab, manifest.tokens.mask, *manifest.tokens.ends)
    return tuple(map(tuple, np.random.default_rng(seed).integers(0, ordinary, (batch, count)).tolist()))
