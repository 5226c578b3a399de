"""What bound weights cost: a partial layer's engines with its weights as inputs and as constants, replayed in turns.

Reads an EmbeddedTask as JSON on stdin and prints EmbeddedTimes in the last line of stdout. Runs in a process of its own, which
needs only what the runtime needs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dllm_export.exporter.build_options import BuildOptions
from dllm_export.exporter.build_progress import BuildProgress
from dllm_export.exporter.build_target import choose_target
from dllm_export.exporter.engines import build_engine
from dllm_export.exporter.plans import make_builder
from dllm_export.graphs import engine_specs
from dllm_export.runtime.bundle import Bundle, open_bundle
from dllm_export.runtime.captures import CapturedProgram, describe_calls
from dllm_export.runtime.cuda import DeviceMemory, gpu_name
from dllm_export.runtime.session import GraphCall, Program, SessionOptions
from dllm_export.runtime.sessions.tensorrt import CudaBuffer, TensorRtSession
from dllm_export.runtime.tensorrt.engine import Engine
from dllm_export.runtime.tensorrt.library import Flavour, load_tensorrt
from dllm_export.runtime.tensorrt.stages import split_call
from dllm_export.tools.bench.graph_runs import fill_tensors
from dllm_export.tools.bench.processes import answer
from dllm_export.tools.bench.records import EmbeddedTask, EmbeddedTimes, Form

GRAPH = "layer_partial"
CALLS = 8
"""Calls in a capture, as a step has layers; all are of the first one, whose weights are larger than the GPU's cache."""
REPLAYS = 20
"""Replays that are timed at a stretch."""


def compare_forms(task: EmbeddedTask) -> EmbeddedTimes:
    """Build the engines with constants, then replay both forms in turns on one stream."""
    bundle, sizes = open_bundle(task.bundle), {"B": 1, "S": task.length, "Q": task.rows}
    with TensorRtSession(bundle, SessionOptions(captures=64), flavours=(task.flavour,)) as session:
        tensors = fill_tensors(bundle, session, bundle.specs[GRAPH], sizes)
        embedded = EmbeddedLayer(bundle, session, task.flavour, sizes)
        calls = embedded.split(GraphCall(GRAPH, 0, tensors))
        parts = {call.graph: [call] for call in calls} | {"all": calls}
        programs: dict[Form, dict[str, Program]] = {
            "bound": {part: session.prepare(CALLS * chosen) for part, chosen in parts.items()},
            "embedded": {part: embedded.prepare(CALLS * chosen) for part, chosen in parts.items()},
        }
        outputs: dict[Form, list[NDArray[np.generic]]] = {}
        ms: dict[Form, dict[str, list[float]]] = {form: {part: [] for part in parts} for form in programs}
        written = [tensors[tensor.name] for tensor in bundle.specs[GRAPH].outputs]
        for form, by_part in programs.items():
            by_part["all"]()
            outputs[form] = [buffer.read() for buffer in written]
            for buffer, value in zip(written, outputs[form], strict=True):
                buffer.write(np.zeros_like(value))  # so that what the other form does not write shows
        for turn in range(task.rounds + 1):  # the first captures
            for form, by_part in programs.items():
                for part, program in by_part.items():
                    seconds = time_replays(session, program) / CALLS
                    if turn:
                        ms[form][part].append(1e3 * seconds)
        report = session.inspect()
        own = {report.engines[graph] for graph in embedded.engines}
        records = [record for record in bundle.manifest.engines if record.file in own]
        file_sizes = {file.path: file.size for file in bundle.manifest.files}
        return EmbeddedTimes(
            gpu=gpu_name(),
            library=report.library,
            graph=GRAPH,
            sizes=sizes,
            ms=ms,
            plan_bytes={
                "bound": sum(file_sizes[record.file] for record in records),
                "embedded": embedded.plan_bytes,
            },
            build_seconds={
                "bound": sum(record.seconds for record in records),
                "embedded": sum(engine.record.seconds for engine in embedded.engines.values()),
            },
            difference=compare_outputs(outputs["embedded"], outputs["bound"]),
        )


class EmbeddedLayer:
    """The engines of the bundle's first layer, which hold its weights."""

    def __init__(self, bundle: Bundle, session: TensorRtSession, flavour: Flavour, sizes: Mapping[str, int]) -> None:
        self._session, self._whole = session, bundle.specs[GRAPH]
        library = load_tensorrt(flavour)
        options = BuildOptions(flavour=flavour, max_batch=1, max_length=sizes["S"], rows=sizes["Q"])
        target, builder = choose_target(options), make_builder(library)
        self._runtime = library.create(library.module.Runtime)
        weights = bundle.graph_weights(GRAPH, 0)
        profile = {dim: (size, size, size) for dim, size in sizes.items()}
        self.engines: dict[str, Engine] = {}
        self.plan_bytes = 0
        for name, spec in engine_specs({GRAPH: self._whole}, staged=library.staged).items():
            constants = {weight.name: weights[weight.name] for weight in spec.weights}
            progress = BuildProgress(lambda share: None)
            record, plan = build_engine(
                bundle, spec, options, target, (profile,), "", builder, progress, constants=constants
            )
            self.plan_bytes += len(plan)
            alone = replace(spec, weights=())
            self.engines[name] = Engine(library, self._runtime, record, plan, alone, bundle.manifest.dtype)
        scratch = max(engine.scratch_bytes for engine in self.engines.values())
        self._scratch = DeviceMemory(session.usage, "workspace", scratch)

    def split(self, call: GraphCall) -> list[GraphCall]:
        """The call, or one for each of the engines that it takes."""
        if GRAPH in self.engines:
            return [call]
        return list(split_call(call, self._whole, lambda _, tensor, dims: self._session.allocate(dims, tensor.type)))

    def prepare(self, calls: Sequence[GraphCall]) -> Program:
        """What queues the calls, captured at the second run, as a session's programs are."""
        stream, contexts, runs = self._session.stream, {}, []
        for call in calls:
            engine, buffers = self.engines[call.graph], {}
            for name, buffer in call.tensors.items():
                assert isinstance(buffer, CudaBuffer)
                buffers[name] = buffer
            if call.graph not in contexts:
                shapes = {tensor.name: buffers[tensor.name].dims for tensor in engine.spec.inputs}
                contexts[call.graph] = engine.create_context(0, shapes, {}, self._scratch, stream)
            runs.append((contexts[call.graph], buffers))

        def queue() -> None:
            for context, buffers in runs:
                context.queue({name: buffer.memory.address for name, buffer in buffers.items()}, stream)

        return CapturedProgram(self._session.captures, queue, stream.capture, describe_calls(calls))


def time_replays(session: TensorRtSession, program: Program) -> float:
    """Seconds of one replay; one runs before the clock starts, so that the stream is never empty."""
    program()
    start = session.mark()
    for _ in range(REPLAYS):
        program()
    return start.seconds_until(session.mark()) / REPLAYS


def compare_outputs(found: Sequence[NDArray[np.generic]], expected: Sequence[NDArray[np.generic]]) -> float:
    """Largest difference over the largest value, the worst of all outputs."""
    pairs = [(one.astype(np.float64), other.astype(np.float64)) for one, other in zip(found, expected, strict=True)]
    return max(float(np.abs(one - other).max() / np.abs(other).max()) for one, other in pairs)


if __name__ == "__main__":
    sys.exit(answer(EmbeddedTask, compare_forms))
