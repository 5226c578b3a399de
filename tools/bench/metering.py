"""The work of a step, taken from the very calls that the step makes: a session that counts, and one that only counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dllm_export.graphs import TensorType
from dllm_export.graphs.counting_ops import Product
from dllm_export.runtime.session import Buffer, Fetch, GraphCall, HostMark, Program, Session, SessionReport
from dllm_export.runtime.tensorrt.profiles import measure_sizes
from dllm_export.tools.bench.roofline import TYPE_BYTES, Call, Model, Work

READ_TYPES = {"int32": np.int32, "int64": np.int64, "bool": np.bool_}


def describe_call(model: Model, call: GraphCall) -> Call:
    """The call as sizes."""
    dims = {name: buffer.dims for name, buffer in call.tensors.items()}
    return Call(call.graph, call.layer, measure_sizes(model.specs[call.graph], dims))


@dataclass(slots=True)
class Meter:
    """The programs that ran since they were last taken; matrix products and graphs of all that ran."""

    model: Model
    runs: list[Work] = field(default_factory=list)
    products: Counter[Product] = field(default_factory=Counter)
    graphs: set[str] = field(default_factory=set)

    def take(self, *, ahead: bool = False) -> Work:
        """Work of the programs since it was last taken; with `ahead` the last one is the next step's, queued already."""
        taken, self.runs = (self.runs[:-1], self.runs[-1:]) if ahead else (self.runs, [])
        return sum(taken, Work())


class MeteredSession:
    """A session that counts what its programs do; all else is the other session's."""

    def __init__(self, session: Session, model: Model) -> None:
        self._session, self.meter = session, Meter(model)
        self.provider, self.in_place = session.provider, session.in_place
        self.few_sizes, self.queues = session.few_sizes, session.queues
        self.allocate, self.fetch, self.mark = session.allocate, session.fetch, session.mark
        self.inspect, self.close = session.inspect, session.close

    def prepare(self, calls: Sequence[GraphCall]) -> Program:
        meter, made = self.meter, [describe_call(self.meter.model, call) for call in calls]
        work, products, program = meter.model.work(made), meter.model.count(made), self._session.prepare(calls)

        def run() -> None:
            program()
            meter.runs.append(work)
            meter.products.update(products)
            meter.graphs.update(call.graph for call in made)

        return run


@dataclass(frozen=True, slots=True)
class OutlineBuffer:
    """A tensor of which only the sizes are there; it reads as zeros."""

    dims: tuple[int, ...]
    type: TensorType

    def write(self, array: NDArray[Any]) -> None:
        pass

    def read(self) -> NDArray[Any]:
        return np.zeros(self.dims, READ_TYPES.get(self.type, np.float32))


class OutlineSession:
    """A session that computes nothing: with it a generation says what it would do, and what memory its buffers take."""

    provider = "outline"
    in_place: frozenset[str] = frozenset()
    few_sizes = False
    queues = False

    def __init__(self, dtype: str) -> None:
        self._dtype, self.buffer_bytes = dtype, 0

    def allocate(self, dims: tuple[int, ...], type: TensorType) -> Buffer:
        self.buffer_bytes += prod(dims) * TYPE_BYTES[self._dtype if type == "compute" else type]
        return OutlineBuffer(dims, type)

    def prepare(self, calls: Sequence[GraphCall]) -> Program:
        return lambda: None

    def fetch(self, buffers: Sequence[Buffer]) -> Fetch:
        return lambda: [buffer.read() for buffer in buffers]

    def mark(self) -> HostMark:
        return HostMark()

    def inspect(self) -> SessionReport:
        return SessionReport(provider=self.provider, library="none", memory={"buffers": self.buffer_bytes})

    def close(self) -> None:
        pass
