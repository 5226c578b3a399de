"""Graphs one by one at the sizes of a request: what a step is made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dllm_export.graphs import GraphSpec
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.rope import rotary_tables
from dllm_export.runtime.session import Buffer, GraphCall, Session
from dllm_export.tools.bench.records import GraphTimes, WorkRecord
from dllm_export.tools.bench.roofline import Call, Model
from dllm_export.tools.bench.statistics import summarize

WARMUP, LEAST, MOST = 3, 5, 30
"""Runs before the clock (the first initialises, the second captures); at least and at most this many on it."""
BUDGET_SECONDS = 0.5
"""After the least number of runs, how long a graph is sampled."""


def time_graphs(
    bundle: Bundle, session: Session, prompt: int, response: int, rows: Sequence[int], batch: int = 1
) -> Iterator[GraphTimes]:
    """Layers at the sizes of a request, partial ones for several counts of rows, and what stands around them."""
    length, budget = prompt + response, max(1, response // 4)
    cases: list[tuple[str, dict[str, int]]] = [
        ("layer_full", {"S": length}),
        *(("layer_partial", {"S": length, "Q": count}) for count in rows),
        ("layer_adaptive", {"S": length, "X": response, "Q": budget}),
        ("embed", {"X": response}),
        *(("head", {"X": response, "Q": count}) for count in sorted({1, *rows, response})),
    ]
    for graph, sizes in cases:
        yield time_graph(bundle, session, graph, {"B": batch, **sizes})


def time_graph(bundle: Bundle, session: Session, graph: str, sizes: Mapping[str, int]) -> GraphTimes:
    """Time of a call among calls of all layers."""
    manifest, spec = bundle.manifest, bundle.specs[graph]
    layered = graph.startswith("layer_")
    calls = manifest.shape.layers if layered else 1
    tensors = fill_tensors(bundle, session, spec, sizes)
    program = session.prepare([GraphCall(graph, layer if layered else None, tensors) for layer in range(calls)])
    probe = session.allocate((1,), "int32")
    work = Model(bundle.specs, manifest.shape, manifest.dtype).work([Call(graph, 0, sizes)])
    return GraphTimes(
        graph=graph,
        sizes=dict(sizes),
        calls=calls,
        call=summarize([seconds / calls for seconds in sample(program, lambda: probe.read())]),
        work=WorkRecord(flops=work.flops, weight_bytes=work.weight_bytes, cache_bytes=work.cache_bytes),
    )


def sample(program: Callable[[], None], wait: Callable[[], object]) -> list[float]:
    """Seconds of single runs, each waited for."""
    seconds: list[float] = []
    for number in range(WARMUP + MOST):
        start = time.perf_counter()
        program()
        wait()
        if number >= WARMUP:
            seconds.append(time.perf_counter() - start)
        if len(seconds) >= LEAST and sum(seconds) > BUDGET_SECONDS:
            break
    return seconds


def fill_tensors(bundle: Bundle, session: Session, spec: GraphSpec, sizes: Mapping[str, int]) -> dict[str, Buffer]:
    """Buffers of a call with the values of a real step; activations are random, since zeros draw less power."""
    rng = np.random.default_rng(0)
    length, alive = sizes.get("S", 0), sizes.get("Q" if spec.name == "layer_partial" else "X", 0)
    start = length - alive
    place = np.arange(length)
    cos, sin = rotary_tables(bundle.manifest.shape, place[None, :])
    values: dict[str, NDArray[np.generic]] = {
        "cos": cos,
        "sin": sin,
        "mask": np.ones((1, length), np.bool_),
        "slot": np.maximum(place - start, 0)[None, :].astype(np.int32),
        "fresh": (place >= start)[None, :],
        "budget": np.array([sizes.get("Q", 0)]),
        "forced": np.zeros((1, alive), np.bool_),
        "bias": np.zeros(bundle.manifest.shape.vocab),
        "index": np.arange(start, length, dtype=np.int32)[None, :],
        "tokens": np.zeros((1, alive), np.int32),
        "cfg_scale": np.zeros(1),
        "given": np.zeros((1, sizes.get("Q", 0)), np.int32),
    }
    if spec.name == "head":
        values["index"] = np.arange(sizes["Q"], dtype=np.int32)[None, :]
    buffers = {}
    for tensor in (*spec.inputs, *spec.outputs):
        dims = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in tensor.dims)
        buffers[tensor.name] = session.allocate(dims, tensor.type)
        if tensor in spec.inputs:
            value = values.get(tensor.name)
            drawn = rng.standard_normal(dims, np.float32) if value is None else np.broadcast_to(value, dims)
            buffers[tensor.name].write(np.ascontiguousarray(drawn))
    return buffers
