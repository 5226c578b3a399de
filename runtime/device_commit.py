"""A step's tokens, decided on the device: the next step is queued before the host has read the statistics of this one.

Source: graph `commit` (graphs/commits.py). The host uploads what it knows, the canvas before the decision and where each
candidate lies, and the graph puts the tokens in that the decision adds. The host then decides by the same numbers.
"""

from __future__ import annotations

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

    def prepare(
        self,
        statistics: Mapping[str, Buffer],
        rows: Sequence[NDArray[np.int64]],
        quota: NDArray[np.int64],
        canvas: NDArray[np.int32],
        alive: NDArray[np.int64],
        tokens: Buffer,
    ) -> Program:
        """The program that fills `tokens` [B, X] with the canvas [B, S] at the `alive` columns [B, X], as this step leaves it.

        `statistics` are the head's `token`, `top_logits` and `logsumexp` of the candidates; `rows` are the columns of each
        sequence's, of which its `quota` [B] are committed.
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
        }
        key = (count, id(tokens))
        if key not in self._programs:
            tensors = {**statistics, **placed, "tokens": known, "tokens_out": tokens}
            self._programs[key] = self._session.prepare([GraphCall("commit", None, tensors)])
        return self._programs[key]

    def _upload(self, name: str, count: int, array: NDArray[np.generic], type: TensorType) -> Buffer:
        buffer = self._buffers.get(f"commit.{name}.{count}", array.shape, type)
        buffer.write(array)
        return buffer
