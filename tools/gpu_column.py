"""One column of the GPU check: a provider on a bundle, graph by graph, step by step and end to end.

Runs in a process of its own, so that providers share neither memory nor clocks, and needs only what the runtime needs.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dllm_export.graphs import GraphSpec
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import CachePolicy, DllmCache, NoCache
from dllm_export.runtime.rope import rotary_tables
from dllm_export.runtime.session import Buffer, GraphCall, Session, SessionOptions, SessionReport

WARMUP, SAMPLES = 5, 30
"""Runs before the clock (the first initialises, the second captures) and runs on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The request that steps are measured on."""

    prompt: int
    response: int
    steps: int
    """Steps that are timed; the response has one for each of its tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Milliseconds over the samples."""

    samples: int
    p10_ms: float
    p50_ms: float
    p90_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphTimes:
    """One graph at one set of sizes: time of a call, as the mean over a program that calls it once for every layer."""

    graph: str
    sizes: Mapping[str, int]
    calls: int
    call: Times


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Steps of one policy."""

    policy: str
    tokens_per_second: float
    """Over the timed steps, one token each; the refreshes among them included."""
    kinds: Mapping[str, Times]
    outside_engines: float | None
    """Share of the time not spent in the provider, where that is known."""
    tokens: Sequence[int]
    """The response after the last timed step, undecided rows included."""
    parts_ms: float | None
    """What a partial step's graphs take one by one: embedding, every layer, head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnReport:
    """Everything measured in one process."""

    provider: str
    library: str
    device: str
    captures: int
    python: str
    bundle: str
    dtype: str
    request: Request
    open_seconds: float
    """From the bundle's directory to ready: digests, engines, weights on the device."""
    device_memory: int | None
    """Bytes of device memory in use while the session is open, the process's own context included."""
    graphs: Sequence[GraphTimes]
    runs: Sequence[Run]
    session: SessionReport


def measure_column(path: Path, options: SessionOptions, request: Request, rows: Sequence[int]) -> ColumnReport:
    """Open, then time graphs, then steps."""
    start = time.perf_counter()
    with DiffusionLM.from_pretrained(path, options) as lm:
        opened = time.perf_counter() - start
        graphs = tuple(time_graphs(lm.bundle, lm.session, request, rows))
        policies: tuple[CachePolicy, ...] = (NoCache(), DllmCache())
        runs = tuple(time_policy(lm, request, policy, graphs) for policy in policies)
        session = lm.session.inspect()
        return ColumnReport(
            provider=session.provider,
            library=session.library,
            device=options.place,
            captures=options.captures,
            python=platform.python_version(),
            bundle=lm.bundle.manifest.digest,
            dtype=lm.bundle.manifest.dtype,
            request=request,
            open_seconds=opened,
            device_memory=used_memory(),
            graphs=graphs,
            runs=runs,
            session=session,
        )


# -- graphs
def time_graphs(bundle: Bundle, session: Session, request: Request, rows: Sequence[int]) -> Iterator[GraphTimes]:
    """Layers at the sizes of a request, partial ones for several counts of rows, and what stands around them."""
    length, response = request.prompt + request.response, request.response
    budget = max(1, response // 4)
    cases: list[tuple[str, dict[str, int]]] = [
        ("layer_full", {"S": length}),
        *(("layer_partial", {"S": length, "Q": count}) for count in rows),
        ("layer_adaptive", {"S": length, "X": response, "Q": budget}),
        ("embed", {"X": response}),
        *(("head", {"X": response, "Q": count}) for count in sorted({1, *rows, response})),
    ]
    for graph, sizes in cases:
        yield time_graph(bundle, session, graph, {"B": 1, **sizes})


def time_graph(bundle: Bundle, session: Session, graph: str, sizes: Mapping[str, int]) -> GraphTimes:
    """Median time of a call among calls of all layers."""
    spec, layers = bundle.specs[graph], bundle.manifest.shape.layers
    calls = layers if graph.startswith("layer_") else 1
    tensors = fill_tensors(bundle, session, spec, sizes)
    program = session.prepare(
        [GraphCall(graph, layer if graph.startswith("layer_") else None, tensors) for layer in range(calls)]
    )
    probe = session.allocate((1,), "int32")

    def wait() -> None:
        probe.read()

    return GraphTimes(graph=graph, sizes=dict(sizes), calls=calls, call=sample(program, wait, calls))


def sample(program: Callable[[], None], wait: Callable[[], None], calls: int) -> Times:
    """Times of single runs, each waited for, divided by its calls."""
    seconds = []
    for number in range(WARMUP + SAMPLES):
        start = time.perf_counter()
        program()
        wait()
        if number >= WARMUP:
            seconds.append((time.perf_counter() - start) / calls)
    return summarize(seconds)


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
    }
    if spec.name == "head":
        values["index"] = np.arange(sizes["Q"], dtype=np.int32)[None, :]
    buffers = {}
    for tensor in (*spec.inputs, *spec.outputs):
        dims = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in tensor.dims)
        buffers[tensor.name] = session.allocate(dims, tensor.type)
        if tensor in spec.inputs:
            value = values.get(tensor.name)
            buffers[tensor.name].write(rng.standard_normal(dims, np.float32) if value is None else value)
    return buffers


# -- steps
def time_policy(lm: DiffusionLM, request: Request, policy: CachePolicy, graphs: Sequence[GraphTimes]) -> Run:
    """A generation with a policy, warmed up by another; the clock stops after `steps` steps."""
    options = GenerationOptions(gen_length=request.response, steps=request.response)
    tokens_below = min(number for number in (lm.bundle.manifest.tokens.mask, lm.bundle.manifest.tokens.eos) if number)
    made = lm.continuation([draw_prompt(tokens_below, request)], options)
    for _ in islice(lm.stream(made, options, policy), request.steps):
        pass
    seconds: dict[str, list[float]] = {}
    engines, tokens = 0.0, np.zeros(0, np.int32)
    start = begin = time.perf_counter()
    for frame in islice(lm.stream(made, options, policy), request.steps):
        now = time.perf_counter()
        seconds.setdefault(frame.kind, []).append(now - start)
        engines += frame.engine_seconds
        start, tokens = now, frame.tokens[0]
    total = time.perf_counter() - begin
    return Run(
        policy=policy.name,
        tokens_per_second=request.steps / total,
        kinds={kind: summarize(times) for kind, times in seconds.items()},
        outside_engines=1 - engines / total,
        tokens=tokens.tolist(),
        parts_ms=sum_parts(graphs, lm.bundle.manifest.shape.layers, request) if "partial" in seconds else None,
    )


def draw_prompt(below: int, request: Request) -> list[int]:
    """Random ordinary tokens, the same in every column."""
    prompt: list[int] = np.random.default_rng(0).integers(0, below, request.prompt).tolist()
    return prompt


def sum_parts(graphs: Sequence[GraphTimes], layers: int, request: Request) -> float:
    """A partial step as the sum of its graphs."""

    def call(graph: str, **sizes: int) -> float:
        fits = (times for times in graphs if times.graph == graph and sizes.items() <= times.sizes.items())
        return next(fits).call.p50_ms

    return layers * call("layer_adaptive") + call("embed") + call("head", Q=request.response)


def summarize(seconds: Sequence[float]) -> Times:
    """Percentiles in milliseconds."""
    low, median, high = (float(value) * 1e3 for value in np.percentile(seconds, (10, 50, 90)))
    return Times(samples=len(seconds), p10_ms=low, p50_ms=median, p90_ms=high)


def used_memory() -> int | None:
    """Device memory in use on the first GPU, as nvidia-smi counts it."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return int(found[0]) * 2**20 if found else None


def main(arguments: Sequence[str]) -> None:
    """Measure and print the column as JSON on stdout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--provider", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--captures", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=893)
    parser.add_argument("--response", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, nargs="*", default=[32, 64, 128, 256])
    given = parser.parse_args(arguments)
    options = SessionOptions(provider=given.provider, device=given.device, captures=given.captures)
    request = Request(prompt=given.prompt, response=given.response, steps=given.steps)
    report = measure_column(given.bundle, options, request, given.rows)
    print(json.dumps(asdict(report)))


if __name__ == "__main__":
    main(sys.argv[1:])
