"""A block's shadow: mask rows that are stored nowhere, one in the place of each row of the block, which it does not see.

It runs after a step, against the keys and values that the step's rows attended to. No row sees a shadow, so that nothing of
the step depends on it, and a step whose rule asks for none is as it would be without.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dllm_export.graphs import ModelShape, layer_graph
from dllm_export.runtime.buffers import Buffers, RequestShape
from dllm_export.runtime.policies.policy import StepPlan
from dllm_export.runtime.programs import ProgramStore
from dllm_export.runtime.session import Buffer, GraphCall, Program, Session
from dllm_export.runtime.trunk import Trunk


class Shadow:
    """The shadow rows of one request: `prepare` gives the program to run after a step, `hidden` its rows after it ran."""

    def __init__(self, session: Session, shape: ModelShape, request: RequestShape) -> None:
        self._shape, self._request = shape, request
        self._buffers, self._programs = Buffers(session, shape, request), ProgramStore(session)
        self._rows = 0

    def prepare(
        self, trunk: Trunk, plan: StepPlan, block: tuple[int, int], shown: NDArray[np.bool_], mask_token: int
    ) -> Program:
        """The shadow of a block [first position, the one after its last) after the step of this plan, just run.

        `shown` [B, n] says which of the rows the others see.
        """
        places = trunk.places(plan, block)
        dims = self._request.batch, block[1] - block[0]
        self._rows = dims[1]
        self._given("index").write(places)
        self._given("shown").write(np.ascontiguousarray(shown))
        self._buffers.constant(f"tokens.{self._rows}", np.full(dims, mask_token, np.int32), "int32")
        seen = [trunk.attended(plan, layer) for layer in range(self._shape.layers)]
        key = (self._rows, *(id(buffer) for tensors in seen for buffer in tensors.values()))
        return self._programs.find(key, lambda: self._calls(seen))

    @property
    def hidden(self) -> Buffer:
        """Hidden rows of the shadow [B, n, D] after the last run."""
        return self._stream(self._shape.layers)

    def _calls(self, seen: Sequence[dict[str, Buffer]]) -> Iterator[GraphCall]:
        dims = self._request.batch, self._rows
        tokens = self._buffers.get(f"tokens.{self._rows}", dims, "int32")
        yield GraphCall("embed", None, {"tokens": tokens, "hidden_out": self._stream(0)})
        given = {name: self._given(name) for name in ("index", "shown")}
        for layer, tensors in enumerate(seen):
            stream = {"hidden": self._stream(layer), "hidden_out": self._stream(layer + 1)}
            yield GraphCall(layer_graph(self._shape, "layer_shadow", layer), layer, {**stream, **given, **tensors})

    def _stream(self, layer: int) -> Buffer:
        return self._buffers.hidden(f"shadow.{self._rows}", self._rows, layer % 2)

    def _given(self, name: str) -> Buffer:
        dims = self._request.batch, self._rows
        return self._buffers.get(f"{name}.{self._rows}", dims, "int32" if name == "index" else "bool")
