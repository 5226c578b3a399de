"""One graph call of a real generation: what went in, weights too, and what came out, as data of Polygraphy."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dllm_export.errors import IncompatibleError, UsageError
from dllm_export.graphs import TensorType
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.generate import Frame
from dllm_export.runtime.session import Buffer, Fetch, GraphCall, Mark, Program, Session, SessionReport

INPUTS = "inputs.json"
OUTPUTS = "outputs.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Which call to record: the first of this graph, from a step on, of one layer or of any."""

    graph: str
    layer: int | None = None
    step: int = 1

    def wants(self, call: GraphCall, step: int) -> bool:
        """Whether this is the graph, its layer where one is asked for, and late enough."""
        return call.graph == self.graph and self.layer in (None, call.layer) and step >= self.step


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """A recorded call. Arrays are copies but for the weights, which are mapped."""

    graph: str
    layer: int | None
    step: int
    provider: str
    inputs: Mapping[str, NDArray[Any]]
    weights: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, NDArray[Any]]


class Recorded(Exception):
    """Ends a generation whose wanted call is recorded: at once, because what follows may fail (an overflow does)."""

    def __init__(self, recording: Recording) -> None:
        super().__init__(recording)
        self.recording = recording


class RecordingSession:
    """Another session whose programs run call by call, so that buffers can be read before and after the wanted one."""

    def __init__(self, inner: Session, bundle: Bundle, target: Target) -> None:
        self.provider, self.in_place, self.few_sizes = inner.provider, inner.in_place, inner.few_sizes
        # A call belongs to the step that is counted when it runs; `commit` alone runs only where the next step is queued.
        self.queues = target.graph == "commit"
        self.called: dict[int | None, int] = {}
        """Layer -> step of the last call of the wanted graph there, whether it was too early or of the wrong layer."""
        self._inner, self._bundle, self._target = inner, bundle, target
        self._step = 1

    def record(self, frames: Iterable[Frame]) -> Recording | None:
        """Run a generation of this session up to the wanted call; None if it ends without one."""
        self._step = 1
        try:
            for frame in frames:
                self._step = frame.step + 1
        except Recorded as ended:
            return ended.recording
        return None

    def allocate(self, dims: tuple[int, ...], type: TensorType) -> Buffer:
        return self._inner.allocate(dims, type)

    def prepare(self, calls: Sequence[GraphCall]) -> Program:
        programs = [(call, self._inner.prepare([call])) for call in calls]

        def run() -> None:
            for call, program in programs:
                if call.graph == self._target.graph:
                    self.called[call.layer] = self._step
                    if self._target.wants(call, self._step):
                        raise Recorded(self._record(call, program))
                program()

        return run

    def fetch(self, buffers: Sequence[Buffer]) -> Fetch:
        return self._inner.fetch(buffers)

    def mark(self) -> Mark:
        return self._inner.mark()

    def inspect(self) -> SessionReport:
        return self._inner.inspect()

    def close(self) -> None:
        self._inner.close()

    def _record(self, call: GraphCall, program: Program) -> Recording:
        spec = self._bundle.specs[call.graph]
        inputs = {tensor.name: call.tensors[tensor.name].read() for tensor in spec.inputs}
        program()
        return Recording(
            graph=call.graph,
            layer=call.layer,
            step=self._step,
            provider=self.provider,
            inputs=inputs,
            weights=self._bundle.graph_weights(call.graph, call.layer),
            outputs={tensor.name: call.tensors[tensor.name].read() for tensor in spec.outputs},
        )


def check_target(bundle: Bundle, target: Target) -> None:
    """Refuse a call that no generation of this bundle makes."""
    if target.graph not in bundle.specs:
        raise UsageError(f"no graph is called '{target.graph}'; there are: {', '.join(bundle.specs)}")
    if target.step < 1:
        raise UsageError(f"--step is {target.step}, expected at least 1")
    layers = bundle.manifest.shape.layers
    if target.layer is not None and not target.graph.startswith("layer_"):
        raise UsageError(f"--layer does not go with graph '{target.graph}', which belongs to no layer; leave it out")
    if target.layer is not None and not 0 <= target.layer < layers:
        raise UsageError(f"--layer is {target.layer}, expected 0 to {layers - 1}")


# -- files
def check_polygraphy(bundle: Bundle) -> None:
    """Refuse, before anything runs, what Polygraphy's files cannot hold or what is not installed."""
    import_polygraphy()
    if bundle.manifest.dtype == "bfloat16":
        raise UsageError(
            "Polygraphy's files hold numpy arrays, and numpy has no bfloat16: export with --dtype float16 or float32 to "
            "dump a graph"
        )


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not an empty folder; remove it or choose another with -o")


def save_recording(bundle: Bundle, recording: Recording, folder: Path) -> dict[str, int]:
    """Write the graph with weights as inputs, its inputs and its outputs; all or nothing. Returns bytes by file name."""
    json, comparator = import_polygraphy()
    # Polygraphy knows numpy's arrays by their exact type, and mapped weights are of a derived one.
    feed = {name: np.asarray(array) for name, array in {**recording.inputs, **recording.weights}.items()}
    results = comparator.RunResults()
    results.add([dict(recording.outputs)], runner_name=f"dllm-export {recording.provider}")
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.partial-", dir=folder.parent) as temporary:
        work = Path(temporary, folder.name)
        work.mkdir()
        (work / f"{recording.graph}.onnx").write_bytes(bundle.graph_bytes(recording.graph))
        json.save_json([feed], str(work / INPUTS))
        json.save_json(results, str(work / OUTPUTS))
        sizes = {file.name: file.stat().st_size for file in sorted(work.iterdir())}
        work.rename(folder)
    return sizes


def import_polygraphy() -> tuple[Any, Any]:
    """The modules `polygraphy.json` and `polygraphy.comparator`."""
    try:
        return importlib.import_module("polygraphy.json"), importlib.import_module("polygraphy.comparator")
    except ModuleNotFoundError as error:
        raise IncompatibleError(
            f"dumping a graph needs the package {error.name}: pip install 'dllm-export[polygraphy]'"
        ) from None
