"""What the benchmark's processes tell one another, and what a report holds: docs/bench.schema.json is made from here."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from dllm_export.graphs import ModelShape
from dllm_export.runtime.session import SessionReport
from dllm_export.runtime.tensorrt.library import Flavour
from dllm_export.tools.machine import Gpu

SCHEMA = 1


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A JSON object whose fields are all known."""


class StrategyRecord(Record, frozen=True):
    """A cache policy or decoding rule by name, with its options."""

    name: str
    settings: dict[str, Any]


class Settings(Record, frozen=True):
    """What is measured: the same for every column."""

    bundle: str
    """Digest of its manifest."""
    shape: ModelShape
    dtype: str
    prompt: int
    response: int
    batch: int
    steps: int
    """Steps that are timed at most, each of them one forward pass."""
    warmup: int | None
    """Steps before the clock; null: docs/benchmarking.md."""
    rounds: int
    seed: int
    threads: int
    device: str
    policies: tuple[StrategyRecord, ...]
    """Without a cache first."""
    transfer: StrategyRecord = StrategyRecord(name="quota", settings={})
    """The decoding rule of the runtime; plain PyTorch has quota alone."""
    tokens_per_step: int = 1
    """Of each sequence, under a rule that keeps to a schedule."""


class ColumnTask(Record, frozen=True):
    """What a column's process is asked to do."""

    column: str
    bundle: str
    checkpoint: str | None
    """Where plain PyTorch reads its weights; null: out of the bundle."""
    prompts: tuple[tuple[int, ...], ...]
    """One of each sequence of the batch, all equally long."""
    settings: Settings
    rows: tuple[int, ...]
    """Counts of rows that partial layers are timed for."""
    graphs: bool
    nvtx: bool


class WorkRecord(Record, frozen=True):
    """What a step must compute and read."""

    flops: int
    weight_bytes: int
    cache_bytes: int


class StepRecord(Record, frozen=True):
    """One step on the clock."""

    kind: str
    seconds: float
    engine_seconds: float | None
    """Of these in the provider, where that is known."""
    work: WorkRecord
    decided: tuple[tuple[int, int], ...]
    """(row, token) of what the step decided; rows are counted through the responses of the batch, one after the other."""


class Times(Record, frozen=True):
    """Milliseconds."""

    samples: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    spread: float
    """Interquartile range as a share of the median."""


class GraphTimes(Record, frozen=True):
    """One graph at one set of sizes; a layer's time is the mean over a program that calls it once for every layer."""

    graph: str
    sizes: dict[str, int]
    calls: int
    call: Times
    work: WorkRecord


class RawRun(Record, frozen=True):
    """The steps of one policy, as its process saw them."""

    policy: str
    steps: tuple[StepRecord, ...]
    tokens: tuple[int, ...]
    """The responses after the last timed step, one after the other, undecided rows included."""
    others: float | None
    """Share of the machine's processor time that other processes took meanwhile."""


class RawColumn(Record, frozen=True):
    """Everything that was measured in one process."""

    library: str
    python: str
    place: str
    """cpu or cuda."""
    open_seconds: float
    """From the bundle's directory to ready."""
    host_memory: int
    """Most bytes of memory that the process held."""
    device_memory: int | None
    """Bytes of GPU memory in use at the end, as nvidia-smi counts them."""
    device_state: str
    """Clocks, power and temperature of the GPU at the end, as nvidia-smi gives them."""
    graphs: tuple[GraphTimes, ...]
    runs: tuple[RawRun, ...]
    session: SessionReport | None


class ProductQuery(Record, frozen=True):
    """`count` matrix products to time; with a `stored` one, as many weights are gone through as there are in a model."""

    rows: int
    inner: int
    columns: int
    count: int
    stored: bool
    weights: int


class LimitsTask(Record, frozen=True):
    """What the process that measures the machine is asked to do."""

    dtype: str
    device: str
    threads: int
    working_set: int
    """Bytes that a step reads: the copy is as large, so that what fits a cache is measured there."""
    products: tuple[ProductQuery, ...]


class MeasuredLimits(Record, frozen=True):
    """What the machine does at best."""

    bytes_per_second: float
    """Of a copy: bytes read and bytes written."""
    flops_per_second: float
    """The fastest matrix product that was measured."""
    product_seconds: tuple[float, ...]
    """Time of every product asked for, all its `count`, timed alone with the fastest library."""
    libraries: tuple[str, ...]


class KindSummary(Record, frozen=True):
    """The steps of one kind against what the machine does at best."""

    times: Times
    limit_ms: float | None
    share_of_limit: float | None
    """Limit / median: 1 is as fast as the machine can."""
    bound_by: str | None
    """reading or arithmetic."""


class Run(Record, frozen=True):
    """One policy in one column."""

    policy: str
    kinds: dict[str, KindSummary]
    passes: int
    """Forward passes on the clock."""
    canvas_tokens: int
    """Tokens decided on the clock."""
    answer_tokens: int | None
    """Tokens before the first end of text, of all sequences; null where the clock stopped before they were whole."""
    seconds: float
    tokens_per_second: float
    """Of canvas tokens."""
    answer_tokens_per_second: float | None
    first_step_ms: float
    outside_engines: float | None
    """Share of the time not spent in the provider, where that is known."""
    share_of_limit: float | None
    times_products: float | None
    """Time of all steps / that of their matrix products timed alone; on the device the products were timed on."""
    raw: RawRun

    @property
    def tokens_per_pass(self) -> float:
        """Of canvas tokens, of all sequences."""
        return self.canvas_tokens / self.passes


class Column(Record, frozen=True):
    """One column of the report; `runs` are those of all rounds."""

    what: str
    needs: int
    """Bytes of memory that it was expected to need."""
    runs: tuple[Run, ...]
    raw: RawColumn
    """Of the first round; its runs are in `runs`."""


class Ratio(Record, frozen=True):
    """How many times less time a run takes for a token than its baseline, with a 95 % interval of bootstrapped steps."""

    column: str
    policy: str
    baseline: str
    baseline_policy: str
    value: float
    low: float
    high: float
    bar: float | None
    met: bool | None


class Agreement(Record, frozen=True):
    """Equal tokens of two runs' responses among rows that either has decided, and the first step after which they differ (null:
    never)."""

    column: str
    policy: str
    reference: str
    reference_policy: str
    share: float
    first_difference: int | None


class ProductsRatio(Record, frozen=True):
    """A run's time over that of its matrix products alone, which a bar may bound from above."""

    column: str
    policy: str
    value: float
    bar: float | None
    met: bool | None


class MachineRecord(Record, frozen=True):
    """Where it was measured."""

    cpu: str
    cores: int
    memory: int | None
    system: str
    python: str
    packages: dict[str, str | None]
    gpus: tuple[Gpu, ...]


class BenchReport(Record, frozen=True):
    """Everything that a figure needs to be believed."""

    schema: int
    tool: str
    version: str
    command: str
    seconds: float
    machine: MachineRecord
    settings: Settings
    limits: MeasuredLimits | None
    limits_failure: str
    break_even_rows: float | None
    """Rows below which a step is bound by reading weights, so that fewer rows save nothing."""
    products_ms: dict[str, float]
    """Policy -> its timed steps' matrix products, each timed alone."""
    columns: dict[str, Column]
    failures: dict[str, str]
    """Column -> why it is missing."""
    ratios: tuple[Ratio, ...]
    times_products: tuple[ProductsRatio, ...]
    agreement: tuple[Agreement, ...]
    warnings: tuple[str, ...]


Form = Literal["bound", "embedded"]
"""Weights are inputs of an engine, or constants in it."""


class EmbeddedTask(Record, frozen=True):
    """What to build and how often to time it. The bundle has engines of this flavour, tuned for these sizes."""

    bundle: str
    flavour: Flavour
    length: int
    rows: int
    rounds: int = 8


class EmbeddedTimes(Record, frozen=True):
    """A layer's engines in both forms."""

    gpu: str
    library: str
    graph: str
    sizes: dict[str, int]
    ms: dict[Form, dict[str, list[float]]]
    """Form -> engine, or `all` for one after the other -> milliseconds of a call, for every round."""
    plan_bytes: dict[Form, int]
    """Of all engines of a layer."""
    build_seconds: dict[Form, float]
    difference: float
    """Largest difference of the layer's outputs between the two forms, over the output's largest value."""
