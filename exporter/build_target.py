"""What a build is for: the library, why that one, and the GPUs. Everything that can be refused is refused here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from dllm_export.errors import IncompatibleError, UsageError
from dllm_export.exporter.build_options import BuildOptions
from dllm_export.exporter.compatibility import check_capabilities, check_compatible
from dllm_export.exporter.precision import check_dtype
from dllm_export.exporter.timing import check_timing
from dllm_export.graphs import DType
from dllm_export.runtime.tensorrt.library import Flavour, TensorRt, choose_targets, find_library, load_tensorrt


@dataclass(frozen=True, slots=True)
class BuildTarget:
    """A library and the compute capabilities that it builds for."""

    library: TensorRt
    reason: str
    """Why this library, as words that follow its name."""
    targets: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Where a bundle keeps these engines."""
        return f"engines/{self.library.flavour}-{self.library.version}-{'_'.join(self.targets)}"


def choose_target(options: BuildOptions) -> BuildTarget:
    """The library and GPUs that the options mean here, or an error before anything is built."""
    library = load_tensorrt(options.flavour)
    check_switches(options, library.flavour, library)
    # One set of GPUs is one folder and one key, however it was written.
    targets = sorted(set(choose_targets(library, options.sm)), key=lambda sm: tuple(map(int, sm.split("."))))
    check_capabilities(options.compatible, targets)
    return BuildTarget(library, _explain_choice(options.flavour), tuple(targets))


def check_switches(options: BuildOptions, flavour: Flavour, library: TensorRt | None) -> None:
    """Refuse what only other libraries can be asked for; None stands for the newest release of the flavour."""
    check_timing(options.timing_cache, flavour, library)
    check_compatible(options.compatible, flavour, library)


def check_build(library: TensorRt, options: BuildOptions, dtype: DType, model_length: int) -> None:
    """Refuse a type that the library lacks, sizes that the model does not have, and a GPU that cannot be asked."""
    check_dtype(library, dtype)
    check_length(options, model_length)
    if options.fixed and library.flavour == "tensorrt-rtx":
        raise UsageError(
            "--fixed is for standard TensorRT, TensorRT for RTX specialises to sizes as it runs: leave it out"
        )
    find_build_cuda(library)


def find_build_cuda(library: TensorRt) -> str:
    """CUDA version of the driver that the library builds under; empty where it builds without a GPU."""
    if library.targets:
        return ""  # and there CUDA need not be installed
    try:
        from dllm_export.runtime.cuda import driver_cuda
    except ModuleNotFoundError:
        raise IncompatibleError(
            f"building with {library.flavour} {library.version} needs the package cuda-bindings: "
            f"pip install 'dllm-export[tensorrt]'"
        ) from None
    return driver_cuda()


def check_length(options: BuildOptions, model_length: int) -> None:
    """Refuse sequences longer than the model's positions."""
    if options.max_length is not None and options.max_length > model_length:
        raise UsageError(
            f"--max-length is {options.max_length}, this model takes at most {model_length} tokens: leave it out, or make "
            f"it smaller"
        )


def _explain_choice(flavour: str) -> str:
    if flavour != "auto":
        return "asked for"
    others = [name for name in get_args(Flavour) if find_library(name) is not None]
    return "the only one installed" if len(others) == 1 else "it runs on every GPU; --flavour takes the other"
