"""The options of a build. Nothing heavy is imported here: the command line shows them without any TensorRT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from dllm_export.errors import UsageError
from dllm_export.graphs import GraphSpec
from dllm_export.runtime.manifest import Compatible
from dllm_export.runtime.options import flag, option

TimingCache = Literal["use", "strict"]

LARGEST_BATCH = 65536
"""Above it, dims of a layer leave the 32 bits that kernels index with; the compiler's own words for that help nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """For which library, GPUs and sizes to build."""

    flavour: str = option("auto", "TensorRT library", choices=("auto", "tensorrt", "tensorrt-rtx"))
    sm: str = option("current", "compute capabilities, such as 8.9,12.0; current asks the GPU of this machine")
    max_batch: int = option(4, "most sequences in a batch")
    max_length: int | None = option(None, "longest prompt and response together; default: the model's own")
    fixed: str = option(
        "",
        "sizes that get a profile of their own, tuned for nothing else (tensorrt), as dims of a graph: "
        "S=1149,X=256,Q=64;S=1149,Q=64",
    )
    graphs: str = option("", "graphs to build engines of, with a comma between; default: all of the bundle's")
    rows: int = option(256, "response rows that engines are tuned for; the head takes no more of them in a step")
    timing_cache: TimingCache = option(
        "use",
        "what the builder measured before (tensorrt): use it and add to it, or fail where it lacks a measurement",
        choices=get_args(TimingCache),
    )
    compatible: Compatible = option(
        "none",
        "what else engines shall run on, at a price in speed (tensorrt): newer versions of the library, all GPUs of the same "
        "compute capability, or all of 8.0 and newer",
        choices=get_args(Compatible),
    )

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_length", "rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{flag(name)} is {value}, expected at least 1")
        if self.max_batch > LARGEST_BATCH:
            raise UsageError(f"--max-batch is {self.max_batch}, expected at most {LARGEST_BATCH}")
        for name, known in (("timing_cache", get_args(TimingCache)), ("compatible", get_args(Compatible))):
            if getattr(self, name) not in known:
                raise UsageError(f"{flag(name)} is {getattr(self, name)!r}, expected one of: {', '.join(known)}")
        parse_sizes(self.fixed)
        if not self.sm.replace(",", "").strip():
            raise UsageError("--sm is empty, expected compute capabilities, such as 8.9,12.0, or current")


def choose_graphs(specs: Mapping[str, GraphSpec], options: BuildOptions) -> dict[str, GraphSpec]:
    """The graphs that engines are asked of."""
    asked = [name.strip() for name in options.graphs.split(",") if name.strip()]
    unknown = [name for name in asked if name not in specs]
    if unknown:
        raise UsageError(f"--graphs has {', '.join(unknown)}, expected some of this bundle's: {', '.join(specs)}")
    return {name: spec for name, spec in specs.items() if not asked or name in asked}


def parse_sizes(text: str) -> tuple[dict[str, int], ...]:
    """Groups of fixed sizes, such as S=1149,Q=64;S=1149: a dict of dim letters each."""
    groups = []
    for group in filter(None, text.split(";")):
        pairs = [part.partition("=") for part in group.split(",")]
        sizes = {dim.strip(): int(size) for dim, _, size in pairs if size.strip().isdecimal()}
        if len(sizes) != len(pairs) or not sizes.keys() <= set("SXQN") or min(sizes.values()) < 1:
            raise UsageError(f"--fixed has {group!r}, expected sizes of the dims S, X, Q or N, such as S=1149,Q=64")
        groups.append(sizes)
    return tuple(groups)
