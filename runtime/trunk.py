"""One pass through embedding and layers, with its cached features in the provider's memory.

A step plan becomes a list of graph calls over buffers that are allocated once. Caches alternate between two halves: a
graph reads one and writes the other, so no call ever reads what it writes, unless the provider allows that. Equal plans
over equal halves are prepared once and then only run, as long as they are among the last used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dllm_export.graphs import ModelShape, TensorType, layer_graph
from dllm_export.runtime.buffers import Buffers, RequestShape, Segment
from dllm_export.runtime.compact_cache import CompactCache
from dllm_export.runtime.device_commit import DeviceCommit
from dllm_export.runtime.policies.policy import PICKING_GRAPHS, LayerPlan, Rows, StepPlan
from dllm_export.runtime.prefix_port import PrefixPort
from dllm_export.runtime.programs import ProgramStore
from dllm_export.runtime.session import FEATURES, Buffer, GraphCall, Program, Session


class Trunk:
    """Embedding and layers of one request: `prepare` gives a plan's program, `hidden` the response's rows after it ran."""

    def __init__(
        self, session: Session, shape: ModelShape, request: RequestShape, shared: Mapping[str, Buffer] | None = None
    ) -> None:
        """`shared` are inputs of all layer graphs that somebody else writes."""
        self._shape, self.request = shape, request
        self._shared = shared or {}
        self._buffers = Buffers(session, shape, request)
        self._compact = CompactCache(self._buffers, shape, request)
        self.port = PrefixPort(session, self._buffers, request)
        self._halves = (0,) * shape.layers
        self._in_place = session.in_place
        self._programs = ProgramStore(session)
        self.commit = DeviceCommit(session, self._buffers)
        self._placed_rows: Rows | None = None
        self._forced_rows: tuple[Segment, Rows] | None = None

    def start(
        self,
        cos: NDArray[np.float64],
        sin: NDArray[np.float64],
        mask: NDArray[np.bool_],
        block: NDArray[np.int32] | None = None,
    ) -> None:
        """Upload what stays fixed for a request: rotary tables [B, S, d/2], key mask and numbers of blocks [B, S]."""
        dims, rotary = (self.request.batch, self.request.length), self._shape.rotary_width // 2
        self._buffers.get("cos", (*dims, rotary), "float32").write(cos)
        self._buffers.get("sin", (*dims, rotary), "float32").write(sin)
        self._buffers.get("mask", dims, "bool").write(mask)
        if block is not None:
            self._buffers.get("block", dims, "int32").write(block)
        self._compact.start(cos, sin, mask)

    def prepare(self, plan: StepPlan, tokens: NDArray[np.int32] | None) -> Program:
        """Upload the alive rows of the canvas [B, S] and return the step's program; caches count as written after it.

        None where another program writes `tokens(plan)`.
        """
        if tokens is not None:
            whole = plan.rows is None
            self.tokens(plan).write(
                tokens[:, self._first(plan) :] if whole else np.take_along_axis(tokens, self.columns(plan), axis=1)
            )
        if plan.rows is not None:
            self._place(plan.rows)
        if plan.forced is not None:
            self._force(plan.alive, plan.forced)
        if plan.compaction is not None:
            self._compact.place(plan.compaction)
        rows = plan.rows.count if plan.rows else 0
        compact = (plan.compaction.count, self._compact.half) if plan.compaction else (0, 0)
        placed = plan.rows is not None or plan.forced is not None or plan.compaction is not None
        shared = replace(plan, rows=None, forced=None, compaction=None) if placed else plan
        key = (shared, rows, plan.forced is not None, self._halves, compact)
        program = self._programs.find(key, lambda: self._calls(plan))
        kept = plan.rows is not None and plan.compaction is not None
        if not (kept or written_caches(plan) <= self._in_place):
            self._halves = tuple(
                half if layer.graph == "layer_skip" else 1 - half
                for half, layer in zip(self._halves, plan.layers, strict=True)
            )
        if plan.compaction is not None:
            self._compact.half = 1 - self._compact.half
        return program

    @property
    def hidden(self) -> Buffer:
        """Hidden rows of the response [B, R, D] after the last run; only its alive rows mean anything."""
        return self._buffers.hidden("response", self.request.response_rows, self._shape.layers % 2)

    @property
    def halves(self) -> tuple[int, ...]:
        """Which of its two copies each layer's cache is in: what the last step wrote and the next one reads."""
        return self._halves

    def features(self, layer: int) -> tuple[Buffer, Buffer]:
        """Keys and values [B, S, G*d] of a layer after the last run."""
        half = self._halves[layer]
        return self._buffers.cache("key", layer, half), self._buffers.cache("value", layer, half)

    def attended(self, plan: StepPlan, layer: int) -> dict[str, Buffer]:
        """What the rows of this plan's step, just run, attended to in a layer: `key`, `value`, `cos`, `sin` and `mask`."""
        if plan.rows is not None and plan.compaction is not None:
            return {**self._compact.attended(plan.compaction, layer), **self._shared}
        return {**dict(zip(("key", "value"), self.features(layer), strict=True)), **self._context()}

    def places(self, plan: StepPlan, block: tuple[int, int]) -> NDArray[np.int32]:
        """Columns [B, n] of a block's rows in what `attended` gives."""
        if plan.rows is not None and plan.compaction is not None:
            return self._compact.places(plan.compaction, block)
        return np.tile(np.arange(*block, dtype=np.int32), (self.request.batch, 1))

    def recomputed(self, plan: StepPlan) -> NDArray[np.bool_]:
        """Which response rows [B, R] the last layer recomputed in the step of this plan, just run."""
        request, last = self.request, plan.layers[-1]
        rows = np.zeros((request.batch, request.length), np.bool_)
        if last.graph == "layer_full":
            rows[:] = True
        if last.graph == "layer_partial":
            np.put_along_axis(rows, self.columns(plan), True, axis=1)
        if last.graph in PICKING_GRAPHS:
            picked = self._picked(last.budget).read()
            np.put_along_axis(rows, picked.astype(np.int64), True, axis=1)
        return rows[:, request.prompt_rows :]

    def drift(self, plan: StepPlan) -> NDArray[np.float64]:
        """Mean drift [B, L] of the rows of every layer in the step of this plan, just run; it must measure drift."""
        layers = [self._drift(plan, layer).read() for layer in range(self._shape.layers)]
        means: NDArray[np.float64] = np.stack(layers, axis=1).mean(axis=2, dtype=np.float64)
        return means

    # -- positions that a plan brings along
    def columns(self, plan: StepPlan) -> NDArray[np.int64]:
        """Positions of the alive rows [B, X]."""
        if plan.rows is not None:
            return plan.rows.array().astype(np.int64)
        return np.tile(np.arange(self._first(plan), self.request.length), (self.request.batch, 1))

    def _first(self, plan: StepPlan) -> int:
        """First position that is alive in a plan of a whole segment."""
        return 0 if plan.alive == "sequence" else self.request.prompt_rows

    def _place(self, rows: Rows) -> None:
        """Upload where the rows lie: `index`, its inverse `slot` and `fresh`, and the way back to the response."""
        if rows == self._placed_rows:
            return
        index, length = rows.array(), self.request.length
        slot = np.zeros((self.request.batch, length), np.int32)
        places = np.broadcast_to(np.arange(rows.count, dtype=np.int32), index.shape)
        np.put_along_axis(slot, index.astype(np.int64), places, axis=1)
        for buffer, values in zip(
            (*self._row_buffers(rows.count), self._row_response()),
            (index, slot, rows.mask(length), slot[:, self.request.prompt_rows :]),
            strict=True,
        ):
            buffer.write(np.ascontiguousarray(values))
        self._placed_rows = rows

    def _row_buffers(self, count: int) -> tuple[Buffer, Buffer, Buffer]:
        dims = (self.request.batch, self.request.length)
        return (
            self._buffers.get(f"index.rows.{count}", (self.request.batch, count), "int32"),
            self._buffers.get("slot.rows", dims, "int32"),
            self._buffers.get("fresh.rows", dims, "bool"),
        )

    def _row_response(self) -> Buffer:
        """For every response row its place among the alive rows; 0 for rows that are not alive."""
        return self._buffers.get("response.rows", (self.request.batch, self.request.response_rows), "int32")

    def _force(self, alive: str, rows: Rows) -> None:
        segment: Segment = "sequence" if alive == "sequence" else "response"
        if (segment, rows) == self._forced_rows:
            return
        forced = rows.mask(self.request.length)
        self._forced(segment).write(np.ascontiguousarray(forced[:, self.request.length - self.request.rows(segment) :]))
        self._forced_rows = (segment, rows)

    def _forced(self, segment: Segment) -> Buffer:
        return self._buffers.get(f"forced.{segment}", (self.request.batch, self.request.rows(segment)), "bool")

    # -- a plan as graph calls
    def _calls(self, plan: StepPlan) -> Iterator[GraphCall]:
        yield GraphCall("embed", None, {"tokens": self.tokens(plan), "hidden_out": self._stream(plan, 0)})
        for layer, step in enumerate(plan.layers):
            if layer == plan.join:
                before, plan = plan, replace(plan, alive="sequence", rows=None)
                yield self._join(before, layer, self._stream(plan, layer))
            if layer == plan.share:
                yield self._gather(self._stream(plan, layer), self._positions("sequence"), self._buffers.entering())
            stream = {"hidden": self._stream(plan, layer), "hidden_out": self._stream(plan, layer + 1)}
            yield from self._reference_calls(plan, layer, step)
            yield from self._layer_calls(plan, layer, step, stream)
        if plan.alive != "response":
            places = self._row_response() if plan.rows else self._positions("response")
            yield self._gather(self._stream(plan, self._shape.layers), places, self.hidden)

    def _join(self, plan: StepPlan, layer: int, target: Buffer) -> GraphCall:
        placed = {name: buffer for name, buffer in self._placed(plan).items() if name != "index"}
        rows = {"hidden": self._stream(plan, layer), "rest": self._buffers.entering(), "hidden_out": target}
        return GraphCall("join_rows", None, {**rows, **placed})

    def _stream(self, plan: StepPlan, layer: int) -> Buffer:
        """The alive rows that enter a layer; where inputs are kept, the response's stay where they were written."""
        if plan.reference == "input" and plan.alive == "response" and layer < self._shape.layers:
            return self._buffers.cache("input", layer, 1 - self._halves[layer])
        name = f"rows.{plan.rows.count}" if plan.rows else plan.alive
        return self._buffers.hidden(name, self._alive_count(plan), layer % 2)

    def _reference_calls(self, plan: StepPlan, layer: int, step: LayerPlan) -> Iterator[GraphCall]:
        """What a layer keeps for the drift of the next step, where neither its stream nor its graph does so already."""
        hidden, new = self._stream(plan, layer), 1 - self._halves[layer]
        if plan.reference == "input" and plan.alive == "sequence":
            yield self._gather(hidden, self._positions("response"), self._buffers.cache("input", layer, new))
        if plan.reference == "indicator" and step.graph != "layer_indicated":
            own = np.arange(self.request.response_rows, dtype=np.int32)
            index = self._positions("response") if plan.alive == "sequence" else self._repeat("index.own", own, "int32")
            kept = self._buffers.cache("indicator", layer, new)
            tensors = {"hidden": hidden, "index": index, "indicator_out": kept, **self._shared}
            yield GraphCall("layer_indicator", layer, tensors)

    def _alive_count(self, plan: StepPlan) -> int:
        if plan.rows is not None:
            return plan.rows.count
        return self.request.length if plan.alive == "sequence" else self.request.response_rows

    def _layer_calls(
        self, plan: StepPlan, layer: int, step: LayerPlan, stream: dict[str, Buffer]
    ) -> Iterator[GraphCall]:
        buffers, old = self._buffers, self._halves[layer]
        new = 1 - old
        if step.graph == "layer_skip":
            yield GraphCall("layer_skip", layer, {**stream, "delta": buffers.cache("delta", layer, old)})
            return
        written = {f"{name}_out": buffers.cache(name, layer, new) for name in ("key", "value")}
        cached = {name: buffers.cache(name, layer, old) for name in ("key", "value")}
        tensors = {**stream, **written, **self._context()}
        whole = plan.alive == "sequence"
        tensors["delta_out"] = after = self._new_delta(plan, layer, new)
        if plan.compaction is not None and plan.rows is not None:
            own = {**stream, "delta_out": after, **self._shared, **self._compact.tensors(plan.compaction, layer)}
            yield self._layer_call("layer_partial", layer, own)
        elif step.graph == "layer_full":
            yield self._layer_call("layer_full", layer, tensors)
            if plan.compaction is not None:
                made = {name: written[f"{name}_out"] for name in cached} | {"hidden": stream["hidden"]}
                yield self._compact.compact(plan.compaction, layer, {**made, **self._context()})
        elif step.graph == "layer_partial":
            yield self._layer_call("layer_partial", layer, {**tensors, **cached, **self._placed(plan)})
        else:
            delta = buffers.cache("delta", layer, old)
            before = buffers.sequence_delta(0) if whole else delta
            if whole:
                yield self._gather(delta, self._delta_places(), before)
            chosen = {
                "delta": before,
                "budget": buffers.constant(f"budget.{step.budget}", np.array([step.budget]), "int64"),
                "forced": self._must_pick(plan),
                "index_out": self._picked(step.budget),
                "drift": self._drift(plan, layer),
            }
            if step.graph == "layer_tracking":
                chosen["seen"] = buffers.cache("input", layer, old)
            if step.graph == "layer_indicated":
                halves = (buffers.cache("indicator", layer, half) for half in (old, new))
                chosen |= dict(zip(("indicator", "indicator_out"), halves, strict=True))
            yield self._layer_call(step.graph, layer, {**tensors, **cached, **self._placed(plan), **chosen})
        if plan.alive != "response" and plan.keep_delta:
            places = self._row_response() if plan.rows else self._positions("response")
            yield self._gather(after, places, buffers.cache("delta", layer, new))

    def _layer_call(self, graph: str, layer: int, tensors: dict[str, Buffer]) -> GraphCall:
        return GraphCall(layer_graph(self._shape, graph, layer), layer, tensors)

    def _gather(self, source: Buffer, index: Buffer, target: Buffer) -> GraphCall:
        return GraphCall("gather", None, {"hidden": source, "index": index, "hidden_out": target})

    # -- buffers that hold the same values all request long
    def _context(self) -> dict[str, Buffer]:
        dims, rotary = (self.request.batch, self.request.length), self._shape.rotary_width // 2
        return {
            "cos": self._buffers.get("cos", (*dims, rotary), "float32"),
            "sin": self._buffers.get("sin", (*dims, rotary), "float32"),
            "mask": self._buffers.get("mask", dims, "bool"),
            **({"block": self._buffers.get("block", dims, "int32")} if self._shape.block else {}),
            **self._shared,
        }

    def tokens(self, plan: StepPlan) -> Buffer:
        """Where the tokens of the alive rows [B, X] lie in a step of this plan."""
        count = self._alive_count(plan)
        name = f"rows.{count}" if plan.rows else plan.alive
        return self._buffers.get(f"tokens.{name}", (self.request.batch, count), "int32")

    def _new_delta(self, plan: StepPlan, layer: int, half: int) -> Buffer:
        """Where a layer puts its deltas: the cache where the response is alive, else a buffer that the layers share."""
        if plan.rows is not None:
            dims = (self.request.batch, plan.rows.count, self._shape.hidden)
            return self._buffers.get(f"delta.rows.{plan.rows.count}", dims, "compute")
        if plan.alive == "sequence":
            return self._buffers.sequence_delta(1)
        return self._buffers.cache("delta", layer, half)

    def _picked(self, budget: int) -> Buffer:
        return self._buffers.get(f"picked.{budget}", (self.request.batch, budget), "int32")

    def _drift(self, plan: StepPlan, layer: int) -> Buffer:
        """Where a layer puts the drift of its rows: all into one buffer, unless it is read back."""
        name = f"drift.{plan.alive}.{layer}" if plan.measure_drift else f"drift.{plan.alive}"
        return self._buffers.get(name, (self.request.batch, self._alive_count(plan)), "float32")

    def _repeat(self, name: str, row: NDArray[np.generic], type: TensorType) -> Buffer:
        return self._buffers.constant(name, np.tile(row, (self.request.batch, 1)), type)

    def _positions(self, segment: Segment) -> Buffer:
        start = self.request.length - self.request.rows(segment)
        return self._repeat(f"index.{segment}", np.arange(start, self.request.length, dtype=np.int32), "int32")

    def _placed(self, plan: StepPlan) -> dict[str, Buffer]:
        """Where the alive rows lie: `index`, and its inverse `slot` and `fresh`."""
        if plan.rows is not None:
            return dict(zip(("index", "slot", "fresh"), self._row_buffers(plan.rows.count), strict=True))
        segment: Segment = "sequence" if plan.alive == "sequence" else "response"
        request, start = self.request, self.request.length - self.request.rows(segment)
        place = np.arange(request.length, dtype=np.int32)
        slot = np.maximum(place - start, 0)
        fresh = place >= start
        if not plan.write_response_values:
            fresh &= place < request.prompt_rows
        return {
            "index": self._positions(segment),
            "slot": self._repeat(f"slot.{segment}", slot, "int32"),
            "fresh": self._repeat(f"fresh.{segment}.{plan.write_response_values}", fresh, "bool"),
        }

    def _delta_places(self) -> Buffer:
        """For every row of the sequence its place in the response's deltas; prompt rows have none and are forced."""
        place = np.arange(self.request.length, dtype=np.int32) - self.request.prompt_rows
        return self._repeat("delta_places", np.maximum(place, 0), "int32")

    def _must_pick(self, plan: StepPlan) -> Buffer:
        segment: Segment = "sequence" if plan.alive == "sequence" else "response"
        if plan.forced is not None:
            return self._forced(segment)
        return self._repeat(f"unforced.{segment}", np.zeros(self.request.rows(segment), np.bool_), "bool")


def written_caches(plan: StepPlan) -> frozenset[str]:
    """Caches of which a step of this plan writes new contents."""
    own = {"indicator"} if any(layer.graph == "layer_indicated" for layer in plan.layers) else set[str]()
    return FEATURES | own | ({plan.reference} if plan.reference else set())
