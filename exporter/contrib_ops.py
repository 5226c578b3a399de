"""ONNX reading of `Ops` for ONNX Runtime on the CPU alone: its own operators, and those that are only slow on GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnx import TensorProto

from dllm_export.exporter.onnx_ops import HIDDEN_SCORE, Dim, OnnxOps, Value
from dllm_export.graphs.shape import Experts

CONTRIB = "com.microsoft"
UNCHOSEN = -1e4
"""Logit of an expert that a row does not go to: its share underflows to 0 in every type."""
LEAST = 1e-30
"""Added to every share, so that it has a logarithm."""


class ContribOps(OnnxOps):
    """As `OnnxOps`, but experts are com.microsoft MoE, attention in float32 is com.microsoft MultiHeadAttention, and rows are
    scattered into a cache, which copies it once, or not at all where it is its own result: Where and Gather go over it three
    times."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[tuple[object, ...], Value] = {}

    def _node(self, kind: str, inputs: Sequence[Value], type: int, dims: tuple[Dim, ...], **attributes: Any) -> Value:
        """The same of the same is one node.

        So a cache's rows that are compared with new ones are those that `put_rows` reads, which a scatter into the very
        cache must wait for; of two reads of it, one could come too late.
        """
        key = (self._scope, kind, tuple(value.name for value in inputs), type, repr(sorted(attributes.items())))
        if key not in self._made:
            self._made[key] = super()._node(kind, inputs, type, dims, **attributes)
        return self._made[key]

    def put_rows(
        self, rows: Value, index: Value, slot: Value, fresh: Value, cache: Value, *, all_fresh: bool = False
    ) -> Value:
        updates = rows
        if not all_fresh:
            known = self.unsqueeze(self.take_rows(fresh, index), 2)
            updates = self.where(known, rows, self.take_rows(cache, index))
        # (sequence, row) of each, and not the row among all: to reshape what comes out would copy it once more.
        sequence = self.add(self.scale(index, 0), self.unsqueeze(self.positions(index, axis=0), 1))
        places = self.concat((self.unsqueeze(sequence, 2), self.unsqueeze(index, 2)))
        inputs = (cache, self._cast(places, TensorProto.INT64), updates)
        return self._node("ScatterND", inputs, cache.type, cache.dims)

    def rotary(self, x: Value, cos: Value, sin: Value, widths: tuple[int, ...]) -> Value:
        half, *rest = widths
        if x.type != TensorProto.FLOAT or rest != [half]:
            return super().rotary(x, cos, sin, widths)  # no kernel of its own for these
        tables = (self._reshape(table, (-1, half), ("rows", half)) for table in (cos, sin))
        places = self.add(self.unsqueeze(self.positions(cos), 0), self._row_offsets(cos))
        inputs = (self.merge_heads(x), self._cast(places, TensorProto.INT64), *tables)
        heads, width = int(x.dims[2]), int(x.dims[3])
        turned = self._node("RotaryEmbedding", inputs, x.type, (*x.dims[:2], heads * width), domain=CONTRIB)
        return self.split_heads(turned, heads, width)

    def attention(self, query: Value, key: Value, value: Value, mask: Value) -> Value:
        heads, width = int(query.dims[2]), int(query.dims[3])
        if query.type != TensorProto.FLOAT or int(key.dims[2]) != heads:
            return super().attention(query, key, value, mask)  # no kernel of its own for these
        inputs = [*map(self.merge_heads, (query, key, value)), Value("", query.type, ())]
        if len(mask.dims) == 2:
            inputs.append(self._cast(mask, TensorProto.INT32))
        else:
            zero, hidden = (self._scalar(TensorProto.FLOAT, number) for number in (0.0, HIDDEN_SCORE))
            inputs += [Value("", query.type, ()), self.where(self.unsqueeze(mask, 1), zero, hidden)]
        mixed = self._node(
            "MultiHeadAttention",
            inputs,
            query.type,
            (query.dims[0], query.dims[1], heads * width),
            domain=CONTRIB,
            num_heads=heads,
            mask_filter_value=HIDDEN_SCORE,
        )
        return self.split_heads(mixed, heads, width)

    def experts(self, experts: Experts, x: Value, chosen: Value, share: Value, gate_up: Value, down: Value) -> Value:
        # The operator routes by itself: softmax, the k largest, scaled to a sum of 1. Logarithms of the shares give the
        # shares back, whatever made them, over their sum.
        with self.scope("combine"):
            names, zero = self.unsqueeze(self.count_up(experts.count, x), 1), self.fill(share, 0.0)
            hits = self.matches(self.unsqueeze(chosen, 2), names)  # [B, N, E, k]
            share = self.add(share, self.fill(share, LEAST))
            spread = self.sum(self.where(hits, self.unsqueeze(share, 2), zero), keep=False)
            chance = self.max(self.where(hits, self.fill(share, 1.0), zero), keep=False)
            logits = self.where(self.at_most(chance, zero), self.fill(share, UNCHOSEN), self.log(spread))
            logits = self._reshape(self.narrow(logits, x), (-1, experts.count), ("rows", experts.count))
            mixed = self._node(
                "MoE",
                (x, logits, gate_up, Value("", x.type, ()), down),
                x.type,
                x.dims,
                domain=CONTRIB,
                k=experts.per_token,
                activation_type="swiglu",
                activation_alpha=1.0,
                activation_beta=0.0,
                swiglu_fusion=1,
                normalize_routing_weights=1,
            )
            return self.narrow(self.mul(self.widen(mixed), self.sum(share, keep=True)), x)
