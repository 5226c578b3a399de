"""What a step must compute and read, and how long that takes at best. Pure arithmetic over graph calls and their sizes.

The limit of a step is the longer of two times: its multiplications and additions at the machine's matrix rate, and the
weights and cached keys and values that it has to read at the machine's bandwidth. What else a step moves (hidden rows, new
keys and values, deltas) is left out: it is small, and a limit that leaves something out is still a limit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from dllm_export.graphs import DType, GraphSpec, ModelShape, TensorSpec
from dllm_export.graphs.counting_ops import Product, count_products

TYPE_BYTES: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "int64": 8,
    "bool": 1,
}


@dataclass(frozen=True, slots=True)
class Call:
    """One run of a graph: its layer, where it has one, and the size of every dim letter."""

    graph: str
    layer: int | None
    sizes: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What some graph calls compute and read."""

    flops: int = 0
    weight_bytes: int = 0
    cache_bytes: int = 0
    """Cached keys and values that were there before."""

    def __add__(self, other: Work) -> Work:
        return Work(
            flops=self.flops + other.flops,
            weight_bytes=self.weight_bytes + other.weight_bytes,
            cache_bytes=self.cache_bytes + other.cache_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a machine does at best."""

    flops_per_second: float
    bytes_per_second: float

    def seconds(self, work: Work) -> float:
        """The least time of this work."""
        return max(work.flops / self.flops_per_second, (work.weight_bytes + work.cache_bytes) / self.bytes_per_second)

    def break_even_rows(self, type_bytes: int) -> float:
        """Rows up to which reading the weights takes longer than multiplying by them: fewer rows then save nothing."""
        return self.flops_per_second / self.bytes_per_second * type_bytes / 2


@dataclass(frozen=True, slots=True)
class Model:
    """Graphs, shape and type: what the work of a call depends on beside its sizes."""

    specs: Mapping[str, GraphSpec]
    shape: ModelShape
    dtype: DType
    _products: dict[tuple[str, tuple[tuple[str, int], ...]], tuple[Product, ...]] = field(default_factory=dict)

    def products(self, call: Call) -> tuple[Product, ...]:
        """The matrix products of a call."""
        key = (call.graph, tuple(sorted(call.sizes.items())))
        if key not in self._products:
            self._products[key] = count_products(self.specs[call.graph], self.shape, call.sizes)
        return self._products[key]

    def work(self, calls: Iterable[Call]) -> Work:
        """The work of a step; a weight that several of its calls use is read once."""
        flops = cached = 0
        read: dict[tuple[str, int | None], int] = {}
        for call in calls:
            spec = self.specs[call.graph]
            flops += sum(product.flops for product in self.products(call))
            scope = call.layer if call.graph.startswith("layer_") else None
            for weight in spec.weights:
                dims = self._read_part(call, weight)
                key = (f"{weight.name}.rows" if call.graph == "embed" else weight.name, scope)
                read[key] = self._bytes(weight.type, dims, call.sizes)
            if any(tensor.name == "slot" for tensor in spec.inputs):
                cached += sum(
                    self._bytes(tensor.type, tensor.dims, call.sizes)
                    for tensor in spec.inputs
                    if tensor.name in ("key", "value")
                )
        return Work(flops=flops, weight_bytes=sum(read.values()), cache_bytes=cached)

    def _read_part(self, call: Call, weight: TensorSpec) -> tuple[str | int, ...]:
        """What a call reads of a weight at least: embeddings of its rows, and no more experts than its rows have."""
        if call.graph == "embed":
            return (call.sizes["B"], call.sizes["X"], weight.dims[1])
        if self.shape.experts is None or not weight.name.startswith("expert_"):
            return weight.dims
        pairs = (
            call.sizes["B"] * (call.sizes["Q"] if "Q" in call.sizes else call.sizes["S"]) * self.shape.experts.per_token
        )
        return (min(self.shape.experts.count, pairs), *weight.dims[1:])

    def count(self, calls: Iterable[Call]) -> Counter[Product]:
        """How often each matrix product occurs."""
        return Counter(product for call in calls for product in self.products(call))

    def _bytes(self, type: str, dims: Sequence[str | int], sizes: Mapping[str, int]) -> int:
        kind = self.dtype if type == "compute" else type
        return TYPE_BYTES[kind] * prod(sizes[dim] if isinstance(dim, str) else dim for dim in dims)
