"""TensorRT's timing cache: what the builder measured on this GPU, so that a similar build need not measure again.

It is no input of a run, and the library itself refuses one of another version or GPU; so it lies beside the engines and
the manifest does not list it. TensorRT for RTX measures nothing while it builds, and has none.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_export.errors import UsageError
from dllm_export.exporter.build_options import TimingCache
from dllm_export.runtime.files import replace_file
from dllm_export.runtime.tensorrt.library import Flavour, TensorRt

if TYPE_CHECKING:
    import tensorrt as trt

TIMING_CACHE = "timing.cache"


def check_timing(mode: TimingCache, flavour: Flavour, library: TensorRt | None) -> None:
    """Refuse a strict cache where there is none; None stands for the newest release of the flavour."""
    if mode != "strict":
        return
    if flavour == "tensorrt-rtx":
        raise UsageError(
            "--timing-cache strict is for standard TensorRT, TensorRT for RTX measures nothing as it builds: leave it out"
        )
    if library is not None and not hasattr(library.module.BuilderFlag, "ERROR_ON_TIMING_CACHE_MISS"):
        raise UsageError(f"{flavour} {library.version} has no --timing-cache strict, 9.3 and newer have: leave it out")


def load_timing_cache(library: TensorRt, config: trt.IBuilderConfig, file: Path) -> Any:
    """The cache that the build will use, which must outlive it; what cannot be read is replaced by an empty one."""
    try:
        blob = file.read_bytes()
    except OSError:
        blob = b""
    for data in dict.fromkeys((blob, b"")):
        cache = config.create_timing_cache(data)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            break
    library.logger.messages = []  # complaints about a damaged cache are no reason of a later failure
    return cache


def require_timing_cache(library: TensorRt, config: trt.IBuilderConfig, file: Path) -> Any:
    """The same, but nothing is measured: a cache that cannot be used, or that lacks what the build needs, fails it."""
    try:
        blob = file.read_bytes()
    except OSError as error:
        raise UsageError(
            f"--timing-cache strict has nothing to go by ({error}): build with --timing-cache use first, or put there what "
            f"such a build wrote"
        ) from None
    cache = config.create_timing_cache(blob)
    used = cache is not None and config.set_timing_cache(cache, ignore_mismatch=False)
    library.require(used, f"use {file}, which --timing-cache strict needs")
    config.set_flag(library.module.BuilderFlag.ERROR_ON_TIMING_CACHE_MISS)
    return cache


def save_timing_cache(config: trt.IBuilderConfig, file: Path) -> None:
    """Write back what the build has learned; the engine is as good where that cannot be kept."""
    cache = config.get_timing_cache()
    if cache is not None:
        with suppress(OSError):
            replace_file(file, bytes(cache.serialize()))
