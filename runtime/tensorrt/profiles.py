"""Which size ranges of an engine hold a call. Pure: no library, no device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dllm_export.errors import UsageError
from dllm_export.graphs import GraphSpec

Range = tuple[int, int, int]
"""Smallest, usual and largest size of a dim."""

Profile = Mapping[str, Range]

BLOCK_GRAPHS = ("head", "layer_shadow")
"""How graphs are called whose Q are rows of one block, so of the response."""

FLAGS = dict.fromkeys("BC", "--max-batch") | dict.fromkeys("SNXQ", "--max-length")
"""Dim -> the flag of `build` that widens it, but for the Q of a graph that runs on a block's rows."""


def flag_of(graph: str, dim: str) -> str:
    """The flag of `build` that widens a dim: heads and the shadow run on rows of one block, which --rows bounds."""
    return "--rows" if dim == "Q" and graph.startswith(BLOCK_GRAPHS) else FLAGS[dim]


def measure_sizes(spec: GraphSpec, dims: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Sizes of a call's dim letters from the dims of its tensors by name."""
    sizes: dict[str, int] = {}
    for tensor in (*spec.inputs, *spec.outputs):
        if tensor.name in dims:
            for letter, size in zip(tensor.dims, dims[tensor.name], strict=True):
                if isinstance(letter, str) and sizes.setdefault(letter, size) != size:
                    raise ValueError(f"{spec.name}: {letter} is {sizes[letter]} and, in {tensor.name}, {size}")
    return sizes


def choose_profile(graph: str, profiles: Sequence[Profile], sizes: Mapping[str, int]) -> int:
    """Index of the first, so the narrowest, profile that holds these sizes."""
    for place, profile in enumerate(profiles):
        if all(profile[dim][0] <= size <= profile[dim][2] for dim, size in sizes.items() if dim in profile):
            return place
    widest = profiles[-1]
    dim = next(dim for dim, size in sizes.items() if dim in widest and not widest[dim][0] <= size <= widest[dim][2])
    least, _, most = widest[dim]
    remedy = f"build again with {flag_of(graph, dim)} {sizes[dim]}, or make the request smaller"
    if sizes[dim] < least:
        remedy = "make the request larger, or run it with --provider onnxruntime"
    raise UsageError(
        f"this request has {dim} = {sizes[dim]} in graph '{graph}', its engine takes {least} to {most}: {remedy}"
    )
