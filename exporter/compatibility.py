"""Engines that newer libraries or other GPUs take, too, at a price in speed. Only standard TensorRT is asked for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dllm_export.errors import UsageError
from dllm_export.runtime.manifest import Compatible
from dllm_export.runtime.tensorrt.library import Flavour, TensorRt

if TYPE_CHECKING:
    import tensorrt as trt

LEAST_CAPABILITY = {"same-capability": (7, 5), "ampere-plus": (8, 0)}
"""Oldest GPUs that can build so, as the library documents its levels."""


def check_compatible(compatible: Compatible, flavour: Flavour, library: TensorRt | None) -> None:
    """Refuse what the library does not offer; None stands for the newest release of the flavour."""
    if compatible == "none":
        return
    if flavour == "tensorrt-rtx":
        raise UsageError(
            "--compatible is for standard TensorRT, an engine of TensorRT for RTX runs on every GPU that --sm names: leave "
            "it out"
        )
    if (
        compatible == "same-capability"
        and library is not None
        and not hasattr(library.module.HardwareCompatibilityLevel, "SAME_COMPUTE_CAPABILITY")
    ):
        raise UsageError(
            f"{flavour} {library.version} has no --compatible same-capability, 10.9 and newer have: leave it out"
        )


def check_capabilities(compatible: Compatible, targets: Sequence[str]) -> None:
    """Refuse GPUs that are too old to build so."""
    least = LEAST_CAPABILITY.get(compatible, (0, 0))
    for target in targets:
        if tuple(map(int, target.split("."))) < least:
            raise UsageError(
                f"--compatible {compatible} is built on GPUs of compute capability {least[0]}.{least[1]} and newer, this "
                f"one has {target}: leave it out"
            )


def set_compatible(library: TensorRt, config: trt.IBuilderConfig, compatible: Compatible) -> tuple[str, ...]:
    """Ask the library for it; returns the names of the flags set."""
    trt = library.module
    if compatible == "versions":
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        return ("VERSION_COMPATIBLE",)
    if compatible == "same-capability":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    elif compatible == "ampere-plus":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    return ()
