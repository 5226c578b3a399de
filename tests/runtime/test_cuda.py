"""The CUDA calls of the runtime where no GPU answers: every error is noticed, and a stream is waited for before it goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dllm_export.errors import DllmExportError, IncompatibleError, ResourceError

cudart = pytest.importorskip("cuda.bindings.runtime", reason="the CUDA bindings are not installed")
cuda = pytest.importorskip("dllm_export.runtime.cuda")

SUCCESS, LOST = cudart.cudaError_t.cudaSuccess, cudart.cudaError_t.cudaErrorLaunchFailure


def gpu_answers() -> bool:
    error, count = cudart.cudaGetDeviceCount()
    return bool(error == SUCCESS and count > 0)


without_gpu = pytest.mark.skipif(gpu_answers(), reason="a GPU answers here")


@pytest.mark.parametrize(("answer", "value"), [((), None), ((7,), 7), ((7, 8), (7, 8))])
def test_a_call_gives_what_cuda_answered_after_its_code(answer: tuple[int, ...], value: object) -> None:
    assert cuda.call(lambda: (SUCCESS, *answer), doing="asking") == value


def test_a_lost_device_is_named_with_what_was_being_done() -> None:
    with pytest.raises(DllmExportError, match=r"CUDA failed while asking: .*; start the process again"):
        cuda.call(lambda: (LOST,), doing="asking")
    with pytest.raises(ResourceError, match="out of device memory while asking"):
        cuda.call(lambda: (cudart.cudaError_t.cudaErrorMemoryAllocation,), doing="asking")


@without_gpu
@pytest.mark.parametrize(
    "ask",
    [lambda: cuda.free_memory(), lambda: cuda.explain_shortage(cuda.Usage(), "weights", 1)],
    ids=["free", "shortage"],
)
def test_free_memory_that_nobody_tells_is_an_error_and_not_a_number(ask: Callable[[], object]) -> None:
    with pytest.raises(IncompatibleError, match="no NVIDIA"):
        ask()


@pytest.mark.parametrize("answer", [SUCCESS, LOST])
def test_a_closed_stream_is_waited_for_once_even_if_the_device_is_lost(
    answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def note(name: str, *result: object) -> None:
        monkeypatch.setattr(cudart, name, lambda *_: (done.append(name), result)[1])

    note("cudaSetDevice", SUCCESS)
    note("cudaStreamCreateWithFlags", SUCCESS, 1)
    note("cudaStreamSynchronize", answer)
    note("cudaStreamDestroy", answer)
    stream = cuda.Stream()
    done.clear()
    stream.close()
    stream.close()
    assert done == ["cudaStreamSynchronize", "cudaStreamDestroy"]
