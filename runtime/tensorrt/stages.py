"""A graph call as the calls of its stages. Pure: no library, no device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from dllm_export.graphs import GraphSpec, TensorSpec
from dllm_export.runtime.session import Buffer, GraphCall
from dllm_export.runtime.tensorrt.profiles import measure_sizes


def split_call(
    call: GraphCall, spec: GraphSpec, hand_over: Callable[[str, TensorSpec, tuple[int, ...]], Buffer]
) -> Iterator[GraphCall]:
    """One call for each stage of the call's graph.

    A stage's output `x_out` is the next stage's input `x`. It lies where the whole call wants it, else in what
    `hand_over(graph, tensor, dims)` gives.
    """
    sizes = measure_sizes(spec, {name: buffer.dims for name, buffer in call.tensors.items()})
    given = dict(call.tensors)
    for stage in spec.stages:
        read = {tensor.name: given[tensor.name] for tensor in stage.inputs}
        written = {}
        for tensor in stage.outputs:
            dims = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in tensor.dims)
            written[tensor.name] = call.tensors.get(tensor.name) or hand_over(call.graph, tensor, dims)
        yield GraphCall(stage.name, call.layer, {**read, **written})
        given |= {name.removesuffix("_out"): buffer for name, buffer in written.items()}


def whole_graph(graph: str) -> str:
    """The graph that a stage belongs to, or the graph itself."""
    return graph.partition(".")[0]
