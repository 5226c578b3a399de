"""What a step of a diffusion LLM is: graphs as pure functions, model shapes, families. Knows no files and no devices."""

from dllm_export.graphs.catalog import (
    LAYER_GRAPHS,
    TOP_TOKENS,
    GraphSpec,
    HeadGraph,
    TensorSpec,
    TensorType,
    engine_specs,
    graph_specs,
    layer_weights,
    with_stages,
)
from dllm_export.graphs.ops import Ops
from dllm_export.graphs.shape import DType, ModelShape

__all__ = [
    "LAYER_GRAPHS",
    "TOP_TOKENS",
    "DType",
    "GraphSpec",
    "HeadGraph",
    "ModelShape",
    "Ops",
    "TensorSpec",
    "TensorType",
    "engine_specs",
    "graph_specs",
    "layer_weights",
    "with_stages",
]
