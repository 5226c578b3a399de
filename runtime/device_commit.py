"""A step's tokens, decided on the device: the next step is queued before the host has read the statistics of this one.

Source: graph `commit` (graphs/commits.py), for rules that take the best rows, or all that are sure enough. The host uploads
what it knows, the canvas before the decision and where each candidate lies, and the graph puts the tokens in that the decision
adds. The host then decides by the same numbers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dllm_export.graphs import TensorType
from dllm_export.runtime.buffers import Buffers
from dllm_export.runtime.session import Buffer, GraphCall, Program, Session


class DeviceCommit:
    """Programs that write the tokens of one pass's next step; one for each number of candidates and of alive rows."""

    def __init__(self, session: Session, buffers: Buffers) -> None:
        self._session, self._buffers = session, buffers
        self._programs: dict[tuple[int, int], Program] = {}
        self._confidence: float | None = None
        """What `sure` was uploaded for; the next request may have another rule."""

    def prepare(
        self,
        statistics: Mapping[str, Buffer],
        rows: Sequence[NDArray[np.int64]],
        quota: NDArray[np.int64],
        sure: float,
        canvas: NDArray[np.int32],
        alive: NDArray[np.int64],
        tokens: Buffer,
    ) -> Program:
        """The program that fills `tokens` [B, X] with the canvas [B, S] at the `alive` columns [B, X], as this step leaves it.

        `statistics` are the head's `token` and `nll` of the candidates; `rows` are the columns of each
        sequence's, of which its `quota` [B] are committed, and those with a confidence of at least `sure`.
        """
        batch, count = statistics["token"].dims
        number = np.full(canvas.shape, -1, np.int32)  # of the candidate that lies there
        candidate = np.zeros((batch, count), np.bool_)
        for sequence, columns in enumerate(rows):
            number[sequence, columns] = np.arange(len(columns))
            candidate[sequence, : len(columns)] = True
        slot = np.take_along_axis(number, alive, axis=1)
        width = alive.shape[1]
        known = self._upload("tokens", width, np.take_along_axis(canvas, alive, axis=1), "int32")
        placed = {
            "slot": self._upload("slot", width, np.maximum(slot, 0), "int32"),
            "fresh": self._upload("fresh", width, slot >= 0, "bool"),
            "candidate": self._upload("candidate", count, candidate, "bool"),
            "quota": self._upload("quota", batch, quota, "float32"),
            "sure": self._be_sure(sure),
        }
        key = (count, id(tokens))
        if key not in self._programs:
            tensors = {**statistics, **placed, "tokens": known, "tokens_out": tokens}
            self._programs[key] = self._session.prepare([GraphCall("commit", None, tensors)])
        return self._programs[key]

    def _be_sure(self, confidence: float) -> Buffer:
        buffer = self._buffers.get("commit.sure", (1,), "float32")
        if confidence != self._confidence:
            buffer.write(np.array([least_logarithm(confidence)]))
            self._confidence = confidence
        return buffer

    def _upload(self, name: str, count: int, array: NDArray[np.generic], type: TensorType) -> Buffer:
        buffer = self._buffers.get(f"commit.{name}.{count}", array.shape, type)
        buffer.write(array)
        return buffer


def least_logarithm(probability: float) -> float:
    """The least float32 number whose exp, in float64, is at least this probability; the largest there is if it is above 1."""
    if probability > 1:
        return float(np.finfo(np.float32).max)
    # Bits of floats from 0 up rise with them: the first magnitude that is too large is looked for among all.
    first = bisect_left(
        range(0x7F800000),
        True,
        key=lambda bits: bool(np.exp(-np.float64(np.uint32(bits).view(np.float32))) < probability),
    )
    return -float(np.uint32(first - 1).view(np.float32))
