"""The little of CUDA that the runtime needs: one device, one stream, memory, copies and captured graphs."""

from __future__ import annotations

import ctypes
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cuda.bindings import runtime as cudart
from numpy.typing import NDArray

from dllm_export.errors import DllmExportError, IncompatibleError, ResourceError

STAGING_BYTES = 32 * 2**20
"""Pinned memory per half of the staging pair that uploads go through."""

REMEDIES = {
    "weights": "export with --dtype float16, or use a GPU with more memory",
    "workspace": "build again with a smaller --max-length, --max-batch or --rows",
    "buffers": "lower --gen-length, the batch or the prompt",
}
"""Purpose of an allocation -> what makes it smaller."""


def call(function: Callable[..., Any], *arguments: Any, doing: str) -> Any:
    """The result of a CUDA call (several as a tuple, or None), or an error that says what was being done."""
    error, *results = function(*arguments)
    if error != cudart.cudaError_t.cudaSuccess:
        raise_error(error, doing)
    return results[0] if len(results) == 1 else tuple(results) or None


def raise_error(error: Any, doing: str) -> None:
    """CUDA's code as one of our errors."""
    kinds = cudart.cudaError_t
    if error in (kinds.cudaErrorInsufficientDriver, kinds.cudaErrorSystemDriverMismatch):
        raise IncompatibleError(
            "no NVIDIA driver answers, or it is older than this CUDA runtime: install or update the driver, or use "
            "--provider onnxruntime"
        )
    if error in (kinds.cudaErrorNoDevice, kinds.cudaErrorInvalidDevice):
        raise IncompatibleError("no NVIDIA GPU is visible to this process: use --provider onnxruntime")
    text = cudart.cudaGetErrorString(error)[1].decode()
    if error == kinds.cudaErrorMemoryAllocation:
        raise ResourceError(f"out of device memory while {doing}")
    raise DllmExportError(
        f"CUDA failed while {doing}: {text}; start the process again, this one may have lost the device"
    )


def driver_cuda() -> str:
    """Newest CUDA version that this machine's driver runs, such as 12.8; empty without a driver."""
    version = call(cudart.cudaDriverGetVersion, doing="asking for the driver's version")
    return f"{version // 1000}.{version % 1000 // 10}" if version else ""


@dataclass(slots=True)
class Usage:
    """Device memory that this session holds, by purpose, and the most it held at once."""

    held: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    allocations: int = 0

    def add(self, purpose: str, size: int) -> None:
        """Count an allocation."""
        self.held[purpose] += size
        self.allocations += 1
        self.peak = max(self.peak, self.held.total())


class DeviceMemory:
    """A block of device memory, freed with the object or by `free`."""

    def __init__(self, usage: Usage, purpose: str, size: int) -> None:
        error, address = cudart.cudaMalloc(max(size, 1))
        if error == cudart.cudaError_t.cudaErrorMemoryAllocation:
            raise ResourceError(explain_shortage(usage, purpose, size))
        if error != cudart.cudaError_t.cudaSuccess:
            raise_error(error, f"allocating {size} bytes of device memory for {purpose}")
        self.address, self.size = int(address), size
        usage.add(purpose, size)
        self.free = weakref.finalize(self, _release, usage, purpose, self.address, size)


def _release(usage: Usage, purpose: str, address: int, size: int) -> None:
    usage.held[purpose] -= size
    cudart.cudaFree(address)


def explain_shortage(usage: Usage, purpose: str, size: int) -> str:
    """What was needed for what, what is held and free, and what lowers it."""
    free, total = free_memory()
    held = ", ".join(f"{name} {_gigabytes(bytes_)}" for name, bytes_ in usage.held.items() if bytes_) or "nothing"
    return (
        f"out of device memory: {purpose} needs {_gigabytes(size)} more, {_gigabytes(free)} of {_gigabytes(total)} are "
        f"free (this session holds {held}); {REMEDIES[purpose]}"
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3f} GB" if size >= 1e8 else f"{size / 1e6:.3f} MB"


class PinnedMemory:
    """Page-locked host memory as a byte array, which the device copies from and to without the CPU."""

    def __init__(self, size: int) -> None:
        doing = f"pinning {size} bytes of host memory"
        self.address = int(call(cudart.cudaHostAlloc, max(size, 1), 0, doing=doing))
        self.bytes: NDArray[np.uint8] = np.ctypeslib.as_array(
            (ctypes.c_ubyte * max(size, 1)).from_address(self.address)
        )
        self.free = weakref.finalize(self, cudart.cudaFreeHost, self.address)


class Stream:
    """The one stream of a session on the current device; order on it is the only dependency between calls."""

    def __init__(self) -> None:
        call(cudart.cudaSetDevice, 0, doing="selecting the GPU")
        flags = cudart.cudaStreamNonBlocking
        self.handle = int(call(cudart.cudaStreamCreateWithFlags, flags, doing="creating a stream"))
        self._close = weakref.finalize(self, _end_stream, self.handle)

    def wait(self) -> None:
        """Block until everything queued is done."""
        call(cudart.cudaStreamSynchronize, self.handle, doing="waiting for the GPU")

    def upload(self, target: int, source: int, size: int) -> None:
        """Queue a copy from pinned host memory."""
        self._copy(target, source, size, cudart.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def download(self, target: int, source: int, size: int) -> None:
        """Queue a copy to pinned host memory."""
        self._copy(target, source, size, cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost)

    def _copy(self, target: int, source: int, size: int, kind: Any) -> None:
        call(cudart.cudaMemcpyAsync, target, source, size, kind, self.handle, doing="copying between host and GPU")

    def clear(self, target: int, size: int) -> None:
        """Queue zeroing."""
        call(cudart.cudaMemsetAsync, target, 0, size, self.handle, doing="zeroing device memory")

    def capture(self, enqueue: Callable[[], None]) -> Capture:
        """What `enqueue` queues, recorded instead of run."""
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call(cudart.cudaStreamBeginCapture, self.handle, mode, doing="starting a capture")
        try:
            enqueue()
        except BaseException:
            cudart.cudaStreamEndCapture(self.handle)  # leaves the stream usable; what was recorded is worthless
            raise
        graph = call(cudart.cudaStreamEndCapture, self.handle, doing="capturing a step")
        try:
            executable = call(cudart.cudaGraphInstantiate, graph, 0, doing="instantiating a captured step")
        finally:
            cudart.cudaGraphDestroy(graph)
        return Capture(executable, self)

    def close(self) -> None:
        """Wait for the stream and give it back."""
        self._close()


def _end_stream(handle: int) -> None:
    cudart.cudaStreamSynchronize(handle)  # what it answers is not asked: the device may be lost, and freeing goes on
    cudart.cudaStreamDestroy(handle)


class Capture:
    """A recorded sequence of work, replayed with one call."""

    def __init__(self, executable: Any, stream: Stream) -> None:
        self._executable, self._stream = executable, stream
        self.replays = 0
        self.close = weakref.finalize(self, cudart.cudaGraphExecDestroy, executable)

    def replay(self) -> None:
        """Queue the whole sequence."""
        call(cudart.cudaGraphLaunch, self._executable, self._stream.handle, doing="replaying a captured step")
        self.replays += 1


class Event:
    """A mark on a stream; one that is `timed` costs a little more."""

    def __init__(self, *, timed: bool = False) -> None:
        flags = cudart.cudaEventDefault if timed else cudart.cudaEventDisableTiming
        self._handle = call(cudart.cudaEventCreateWithFlags, flags, doing="creating an event")
        self._close = weakref.finalize(self, cudart.cudaEventDestroy, self._handle)

    def record(self, stream: Stream) -> None:
        """Mark the stream's present end."""
        call(cudart.cudaEventRecord, self._handle, stream.handle, doing="recording an event")

    def wait(self) -> None:
        """Block until the stream has passed the mark."""
        call(cudart.cudaEventSynchronize, self._handle, doing="waiting for the GPU")

    def seconds_until(self, later: Event) -> float:
        """Time from this mark to a later one, both timed, which is waited for."""
        later.wait()
        return float(call(cudart.cudaEventElapsedTime, self._handle, later._handle, doing="measuring time")) / 1e3


class Uploader:
    """Host arrays of any size to the device through a pair of pinned blocks: one fills while the other is sent."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._blocks = [(PinnedMemory(STAGING_BYTES), Event()) for _ in range(2)]
        self._turn = 0

    def send(self, array: NDArray[Any], target: int) -> None:
        """Queue the copy of an array, mapped files included; a host copy never exceeds the pair."""
        raw = array.reshape(-1).view(np.uint8)
        for start in range(0, raw.size, STAGING_BYTES):
            piece = raw[start : start + STAGING_BYTES]
            block, sent = self._blocks[self._turn]
            self._turn = 1 - self._turn
            sent.wait()
            np.copyto(block.bytes[: piece.size], piece)
            self._stream.upload(target + start, block.address, piece.size)
            sent.record(self._stream)

    def close(self) -> None:
        """Wait for what is queued and free the blocks."""
        self._stream.wait()
        for block, _ in self._blocks:
            block.free()


def gpu_capability() -> str:
    """Compute capability of the GPU in use, such as 9.0."""
    kinds = cudart.cudaDeviceAttr
    pair: Sequence[Any] = (kinds.cudaDevAttrComputeCapabilityMajor, kinds.cudaDevAttrComputeCapabilityMinor)
    return ".".join(str(call(cudart.cudaDeviceGetAttribute, kind, 0, doing="asking for the GPU")) for kind in pair)


def gpu_name() -> str:
    """The GPU in use, such as NVIDIA L4."""
    name = call(cudart.cudaGetDeviceProperties, 0, doing="asking for the GPU").name
    return (name.decode() if isinstance(name, bytes) else str(name)).strip("\0 ")


def free_memory() -> tuple[int, int]:
    """Free and total bytes of device memory."""
    free, total = call(cudart.cudaMemGetInfo, doing="asking for the free device memory")
    return int(free), int(total)
