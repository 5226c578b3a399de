"""What a graph is: named tensors in and out, weights that are bound once, and a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

TensorType = Literal["compute", "float32", "int32", "int64", "bool"]
"""`compute` is the export's dtype (float32, float16 or bfloat16)."""

GraphFunction = Callable[..., dict[str, Any]]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One named tensor of a graph."""

    name: str
    type: TensorType
    dims: tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """The signature of one graph. `weights` are bound once, `inputs` and `outputs` at every run."""

    name: str
    inputs: tuple[TensorSpec, ...]
    weights: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    function: GraphFunction
    """`function(ops, shape, tensors) -> outputs by name`."""
    stages: tuple[GraphSpec, ...] = ()
    """The same graph as two, one after the other: an output `x_out` of the first is the input `x` of the second."""

    def tensor(self, name: str) -> TensorSpec:
        """The input, weight or output of this name."""
        return next(spec for spec in (*self.inputs, *self.weights, *self.outputs) if spec.name == name)
