"""Which engines run where, decided from the manifest alone, and what to do about those that do not."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from dllm_export.errors import IncompatibleError
from dllm_export.runtime.manifest import EngineRecord
from dllm_export.runtime.tensorrt.compatibility import Host, choose_engines, explain_misfit, missing_engine

STANDARD = Host(flavour="tensorrt", version="10.13.0.35", capability="8.9", platform="linux-x86_64", cuda="12.8")
RTX = Host(flavour="tensorrt-rtx", version="1.7.1.116", capability="8.9", platform="linux-x86_64", cuda="13.0")

HERE = EngineRecord(
    graph="embed",
    file="engines/embed.plan",
    flavour="tensorrt",
    version="10.13.0.35",
    targets=("8.9",),
    platform="linux-x86_64",
    cuda="12.8",
    flags=(),
    profiles=({"B": (1, 1, 4)},),
    key="0" * 64,
    seconds=1.0,
)
PORTABLE = msgspec.structs.replace(
    HERE, flavour="tensorrt-rtx", version="1.7.1.116", targets=("8.9", "12.0"), platform="windows-amd64", cuda=""
)
STANDARD_LINE = "'dllm-export build BUNDLE --flavour tensorrt'"
RTX_LINE = "'dllm-export build BUNDLE --flavour tensorrt-rtx --sm 8.9'"


def test_an_engine_built_here_fits() -> None:
    assert explain_misfit(HERE, STANDARD) is None


def test_a_plan_of_tensorrt_for_rtx_fits_on_all_it_names_whatever_system_built_it() -> None:
    assert explain_misfit(PORTABLE, RTX) is None
    assert explain_misfit(PORTABLE, replace(RTX, capability="12.0")) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"flavour": "tensorrt-rtx", "version": "1.7.1.116"},
            "it was built with tensorrt-rtx, here tensorrt is installed",
        ),
        ({"version": "10.9.0.34"}, "it was built with tensorrt 10.9.0.34, here 10.13.0.35 is installed"),
        ({"targets": ("12.0",)}, "it was built for compute capability 12.0, this GPU has 8.9"),
        ({"targets": ("8.6", "12.0")}, "it was built for compute capability 8.6 and 12.0, this GPU has 8.9"),
        ({"platform": "linux-aarch64"}, "it was built on linux-aarch64, this is linux-x86_64"),
        ({"cuda": "13.0"}, "it was built under a driver for CUDA 13.0, this driver knows CUDA 12.8: update it"),
    ],
)
def test_every_reason_is_given_and_becomes_one_sentence_with_the_command(changes: dict[str, Any], reason: str) -> None:
    record = msgspec.structs.replace(HERE, **changes)
    assert explain_misfit(record, STANDARD) == reason
    with pytest.raises(IncompatibleError) as refused:
        choose_engines([record], ["embed"], STANDARD, "BUNDLE")
    assert str(refused.value) == f"the engine of graph 'embed' does not fit: {reason}; run {STANDARD_LINE}"


# -- plans that were built for more
@pytest.mark.parametrize(
    ("built", "here", "fits"),
    [
        ("10.9.0.34", "10.13.0.35", True),
        ("10.13.0.35", "10.13.0.35", True),
        ("10.13.0.35", "10.13.1.0", True),
        ("8.6.1", "10.0.1", True),
        ("10.13.0.35", "11.1.0", True),
        ("10.13.0.35", "10.9.0.34", False),  # newer versions only
        ("11.1.0", "10.13.0.35", False),
        ("8.6.1", "11.1.0", False),
        ("8.6.1", "9.3.0", False),
        ("9.3.0", "10.0.1", False),
        ("11.1.0", "12.0.0", False),
        ("", "10.13.0.35", False),
    ],
)
def test_a_plan_for_newer_versions_runs_where_they_are_and_its_code_is_allowed(
    built: str, here: str, fits: bool
) -> None:
    record = msgspec.structs.replace(HERE, version=built, compatible="versions")
    host = replace(STANDARD, version=here, host_code=True)
    reason = f"it was built with tensorrt {built} for that and newer versions, here {here} is installed"
    assert explain_misfit(record, host) == (None if fits else reason)
    if fits:
        assert explain_misfit(record, replace(host, host_code=False)) == (
            "it brings code that runs on the host, which --allow-host-code takes from builders that you trust"
        )
    for other in ("none", "same-capability", "ampere-plus"):
        strict = msgspec.structs.replace(record, compatible=other)
        assert (explain_misfit(strict, host) is None) is (built == here)


@pytest.mark.parametrize(
    ("here", "fits"), [("8.0", True), ("8.9", True), ("12.0", True), ("10.0", True), ("7.5", False)]
)
def test_a_plan_for_ampere_runs_on_8_0_and_newer(here: str, fits: bool) -> None:
    record = msgspec.structs.replace(HERE, compatible="ampere-plus", targets=("8.6",))
    host = replace(STANDARD, capability=here)
    reason = f"it was built for compute capability 8.0 and newer, this GPU has {here}"
    assert explain_misfit(record, host) == (None if fits else reason)
    for other in ("none", "versions", "same-capability"):
        strict = msgspec.structs.replace(record, compatible=other)
        assert explain_misfit(strict, replace(host, host_code=True)) == (
            f"it was built for compute capability 8.6, this GPU has {here}"
        )


def test_what_was_built_for_more_still_stays_on_its_system_and_its_driver() -> None:
    for asked in ("versions", "ampere-plus"):
        record, host = msgspec.structs.replace(HERE, compatible=asked), replace(STANDARD, host_code=True)
        assert explain_misfit(record, replace(host, platform="windows-amd64")) is not None
        assert explain_misfit(msgspec.structs.replace(record, cuda="13.0"), host) is not None


def test_an_engine_without_host_code_is_chosen_before_a_newer_one_with_it() -> None:
    newer = msgspec.structs.replace(HERE, file="newer.plan", compatible="versions")
    assert choose_engines([HERE, newer], ["embed"], STANDARD, "BUNDLE") == {"embed": HERE}
    allowed = choose_engines([HERE, newer], ["embed"], replace(STANDARD, host_code=True), "BUNDLE")
    assert allowed == {"embed": newer}


def test_a_driver_that_answers_no_version_knows_no_cuda() -> None:
    reason = explain_misfit(HERE, replace(STANDARD, cuda=""))
    assert reason == "it was built under a driver for CUDA 12.8, this driver knows CUDA nothing: update it"


@pytest.mark.parametrize("cuda", ["12.0", "12.9", "11.8", ""])
def test_only_the_major_version_of_cuda_must_be_known_to_the_driver(cuda: str) -> None:
    assert explain_misfit(msgspec.structs.replace(HERE, cuda=cuda), STANDARD) is None


def test_versions_are_compared_as_numbers() -> None:
    """As text, 9 would be newer than 12."""
    assert explain_misfit(msgspec.structs.replace(HERE, cuda="9.2"), STANDARD) is None


@pytest.mark.parametrize(("host", "line"), [(STANDARD, STANDARD_LINE), (RTX, RTX_LINE)])
def test_a_graph_without_engines_is_named_with_the_command_that_builds_it(host: Host, line: str) -> None:
    record = HERE if host is STANDARD else PORTABLE
    assert choose_engines([record], ["embed", "head"], host, "BUNDLE") == {"embed": record}
    assert str(missing_engine("head", host, "BUNDLE")) == f"the bundle has no engine of graph 'head': run {line}"
    with pytest.raises(IncompatibleError) as refused:
        choose_engines([record], ["head", "gather"], host, "BUNDLE")
    assert str(refused.value) == str(missing_engine("head", host, "BUNDLE"))


def test_the_newest_engine_that_fits_is_chosen_for_each_graph() -> None:
    """The manifest lists engines in the order of their building; the last ones here are for another GPU."""
    older, newer = (msgspec.structs.replace(HERE, file=f"{name}.plan") for name in ("older", "newer"))
    elsewhere = msgspec.structs.replace(HERE, file="elsewhere.plan", targets=("12.0",))
    head = msgspec.structs.replace(HERE, graph="head", file="head.plan")
    records = [head, older, PORTABLE, newer, elsewhere, msgspec.structs.replace(elsewhere, graph="head")]
    chosen = choose_engines(records, ["embed", "head"], STANDARD, "BUNDLE")
    assert {graph: record.file for graph, record in chosen.items()} == {"embed": "newer.plan", "head": "head.plan"}
    assert choose_engines(records, ["embed"], RTX, "BUNDLE") == {"embed": PORTABLE}


def test_the_reason_is_that_of_the_installed_librarys_own_engines_first() -> None:
    older = msgspec.structs.replace(HERE, version="10.9.0.34")
    for records in ([older, PORTABLE], [PORTABLE, older]):
        with pytest.raises(IncompatibleError, match=r"it was built with tensorrt 10\.9\.0\.34, here 10\.13"):
            choose_engines(records, ["embed"], STANDARD, "BUNDLE")
    with pytest.raises(IncompatibleError, match="it was built with tensorrt-rtx, here tensorrt is installed"):
        choose_engines([PORTABLE], ["embed"], STANDARD, "BUNDLE")


@pytest.mark.parametrize(("host", "flags"), [(STANDARD, "tensorrt"), (RTX, "tensorrt-rtx --sm 8.9")])
def test_the_command_can_be_pasted_whatever_the_bundle_is_called(host: Host, flags: str) -> None:
    with pytest.raises(IncompatibleError) as refused:
        choose_engines([], ["embed"], host, "my bundles/it's")
    line = str(refused.value).partition("run '")[2].removesuffix("'")
    assert shlex.split(line) == ["dllm-export", "build", "my bundles/it's", "--flavour", *flags.split()]


@pytest.mark.parametrize("capability", ["9.0", "10.0"])
def test_tensorrt_for_rtx_is_refused_on_datacentre_gpus_before_any_command_is_offered(capability: str) -> None:
    record = msgspec.structs.replace(PORTABLE, targets=(capability,))
    with pytest.raises(IncompatibleError) as refused:
        choose_engines([record], ["embed"], replace(RTX, capability=capability), "BUNDLE")
    assert str(refused.value) == (
        f"TensorRT for RTX does not run on compute capability {capability}; install tensorrt on this GPU"
    )


def test_standard_tensorrt_runs_on_datacentre_gpus() -> None:
    record = msgspec.structs.replace(HERE, targets=("9.0",))
    assert choose_engines([record], ["embed"], replace(STANDARD, capability="9.0"), "BUNDLE") == {"embed": record}
