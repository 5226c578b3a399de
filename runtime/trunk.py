"""One pass through embedding and layers, with its cached features in the provider's memory.

A step plan becomes a list of graph calls over buffers that are allocated once. Caches alternate between two halves: a
graph reads one and writes the other, so no call ever reads what it writes. Equal plans over equal halves are prepared
once and then only run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dllm_export.graphs import ModelShape, TensorType
from dllm_export.runtime.policies.policy import Alive, LayerPlan, StepPlan
from dllm_export.runtime.session import Buffer, GraphCall, Program, Session


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestShape:
    """Sizes of a request: B sequences of S = P + R rows; the response is the last R."""

    batch: int
    prompt_rows: int
    response_rows: int

    @property
    def length(self) -> int:
        """S."""
        return self.prompt_rows + self.response_rows

    def rows(self, alive: Alive) -> int:
        """X, the rows that travel through the layers."""
        return self.length if alive == "sequence" else self.response_rows


class Buffers:
    """Every allocation of one pass, made at first use of its name and then kept."""

    def __init__(self, session: Session, shape: ModelShape, request: RequestShape) -> None:
        self._session, self._shape, self._request = session, shape, request
        self._by_name: dict[str, Buffer] = {}

    def get(self, name: str, dims: tuple[int, ...], type: TensorType) -> Buffer:
        """The buffer of this name, zeroed when new."""
        if name not in self._by_name:
            self._by_name[name] = self._session.allocate(dims, type)
        return self._by_name[name]

    def constant(self, name: str, array: NDArray[np.generic], type: TensorType) -> Buffer:
        """A buffer that holds this array from its first use on."""
        if name not in self._by_name:
            self.get(name, array.shape, type).write(array)
        return self._by_name[name]

    def cache(self, name: str, layer: int, half: int) -> Buffer:
        """Cached `key` or `value` of all rows, or `delta` of the response rows."""
        request, shape = self._request, self._shape
        rows, width = (request.response_rows, shape.hidden) if name == "delta" else (request.length, shape.key_width)
        return self.get(f"{name}.{layer}.{half}", (request.batch, rows, width), "compute")

    def hidden(self, alive: Alive, half: int) -> Buffer:
        """The residual stream between two layers."""
        dims = (self._request.batch, self._request.rows(alive), self._shape.hidden)
        return self.get(f"hidden.{alive}.{half}", dims, "compute")

    def sequence_delta(self, half: int) -> Buffer:
        """Deltas of all rows, where a step computes more than the response keeps."""
        dims = (self._request.batch, self._request.length, self._shape.hidden)
        return self.get(f"sequence_delta.{half}", dims, "compute")


class Trunk:
    """Embedding and layers of one request: `prepare` gives a plan's program, `hidden` the response's rows after it ran."""

    def __init__(self, session: Session, shape: ModelShape, request: RequestShape) -> None:
        self._session, self._shape, self.request = session, shape, request
        self._buffers = Buffers(session, shape, request)
        self._halves = (0,) * shape.layers
        self._programs: dict[tuple[StepPlan, tuple[int, ...]], tuple[Program, tuple[int, ...]]] = {}

    def start(self, cos: NDArray[np.float64], sin: NDArray[np.float64], mask: NDArray[np.bool_]) -> None:
        """Upload what stays fixed for a request: rotary tables [B, S, d/2] and the key mask [B, S]."""
        dims, rotary = (self.request.batch, self.request.length), self._shape.head_dim // 2
        self._buffers.get("cos", (*dims, rotary), "float32").write(cos)
        self._buffers.get("sin", (*dims, rotary), "float32").write(sin)
        self._buffers.get("mask", dims, "bool").write(mask)

    def prepare(self, plan: StepPlan, tokens: NDArray[np.int32]) -> Program:
        """Upload the alive rows of the canvas [B, S] and return the step's program; caches count as written after it."""
        alive = tokens if plan.alive == "sequence" else tokens[:, self.request.prompt_rows :]
        self._tokens(plan.alive).write(alive)
        key = (plan, self._halves)
        if key not in self._programs:
            halves = tuple(
                half if layer.graph == "layer_skip" else 1 - half
                for half, layer in zip(self._halves, plan.layers, strict=True)
            )
            self._programs[key] = (self._session.prepare(list(self._calls(plan))), halves)
        program, self._halves = self._programs[key]
        return program

    @property
    def hidden(self) -> Buffer:
        """Hidden rows of the response [B, R, D] after the last run."""
        return self._buffers.hidden("response", self._shape.layers % 2)

    def recomputed(self, plan: StepPlan) -> NDArray[np.bool_]:
        """Which response rows [B, R] the last layer recomputed in the step of this plan, just run."""
        request, last = self.request, plan.layers[-1]
        rows = np.full((request.batch, request.length), last.graph in ("layer_full", "layer_partial"))
        if last.graph == "layer_adaptive":
            picked = self._picked(last.budget).read()
            np.put_along_axis(rows, picked.astype(np.int64), True, axis=1)
        return rows[:, request.prompt_rows :]

    # -- a plan as graph calls
    def _calls(self, plan: StepPlan) -> Iterator[GraphCall]:
        buffers, alive = self._buffers, plan.alive
        yield GraphCall("embed", None, {"tokens": self._tokens(alive), "hidden_out": buffers.hidden(alive, 0)})
        for layer, step in enumerate(plan.layers):
            stream = {
                "hidden": buffers.hidden(alive, layer % 2),
                "hidden_out": buffers.hidden(alive, (layer + 1) % 2),
            }
            yield from self._layer_calls(plan, layer, step, stream)
        if alive == "sequence":
            source = buffers.hidden(alive, self._shape.layers % 2)
            yield self._gather(source, self._positions("response"), self.hidden)

    def _layer_calls(
        self, plan: StepPlan, layer: int, step: LayerPlan, stream: dict[str, Buffer]
    ) -> Iterator[GraphCall]:
        buffers, old = self._buffers, self._halves[layer]
        new = 1 - old
        delta, new_delta = buffers.cache("delta", layer, old), buffers.cache("delta", layer, new)
        if step.graph == "layer_skip":
            yield GraphCall("layer_skip", layer, {**stream, "delta": delta})
            return
        written = {f"{name}_out": buffers.cache(name, layer, new) for name in ("key", "value")}
        cached = {name: buffers.cache(name, layer, old) for name in ("key", "value")}
        tensors = {**stream, **written, **self._context()}
        whole = plan.alive == "sequence"
        before, after = (buffers.sequence_delta(0), buffers.sequence_delta(1)) if whole else (delta, new_delta)
        if step.graph == "layer_full":
            yield GraphCall("layer_full", layer, {**tensors, "delta_out": after})
        elif step.graph == "layer_partial":
            yield GraphCall("layer_partial", layer, {**tensors, **cached, **self._placed(plan), "delta_out": after})
        else:
            if whole:
                yield self._gather(delta, self._delta_places(), before)
            chosen = {
                "delta": before,
                "delta_out": after,
                "budget": buffers.constant(f"budget.{step.budget}", np.array([step.budget]), "int64"),
                "forced": self._forced(plan),
                "index_out": self._picked(step.budget),
                "drift": buffers.get(
                    f"drift.{plan.alive}", (self.request.batch, self.request.rows(plan.alive)), "float32"
                ),
            }
            yield GraphCall("layer_adaptive", layer, {**tensors, **cached, **self._placed(plan), **chosen})
        if whole and plan.keep_delta:
            yield self._gather(after, self._positions("response"), new_delta)

    def _gather(self, source: Buffer, index: Buffer, target: Buffer) -> GraphCall:
        return GraphCall("gather", None, {"hidden": source, "index": index, "hidden_out": target})

    # -- buffers that hold the same values all request long
    def _context(self) -> dict[str, Buffer]:
        dims, rotary = (self.request.batch, self.request.length), self._shape.head_dim // 2
        return {
            "cos": self._buffers.get("cos", (*dims, rotary), "float32"),
            "sin": self._buffers.get("sin", (*dims, rotary), "float32"),
            "mask": self._buffers.get("mask", dims, "bool"),
        }

    def _tokens(self, alive: Alive) -> Buffer:
        return self._buffers.get(f"tokens.{alive}", (self.request.batch, self.request.rows(alive)), "int32")

    def _picked(self, budget: int) -> Buffer:
        return self._buffers.get(f"picked.{budget}", (self.request.batch, budget), "int32")

    def _repeat(self, name: str, row: NDArray[np.generic], type: TensorType) -> Buffer:
        return self._buffers.constant(name, np.tile(row, (self.request.batch, 1)), type)

    def _positions(self, alive: Alive) -> Buffer:
        start = self.request.length - self.request.rows(alive)
        return self._repeat(f"index.{alive}", np.arange(start, self.request.length, dtype=np.int32), "int32")

    def _placed(self, plan: StepPlan) -> dict[str, Buffer]:
        """Where the alive rows lie: `index`, and its inverse `slot` and `fresh`."""
        request, start = self.request, self.request.length - self.request.rows(plan.alive)
        place = np.arange(request.length, dtype=np.int32)
        slot = np.maximum(place - start, 0)
        fresh = place >= start
        if not plan.write_response_values:
            fresh &= place < request.prompt_rows
        return {
            "index": self._positions(plan.alive),
            "slot": self._repeat(f"slot.{plan.alive}", slot, "int32"),
            "fresh": self._repeat(f"fresh.{plan.alive}.{plan.write_response_values}", fresh, "bool"),
        }

    def _delta_places(self) -> Buffer:
        """For every row of the sequence its place in the response's deltas; prompt rows have none and are forced."""
        place = np.arange(self.request.length, dtype=np.int32) - self.request.prompt_rows
        return self._repeat("delta_places", np.maximum(place, 0), "int32")

    def _forced(self, plan: StepPlan) -> Buffer:
        rows = np.arange(self.request.rows(plan.alive)) < (self.request.prompt_rows if plan.force_prompt else 0)
        return self._repeat(f"forced.{plan.alive}.{plan.force_prompt}", rows, "bool")
