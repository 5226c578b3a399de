"""What a step's noise level conditions a model by: one small buffer that all layers and heads of a request read."""

from __future__ import annotations

import numpy as np

from dllm_export.graphs import ModelShape
from dllm_export.graphs.steps import TIME_WIDTH
from dllm_export.runtime.session import Buffer, GraphCall, Program, Session

PERIOD = 10_000.0


class Conditioner:
    """The `condition` graph of one request; a model that does not see the time has no such graph and no such input."""

    def __init__(self, session: Session, shape: ModelShape, batch: int) -> None:
        self.inputs: dict[str, Buffer] = {}
        """Inputs of every layer and head graph, by name."""
        if shape.conditioning:
            self._time = session.allocate((batch, TIME_WIDTH), "float32")
            self.inputs["condition"] = session.allocate((batch, shape.conditioning), "compute")
            tensors = {"time": self._time, "condition_out": self.inputs["condition"]}
            self._program = session.prepare([GraphCall("condition", None, tensors)])

    def prepare(self, sigma: float) -> Program:
        """The program that conditions what runs after it by this noise level."""
        half = TIME_WIDTH // 2
        angle = sigma * np.exp(-np.log(PERIOD) * np.arange(half) / half)
        table = np.concatenate((np.cos(angle), np.sin(angle))).astype(np.float32)
        self._time.write(np.tile(table, (self._time.dims[0], 1)))
        return self._program
