"""What a step of a diffusion LLM is: graphs as pure functions, model shapes, families. Knows no files and no devices."""

from dllm_export.graphs.catalog import (
    LAYER_GRAPHS,
    TOP_TOKENS,
    HeadGraph,
    engine_specs,
    graph_layers,
    graph_specs,
    has_experts,
    layer_graph,
    with_stages,
)
from dllm_export.graphs.ops import Ops
from dllm_export.graphs.shape import DType, Experts, ModelShape
from dllm_export.graphs.spec import GraphSpec, TensorSpec, TensorType
from dllm_export.graphs.weights import COUNTED, layer_weights

__all__ = [
    "COUNTED",
    "LAYER_GRAPHS",
    "TOP_TOKENS",
    "DType",
    "Experts",
    "GraphSpec",
    "HeadGraph",
    "ModelShape",
    "Ops",
    "TensorSpec",
    "TensorType",
    "engine_specs",
    "graph_layers",
    "graph_specs",
    "has_experts",
    "layer_graph",
    "layer_weights",
    "with_stages",
]
