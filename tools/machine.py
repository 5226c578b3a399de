"""What a machine has: interpreter, cores, memory, disk, packages and GPUs. Imports none of the packages."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dllm_export import __version__
from dllm_export.runtime.tensorrt.library import REFUSED_BY_RTX

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "numpy": ("numpy",),
    "tokenizers": ("tokenizers",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "torch": ("torch",),
    "onnx": ("onnx",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt_rtx"),
    "cuda": ("cuda-bindings",),
    "polygraphy": ("polygraphy",),
    "matplotlib": ("matplotlib",),
}
"""Package -> the names it is distributed under."""

EXTRAS: Mapping[str, str] = {
    "cuda": "tensorrt",
    "matplotlib": "plots",
    "onnx": "export",
    "onnxruntime": "onnxruntime",
    "polygraphy": "polygraphy",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
    "torch": "export",
}
"""Package -> the extra of dllm-export that brings it; the others always come along."""


QUIET = 0.05
"""Most of the machine's processor time that others may take. With more, threads that wait for one another at every
operation (PyTorch's most of all) are slowed down many times over, and ratios mean nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU as nvidia-smi describes it."""

    name: str
    driver: str
    capability: str

    @property
    def runs_rtx(self) -> bool:
        """Whether TensorRT for RTX accepts it."""
        return self.capability not in REFUSED_BY_RTX


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Facts for a report. Memory and disk in bytes; None where the system does not tell."""

    version: str
    python: str
    platform: str
    cpus: int
    memory: int | None
    disk: int
    packages: Mapping[str, str | None]
    gpus: tuple[Gpu, ...]


def inspect_machine(place: Path) -> Machine:
    """This machine, with the free space on the disk of `place`."""
    return Machine(
        version=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=find_memory(),
        disk=shutil.disk_usage(place).free,
        packages={name: find_version(name) for name in PACKAGES},
        gpus=tuple(find_gpus()),
    )


def find_version(package: str) -> str | None:
    """The installed version, or None."""
    for distribution in PACKAGES[package]:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def pip_line(package: str) -> str:
    """What installs the package."""
    return f"pip install 'dllm-export[{EXTRAS[package]}]'" if package in EXTRAS else "pip install dllm-export"


def find_memory() -> int | None:
    """Bytes of memory that processes here may use: the machine's, or the container's limit."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(total, int(text)) if text.isdecimal() else total


def find_free_memory(place: str) -> int | None:
    """Bytes of memory that are free on the cpu, or on the first GPU for cuda; None where the system does not tell."""
    if place == "cuda":
        answer = ask_gpu("memory.free")
        return int(answer) * 2**20 if answer.isdecimal() else None
    info = Path("/proc/meminfo")
    lines = info.read_text(encoding="ascii").splitlines() if info.is_file() else []
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else ""
    if free is None or not text.isdecimal():
        return free
    used = Path("/sys/fs/cgroup/memory.current")
    return min(free, int(text) - (int(used.read_text()) if used.is_file() else 0))


def ask_gpu(fields: str) -> str:
    """What nvidia-smi says of the GPU that is this process's first; empty where it is missing.

    The tool lists all GPUs of the machine, also those that CUDA_VISIBLE_DEVICES hides from CUDA, and in the bus's order.
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    query = ["nvidia-smi", f"--id={first}", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.partition("\n")[0].strip()


def find_gpus() -> Iterator[Gpu]:
    """The GPUs that nvidia-smi lists; none where it is missing or fails."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return
    if result.returncode:
        return
    for line in result.stdout.splitlines():
        name, driver, capability = (part.strip() for part in line.rsplit(",", 2))
        yield Gpu(name=name, driver=driver, capability=capability)


def describe_machine(threads: int) -> dict[str, object]:
    """What the figures depend on beside the code."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory": find_memory(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: find_version(name) for name in ("torch", "onnxruntime", "onnx", "numpy")},
    }


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


@dataclass(slots=True)
class Others:
    """Measures what other processes take of the processors while the block runs; None where the system does not tell."""

    share: float | None = None
    _start: tuple[float, float, float] | None = None

    def __enter__(self) -> Others:
        self._start = processor_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        if self._start is not None and (end := processor_seconds()) is not None:
            every, idle, own = (after - before for before, after in zip(self._start, end, strict=True))
            self.share = max(0.0, every - idle - own) / max(every, 1e-9)


def processor_seconds() -> tuple[float, float, float] | None:
    """Seconds of all processors since the start of the machine: all, idle, and those of this process."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None
    # user nice system idle iowait irq softirq steal; what follows is already in user and nice
    ticks = [int(number) for number in stat.read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    rate, own = os.sysconf("SC_CLK_TCK"), os.times()
    return sum(ticks) / rate, (ticks[3] + ticks[4]) / rate, own.user + own.system
