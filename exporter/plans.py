"""One ONNX graph -> one serialised TensorRT engine, or one readable error with the node that is at fault."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from numpy.typing import NDArray

from dllm_export.errors import DllmExportError
from dllm_export.exporter.build_progress import BuildProgress, make_monitor
from dllm_export.exporter.compatibility import set_compatible
from dllm_export.exporter.precision import set_precision
from dllm_export.exporter.ranges import VALUE_INPUT, input_ranges
from dllm_export.exporter.timing import TIMING_CACHE, load_timing_cache, require_timing_cache, save_timing_cache
from dllm_export.graphs import DType, GraphSpec
from dllm_export.runtime.manifest import Compatible
from dllm_export.runtime.tensorrt.library import TensorRt
from dllm_export.runtime.tensorrt.profiles import Range

if TYPE_CHECKING:
    import tensorrt as trt

R = TypeVar("R")

SOURCE_PLACE = re.compile(r"\s*\bIn \w+ at /\S+?:\d+(?=[\s)]|$)")
"""Where in its own source the library noticed: nothing that a reader has."""
NOISE = ("Invalid Node - ", "[checkMacros.cpp::catchCudaError")
"""Lines that repeat the node's name, or that say that there is no GPU where none is needed."""


def build_plan(
    library: TensorRt,
    onnx: bytes,
    spec: GraphSpec,
    dtype: DType,
    profiles: Sequence[Mapping[str, Range]],
    targets: Sequence[str],
    *,
    builder: trt.Builder | None = None,
    progress: BuildProgress | None = None,
    timing: Path | None = None,
    strict: bool = False,
    compatible: Compatible = "none",
    constants: Mapping[str, NDArray[Any]] = MappingProxyType({}),
) -> tuple[bytes, tuple[str, ...]]:
    """One serialised engine and the builder flags it was made with, or an error with the library's own messages.

    A builder serves any number of graphs, and making one takes standard TensorRT seconds: pass the same to all. A strict
    build measures nothing: it fails where the timing cache lacks something, and leaves the file as it is. Inputs with a value
    in `constants` are no inputs of the engine. Ctrl-C ends the build at its next step.
    """
    builder, progress = builder or make_builder(library), progress or BuildProgress(lambda share: None)
    make = partial(
        make_plan,
        library,
        onnx,
        spec,
        dtype,
        profiles,
        targets,
        builder=builder,
        progress=progress,
        timing=timing,
        strict=strict,
        compatible=compatible,
        constants=constants,
    )
    return run_aside(library, make, progress)


def make_plan(
    library: TensorRt,
    onnx: bytes,
    spec: GraphSpec,
    dtype: DType,
    profiles: Sequence[Mapping[str, Range]],
    targets: Sequence[str],
    *,
    builder: trt.Builder,
    progress: BuildProgress,
    timing: Path | None,
    strict: bool,
    compatible: Compatible,
    constants: Mapping[str, NDArray[Any]],
) -> tuple[bytes, tuple[str, ...]]:
    """The same, in this thread."""
    network = library.require(builder.create_network(library.network_flags()), "create a network")
    parse_graph(library, network, onnx, spec.name)
    embed_constants(library, network, constants)
    config = builder.create_builder_config()
    for ranges in profiles:
        profile = make_profile(builder, spec, ranges)
        if ranges:
            library.require(config.add_optimization_profile(profile), f"accept the size ranges of '{spec.name}'")
    flags = set_precision(library, network, config, spec, dtype) + set_compatible(library, config, compatible)
    set_targets(library, config, targets)
    # The names keep alive what the library only points to.
    monitor = make_monitor(library.module, progress)
    if monitor is not None:
        config.progress_monitor = monitor
    cache: Any = None
    if timing is not None and strict:
        cache = require_timing_cache(library, config, timing)
        flags += ("ERROR_ON_TIMING_CACHE_MISS",)
    elif timing is not None:
        cache = load_timing_cache(library, config, timing)
    plan = builder.build_serialized_network(network, config)
    library.logger.messages = list(shorten(library.logger.messages))
    alone = f" from {TIMING_CACHE} alone (--timing-cache use measures what that lacks)" if strict else ""
    plan = library.require(plan, f"build graph '{spec.name}'{alone}")
    if timing is not None and cache is not None and not strict:
        save_timing_cache(config, timing)
    return bytes(plan), flags


def make_builder(library: TensorRt) -> trt.Builder:
    """The library's builder, which starts it."""
    builder: trt.Builder = library.create(library.module.Builder)
    return builder


def run_aside(library: TensorRt, work: Callable[[], R], progress: BuildProgress) -> R:
    """The result of work with the library, done in a thread of its own.

    This thread is then free to be interrupted at any time. In one that is within the library, Ctrl-C may arrive while that
    calls back to log something, which lets no exception through.
    """
    result: list[R] = []
    with ThreadPoolExecutor(1) as thread:
        task = thread.submit(work)
        try:
            result.append(task.result())
        except KeyboardInterrupt as interrupt:
            progress.failure = interrupt  # leaving the block waits until the library has let go
        except DllmExportError:
            if progress.failure is None:  # else the library was told to stop, and says that it made nothing
                raise
    if progress.failure is not None:
        library.logger.messages = []
        raise progress.failure
    return result[0]


def parse_graph(library: TensorRt, network: Any, onnx: bytes, graph: str) -> None:
    """Fill the network from ONNX bytes, or say which node the library refuses and why."""
    parser: trt.OnnxParser = library.create(library.module.OnnxParser, network)
    if parser.parse(onnx):
        return
    errors = [parser.get_error(place) for place in range(parser.num_errors)]
    # What 8.6 says of a node is its number; its name is in the log, which newer releases only repeat.
    logged = [] if errors and all(hasattr(error, "node_name") for error in errors) else library.logger.messages
    library.logger.messages = [*map(describe_error, errors), *shorten(logged)]
    library.require(None, f"parse graph '{graph}'")


def embed_constants(library: TensorRt, network: trt.INetworkDefinition, constants: Mapping[str, NDArray[Any]]) -> None:
    """Put values in the place of inputs; the network refers to the arrays, so they must outlive the build."""
    inputs = [network.get_input(place) for place in range(network.num_inputs)]
    for given in [given for given in inputs if given.name in constants]:
        value = constants[given.name]
        # 8.6 takes arrays alone, and no array is of a type that numpy lacks.
        plain = value.dtype.kind == "f"
        weights = library.module.Weights(*((value,) if plain else (given.dtype, value.ctypes.data, value.size)))
        constant = library.require(network.add_constant(given.shape, weights), f"embed '{given.name}'").get_output(0)
        for place in range(network.num_layers):
            layer = network.get_layer(place)
            for slot in range(layer.num_inputs):
                read = layer.get_input(slot)
                if read is not None and read.name == given.name:
                    layer.set_input(slot, constant)
        network.remove_tensor(given)


def describe_error(error: Any) -> str:
    """A parser's error as one line: the node, then what is wrong with it."""
    name, operator = getattr(error, "node_name", str)(), getattr(error, "node_operator", str)()
    reason = ", ".join(shorten([error.desc()])) or "it gave no reason"
    if error.node() < 0:
        return reason
    node = f"node {error.node()}" + (f" '{name}'" if name else "") + (f" ({operator})" if operator else "")
    return f"{node}: {reason}"


def shorten(messages: Sequence[str]) -> Iterator[str]:
    """Messages as single lines without the library's source places; noise stays only where it is all there is."""
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(NOISE)]
    yield from (SOURCE_PLACE.sub("", line) for line in telling or lines)


def make_profile(builder: trt.Builder, spec: GraphSpec, ranges: Mapping[str, Range]) -> trt.IOptimizationProfile:
    """The ranges as an optimisation profile: shapes of the inputs, and the value of `budget`."""
    profile = builder.create_optimization_profile()
    for name, sizes in input_ranges(spec, ranges).items():
        (profile.set_shape_input if name == VALUE_INPUT else profile.set_shape)(name, *sizes)
    return profile


def set_targets(library: TensorRt, config: Any, targets: Sequence[str]) -> None:
    """What only one flavour has: named compute capabilities, or contexts that share a profile."""
    if library.targets:
        config.num_compute_capabilities = len(targets)
        for place, target in enumerate(targets):
            config.set_compute_capability(library.capability(target), place)
    sharing = getattr(getattr(library.module, "PreviewFeature", None), "PROFILE_SHARING_0806", None)
    if sharing is not None:
        config.set_preview_feature(sharing, True)
