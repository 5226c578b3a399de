"""TensorRT engines of whole bundles: the real compiler accepts every graph, without a GPU."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from dllm_export.errors import DllmExportError, IncompatibleError, IntegrityError, ResourceError, UsageError
from dllm_export.exporter.build_options import BuildOptions
from dllm_export.exporter.build_progress import BuildProgress
from dllm_export.exporter.build_target import choose_target
from dllm_export.exporter.checkpoint import open_checkpoint
from dllm_export.exporter.engines import build_engine, build_engines, drop_damaged_engines, find_missing
from dllm_export.exporter.onnx_graph import build_onnx
from dllm_export.exporter.options import ExportOptions, ExportType
from dllm_export.exporter.pipeline import export
from dllm_export.exporter.plans import build_plan, make_builder
from dllm_export.exporter.ranges import make_profiles
from dllm_export.graphs import DType, ModelShape, engine_specs, graph_specs
from dllm_export.runtime.bundle import Bundle, open_bundle
from dllm_export.runtime.files import replace_file
from dllm_export.runtime.manifest import Compatible, encode_manifest
from dllm_export.runtime.tensorrt.library import TensorRt, current_platform, load_tensorrt

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX has wheels for Linux on x86-64 only")

RTX = BuildOptions(flavour="tensorrt-rtx", sm="8.9,12.0")
TARGETS = ("8.9", "12.0")
HALF = [
    ("plain", "float16"),
    *((variant, "bfloat16") for variant in ("plain", "gqa", "bias", "tied")),
    ("qk_norm", "bfloat16"),
    ("dream", "bfloat16"),
    ("blocks", "bfloat16"),
]


@pytest.fixture(scope="module")
def unbuilt(tiny_checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle without engines; not to be written to."""
    root = tmp_path_factory.mktemp("engines") / "unbuilt"
    return export(tiny_checkpoints["gqa"], root, ExportOptions(dtype="float16", no_tokenizer=True))


@pytest.fixture(scope="module")
def reports() -> list[tuple[str, int, int]]:
    """What the build of `built` reported."""
    return []


@pytest.fixture(scope="module")
def built(unbuilt: Bundle, reports: list[tuple[str, int, int]], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same with all engines; not to be written to."""
    copy = copy_bundle(unbuilt, tmp_path_factory.mktemp("engines"))
    return build_engines(copy, RTX, lambda *report: reports.append(report))


def copy_bundle(bundle: Bundle, folder: Path) -> Bundle:
    return open_bundle(shutil.copytree(bundle.path, folder / "bundle"))


def plan_files(root: Path) -> set[str]:
    """Every file below the folder of engines."""
    return {path.relative_to(root).as_posix() for path in (root / "engines").rglob("*") if path.is_file()}


# -- every graph of every model
def test_no_variant_is_left_out(tiny_checkpoints: dict[str, Path]) -> None:
    assert {variant for variant, _ in HALF} == set(tiny_checkpoints)


@pytest.mark.parametrize(("variant", "dtype"), [*HALF, ("plain", "float32")])
def test_every_graph_has_an_engine_that_the_manifest_lists_and_verifies(
    variant: str, dtype: ExportType, tiny_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Graphs that are byte for byte those of the plain variant are built there."""
    options = ExportOptions(dtype=dtype, no_tokenizer=True)
    bundle = export(tiny_checkpoints[variant], tmp_path / "bundle", options)
    plain = open_checkpoint(tiny_checkpoints["plain"]).config.shape
    shape = replace(plain, indicator_rank=bundle.manifest.shape.indicator_rank)
    shared = {name: build_onnx(spec, shape, dtype).SerializeToString() for name, spec in graph_specs(shape).items()}
    own = [name for name in bundle.specs if variant == "plain" or bundle.graph_bytes(name) != shared[name]]
    assert {"layer_full", "layer_partial"} <= set(own) or variant == "tied"
    bundle = build_engines(bundle, replace(RTX, graphs=",".join(own)))
    assert [record.graph for record in bundle.manifest.engines] == own
    for record in bundle.manifest.engines:
        assert record.targets == TARGETS
        assert record.platform == current_platform()
        assert (record.cuda, record.flags) == ("", ())
        assert record.seconds > 0
        assert 1000 < bundle.file(record.file).stat().st_size < 4_000_000
    assert plan_files(bundle.path) == {record.file for record in bundle.manifest.engines}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_engines_of_the_8b_shape_are_small(dtype: DType, llada_8b: ModelShape) -> None:
    library = load_tensorrt("tensorrt-rtx")
    plans = {
        name: build_plan(
            library,
            build_onnx(spec, llada_8b, dtype).SerializeToString(),
            spec,
            dtype,
            make_profiles(library.flavour, spec, llada_8b.max_length, BuildOptions()),
            TARGETS,
        )[0]
        for name, spec in graph_specs(llada_8b).items()
    }
    # Nineteen graphs for two capabilities, by the number of their kernels (docs/tensorrt.md).
    assert max(map(len, plans.values())) < 2_500_000
    assert sum(map(len, plans.values())) < 20_000_000


def test_a_library_that_needs_stages_gets_an_engine_of_each(
    unbuilt: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only 8.6 does, which builds on a GPU alone; here its successor compiles the same stages."""
    monkeypatch.setattr(TensorRt, "staged", True)
    built = build_engines(copy_bundle(unbuilt, tmp_path), RTX)
    wanted = engine_specs(unbuilt.specs, staged=True)
    assert [record.graph for record in built.manifest.engines] == list(wanted)
    assert {"layer_partial.project", "layer_partial.finish"} < wanted.keys()
    assert "layer_partial" not in wanted
    assert build_engines(built, RTX).manifest == built.manifest


# -- again
def test_a_second_build_does_nothing_and_other_sizes_build_again(built: Bundle, tmp_path: Path) -> None:
    copy = copy_bundle(built, tmp_path)
    manifest = (copy.path / "manifest.json").read_bytes()
    assert build_engines(copy, RTX).manifest == copy.manifest
    assert (copy.path / "manifest.json").read_bytes() == manifest
    again = build_engines(copy, replace(RTX, max_batch=2, graphs="embed,layer_partial,head")).manifest
    assert len(again.engines) == len(copy.manifest.engines)
    kept = {record.key for record in again.engines} & {record.key for record in copy.manifest.engines}
    assert {record.graph for record in again.engines if record.key not in kept} == {"embed", "layer_partial", "head"}
    assert plan_files(copy.path) == {record.file for record in again.engines}


def test_engines_of_another_compatibility_are_others_and_say_so(built: Bundle) -> None:
    options = BuildOptions(flavour="tensorrt-rtx", sm="8.9,12.0", compatible="ampere-plus")  # which RTX ignores
    target, specs = choose_target(RTX), built.specs
    keys = {
        asked: {key for _, key in find_missing(built, specs, replace(RTX, compatible=asked), target).values()}
        for asked in get_args(Compatible)
    }
    assert keys["none"] == set()
    assert [len(keys[asked]) for asked in ("versions", "same-capability", "ampere-plus")] == [len(specs)] * 3
    assert len(set().union(*keys.values())) == 3 * len(specs)
    profiles, key = find_missing(built, specs, options, target)["gather"]
    builder, progress = make_builder(target.library), BuildProgress(lambda share: None)
    record, _ = build_engine(built, specs["gather"], options, target, profiles, key, builder, progress)
    assert (record.compatible, record.key) == ("ampere-plus", key)
    assert {engine.compatible for engine in built.manifest.engines} == {"none"}
    asked = replace(options, compatible="versions")
    with pytest.raises(IncompatibleError, match=r"could not build graph 'gather': .*lean"):  # which this library lacks
        build_engine(built, specs["gather"], asked, target, profiles, key, builder, progress)


def test_a_strict_build_without_a_timing_cache_is_refused_and_makes_no_folder(
    unbuilt: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, spec = choose_target(RTX), unbuilt.specs["gather"]
    options, progress = replace(RTX, timing_cache="strict"), BuildProgress(lambda share: None)
    profiles, key = find_missing(unbuilt, {"gather": spec}, options, target)["gather"]
    builder = make_builder(target.library)
    monkeypatch.setattr(TensorRt, "targets", ())  # as standard TensorRT, which alone has such a cache
    with pytest.raises(UsageError, match=r"strict has nothing to go by .*timing\.cache"):
        build_engine(unbuilt, spec, options, target, profiles, key, builder, progress)
    assert not (unbuilt.path / "engines").exists()


def test_the_same_gpus_in_another_order_are_the_same_engines(built: Bundle, tmp_path: Path) -> None:
    copy = copy_bundle(built, tmp_path)
    options = BuildOptions(flavour="tensorrt-rtx", sm="12.0, 8.9,8.9")
    assert build_engines(copy, options).manifest == copy.manifest


def test_a_changed_plan_is_refused(built: Bundle, tmp_path: Path) -> None:
    root = Path(shutil.copytree(built.path, tmp_path / "bundle"))
    plan = root / built.manifest.engines[0].file
    plan.write_bytes(plan.read_bytes()[:-1] + b"?")
    with pytest.raises(IntegrityError, match=r"\.plan was changed"):
        open_bundle(root)


# -- repair
@pytest.mark.parametrize("damage", ["gone", "cut", "changed", "link"])
def test_a_damaged_plan_leaves_the_manifest_and_the_next_build_replaces_it(
    damage: str, built: Bundle, tmp_path: Path
) -> None:
    copy, record = copy_bundle(built, tmp_path), built.manifest.engines[0]
    plan = copy.path / record.file
    data = plan.read_bytes()
    plan.unlink()
    if damage == "link":
        plan.symlink_to(built.path / record.file)
    elif damage != "gone":
        plan.write_bytes(data[:100] if damage == "cut" else data[:-1] + b"?")
    with pytest.raises(IntegrityError):
        open_bundle(copy.path)
    assert drop_damaged_engines(copy.path) == (record.file,)
    opened = open_bundle(copy.path)
    assert {engine.graph for engine in built.manifest.engines} - {
        engine.graph for engine in opened.manifest.engines
    } == {record.graph}
    repaired = build_engines(opened, RTX)
    assert {engine.key for engine in repaired.manifest.engines} == {engine.key for engine in built.manifest.engines}
    assert not plan.is_symlink()
    assert (built.path / record.file).read_bytes() == data, "nothing is written through a link"
    assert drop_damaged_engines(copy.path) == ()


def test_engines_that_say_what_cannot_be_are_dropped_with_their_plans_and_nothing_else(
    built: Bundle, tmp_path: Path
) -> None:
    copy = copy_bundle(built, tmp_path)
    first, second, *others = built.manifest.engines
    wrong = (msgspec.structs.replace(first, profiles=()), msgspec.structs.replace(second, file="graphs/embed.onnx"))
    manifest = msgspec.structs.replace(built.manifest, engines=(*wrong, *others))
    (copy.path / "manifest.json").write_bytes(encode_manifest(manifest))
    assert drop_damaged_engines(copy.path) == (first.file, "graphs/embed.onnx")
    opened = open_bundle(copy.path)
    assert opened.manifest.engines == tuple(others)
    assert "graphs/embed.onnx" in {record.path for record in opened.manifest.files}


def test_other_damage_is_no_business_of_a_build(built: Bundle, tmp_path: Path) -> None:
    copy = copy_bundle(built, tmp_path)
    (copy.path / "graphs/embed.onnx").write_bytes(b"changed")
    manifest = (copy.path / "manifest.json").read_bytes()
    assert drop_damaged_engines(copy.path) == ()
    assert (copy.path / "manifest.json").read_bytes() == manifest
    with pytest.raises(IntegrityError, match=r"graphs/embed\.onnx .*export again"):
        open_bundle(copy.path)


# -- progress, and what an interruption leaves
def test_progress_grows_within_an_engine_to_a_hundred(built: Bundle, reports: list[tuple[str, int, int]]) -> None:
    bundle, seen = built, reports
    assert all(before[1] <= after[1] for before, after in pairwise(seen))
    assert {steps for _, _, steps in seen} == {100}
    assert seen[0] == (f"engine embed (1 of {len(bundle.specs)})", 0, 100)
    assert seen[-1] == ("engines", 100, 100)
    for number, graph in enumerate(bundle.specs, 1):
        name = f"engine {graph} ({number} of {len(bundle.specs)})"
        assert len({step for what, step, _ in seen if what == name}) >= 3, "more than its beginning and its end"


def test_an_interrupted_build_leaves_whole_engines_only_and_goes_on_later(unbuilt: Bundle, tmp_path: Path) -> None:
    copy, calls = copy_bundle(unbuilt, tmp_path), 0

    def interrupt(what: str, step: int, steps: int) -> None:
        nonlocal calls
        calls += what.startswith("engine layer_partial")
        if calls == 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(copy, RTX, interrupt)
    assert calls == 50, "nothing is reported of a build that is to stop"
    stopped = open_bundle(copy.path)
    assert [record.graph for record in stopped.manifest.engines] == ["embed", "layer_full"]
    assert plan_files(copy.path) == {record.file for record in stopped.manifest.engines}
    finished = build_engines(stopped, replace(RTX, graphs="embed,layer_full,layer_partial"))
    assert finished.manifest.engines[:2] == stopped.manifest.engines
    assert [record.graph for record in finished.manifest.engines[2:]] == ["layer_partial"]


def test_ctrl_c_reaches_a_build_that_works_in_another_thread(unbuilt: Bundle, tmp_path: Path) -> None:
    copy, main, pressed = copy_bundle(unbuilt, tmp_path), threading.get_ident(), threading.Event()

    def press(what: str, step: int, steps: int) -> None:
        # Which graph's build leaves this thread is the library's affair, and not the same on every day.
        if what.startswith("engine layer_") and threading.get_ident() != main and not pressed.is_set():
            pressed.set()
            signal.pthread_kill(main, signal.SIGINT)

    # A shell that starts the tests in the background has them ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            build_engines(copy, RTX, press)
    finally:
        signal.signal(signal.SIGINT, before)
    assert pressed.is_set()
    listed = open_bundle(copy.path).manifest.engines
    assert plan_files(copy.path) == {record.file for record in listed}
    names = [record.graph for record in listed]
    assert 1 <= len(names) < len(copy.specs)
    assert names == list(copy.specs)[: len(names)]


def test_a_plan_that_was_written_but_never_listed_is_built_again(
    built: Bundle, unbuilt: Bundle, tmp_path: Path
) -> None:
    copy, record = copy_bundle(unbuilt, tmp_path), built.manifest.engines[0]
    (copy.path / record.file).parent.mkdir(parents=True)
    (copy.path / record.file).write_bytes(b"half of a plan")
    assert open_bundle(copy.path).manifest.engines == ()

    def stop(what: str, step: int, steps: int) -> None:
        if not what.startswith(f"engine {record.graph} "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(copy, RTX, stop)
    assert open_bundle(copy.path).file(record.file).stat().st_size > 1000


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"old")

    def fail(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        replace_file(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


# -- refused before anything is built
@pytest.mark.parametrize(("number", "error"), [(errno.EROFS, UsageError), (errno.ENOSPC, ResourceError)])
def test_a_bundle_that_takes_no_files_is_refused_first(
    number: int, error: type[DllmExportError], unbuilt: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copy_bundle(unbuilt, tmp_path)

    def refuse(dir: Path) -> None:
        raise OSError(number, os.strerror(number), str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(error, match=f"^cannot write into {copy.path}: "):
        build_engines(copy, RTX)
    assert not (copy.path / "engines").exists()


def test_engines_that_are_there_need_no_writing(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("tempfile.TemporaryFile")
    assert build_engines(built, RTX).manifest == built.manifest


def test_a_length_beyond_the_models_is_refused(unbuilt: Bundle) -> None:
    with pytest.raises(UsageError, match="--max-length is 513, this model takes at most 512 tokens"):
        build_engines(unbuilt, BuildOptions(flavour="tensorrt-rtx", sm="8.9", max_length=513))
