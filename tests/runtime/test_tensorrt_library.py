"""What the library answers, and above all what it does not, as one readable error."""

from __future__ import annotations

import shlex
from types import SimpleNamespace
from typing import Any

import pytest

from dllm_export.errors import IncompatibleError, ResourceError
from dllm_export.runtime.tensorrt.library import TensorRt, build_command


class Logger:
    """Collects as ours does."""

    def __init__(self) -> None:
        self.messages: list[str] = []


@pytest.fixture
def library() -> TensorRt:
    return TensorRt("tensorrt", "8.6.0", SimpleNamespace(), Logger())


def make_kind(fails: Exception | None) -> type[Any]:
    """A class of the library that logs and, like pybind11, fails in its constructor."""

    class Builder:
        def __init__(self, *arguments: Any) -> None:
            self.arguments = arguments
            if fails is not None:
                arguments[-1].messages.append("CUDA initialization failure with error: 35")
                raise fails

    return Builder


def test_what_is_created_gets_the_logger_last(library: TensorRt) -> None:
    assert library.create(make_kind(None), "network").arguments == ("network", library.logger)


def test_a_constructor_that_gives_nothing_is_refused_with_what_was_logged(library: TensorRt) -> None:
    """The words of TensorRT 8.6 where no GPU answers."""
    kind = make_kind(TypeError("pybind11::init(): factory function returned nullptr"))
    with pytest.raises(IncompatibleError) as refused:
        library.create(kind)
    assert str(refused.value) == "TensorRT could not create its Builder: CUDA initialization failure with error: 35"
    assert library.logger.messages == []


def test_a_wrong_call_of_ours_stays_what_it_is(library: TensorRt) -> None:
    with pytest.raises(TypeError, match="incompatible constructor arguments"):
        library.create(make_kind(TypeError("__init__(): incompatible constructor arguments")))


@pytest.mark.parametrize("value", [None, False, -1])
@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("no importer", IncompatibleError),
        ("Requested amount of GPU memory (9 bytes) could not be allocated: out of memory", ResourceError),
        ("Error Code 2: OutOfMemory (no further information)", ResourceError),
    ],
)
def test_a_refusal_does_not_fit_and_a_shortage_is_a_shortage(
    value: object, message: str, error: type[Exception], library: TensorRt
) -> None:
    library.logger.messages = [message, message]
    with pytest.raises(error) as refused:
        library.require(value, "parse it")
    assert str(refused.value) == f"TensorRT could not parse it: {message}"
    assert library.logger.messages == []


def test_a_value_is_given_back_and_old_messages_are_forgotten(library: TensorRt) -> None:
    library.logger.messages = ["an old complaint"]
    assert library.require(0, "add a profile") == 0
    with pytest.raises(IncompatibleError, match="could not go on: it gave no reason"):
        library.require(None, "go on")


def test_only_tensorrt_for_rtx_is_told_the_gpus() -> None:
    assert shlex.split(build_command("a b", "tensorrt", ["8.9"])) == [
        *("dllm-export", "build", "a b", "--flavour", "tensorrt")
    ]
    assert build_command("b", "tensorrt-rtx", ["8.9", "12.0"]).endswith("b --flavour tensorrt-rtx --sm 8.9,12.0")
