"""Size ranges of the engines, from the graphs and the options alone: no library, no device."""

from __future__ import annotations

from collections.abc import Mapping

from dllm_export.errors import UsageError
from dllm_export.exporter.build_options import BuildOptions, parse_sizes
from dllm_export.graphs import GraphSpec
from dllm_export.runtime.tensorrt.library import Flavour
from dllm_export.runtime.tensorrt.profiles import BLOCK_GRAPHS, Range

VALUE_INPUT = "budget"
"""The one input that TensorRT reads before it runs: a range gives its value, not its shape."""


def make_profiles(
    flavour: Flavour, spec: GraphSpec, model_length: int, options: BuildOptions
) -> tuple[dict[str, Range], ...]:
    """Size ranges of a graph, the narrowest first.

    Standard TensorRT tunes for a profile's usual sizes, so that layers get one for the response's rows and one for the
    whole sequence, besides the fixed sizes that were asked for. TensorRT for RTX specialises at run time: one wide profile
    serves.
    """
    wide = dim_ranges(spec, model_length, options)
    if flavour == "tensorrt-rtx":
        return (wide,)
    fixed = [
        wide | {dim: (size, size, size) for dim, size in sizes.items()}
        for sizes in parse_sizes(options.fixed)
        if _fits(sizes, wide)
    ]
    rows = min(options.rows, wide["S"][2]) if "S" in wide and spec.weights else 0  # a copy of rows has nothing to tune
    narrow = wide | {dim: (1, min(wide[dim][1], rows), rows) for dim in ("X", "Q") if rows and dim in wide}
    return (*fixed, wide) if narrow == wide else (*fixed, narrow, wide)


def check_fixed_sizes(specs: Mapping[str, GraphSpec], model_length: int, options: BuildOptions) -> None:
    """Refuse fixed sizes that no graph would use."""
    wide = {name: dim_ranges(spec, model_length, options) for name, spec in specs.items()}
    for sizes in parse_sizes(options.fixed):
        if not any(_fits(sizes, ranges) for ranges in wide.values()):
            group = ",".join(f"{dim}={size}" for dim, size in sizes.items())
            takes = "; ".join(f"{name} {'/'.join(sorted(ranges.keys() - {'B', 'C'}))}" for name, ranges in wide.items())
            raise UsageError(
                f"--fixed has {group!r}, which no graph has as its dims, or not within --max-length and --rows: {takes}"
            )


def _fits(sizes: Mapping[str, int], wide: Mapping[str, Range]) -> bool:
    """Whether these are a graph's dims, batches aside, within its ranges."""
    return sizes.keys() == wide.keys() - {"B", "C"} and all(size <= wide[dim][2] for dim, size in sizes.items())


def dim_ranges(spec: GraphSpec, model_length: int, options: BuildOptions) -> dict[str, Range]:
    """The widest sizes of a graph: a range for each of its dynamic dims."""
    length = min(options.max_length or model_length, model_length)
    rows = min(options.rows, length)
    whole, some = (1, min(1024, length), length), (1, rows, length)
    by_dim: dict[str, Range] = {
        "B": (1, 1, options.max_batch),
        "C": (1, 1, options.max_batch),
        "S": whole,
        "N": whole,
        "X": some,
        "Q": (1, min(64, rows), rows if spec.name.startswith(BLOCK_GRAPHS) else length),
    }
    dims = {dim for tensor in spec.inputs for dim in tensor.dims if isinstance(dim, str)}
    has_value = any(tensor.name == VALUE_INPUT for tensor in spec.inputs)
    return {dim: by_dim[dim] for dim in dims} | ({"Q": by_dim["Q"]} if has_value else {})


def input_ranges(spec: GraphSpec, ranges: Mapping[str, Range]) -> dict[str, tuple[list[int], ...]]:
    """Smallest, usual and largest shape of every dynamic input; of `budget` the value."""
    shapes: dict[str, tuple[list[int], ...]] = {}
    for tensor in spec.inputs:
        if tensor.name == VALUE_INPUT:
            shapes[tensor.name] = tuple([size] for size in ranges["Q"])
        elif any(isinstance(dim, str) for dim in tensor.dims):
            shapes[tensor.name] = tuple(
                [ranges[dim][at] if isinstance(dim, str) else dim for dim in tensor.dims] for at in range(3)
            )
    return shapes
