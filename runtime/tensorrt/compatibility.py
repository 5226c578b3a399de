"""Which of a bundle's engines fit here. Decided from the manifest alone, before any plan is given to the library.

Rules (NVIDIA's engine compatibility tables): a plan of standard TensorRT runs with the same version on the same compute
capability, operating system and processor; one of TensorRT for RTX with the same version on the capabilities it names. The
driver must know the CUDA major version that the plan was built under.

Standard TensorRT can be asked for more. A plan built for newer versions runs with those of the same major version, and from 8
with 10 and from 10 with 11; it holds code that runs on the host, so that somebody must have allowed that. One built for
Ampere runs on compute capability 8.0 and newer. Any plan is taken on every GPU of its own capability; that it works there is a
promise of the library's only for one built so.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from dllm_export.errors import IncompatibleError
from dllm_export.runtime.manifest import EngineRecord
from dllm_export.runtime.tensorrt.library import REFUSED_BY_RTX, Flavour, build_command

AMPERE = (8, 0)
NEXT_MAJOR = ((8, 10), (10, 11))
"""Major versions that take the plans of an older one; no other pair does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What this machine offers an engine."""

    flavour: Flavour
    version: str
    capability: str
    """Of the GPU, such as 8.9."""
    platform: str
    cuda: str
    """Newest CUDA version of the driver, such as 12.8."""
    host_code: bool = False
    """Whether a plan may bring code that runs on the host."""


def explain_misfit(record: EngineRecord, host: Host) -> str | None:
    """Why this engine cannot run here, as the middle of a sentence; None if it can."""
    if record.flavour != host.flavour:
        return f"it was built with {record.flavour}, here {host.flavour} is installed"
    if record.version != host.version and not (
        record.compatible == "versions" and _reaches(record.version, host.version)
    ):
        newer = " for that and newer versions" if record.compatible == "versions" else ""
        return f"it was built with {record.flavour} {record.version}{newer}, here {host.version} is installed"
    if host.capability not in record.targets and not (
        record.compatible == "ampere-plus" and _numbers(host.capability) >= AMPERE
    ):
        built = (
            f"{AMPERE[0]}.{AMPERE[1]} and newer" if record.compatible == "ampere-plus" else " and ".join(record.targets)
        )
        return f"it was built for compute capability {built}, this GPU has {host.capability}"
    if record.flavour == "tensorrt" and record.platform != host.platform:
        return f"it was built on {record.platform}, this is {host.platform}"
    if record.cuda and _major(record.cuda) > _major(host.cuda or "0"):
        return f"it was built under a driver for CUDA {record.cuda}, this driver knows CUDA {host.cuda or 'nothing'}: update it"
    if record.compatible == "versions" and not host.host_code:
        return "it brings code that runs on the host, which --allow-host-code takes from builders that you trust"
    return None


def choose_engines(
    records: Sequence[EngineRecord], graphs: Collection[str], host: Host, bundle: str
) -> dict[str, EngineRecord]:
    """The newest engine of every graph that has any, or one sentence with the command that builds what fits.

    Graphs without an engine are for `missing_engine` to name once somebody asks for them: a build may be of some graphs only.
    """
    if host.flavour == "tensorrt-rtx" and host.capability in REFUSED_BY_RTX:
        raise IncompatibleError(
            f"TensorRT for RTX does not run on compute capability {host.capability}; install tensorrt on this GPU"
        )
    remedy = build_command(bundle, host.flavour, [host.capability])
    chosen = {}
    for graph in graphs:
        offered = [record for record in records if record.graph == graph]
        if not offered:
            continue
        fitting = [record for record in offered if explain_misfit(record, host) is None]
        if not fitting:
            # Somebody who built for this library wants to know about those engines, not that there are others, too.
            nearest = [record for record in offered if record.flavour == host.flavour] or offered
            reason = explain_misfit(nearest[-1], host)
            raise IncompatibleError(f"the engine of graph '{graph}' does not fit: {reason}; run '{remedy}'")
        chosen[graph] = fitting[-1]
    if not chosen:
        raise missing_engine(next(iter(graphs)), host, bundle)
    return chosen


def missing_engine(graph: str, host: Host, bundle: str) -> IncompatibleError:
    """That there is no engine of a graph, and what builds one."""
    remedy = build_command(bundle, host.flavour, [host.capability])
    return IncompatibleError(f"the bundle has no engine of graph '{graph}': run '{remedy}'")


def _reaches(built: str, here: str) -> bool:
    """Whether a plan that was built for newer versions is one for this."""
    first, second = _numbers(built), _numbers(here)
    return second >= first and (first[:1] == second[:1] or first[:1] + second[:1] in NEXT_MAJOR)


def _major(version: str) -> int:
    return _numbers(version)[0]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))
