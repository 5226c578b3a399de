"""Which library and which GPUs, sizes and types: refused before anything is built."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest

from dllm_export.errors import IncompatibleError, UsageError
from dllm_export.exporter.build_options import BuildOptions
from dllm_export.exporter.build_target import check_build, check_switches, choose_target
from dllm_export.exporter.compatibility import check_capabilities, set_compatible
from dllm_export.exporter.ranges import dim_ranges, input_ranges, make_profiles
from dllm_export.exporter.timing import load_timing_cache, require_timing_cache, save_timing_cache
from dllm_export.graphs import ModelShape, graph_specs
from dllm_export.runtime.manifest import Compatible
from dllm_export.runtime.tensorrt.library import TensorRt, choose_targets, load_tensorrt

rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX has wheels for Linux on x86-64 only")


@pytest.fixture(scope="module")
def library() -> TensorRt:
    return load_tensorrt("tensorrt-rtx")


def old_library() -> TensorRt:
    """What 8.6 shows of itself: explicit batch as a flag, and no strong typing."""
    module = SimpleNamespace(
        NetworkDefinitionCreationFlag=SimpleNamespace(EXPLICIT_BATCH=0),
        BuilderFlag=SimpleNamespace(FP16=0, VERSION_COMPATIBLE=15),
        HardwareCompatibilityLevel=SimpleNamespace(NONE=0, AMPERE_PLUS=1),
    )
    return TensorRt("tensorrt", "8.6.1", module, SimpleNamespace(messages=[]))


def new_library() -> TensorRt:
    """What 11 shows of itself, as far as it is asked here: the names of TensorRT for RTX, without its GPUs by name."""
    module = SimpleNamespace(**{name: value for name, value in vars(rtx).items() if name != "ComputeCapability"})
    return TensorRt("tensorrt", "11.1.0", module, SimpleNamespace(messages=[]))


# -- which library and which GPU
def test_a_target_says_which_library_and_why() -> None:
    chosen = choose_target(BuildOptions(sm="12.0,8.9"))
    assert (chosen.library.flavour, chosen.reason, chosen.targets) == (
        "tensorrt-rtx",
        "the only one installed",
        ("8.9", "12.0"),
    )
    assert chosen.folder == f"engines/tensorrt-rtx-{chosen.library.version}-8.9_12.0"
    assert choose_target(BuildOptions(flavour="tensorrt-rtx", sm="8.9")).reason == "asked for"


def test_hopper_is_refused_before_building_with_the_other_flavour_named(library: TensorRt) -> None:
    with pytest.raises(IncompatibleError, match=r"does not run on compute capability 9\.0; use --flavour tensorrt"):
        choose_targets(library, "8.9,9.0")


def test_an_unknown_capability_lists_the_known_ones(library: TensorRt) -> None:
    with pytest.raises(UsageError, match=r"--sm 5\.0 is none of 7\.5, 8\.0, 8\.6, 8\.9, 12\.0"):
        choose_targets(library, "5.0")


def test_without_a_gpu_the_current_one_cannot_be_meant(library: TensorRt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(IncompatibleError, match=r"no NVIDIA GPU answers here: name .* --sm 8\.9,12\.0"):
        choose_targets(library, "current")
    with pytest.raises(
        IncompatibleError, match=r"answers here: tensorrt 8\.6\.1 builds only for .* build on that machine"
    ):
        choose_targets(old_library(), "current")


def test_a_library_that_is_not_installed_gives_the_pip_line() -> None:
    with pytest.raises(IncompatibleError, match=r"pip install 'dllm-export\[tensorrt\]'"):
        load_tensorrt("tensorrt")
    with pytest.raises(UsageError, match="expected auto, tensorrt or tensorrt-rtx"):
        load_tensorrt("rtx")


@pytest.mark.parametrize("sm", ["8.9 12.0", "sm_89", "89"])
def test_capabilities_in_another_spelling_are_refused_with_the_right_one(sm: str, library: TensorRt) -> None:
    with pytest.raises(
        UsageError, match=rf"--sm {sm} is none of 7\.5, .*; several are separated by commas, as in 8\.9,12"
    ):
        choose_targets(library, sm)


# -- types and sizes
def test_fixed_sizes_are_refused_where_they_would_change_nothing(library: TensorRt) -> None:
    options = BuildOptions(fixed="S=100,Q=4")
    check_build(old_library(), options, "float16", 512)
    with pytest.raises(UsageError, match=r"--fixed is for standard TensorRT, .*: leave it out"):
        check_build(library, options, "float16", 512)


def test_bfloat16_is_refused_where_the_library_has_none(library: TensorRt) -> None:
    with pytest.raises(IncompatibleError, match=r"tensorrt 8\.6\.1 has no bfloat16: export with --dtype float16"):
        check_build(old_library(), BuildOptions(), "bfloat16", 512)
    check_build(old_library(), BuildOptions(), "float16", 512)
    check_build(old_library(), BuildOptions(), "float32", 512)
    check_build(library, BuildOptions(), "bfloat16", 512)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_batch": 0}, "--max-batch is 0, expected at least 1"),
        ({"max_length": 0}, "--max-length is 0, expected at least 1"),
        ({"rows": -1}, "--rows is -1, expected at least 1"),
        ({"max_batch": 65537}, "--max-batch is 65537, expected at most 65536"),
        ({"sm": " , "}, "--sm is empty"),
        ({"compatible": "all"}, "--compatible is 'all', expected one of: none, versions, same-capability, ampere-plus"),
        ({"timing_cache": "off"}, "--timing-cache is 'off', expected one of: use, strict"),
    ],
)
def test_options_that_mean_nothing_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BuildOptions(**values)


COMPATIBLE: tuple[Compatible, ...] = get_args(Compatible)


# -- switches that some libraries have
@pytest.mark.parametrize(
    "options", [*(BuildOptions(compatible=asked) for asked in COMPATIBLE), BuildOptions(timing_cache="strict")]
)
def test_a_switch_is_taken_where_the_library_has_it_and_refused_elsewhere(
    options: BuildOptions, library: TensorRt
) -> None:
    for newest in (new_library(), None):
        check_switches(options, "tensorrt", newest)
    asked = f"--compatible {options.compatible}" if options.timing_cache == "use" else "--timing-cache strict"
    if asked == "--compatible none":
        check_switches(options, "tensorrt-rtx", library)
        return
    for newest in (library, None):
        with pytest.raises(UsageError, match=rf"^{asked.split(' ')[0]} .*is for standard TensorRT, .*: leave it out$"):
            check_switches(options, "tensorrt-rtx", newest)
    if asked in ("--compatible same-capability", "--timing-cache strict"):
        with pytest.raises(UsageError, match=rf"^tensorrt 8\.6\.1 has no {asked}, .* and newer have: leave it out$"):
            check_switches(options, "tensorrt", old_library())
    else:
        check_switches(options, "tensorrt", old_library())


@pytest.mark.parametrize(
    ("asked", "least"), [("none", "7.0"), ("versions", "7.0"), ("same-capability", "7.5"), ("ampere-plus", "8.0")]
)
def test_gpus_too_old_for_a_level_are_refused(asked: Compatible, least: str) -> None:
    """The least capabilities are those of the levels' own documentation."""
    check_capabilities(asked, (least, "8.9", "12.0"))
    if asked in ("same-capability", "ampere-plus"):
        with pytest.raises(
            UsageError, match=rf"--compatible {asked} is built on GPUs of compute capability {least} and newer"
        ):
            check_capabilities(asked, ("7.0",))


@pytest.mark.parametrize(
    ("asked", "flags", "level"),
    [
        ("none", (), None),
        ("versions", ("VERSION_COMPATIBLE",), None),
        ("same-capability", (), "SAME_COMPUTE_CAPABILITY"),
        ("ampere-plus", (), "AMPERE_PLUS"),
    ],
)
def test_each_kind_of_compatibility_is_one_switch_of_the_library(
    asked: Compatible, flags: tuple[str, ...], level: str | None, library: TensorRt
) -> None:
    config, set_flags = SimpleNamespace(), []
    config.set_flag = set_flags.append
    assert set_compatible(library, cast(Any, config), asked) == flags
    assert set_flags == [getattr(rtx.BuilderFlag, name) for name in flags]
    found = getattr(config, "hardware_compatibility_level", None)
    assert found == (level and getattr(rtx.HardwareCompatibilityLevel, level))


def test_a_length_that_the_model_has_is_taken_and_one_more_is_not(library: TensorRt) -> None:
    check_build(library, BuildOptions(max_length=512), "float16", 512)
    with pytest.raises(UsageError, match="--max-length is 513, this model takes at most 512 tokens"):
        check_build(library, BuildOptions(max_length=513), "float16", 512)


def test_ranges_cover_a_step_of_any_request(llada_8b: ModelShape) -> None:
    specs = graph_specs(llada_8b)
    options = BuildOptions(max_batch=3, max_length=2000, rows=64)
    assert dim_ranges(specs["layer_adaptive"], 4096, options) == {
        "B": (1, 1, 3),
        "S": (1, 1024, 2000),
        "X": (1, 64, 2000),
        "Q": (1, 64, 2000),
    }
    assert dim_ranges(specs["head"], 4096, options)["Q"] == (1, 64, 64)
    assert dim_ranges(specs["layer_full"], 4096, BuildOptions())["S"] == (1, 1024, 4096)
    assert dim_ranges(specs["layer_full"], 100, BuildOptions())["S"] == (1, 100, 100)


def test_standard_tensorrt_gets_a_profile_for_the_rows_of_the_response(llada_8b: ModelShape) -> None:
    spec, options = graph_specs(llada_8b)["layer_partial"], BuildOptions(rows=64)
    narrow, wide = make_profiles("tensorrt", spec, 4096, options)
    assert (narrow["Q"], wide["Q"]) == ((1, 64, 64), (1, 64, 4096))
    assert make_profiles("tensorrt-rtx", spec, 4096, options) == (wide,)


def test_every_dynamic_input_has_shapes_and_the_budget_a_value(llada_8b: ModelShape) -> None:
    spec = graph_specs(llada_8b)["layer_adaptive"]
    found = input_ranges(spec, dim_ranges(spec, 4096, BuildOptions()))
    assert found["hidden"] == ([1, 1, 4096], [1, 256, 4096], [4, 4096, 4096])
    assert found["budget"] == ([1], [64], [4096])
    assert set(found) == {tensor.name for tensor in spec.inputs}


# -- the timing cache of standard TensorRT, which needs a GPU to build with
class Config:
    """Takes a cache that starts like one, as the library does."""

    def __init__(self) -> None:
        self.cache: SimpleNamespace | None = None
        self.flags: list[object] = []

    def create_timing_cache(self, blob: bytes) -> SimpleNamespace | None:
        return SimpleNamespace(blob=blob) if blob == b"" or blob.startswith(b"cache") else None

    def set_timing_cache(self, cache: SimpleNamespace, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.blob == b"cache of another GPU":
            return False
        self.cache = SimpleNamespace(serialize=lambda: cache.blob + b"cache")
        return True

    def set_flag(self, flag: object) -> None:
        self.flags.append(flag)

    def get_timing_cache(self) -> SimpleNamespace | None:
        return self.cache


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, b"cache"), (b"cache", b"cachecache"), (b"damaged", b"cache"), (b"cache of another GPU", b"cache")],
)
def test_a_timing_cache_is_carried_on_and_a_useless_one_replaced(
    before: bytes | None, after: bytes, tmp_path: Any
) -> None:
    file, config, library = tmp_path / "timing.cache", Config(), old_library()
    library.logger.messages = ["cache is damaged"]
    if before is not None:
        file.write_bytes(before)
    assert load_timing_cache(library, config, file) is not None
    assert library.logger.messages == []
    save_timing_cache(config, file)
    assert file.read_bytes() == after
    assert [path.name for path in tmp_path.iterdir()] == ["timing.cache"]


def test_a_strict_cache_must_be_there_and_be_taken(tmp_path: Path, library: TensorRt) -> None:
    file, config, standard = tmp_path / "timing.cache", Config(), new_library()
    with pytest.raises(
        UsageError, match=r"^--timing-cache strict has nothing to go by \(.*timing\.cache'\): build with "
    ):
        require_timing_cache(standard, cast(Any, config), file)
    for refused in (b"damaged", b"cache of another GPU"):
        file.write_bytes(refused)
        standard.logger.messages = ["it is another GPU's"]
        with pytest.raises(IncompatibleError) as error:
            require_timing_cache(standard, cast(Any, config), file)
        assert str(error.value) == (
            f"TensorRT could not use {file}, which --timing-cache strict needs: it is another GPU's"
        )
    assert config.flags == []
    file.write_bytes(b"cache")
    assert require_timing_cache(standard, cast(Any, config), file).blob == b"cache"
    assert config.flags == [rtx.BuilderFlag.ERROR_ON_TIMING_CACHE_MISS]


def test_a_timing_cache_that_cannot_be_kept_fails_nothing(tmp_path: Any) -> None:
    config = Config()
    load_timing_cache(old_library(), config, tmp_path)
    save_timing_cache(config, tmp_path / "missing" / "timing.cache")
    assert list(tmp_path.iterdir()) == []
