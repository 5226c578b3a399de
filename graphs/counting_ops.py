"""A third reading of `Ops`, which computes nothing: it follows sizes and lists the matrix products of a graph."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from math import prod

from dllm_export.graphs.rotary import rotate_halves
from dllm_export.graphs.shape import Experts, ModelShape
from dllm_export.graphs.spec import GraphSpec


@dataclass(frozen=True, slots=True, order=True)
class Product:
    """`count` products of [rows, inner] and [inner, columns]; `stored`: the second one is a weight."""

    rows: int
    inner: int
    columns: int
    count: int = 1
    stored: bool = True

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.count * self.rows * self.inner * self.columns


@dataclass(frozen=True, slots=True)
class Outline:
    """The sizes of a tensor; `value` where it holds one number that sizes depend on."""

    dims: tuple[int, ...]
    value: int | None = None


def count_products(spec: GraphSpec, shape: ModelShape, sizes: Mapping[str, int]) -> tuple[Product, ...]:
    """The matrix products of one call of a graph, in order. `sizes` has every dim letter of its inputs."""
    ops = CountingOps()
    tensors = {}
    for tensor in (*spec.inputs, *spec.weights):
        dims = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in tensor.dims)
        # An int64 tensor holds a size: the rows that a graph picks, which its outputs call Q.
        tensors[tensor.name] = Outline(dims, sizes["Q"] if tensor.type == "int64" else None)
    spec.function(ops, shape, tensors)
    return tuple(ops.products)


@dataclass(frozen=True, slots=True)
class CountingOps:
    """Sizes in, sizes out; every matrix product is added to `products`."""

    products: list[Product] = field(default_factory=list)

    def scope(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    # -- elementwise
    def add(self, left: Outline, right: Outline) -> Outline:
        return broadcast(left, right)

    sub = mul = div = both = matches = differs = exceeds = at_most = add

    def same(self, x: Outline) -> Outline:
        """Sizes stay as they are."""
        return Outline(x.dims)

    silu = sigmoid = gelu = relu = exp = log = floor = softmax = widen = same

    def scale(self, x: Outline, factor: float) -> Outline:
        return self.same(x)

    def rsqrt(self, x: Outline, eps: float) -> Outline:
        return self.same(x)

    def max_pool(self, x: Outline, width: int) -> Outline:
        return self.same(x)

    def narrow(self, x: Outline, like: Outline) -> Outline:
        return self.same(x)

    def where(self, condition: Outline, chosen: Outline, other: Outline) -> Outline:
        return broadcast(condition, broadcast(chosen, other))

    def fill(self, like: Outline, value: float) -> Outline:
        return Outline(())

    # -- reductions
    def mean(self, x: Outline) -> Outline:
        return Outline((*x.dims[:-1], 1))

    def sum(self, x: Outline, *, keep: bool) -> Outline:
        return Outline((*x.dims[:-1], 1) if keep else x.dims[:-1])

    max = sum

    def any_last(self, x: Outline) -> Outline:
        return Outline(x.dims[:-1])

    def top(self, x: Outline, count: Outline | int) -> tuple[Outline, Outline]:
        kept = Outline((*x.dims[:-1], read_count(count)))
        return kept, kept

    # -- counts
    def count_rows(self, x: Outline) -> Outline:
        return Outline((1,), x.dims[0] * x.dims[1])

    def smaller(self, left: Outline, right: Outline | int) -> Outline:
        return Outline((1,), min(read_count(left), read_count(right)))

    def times(self, count: Outline, factor: Outline | int) -> Outline:
        return Outline((1,), read_count(count) * read_count(factor))

    def divide(self, count: Outline, by: int) -> Outline:
        return Outline((1,), read_count(count) // by)

    def at_least(self, count: Outline, least: int) -> Outline:
        return Outline((1,), max(read_count(count), least))

    def count_up(self, count: Outline | int, beside: Outline) -> Outline:
        return Outline((read_count(count),))

    # -- layout
    def matmul(self, x: Outline, weight: Outline, *, apart: bool = False) -> Outline:
        columns = weight.dims[-1]
        stored = len(weight.dims) == 2
        rows = prod(x.dims[:-1]) if stored else x.dims[-2]
        self.products.append(Product(rows, x.dims[-1], columns, prod(weight.dims[:-2]), stored))
        return Outline((*x.dims[:-1], columns))

    def matmul_transposed(self, x: Outline, weight: Outline) -> Outline:
        return self.matmul(x, Outline(weight.dims[::-1]))

    def split(self, x: Outline, sizes: tuple[int, ...]) -> tuple[Outline, ...]:
        return tuple(Outline((*x.dims[:-1], size)) for size in sizes)

    def piece(self, x: Outline, start: int, stop: int) -> Outline:
        return Outline((*x.dims[:-1], len(range(x.dims[-1])[start:stop])))

    def concat(self, pieces: tuple[Outline, ...]) -> Outline:
        return Outline((*pieces[0].dims[:-1], sum(piece.dims[-1] for piece in pieces)))

    def join_rows(self, first: Outline, second: Outline) -> Outline:
        return Outline((first.dims[0], first.dims[1] + second.dims[1], *first.dims[2:]))

    def split_heads(self, x: Outline, heads: int, width: int) -> Outline:
        return Outline((*x.dims[:-1], heads, width))

    def merge_heads(self, x: Outline) -> Outline:
        return Outline((*x.dims[:-2], x.dims[-2] * x.dims[-1]))

    def unsqueeze(self, x: Outline, axis: int) -> Outline:
        place = axis if axis >= 0 else len(x.dims) + 1 + axis
        return Outline((*x.dims[:place], 1, *x.dims[place:]))

    def column(self, x: Outline, index: int) -> Outline:
        return Outline(x.dims[:-1])

    def positions(self, x: Outline, axis: int = 1) -> Outline:
        return Outline((x.dims[axis],))

    def swap_last(self, x: Outline) -> Outline:
        return Outline((*x.dims[:-2], x.dims[-1], x.dims[-2]))

    def columns(self, x: Outline) -> Outline:
        return Outline((x.dims[2], x.dims[0] * x.dims[1]))

    def take_turns(self, x: Outline) -> tuple[Outline, Outline]:
        half = Outline((x.dims[0], x.dims[1] // 2, *x.dims[2:]))
        return half, half

    def take_last(self, x: Outline, index: Outline) -> Outline:
        return Outline(index.dims)

    def take_rows(self, rows: Outline, index: Outline) -> Outline:
        return Outline((*index.dims, *rows.dims[2:]))

    take_flat = take_rows

    def lookup(self, table: Outline, index: Outline) -> Outline:
        return Outline((*index.dims, *table.dims[1:]))

    # -- attention
    def put_rows(
        self, rows: Outline, index: Outline, slot: Outline, fresh: Outline, cache: Outline, *, all_fresh: bool = False
    ) -> Outline:
        return Outline(cache.dims)

    def rotary(self, x: Outline, cos: Outline, sin: Outline, widths: tuple[int, ...]) -> Outline:
        return rotate_halves(self, x, cos, sin, widths)

    def attention(self, query: Outline, key: Outline, value: Outline, mask: Outline) -> Outline:
        batch, rows, heads, width = query.dims
        keys = key.dims[1]
        self.products.append(Product(rows, width, keys, batch * heads, stored=False))
        self.products.append(Product(rows, keys, width, batch * heads, stored=False))
        return Outline(query.dims)

    # -- experts
    def experts(
        self, experts: Experts, x: Outline, chosen: Outline, share: Outline, gate_up: Outline, down: Outline
    ) -> Outline:
        # What the router asks for: how a provider lays rows out, and what it computes beside, is its own.
        pairs = prod(chosen.dims)
        for weight in (gate_up, down):
            self.products.append(Product(pairs, weight.dims[2], weight.dims[1]))
        return Outline(x.dims)


def read_count(count: Outline | int) -> int:
    """The number itself, or the one that a tensor holds."""
    size = count if isinstance(count, int) else count.value
    assert size is not None
    return size


def broadcast(left: Outline, right: Outline) -> Outline:
    """The common sizes of two tensors, aligned at their last axes."""
    short, long = sorted((left.dims, right.dims), key=len)
    aligned = (*(1,) * (len(long) - len(short)), *short)
    assert all(1 in pair or pair[0] == pair[1] for pair in zip(aligned, long, strict=True)), (left, right)
    return Outline(tuple(max(pair) for pair in zip(aligned, long, strict=True)))
