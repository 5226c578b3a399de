"""Every allocation of one pass: the sizes of a request, and buffers by name in the provider's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dllm_export.graphs import ModelShape, TensorType
from dllm_export.runtime.session import Buffer, Session

Segment = Literal["sequence", "response"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestShape:
    """Sizes of a request: B sequences of S = P + R rows; the response is the last R."""

    batch: int
    prompt_rows: int
    response_rows: int
    shift: bool = False
    """Whether a row's logits are those of the next token."""

    @property
    def lead(self) -> int:
        """Prompt rows that predict into the response: the last one with a shift, if there is one."""
        return int(self.shift and self.prompt_rows > 0)

    @property
    def led(self) -> RequestShape:
        """The same rows as a pass sees them: what predicts into the response is alive with it, as its first row."""
        prompt, response = self.prompt_rows - self.lead, self.response_rows + self.lead
        return RequestShape(batch=self.batch, prompt_rows=prompt, response_rows=response)

    @property
    def length(self) -> int:
        """S."""
        return self.prompt_rows + self.response_rows

    def rows(self, alive: Segment) -> int:
        """Rows of the whole sequence or of the response."""
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
        """Cached `key` or `value` of all rows, or `delta`, `input` or `indicator` of the response rows.

        Where calls may write what they read, both halves are one buffer; inputs of layers always have two, because a step
        writes them before it compares them with the last one's.
        """
        shape = self._shape
        half = 0 if name in self._session.in_place else half
        widths = {"delta": shape.hidden, "input": shape.hidden, "indicator": shape.indicator_rank}
        rows = self._request.response_rows if name in widths else self._request.length
        dims = (self._request.batch, rows, widths.get(name, shape.key_width))
        return self.get(f"{name}.{layer}.{half}", dims, "compute")

    def hidden(self, stream: str, rows: int, half: int) -> Buffer:
        """The residual stream between two layers."""
        return self.get(f"hidden.{stream}.{half}", (self._request.batch, rows, self._shape.hidden), "compute")

    def entering(self) -> Buffer:
        """Rows of all the sequence that enter the layer up to which a prefix is shared: kept here, or loaded to join."""
        return self.get("entering", (self._request.batch, self._request.length, self._shape.hidden), "compute")

    def sequence_delta(self, half: int) -> Buffer:
        """Deltas of all rows, where a step computes more than the response keeps."""
        dims = (self._request.batch, self._request.length, self._shape.hidden)
        return self.get(f"sequence_delta.{half}", dims, "compute")
