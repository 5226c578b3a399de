"""`tensorrt` 8.6 to 11 and `tensorrt_rtx` behind one small module: what differs is asked of the library, never guessed.

Flag numbers move between releases (STRONGLY_TYPED is bit 2, 1 or 0), so they are composed from the names that exist, and
every return value is checked: the library answers None or False where others raise.
"""

from __future__ import annotations

import importlib
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

from dllm_export.errors import IncompatibleError, ResourceError, UsageError

Flavour = Literal["tensorrt", "tensorrt-rtx"]
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
REFUSED_BY_RTX = ("9.0", "10.0")
"""Compute capabilities that TensorRT for RTX does not run on: H100/H200 and B200."""


@dataclass(frozen=True, slots=True)
class TensorRt:
    """One installed library. `module` is untyped because the flavours are two modules with nearly the same names."""

    flavour: Flavour
    version: str
    module: Any
    logger: Any
    """The library keeps the first logger of a process, so that there is one; it collects instead of printing."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Compute capabilities that can be named ahead of time, such as 8.9; empty where a build needs the GPU itself."""
        named = getattr(self.module, "ComputeCapability", None)
        names = [] if named is None else [name for name in dir(named) if name.startswith("SM")]
        return tuple(
            sorted((f"{name[2:-1]}.{name[-1]}" for name in names), key=lambda sm: tuple(map(int, sm.split("."))))
        )

    @property
    def strongly_typed(self) -> bool:
        """Whether the numbers' types come from the graph alone; 8.6 must be told (exporter/precision.py)."""
        return hasattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")

    @property
    def staged(self) -> bool:
        """Whether layers that read cached keys run as two engines: 8.6 would compute the whole of one in float32.

        Its builder offers such a graph to its code generator with float32 inputs alone, and then converts all weights at
        every call; either half of it is taken in float16 (docs/tensorrt.md).
        """
        return not self.strongly_typed

    def network_flags(self) -> int:
        """Explicit batch and strong typing, as far as this release has them as flags."""
        flags = self.module.NetworkDefinitionCreationFlag
        return sum(
            1 << int(getattr(flags, name)) for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED") if hasattr(flags, name)
        )

    def capability(self, target: str) -> Any:
        """The library's constant for a named compute capability."""
        return getattr(self.module.ComputeCapability, "SM" + target.replace(".", ""))

    def create(self, kind: type[Any], *arguments: Any) -> Any:
        """A Builder, Runtime or OnnxParser of the library, which logs to `logger`, or a readable error."""
        try:
            made = kind(*arguments, self.logger)
        except TypeError as error:
            # What Python makes of None from a constructor: 8.6 does so where no GPU answers.
            if "nullptr" not in str(error):
                raise
            made = None
        return self.require(made, f"create its {kind.__name__}")

    def require(self, value: Any, what: str) -> Any:
        """The value, or what the library logged since the last call as one readable error."""
        messages, self.logger.messages = self.logger.messages, []
        if value is None or value is False or (isinstance(value, int) and not isinstance(value, bool) and value < 0):
            reason = "; ".join(dict.fromkeys(messages)) or "it gave no reason"
            short = re.search(r"out ?of ?memory", reason, re.IGNORECASE) is not None
            raise (ResourceError if short else IncompatibleError)(f"TensorRT could not {what}: {reason}")
        return value


def load_tensorrt(flavour: str) -> TensorRt:
    """The library of this flavour; `auto` takes standard TensorRT first, since it runs on every GPU."""
    if flavour != "auto" and flavour not in MODULES:
        raise UsageError(f"--flavour is {flavour!r}, expected auto, tensorrt or tensorrt-rtx")
    wanted: tuple[Flavour, ...] = get_args(Flavour)
    if flavour != "auto":
        wanted = tuple(name for name in wanted if name == flavour)
    for name in wanted:
        library = find_library(name)
        if library is not None:
            return library
    raise IncompatibleError(
        f"no TensorRT is installed (looked for {', '.join(wanted)}): pip install 'dllm-export[{wanted[-1]}]'"
    )


@cache
def find_library(flavour: Flavour) -> TensorRt | None:
    """The installed library of a flavour, or None."""
    try:
        module = importlib.import_module(MODULES[flavour])
    except (ImportError, OSError):  # OSError: installed, but a library that it is linked against is missing
        return None
    if not hasattr(module, "Builder"):  # a folder of type stubs imports as an empty package
        return None
    return TensorRt(flavour, str(module.__version__), module, make_logger(module))


def make_logger(trt: Any) -> Any:
    """A logger that keeps errors for the next `require` instead of printing them."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.messages.append(message.strip())

    return Logger()


def choose_targets(library: TensorRt, sm: str) -> tuple[str, ...]:
    """Compute capabilities to build for, refused before anything is built where the library cannot."""
    targets = tuple(part.strip() for part in sm.split(",") if part.strip())
    if targets == ("current",):
        targets = (current_capability(library),)
    elif not library.targets:
        raise IncompatibleError(
            f"{library.flavour} {library.version} builds only for the GPU it runs on: use --sm current, or the flavour "
            f"tensorrt-rtx"
        )
    for target in targets:
        if not library.targets:
            continue
        if target in REFUSED_BY_RTX:
            raise IncompatibleError(
                f"TensorRT for RTX does not run on compute capability {target}; use --flavour tensorrt on that GPU"
            )
        if target not in library.targets:
            known = ", ".join(library.targets)
            raise UsageError(f"--sm {target} is none of {known}; several are separated by commas, as in 8.9,12.0")
    return targets


def current_capability(library: TensorRt) -> str:
    """Compute capability of this machine's first GPU, or what else can be built here."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        found = []
    if not found:
        remedy = "name the compute capabilities to build for, as --sm 8.9,12.0"
        if not library.targets:
            remedy = (
                f"{library.flavour} {library.version} builds only for the GPU it runs on, so build on that machine, or use "
                f"--flavour tensorrt-rtx --sm 8.9"
            )
        raise IncompatibleError(f"no NVIDIA GPU answers here: {remedy}")
    return found[0]


def build_command(bundle: str, flavour: Flavour, targets: Sequence[str]) -> str:
    """The command line that builds a bundle's engines for this library and these GPUs, as a shell takes it."""
    words = ["dllm-export", "build", bundle, "--flavour", flavour]
    return shlex.join([*words, "--sm", ",".join(targets)] if flavour == "tensorrt-rtx" else words)


def current_platform() -> str:
    """Operating system and processor, such as linux-x86_64: standard TensorRT's plans do not leave it."""
    return f"{platform.system()}-{platform.machine()}".lower()
