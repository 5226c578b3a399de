"""The vocabulary in which every graph is written.

A graph is one Python function over `Ops`. `TorchOps` (graphs/torch_ops.py) computes it eagerly: the reference.
`OnnxOps` (exporter/onnx_ops.py) records it as ONNX nodes: the product. One definition, two readings, so a graph cannot
drift from its reference, and the ONNX form holds only the operators that every TensorRT and ONNX Runtime release accepts.

Shapes in comments use B batch, S sequence, X rows alive in a step, Q rows recomputed, N any row count, D width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from dllm_export.graphs.shape import Experts

T = TypeVar("T")


class Ops(Protocol[T]):
    """What a graph may do with tensors. Operands of a binary operation share one type: there is no promotion."""

    def scope(self, name: str) -> AbstractContextManager[None]:
        """Prefix for the names of the nodes made inside; builders pin precision by it."""
        ...

    # -- elementwise
    def add(self, left: T, right: T) -> T: ...
    def sub(self, left: T, right: T) -> T: ...
    def mul(self, left: T, right: T) -> T: ...
    def div(self, left: T, right: T) -> T: ...
    def scale(self, x: T, factor: float) -> T:
        """x * factor, with the factor in x's type."""
        ...

    def rsqrt(self, x: T, eps: float) -> T:
        """1 / sqrt(x + eps)."""
        ...

    def silu(self, x: T) -> T: ...
    def gelu(self, x: T) -> T:
        """The tanh form: x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
        ...

    def sigmoid(self, x: T) -> T: ...
    def relu(self, x: T) -> T: ...
    def exp(self, x: T) -> T: ...
    def log(self, x: T) -> T: ...
    def floor(self, x: T) -> T: ...
    def where(self, condition: T, chosen: T, other: T) -> T: ...
    def both(self, left: T, right: T) -> T:
        """Logical and of two bool tensors."""
        ...

    def exceeds(self, left: T, right: T) -> T:
        """Elementwise left > right, with broadcasting."""
        ...

    def matches(self, left: T, right: T) -> T:
        """Elementwise equality of two int32 tensors, with broadcasting."""
        ...

    def differs(self, left: T, right: T) -> T:
        """The opposite of `matches`."""
        ...

    def at_most(self, left: T, right: T) -> T:
        """Bool: left <= right, with broadcasting."""
        ...

    def fill(self, like: T, value: float) -> T:
        """A scalar of `like`'s type, to broadcast."""
        ...

    # -- types
    def widen(self, x: T) -> T:
        """x in float32 (in float64 when x is float64)."""
        ...

    def narrow(self, x: T, like: T) -> T:
        """x in the type of `like`."""
        ...

    # -- reductions over the last axis; `keep` leaves an axis of size 1
    def mean(self, x: T) -> T: ...
    def sum(self, x: T, *, keep: bool) -> T: ...
    def max(self, x: T, *, keep: bool) -> T: ...
    def softmax(self, x: T) -> T: ...
    def any_last(self, x: T) -> T:
        """Bool: is any element of the last axis true."""
        ...

    def max_pool(self, x: T, width: int) -> T:
        """Largest of the `width` elements around each, an odd number, along the last axis of x [B, N]."""
        ...

    def top(self, x: T, count: T | int) -> tuple[T, T]:
        """Largest `count` values of the last axis, descending, and their int32 positions; ties go to the lowest position."""
        ...

    # -- counts: int64 [1], known before a graph runs
    def count_rows(self, x: T) -> T:
        """B * N of x [B, N, ...]."""
        ...

    def smaller(self, left: T, right: T | int) -> T: ...
    def times(self, count: T, factor: T | int) -> T: ...
    def divide(self, count: T, by: int) -> T:
        """Rounded down."""
        ...

    def at_least(self, count: T, least: int) -> T: ...
    def count_up(self, count: T | int, beside: T) -> T:
        """int32 [count]: 0, 1, ..., where `beside` is."""
        ...

    # -- layout
    def matmul(self, x: T, weight: T, *, apart: bool = False) -> T:
        """[..., N, D] @ [D, M], or @ [..., D, M] where both have batches, which are broadcast.

        `apart` says that it is not to be joined with other products of the same x.
        """
        ...

    def matmul_transposed(self, x: T, weight: T) -> T:
        """x @ weight^T: the tied head."""
        ...

    def split(self, x: T, sizes: tuple[int, ...]) -> tuple[T, ...]:
        """Pieces of the last axis."""
        ...

    def piece(self, x: T, start: int, stop: int) -> T:
        """x[..., start:stop]."""
        ...

    def concat(self, pieces: tuple[T, ...]) -> T:
        """Pieces joined along the last axis."""
        ...

    def join_rows(self, first: T, second: T) -> T:
        """first [B, N, ...], second [B, M, ...] -> [B, N + M, ...]."""
        ...

    def take_turns(self, x: T) -> tuple[T, T]:
        """Rows 0, 2, .. and rows 1, 3, .. of x [N, 2M, D], each [N, M, D]."""
        ...

    def split_heads(self, x: T, heads: int, width: int) -> T:
        """[B, N, heads * width] -> [B, N, heads, width]."""
        ...

    def merge_heads(self, x: T) -> T:
        """[B, N, heads, width] -> [B, N, heads * width]."""
        ...

    def unsqueeze(self, x: T, axis: int) -> T: ...
    def column(self, x: T, index: int) -> T:
        """x[..., index], the axis dropped."""
        ...

    def swap_last(self, x: T) -> T:
        """The last two axes swapped."""
        ...

    def columns(self, x: T) -> T:
        """[B, N, E] -> [E, B * N]."""
        ...

    def positions(self, x: T, axis: int = 1) -> T:
        """int32 [N]: 0, 1, ... along an axis of x."""
        ...

    def take_last(self, x: T, index: T) -> T:
        """x [..., N], index [..., M] int32 -> [..., M]: elements of the last axis by position."""
        ...

    def take_rows(self, rows: T, index: T) -> T:
        """rows [B, N, ...], index [B, Q] int32 -> [B, Q, ...]: rows of each sequence by position."""
        ...

    def take_flat(self, rows: T, index: T) -> T:
        """rows [B, N, D], index int32 [...] -> [..., D]: rows of any sequence, counted through all: b * N + n."""
        ...

    def lookup(self, table: T, index: T) -> T:
        """table [V, ...], index int32 [...] -> [..., ...]: entries of the table."""
        ...

    # -- the fused operations
    def put_rows(self, rows: T, index: T, slot: T, fresh: T, cache: T, *, all_fresh: bool = False) -> T:
        """rows [B, Q, D] into cache [B, N, D]: row j is rows[slot[j]] where fresh[j], else the cached one.

        `index` [B, Q] says the same from the other side: where each row belongs. A place that is named more than once is
        named for equal rows. `all_fresh`: every place that it names is fresh.
        """
        ...

    def rotary(self, x: T, cos: T, sin: T, widths: tuple[int, ...]) -> T:
        """Rotary embedding of x [B, N, heads, d]: dimension j < r/2 turns with j + r/2 by the angle of cos and sin [B, N, r/2].

        `widths` are r/2 twice and, where r < d, that of the dimensions that stay.
        """
        ...

    def attention(self, query: T, key: T, value: T, mask: T) -> T:
        """softmax(query key^T / sqrt(head_dim)) value, softmax in float32.

        query [B, Q, H, d]; key, value [B, S, G, d] (head j reads group j // (H/G)); mask bool, true where a key is visible:
        [B, S] to all rows alike, or [B, Q, S] to each row. Every row must see a key. Returns [B, Q, H, d].
        """
        ...

    def experts(self, experts: Experts, x: T, chosen: T, share: T, gate_up: T, down: T) -> T:
        """Sum over j of share[j] * (expert chosen[j] of the row), in float32; rows and result [B, N, D] in x's type.

        An expert is a SwiGLU of gate_up [E, 2F, D], where rows of gate and up take turns, and down [E, D, F]. chosen
        [B, N, k] int32 are k different experts of each row, share [B, N, k] is float32.
        """
        ...
