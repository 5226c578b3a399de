"""ONNX reading of `Ops`: records each operation as a node of opset 17.

Only operators and forms that TensorRT 8.6 to 11, TensorRT for RTX and ONNX Runtime all accept: reductions with axes as
attributes, Split without sizes, Slice with constant axes, int32 indices into Gather, no Scatter, no implicit promotion.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from dllm_export.graphs.experts import run_experts
from dllm_export.graphs.rotary import rotate_halves
from dllm_export.graphs.shape import Experts

INT64 = TensorProto.INT64
OPSET = 17
IR_VERSION = 8
HIDDEN_SCORE = -1e30
"""Score of a masked key in float32: softmax makes it exactly 0, and no row ever has all keys masked."""

Dim = str | int


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor in the graph: its name, ONNX element type and dims."""

    name: str
    type: int
    dims: tuple[Dim, ...]


class OnnxOps:
    """Appends nodes as a graph function runs; `nodes` and `initializers` are the result."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._constants: dict[tuple[object, ...], Value] = {}
        self._offsets: dict[Dim, Value] = {}
        self._shapes: dict[tuple[Dim, ...], Value] = {}
        self._scope: tuple[str, ...] = ()

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        outer = self._scope
        self._scope = (*outer, name)
        yield
        self._scope = outer

    # -- recording
    def _node(self, kind: str, inputs: Sequence[Value], type: int, dims: tuple[Dim, ...], **attributes: Any) -> Value:
        name = "/".join((*self._scope, f"{kind}_{len(self.nodes)}"))
        self.nodes.append(helper.make_node(kind, [value.name for value in inputs], [name], name=name, **attributes))
        return Value(name, type, dims)

    def _constant(self, array: np.ndarray, type: int | None = None) -> Value:
        type = type or helper.np_dtype_to_tensor_dtype(array.dtype)
        key = (type, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            if type == TensorProto.BFLOAT16:
                tensor = helper.make_tensor(name, type, array.shape, array.astype(np.float32).ravel().tolist())
            else:
                tensor = numpy_helper.from_array(array.astype(helper.tensor_dtype_to_np_dtype(type)), name)
            self.initializers.append(tensor)
            self._constants[key] = Value(name, type, array.shape)
        return self._constants[key]

    def _int64(self, *numbers: int) -> Value:
        return self._constant(np.array(numbers, np.int64))

    def _scalar(self, type: int, value: float) -> Value:
        return self._constant(np.array(value, np.float32), type)

    def _cast(self, x: Value, type: int) -> Value:
        return x if x.type == type else self._node("Cast", (x,), type, x.dims, to=type)

    def _binary(self, kind: str, left: Value, right: Value, type: int | None = None) -> Value:
        return self._node(kind, (left, right), type or left.type, broadcast(left.dims, right.dims))

    def _reshape(self, x: Value, target: tuple[int, ...], dims: tuple[Dim, ...]) -> Value:
        return self._node("Reshape", (x, self._int64(*target)), x.type, dims)

    def _transpose(self, x: Value, perm: tuple[int, ...]) -> Value:
        return self._node("Transpose", (x,), x.type, tuple(x.dims[axis] for axis in perm), perm=perm)

    def _size(self, x: Value, axis: int) -> Value:
        shape = self._node("Shape", (x,), TensorProto.INT64, (len(x.dims),))
        return self._node("Gather", (shape, self._constant(np.array(axis, np.int64))), TensorProto.INT64, ())

    def _range(self, size: Value, dim: Dim) -> Value:
        zero, one = (self._constant(np.array(number, np.int64)) for number in (0, 1))
        return self._node("Range", (zero, size, one), TensorProto.INT64, (dim,))

    # -- elementwise
    def add(self, left: Value, right: Value) -> Value:
        return self._binary("Add", left, right)

    def sub(self, left: Value, right: Value) -> Value:
        return self._binary("Sub", left, right)

    def mul(self, left: Value, right: Value) -> Value:
        return self._binary("Mul", left, right)

    def div(self, left: Value, right: Value) -> Value:
        return self._binary("Div", left, right)

    def scale(self, x: Value, factor: float) -> Value:
        return self.mul(x, self._scalar(x.type, factor))

    def rsqrt(self, x: Value, eps: float) -> Value:
        root = self._node("Sqrt", (self.add(x, self._scalar(x.type, eps)),), x.type, x.dims)
        return self._node("Reciprocal", (root,), x.type, x.dims)

    def silu(self, x: Value) -> Value:
        return self.mul(x, self._node("Sigmoid", (x,), x.type, x.dims))

    def gelu(self, x: Value) -> Value:
        # In float16 a square or a cube may overflow to infinity: tanh is then 1 or -1, as it would be.
        cube = self.mul(self.scale(self.mul(x, x), 0.044715), x)
        bend = self._node("Tanh", (self.scale(self.add(x, cube), (2 / np.pi) ** 0.5),), x.type, x.dims)
        return self.mul(self.scale(x, 0.5), self.add(bend, self._scalar(x.type, 1.0)))

    def sigmoid(self, x: Value) -> Value:
        return self._node("Sigmoid", (x,), x.type, x.dims)

    def relu(self, x: Value) -> Value:
        return self._node("Relu", (x,), x.type, x.dims)

    def exp(self, x: Value) -> Value:
        return self._node("Exp", (x,), x.type, x.dims)

    def log(self, x: Value) -> Value:
        return self._node("Log", (x,), x.type, x.dims)

    def floor(self, x: Value) -> Value:
        return self._node("Floor", (x,), x.type, x.dims)

    def where(self, condition: Value, chosen: Value, other: Value) -> Value:
        dims = broadcast(broadcast(condition.dims, chosen.dims), other.dims)
        return self._node("Where", (condition, chosen, other), chosen.type, dims)

    def both(self, left: Value, right: Value) -> Value:
        return self._binary("And", left, right)

    def exceeds(self, left: Value, right: Value) -> Value:
        return self._binary("Greater", left, right, TensorProto.BOOL)

    def matches(self, left: Value, right: Value) -> Value:
        return self._binary("Equal", left, right, TensorProto.BOOL)

    def differs(self, left: Value, right: Value) -> Value:
        equal = self.matches(left, right)
        return self._node("Not", (equal,), TensorProto.BOOL, equal.dims)

    def at_most(self, left: Value, right: Value) -> Value:
        return self._binary("LessOrEqual", left, right, TensorProto.BOOL)

    def fill(self, like: Value, value: float) -> Value:
        return self._scalar(like.type, value)

    # -- types
    def widen(self, x: Value) -> Value:
        return self._cast(x, TensorProto.FLOAT)

    def narrow(self, x: Value, like: Value) -> Value:
        return self._cast(x, like.type)

    # -- reductions
    def mean(self, x: Value) -> Value:
        return self._node("ReduceMean", (x,), x.type, (*x.dims[:-1], 1), axes=[-1], keepdims=1)

    def sum(self, x: Value, *, keep: bool) -> Value:
        dims = (*x.dims[:-1], 1) if keep else x.dims[:-1]
        return self._node("ReduceSum", (x, self._int64(-1)), x.type, dims, keepdims=int(keep))

    def max(self, x: Value, *, keep: bool) -> Value:
        dims = (*x.dims[:-1], 1) if keep else x.dims[:-1]
        return self._node("ReduceMax", (x,), x.type, dims, axes=[-1], keepdims=int(keep))

    def softmax(self, x: Value) -> Value:
        return self._node("Softmax", (x,), x.type, x.dims, axis=len(x.dims) - 1)

    def any_last(self, x: Value) -> Value:
        return self._cast(self.max(self._cast(x, TensorProto.FLOAT), keep=False), TensorProto.BOOL)

    def max_pool(self, x: Value, width: int) -> Value:
        channel, pads = self.unsqueeze(x, 1), [width // 2, width // 2]
        pooled = self._node("MaxPool", (channel,), x.type, channel.dims, kernel_shape=[width], pads=pads)
        return self._reshape(pooled, (0, -1), x.dims)

    def top(self, x: Value, count: Value | int) -> tuple[Value, Value]:
        size = self._int64(count) if isinstance(count, int) else count
        dims = (*x.dims[:-1], count if isinstance(count, int) else "Q" if count.name == "budget" else count.name)
        name = "/".join((*self._scope, f"TopK_{len(self.nodes)}"))
        outputs = [f"{name}_values", f"{name}_places"]
        self.nodes.append(helper.make_node("TopK", [x.name, size.name], outputs, name=name, axis=-1))
        return Value(outputs[0], x.type, dims), self._cast(
            Value(outputs[1], TensorProto.INT64, dims), TensorProto.INT32
        )

    # -- counts
    def count_rows(self, x: Value) -> Value:
        return self.times(self._count(x, 0), self._count(x, 1))

    def _count(self, x: Value, axis: int) -> Value:
        return self._node("Unsqueeze", (self._size(x, axis), self._int64(0)), INT64, (1,))

    def smaller(self, left: Value, right: Value | int) -> Value:
        return self._binary("Min", left, self._int64(right) if isinstance(right, int) else right)

    def times(self, count: Value, factor: Value | int) -> Value:
        return self._binary("Mul", count, self._int64(factor) if isinstance(factor, int) else factor)

    def divide(self, count: Value, by: int) -> Value:
        return self._binary("Div", count, self._int64(by))

    def at_least(self, count: Value, least: int) -> Value:
        return self._binary("Max", count, self._int64(least))

    def count_up(self, count: Value | int, beside: Value) -> Value:
        if isinstance(count, int):
            return self._constant(np.arange(count, dtype=np.int32))
        size = self._node("Squeeze", (count, self._int64(0)), INT64, ())
        return self._cast(self._range(size, count.name), TensorProto.INT32)

    # -- layout
    def matmul(self, x: Value, weight: Value, *, apart: bool = False) -> Value:
        dims = (*broadcast(x.dims[:-2], weight.dims[:-2]), *x.dims[-2:-1], *weight.dims[-1:])
        if apart or len(x.dims) != 3 or len(weight.dims) != 2:
            # TensorRT 8.6 makes one product of all that take the same flattened rows, and for that writes their weights side by
            # side at every call where those are inputs. A product of another form is left as it is.
            return self._node("MatMul", (x, weight), x.type, dims)
        # Rows flattened: one product of two matrices, where a three-dimensional operand asks for one a sequence.
        rows = self._reshape(x, (-1, int(x.dims[2])), ("rows", x.dims[2]))
        product = self._node("MatMul", (rows, weight), x.type, ("rows", dims[2]))
        return self._node("Reshape", (product, self._row_shape(x, int(dims[2]))), x.type, dims)

    def _row_shape(self, x: Value, width: int) -> Value:
        """[B, N, width] as a shape; shared by all rows with this B and N."""
        key = (*x.dims[:2], width)
        if key not in self._shapes:
            sizes = (self._node("Unsqueeze", (self._size(x, axis), self._int64(0)), INT64, (1,)) for axis in (0, 1))
            self._shapes[key] = self._node("Concat", (*sizes, self._int64(width)), INT64, (3,), axis=0)
        return self._shapes[key]

    def matmul_transposed(self, x: Value, weight: Value) -> Value:
        return self.matmul(x, self._transpose(weight, (1, 0)))

    def split(self, x: Value, sizes: tuple[int, ...]) -> tuple[Value, ...]:
        pieces, start = [], 0
        for size in sizes:
            pieces.append(self.piece(x, start, start + size))
            start += size
        return tuple(pieces)

    def piece(self, x: Value, start: int, stop: int) -> Value:
        bounds = (self._int64(start), self._int64(stop), self._int64(len(x.dims) - 1))
        return self._node("Slice", (x, *bounds), x.type, (*x.dims[:-1], stop - start))

    def concat(self, pieces: tuple[Value, ...]) -> Value:
        width = sum(int(piece.dims[-1]) for piece in pieces)
        return self._node("Concat", pieces, pieces[0].type, (*pieces[0].dims[:-1], width), axis=len(pieces[0].dims) - 1)

    def join_rows(self, first: Value, second: Value) -> Value:
        dims = (first.dims[0], f"{first.dims[1]}+{second.dims[1]}", *first.dims[2:])
        return self._node("Concat", (first, second), first.type, dims, axis=1)

    def take_turns(self, x: Value) -> tuple[Value, Value]:
        rows, axis, step = int(x.dims[1]), self._int64(1), self._int64(2)
        dims = (x.dims[0], rows // 2, *x.dims[2:])
        first, second = (
            self._node("Slice", (x, self._int64(start), self._int64(rows), axis, step), x.type, dims)
            for start in (0, 1)
        )
        return first, second

    def split_heads(self, x: Value, heads: int, width: int) -> Value:
        return self._reshape(x, (0, 0, heads, width), (*x.dims[:-1], heads, width))

    def merge_heads(self, x: Value) -> Value:
        width = int(x.dims[-1]) * int(x.dims[-2])
        return self._reshape(x, (0, 0, width), (*x.dims[:-2], width))

    def unsqueeze(self, x: Value, axis: int) -> Value:
        axis = axis if axis >= 0 else len(x.dims) + 1 + axis
        return self._node("Unsqueeze", (x, self._int64(axis)), x.type, (*x.dims[:axis], 1, *x.dims[axis:]))

    def column(self, x: Value, index: int) -> Value:
        inputs = (x, self._constant(np.array(index, np.int64)))
        return self._node("Gather", inputs, x.type, x.dims[:-1], axis=len(x.dims) - 1)

    def swap_last(self, x: Value) -> Value:
        last = len(x.dims) - 1
        return self._transpose(x, (*range(last - 1), last, last - 1))

    def columns(self, x: Value) -> Value:
        rows = self._reshape(x, (-1, int(x.dims[2])), ("rows", x.dims[2]))
        return self._transpose(rows, (1, 0))

    def positions(self, x: Value, axis: int = 1) -> Value:
        return self._cast(self._range(self._size(x, axis), x.dims[axis]), TensorProto.INT32)

    def take_last(self, x: Value, index: Value) -> Value:
        return self._node("GatherElements", (x, index), x.type, index.dims, axis=len(x.dims) - 1)

    def take_rows(self, rows: Value, index: Value) -> Value:
        return self.take_flat(rows, self.add(index, self._row_offsets(rows)))

    def _row_offsets(self, rows: Value) -> Value:
        """[B, 1] int32: where each sequence starts among the B * N flattened rows; shared by all rows with this N."""
        dim = rows.dims[1]
        if dim not in self._offsets:
            starts = self.mul(self._range(self._size(rows, 0), rows.dims[0]), self._size(rows, 1))
            self._offsets[dim] = self.unsqueeze(self._cast(starts, TensorProto.INT32), 1)
        return self._offsets[dim]

    def take_flat(self, rows: Value, index: Value) -> Value:
        flat = self._reshape(rows, (-1, *(int(dim) for dim in rows.dims[2:])), ("rows", *rows.dims[2:]))
        return self._node("Gather", (flat, index), rows.type, (*index.dims, *rows.dims[2:]), axis=0)

    def lookup(self, table: Value, index: Value) -> Value:
        return self._node("Gather", (table, index), table.type, (*index.dims, *table.dims[1:]), axis=0)

    def put_rows(
        self, rows: Value, index: Value, slot: Value, fresh: Value, cache: Value, *, all_fresh: bool = False
    ) -> Value:
        # Where + Gather and not ScatterND: a scatter costs 4 to 15 times as much on GPUs (docs/decisions.md).
        return self.where(self.unsqueeze(fresh, 2), self.take_rows(rows, slot), cache)

    def attention(self, query: Value, key: Value, value: Value, mask: Value) -> Value:
        # The form that fuses into one kernel in every TensorRT release we could check: scale on the query, key and value
        # heads repeated by Unsqueeze, Expand, Reshape, a Where mask, softmax in float32.
        heads, width = int(query.dims[2]), int(query.dims[3])
        query = self._transpose(self.scale(query, width**-0.5), (0, 2, 1, 3))
        key = self._repeat_heads(self._transpose(key, (0, 2, 1, 3)), heads)
        value = self._repeat_heads(self._transpose(value, (0, 2, 1, 3)), heads)
        scores = self.widen(self.matmul(query, self._transpose(key, (0, 1, 3, 2))))
        visible = self.unsqueeze(mask if len(mask.dims) == 3 else self.unsqueeze(mask, 1), 1)
        scores = self.where(visible, scores, self._scalar(scores.type, HIDDEN_SCORE))
        weights = self._node("Softmax", (scores,), scores.type, scores.dims, axis=3)
        return self._transpose(self.matmul(self.narrow(weights, value), value), (0, 2, 1, 3))

    def rotary(self, x: Value, cos: Value, sin: Value, widths: tuple[int, ...]) -> Value:
        return rotate_halves(self, x, cos, sin, widths)

    def experts(self, experts: Experts, x: Value, chosen: Value, share: Value, gate_up: Value, down: Value) -> Value:
        return run_experts(self, experts, x, chosen, share, gate_up, down)

    def _repeat_heads(self, x: Value, heads: int) -> Value:  # [B, G, S, d] -> [B, H, S, d]
        groups, width = int(x.dims[1]), int(x.dims[3])
        if groups == heads:
            return x
        spread = self.unsqueeze(x, 2)
        target = self._int64(1, 1, heads // groups, 1, 1)
        spread = self._node("Expand", (spread, target), x.type, (x.dims[0], groups, heads // groups, *x.dims[2:]))
        batch = self._node("Unsqueeze", (self._size(x, 0), self._int64(0)), TensorProto.INT64, (1,))
        rest = self._int64(heads, -1, width)
        shape = self._node("Concat", (batch, rest), TensorProto.INT64, (4,), axis=0)
        return self._node("Reshape", (spread, shape), x.type, (x.dims[0], heads, x.dims[2], width))


def broadcast(left: tuple[Dim, ...], right: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """Dims of an elementwise result under numpy's rules."""
    rank = max(len(left), len(right))
    padded = [(1,) * (rank - len(dims)) + dims for dims in (left, right)]
    return tuple(b if a == 1 else a for a, b in zip(*padded, strict=True))
