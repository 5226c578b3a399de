"""TensorRT engines: the real compiler accepts every graph, without a GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dllm_export.errors import DllmExportError, IncompatibleError, IntegrityError, UsageError
from dllm_export.exporter.engines import BuildOptions, build_engines, build_plan, dim_ranges, make_profiles
from dllm_export.exporter.onnx_graph import build_onnx
from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pipeline import export
from dllm_export.graphs import DType, ModelShape, graph_specs
from dllm_export.runtime.bundle import Bundle, open_bundle
from dllm_export.runtime.tensorrt.library import TensorRt, choose_targets, load_tensorrt

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX has wheels for Linux on x86-64 only")

RTX = BuildOptions(flavour="tensorrt-rtx", sm="8.9,12.0")
TARGETS = ("8.9", "12.0")


@pytest.fixture(scope="module")
def library() -> TensorRt:
    return load_tensorrt("tensorrt-rtx")


@pytest.fixture(scope="module")
def built(tiny_checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("engines") / "bundle"
    bundle = export(tiny_checkpoints["gqa"], root, ExportOptions(dtype="float16", no_tokenizer=True))
    return build_engines(bundle, RTX)


def test_every_graph_has_an_engine_that_the_manifest_lists_and_verifies(built: Bundle) -> None:
    assert {record.graph for record in built.manifest.engines} == set(built.specs)
    assert {record.targets for record in built.manifest.engines} == {TARGETS}
    for record in built.manifest.engines:
        assert 1000 < built.file(record.file).stat().st_size < 4_000_000


def test_a_second_build_does_nothing_and_other_sizes_build_again(built: Bundle, tmp_path: Path) -> None:
    copy = open_bundle(shutil.copytree(built.path, tmp_path / "bundle"))
    manifest = (copy.path / "manifest.json").read_bytes()
    assert build_engines(copy, RTX).manifest == copy.manifest
    assert (copy.path / "manifest.json").read_bytes() == manifest
    again = build_engines(copy, BuildOptions(flavour="tensorrt-rtx", sm="8.9,12.0", max_batch=2)).manifest
    assert len(again.engines) == len(copy.manifest.engines)
    assert not {record.key for record in again.engines} & {record.key for record in copy.manifest.engines}
    plans = {path.relative_to(copy.path).as_posix() for path in copy.path.rglob("*.plan")}
    assert plans == {record.file for record in again.engines}


def test_a_changed_plan_is_refused(built: Bundle, tmp_path: Path) -> None:
    root = Path(shutil.copytree(built.path, tmp_path / "bundle"))
    plan = root / built.manifest.engines[0].file
    plan.write_bytes(plan.read_bytes()[:-1] + b"?")
    with pytest.raises(IntegrityError, match=r"\.plan was changed"):
        open_bundle(root)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_engines_of_the_8b_shape_are_small(dtype: DType, library: TensorRt, llada_8b: ModelShape) -> None:
    options = BuildOptions()
    plans = {
        name: build_plan(
            library,
            build_onnx(spec, llada_8b, dtype).SerializeToString(),
            spec,
            dtype,
            make_profiles(library, spec, llada_8b.max_length, options),
            TARGETS,
        )[0]
        for name, spec in graph_specs(llada_8b).items()
    }
    assert sum(map(len, plans.values())) < 20_000_000


def test_a_graph_that_the_parser_refuses_is_named(library: TensorRt, llada_8b: ModelShape) -> None:
    spec = graph_specs(llada_8b)["embed"]
    with pytest.raises(DllmExportError, match="could not parse graph 'embed'"):
        build_plan(library, b"not a graph", spec, "float16", [dim_ranges(spec, 4096, BuildOptions())], TARGETS)


# -- sizes
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


@pytest.mark.parametrize("field", ["max_batch", "max_length", "rows"])
def test_sizes_below_one_are_refused(field: str) -> None:
    with pytest.raises(UsageError, match=rf"--{field.replace('_', '-')} is 0"):
        BuildOptions(**{field: 0})


# -- which library and which GPU
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


def test_a_library_that_is_not_installed_gives_the_pip_line() -> None:
    with pytest.raises(IncompatibleError, match=r"pip install 'dllm-export\[tensorrt\]'"):
        load_tensorrt("tensorrt")
    with pytest.raises(UsageError, match="expected auto, tensorrt or tensorrt-rtx"):
        load_tensorrt("rtx")
