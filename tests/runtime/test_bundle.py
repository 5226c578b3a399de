"""Opening a bundle: a byte out of place, a file that leaves the directory, a graph that reaches out: all refused."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto

from dllm_export.errors import IncompatibleError, IntegrityError, UsageError
from dllm_export.exporter.pack import list_files
from dllm_export.exporter.pipeline import export
from dllm_export.graphs import ModelShape
from dllm_export.runtime.bundle import PLACEHOLDER, Bundle, open_bundle
from dllm_export.runtime.manifest import FORMAT, MANIFEST, EngineRecord, FileRecord, WeightRecord, encode_manifest
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.session import SessionOptions
from dllm_export.tools.demo_layouts import byte_tokenizer
from dllm_export.tools.random_checkpoint import write_random_checkpoint

Rewrite = Callable[..., Path]
SHAPE = ModelShape(
    layers=2,
    hidden=16,
    heads=2,
    kv_heads=1,
    head_dim=8,
    mlp=24,
    vocab=264,
    max_length=64,
    norm_eps=1e-5,
    rope_theta=1e4,
)
FILES = (
    "manifest.json",
    "probe.safetensors",
    "tokenizer/tokenizer.json",
    "weights/layer.000.safetensors",
    "weights/layer.001.safetensors",
    "weights/embedding.safetensors",
    "weights/head.safetensors",
    *(f"graphs/{name}.onnx" for name in ("embed", "gather", "guidance", "head", "layer_skip")),
    *(f"graphs/layer_{kind}{form}.onnx" for kind in ("full", "partial", "adaptive") for form in ("", ".constant")),
)
"""Files that a bundle surely has; the tests go through all that are there."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with everything in it, tokenizer included; not to be written to."""
    root = tmp_path_factory.mktemp("bundle")
    model = write_random_checkpoint(root / "model", SHAPE)
    byte_tokenizer().save(str(model / "tokenizer.json"))
    return export(model, root / "bundle")


@pytest.fixture
def copy(original: Bundle, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(original.path, tmp_path / "bundle"))


@pytest.fixture
def rewrite(copy: Path, original: Bundle) -> Rewrite:
    """Writes the copy's manifest anew, with digests that fit the files as they are now and with fields changed."""

    def write(**fields: object) -> Path:
        (copy / MANIFEST).unlink()
        files = {"files": list_files(copy), **fields}
        (copy / MANIFEST).write_bytes(encode_manifest(msgspec.structs.replace(original.manifest, **files)))
        return copy

    return write


def all_files(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def refuse(root: Path, *words: str, error: type[Exception] = IntegrityError) -> str:
    """Neither opening nor loading works, and both say the same."""
    with pytest.raises(error) as refused:
        open_bundle(root)
    message = str(refused.value)
    assert not [word for word in words if word not in message], message
    assert message.count("\n") <= 1
    with pytest.raises(error):
        DiffusionLM.from_pretrained(root)
    return message


# -- what is fine
def test_a_bundle_opens_with_its_manifest_and_graphs(original: Bundle) -> None:
    bundle = open_bundle(str(original.path))
    assert bundle.manifest == original.manifest
    assert set(FILES) <= set(all_files(original.path))
    weights = bundle.graph_weights("layer_full", 1)
    assert {name: array.shape for name, array in weights.items()} == {
        spec.name: spec.dims for spec in bundle.specs["layer_full"].weights
    }
    assert onnx.load_model_from_string(bundle.graph_bytes("layer_full")).graph.name == "layer_full"


def test_a_moved_or_linked_bundle_opens(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy.rename(tmp_path / "else where")
    (tmp_path / "link").symlink_to(tmp_path / "else where")
    monkeypatch.chdir(tmp_path)
    for path in (Path("else where"), Path("link")):
        with DiffusionLM.from_pretrained(path, SessionOptions(threads=1)) as lm:
            assert len(lm.generate(["hi"], GenerationOptions(gen_length=4))[0].tokens) == 4


def test_files_that_the_manifest_does_not_list_are_left_alone(copy: Path) -> None:
    (copy / "README.txt").write_text("notes")
    (copy / "weights" / "layer.009.safetensors").write_bytes(b"never read")
    open_bundle(copy)


def test_rewriting_the_manifest_alone_is_no_damage(rewrite: Rewrite) -> None:
    open_bundle(rewrite())


@pytest.mark.parametrize("kind", ["nothing", "file", "empty", "model"])
def test_a_path_without_a_bundle_says_how_to_make_one(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if kind == "file":
        path.write_text("text")
    elif kind in ("empty", "model"):
        path.mkdir()
    if kind == "model":
        (path / "config.json").write_text("{}")
    reason = {"nothing": "it does not exist", "file": "it is a file"}.get(kind, "it has no manifest.json")
    message = refuse(path, f"is not a bundle: {reason}; ", "dllm-export export MODEL -o BUNDLE", error=UsageError)
    assert str(path) in message


# -- damage
def test_one_flipped_byte_in_any_file_is_refused(original: Bundle, copy: Path) -> None:
    generator = random.Random(0)
    files = all_files(copy)
    assert set(FILES) <= set(files)
    for name in files:
        path, data = copy / name, (original.path / name).read_bytes()
        for place in {0, 1, 7, 8, len(data) // 2, len(data) - 1, *generator.choices(range(len(data)), k=4)}:
            if place < len(data):
                path.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
                with pytest.raises((IntegrityError, IncompatibleError)) as refused:
                    open_bundle(copy)
                assert name in str(refused.value), f"byte {place} of {name}"
        path.write_bytes(data)
    open_bundle(copy)


def test_a_damaged_file_loads_nothing(copy: Path) -> None:
    data = bytearray((copy / "weights/head.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "weights/head.safetensors").write_bytes(data)
    assert refuse(copy, "weights/head.safetensors was changed after it was written (its sha256 differs)")


@pytest.mark.parametrize("change", ["cut", "longer", "empty"])
def test_a_file_of_another_size_is_refused_with_both_sizes(change: str, original: Bundle, copy: Path) -> None:
    for record in original.manifest.files:
        path = copy / record.path
        data = path.read_bytes()
        path.write_bytes({"cut": data[:-1], "longer": data + b"\0", "empty": b""}[change])
        refuse(copy, f"{record.path} has {path.stat().st_size} bytes, expected {record.size}")
        path.write_bytes(data)


def test_a_missing_file_is_named(original: Bundle, copy: Path) -> None:
    for record in original.manifest.files:
        (copy / record.path).rename(copy / "aside")
        refuse(copy, f"{record.path} is missing from the bundle")
        (copy / "aside").rename(copy / record.path)


def test_a_directory_or_pipe_in_the_place_of_a_file_is_refused(copy: Path) -> None:
    (copy / "probe.safetensors").unlink()
    (copy / "probe.safetensors").mkdir()
    refuse(copy, "probe.safetensors")
    (copy / "probe.safetensors").rmdir()
    os.mkfifo(copy / "probe.safetensors")
    refuse(copy, "probe.safetensors")


def test_a_cut_or_missing_manifest_is_refused(copy: Path) -> None:
    data = (copy / MANIFEST).read_bytes()
    (copy / MANIFEST).write_bytes(data[:-1])
    refuse(copy, "manifest.json")
    (copy / MANIFEST).write_bytes(b"")
    refuse(copy, "manifest.json")
    (copy / MANIFEST).unlink()
    refuse(copy, error=UsageError)


def test_two_exchanged_layers_are_refused(copy: Path) -> None:
    (copy / "weights/layer.000.safetensors").rename(copy / "aside")
    (copy / "weights/layer.001.safetensors").rename(copy / "weights/layer.000.safetensors")
    (copy / "aside").rename(copy / "weights/layer.001.safetensors")
    refuse(copy, "sha256 differs")


# -- links
def test_a_link_in_the_place_of_any_file_is_refused_even_with_the_right_content(copy: Path, tmp_path: Path) -> None:
    for name in all_files(copy):
        (copy / name).rename(tmp_path / "outside")
        (copy / name).symlink_to(tmp_path / "outside")
        refuse(copy, name, "symbolic link")
        (copy / name).unlink()
        (tmp_path / "outside").rename(copy / name)


@pytest.mark.parametrize("folder", ["weights", "graphs", "tokenizer"])
def test_a_linked_folder_is_refused(folder: str, copy: Path, tmp_path: Path) -> None:
    (copy / folder).rename(tmp_path / "outside")
    (copy / folder).symlink_to(tmp_path / "outside")
    refuse(copy, f"{folder}/", "symbolic link")


def test_a_link_that_leads_nowhere_or_to_itself_is_refused(copy: Path) -> None:
    (copy / "probe.safetensors").unlink()
    for place in ("nowhere", "probe.safetensors"):
        (copy / "probe.safetensors").symlink_to(place)
        refuse(copy, "probe.safetensors")
        (copy / "probe.safetensors").unlink()


# -- a manifest made by somebody else, digests right
@pytest.mark.parametrize("path", ["../outside", "weights/../../outside", "OUTSIDE", "weights\\..\\..\\outside", "a\0b"])
def test_a_listed_path_outside_the_bundle_is_refused(path: str, rewrite: Rewrite, copy: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"secret")
    path = str(outside) if path == "OUTSIDE" else path
    (record,) = (record for record in list_files(tmp_path) if record.path == "outside")
    files = [record for record in list_files(copy) if record.path != MANIFEST]
    refuse(rewrite(files=(*files, msgspec.structs.replace(record, path=path))), "not a plain path inside the bundle")


@pytest.mark.parametrize("path", ["x" * 300, "x/" * 3000 + "x"])
def test_a_path_that_no_file_system_takes_is_refused(path: str, rewrite: Rewrite, original: Bundle) -> None:
    record = FileRecord(path=path, size=1, sha256="0" * 64)
    refuse(rewrite(files=(*original.manifest.files, record)))


@pytest.mark.parametrize("field", ["graphs", "layer_bindings", "model_bindings", "tokenizer", "probe"])
def test_a_file_that_is_used_but_not_listed_is_refused(field: str, rewrite: Rewrite, original: Bundle) -> None:
    manifest = original.manifest
    assert manifest.tokenizer is not None
    away = "../outside"
    values: dict[str, object] = {
        "graphs": {name: msgspec.structs.replace(record, file=away) for name, record in manifest.graphs.items()},
        "layer_bindings": tuple(
            {name: msgspec.structs.replace(weight, file=away) for name, weight in layer.items()}
            for layer in manifest.layer_bindings
        ),
        "model_bindings": {
            name: msgspec.structs.replace(weight, file=away) for name, weight in manifest.model_bindings.items()
        },
        "tokenizer": msgspec.structs.replace(manifest.tokenizer, file=away),
        "probe": away,
    }
    root = rewrite(**{field: values[field]})
    with pytest.raises(IntegrityError, match="outside"):
        use_everything(root)


def use_everything(root: Path) -> None:
    """Open a bundle, read its probe and generate with it."""
    bundle = open_bundle(root)
    bundle.file(bundle.manifest.probe)
    with DiffusionLM.from_pretrained(root, SessionOptions(threads=1, prepack="off")) as lm:
        lm.generate(["hi"], GenerationOptions(gen_length=4))


def test_an_unknown_format_is_incompatible(rewrite: Rewrite) -> None:
    refuse(rewrite(format=FORMAT + 1), f"format {FORMAT + 1}", error=IncompatibleError)


@pytest.mark.parametrize("name", ["embed", "layer_full", "head"])
def test_a_manifest_that_lacks_a_graph_is_refused(name: str, rewrite: Rewrite, original: Bundle) -> None:
    graphs = {other: record for other, record in original.manifest.graphs.items() if other != name}
    refuse(rewrite(graphs=graphs), name)


def test_a_graph_with_another_signature_is_refused(rewrite: Rewrite, original: Bundle) -> None:
    record = original.manifest.graphs["embed"]
    changed = msgspec.structs.replace(record, outputs=record.inputs)
    refuse(rewrite(graphs={**original.manifest.graphs, "embed": changed}), "'embed'", "signature")
    refuse(rewrite(graphs={**original.manifest.graphs, "other": record}), "'other'", "signature")


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 1},
        {"layers": 3},
        {"vocab": 263},
        {"hidden": 17},
        {"heads": 4},
        {"mlp": 0},
        {"head_dim": 7},
        {"layers": -1},
        {"qkv_bias": True},
        {"tied_head": True},
    ],
    ids=str,
)
def test_a_shape_that_does_not_fit_the_files_is_refused(
    change: dict[str, int], rewrite: Rewrite, original: Bundle
) -> None:
    refuse(rewrite(shape=replace(original.manifest.shape, **change)))


@pytest.mark.parametrize("kind", ["layer", "weight", "tensor", "shape", "type"])
def test_bindings_that_do_not_fit_the_weights_are_refused(kind: str, rewrite: Rewrite, original: Bundle) -> None:
    layers, model = original.manifest.layer_bindings, original.manifest.model_bindings
    first = dict(layers[0])
    changes: dict[str, dict[str, object]] = {
        "layer": {"layer_bindings": layers[:1]},
        "weight": {"model_bindings": {"norm": model["norm"], "head": model["head"]}},
        "tensor": {"model_bindings": {**model, "norm": WeightRecord(file=model["norm"].file, tensor="none")}},
        "shape": {"layer_bindings": ({**first, "norm1": first["qk"]}, layers[1])},
        "type": {"dtype": "float16"},
    }
    refuse(rewrite(**changes[kind]))


# -- engines
PLAN = "engines/tensorrt-10.13.0.35-8.9/layer_adaptive.plan"
ENGINE = EngineRecord(
    graph="layer_adaptive",
    file=PLAN,
    flavour="tensorrt",
    version="10.13.0.35",
    targets=("8.9",),
    platform="linux-x86_64",
    cuda="12.8",
    flags=(),
    profiles=({dim: (1, 1, 9) for dim in "BSXQ"},),
    key="0" * 64,
    seconds=1.0,
)
"""Of a graph whose Q is the value of an input, not a dim."""
BUILD_AGAIN = "build again with 'dllm-export build {root} --flavour tensorrt'"


@pytest.fixture
def with_plan(copy: Path) -> Path:
    """The copy with a file where the engine's plan belongs."""
    (copy / PLAN).parent.mkdir(parents=True)
    (copy / PLAN).write_bytes(b"never loaded here")
    return copy


def test_an_engine_with_ranges_of_its_graphs_dims_is_accepted(with_plan: Path, rewrite: Rewrite) -> None:
    assert open_bundle(rewrite(engines=(ENGINE,))).manifest.engines == (ENGINE,)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"graph": "layer_none"}, "belongs to no graph that this version runs"),
        ({"graph": "layer_skip"}, "has size ranges of B, Q, S, X, expected B, X"),
        ({"file": "../elsewhere.plan"}, "is in '../elsewhere.plan', which manifest.json does not list under engines/"),
        ({"file": "engines/elsewhere.plan"}, "which manifest.json does not list"),
        ({"file": "graphs/embed.onnx"}, "which manifest.json does not list under engines/"),
        ({"profiles": ()}, "has no size ranges"),
        ({"profiles": ({},)}, "has size ranges of nothing, expected B, Q, S, X"),
        ({"profiles": ({dim: (1, 1, 9) for dim in "BSX"},)}, "has size ranges of B, S, X, expected B, Q, S, X"),
        ({"profiles": (*ENGINE.profiles, {dim: (1, 1, 9) for dim in "BSXQN"})}, "ranges of B, N, Q, S, X, expected"),
        ({"profiles": ({**ENGINE.profiles[0], "S": (0, 1, 9)},)}, "takes S from 0 to 9, usually 1, which is no range"),
        ({"profiles": ({**ENGINE.profiles[0], "S": (1, 10, 9)},)}, "takes S from 1 to 9, usually 10"),
        ({"profiles": ({**ENGINE.profiles[0], "S": (5, 4, 9)},)}, "takes S from 5 to 9, usually 4"),
        ({"cuda": "new"}, "does not say for which GPUs and driver it is"),
        ({"targets": ()}, "does not say for which GPUs and driver it is"),
        (
            {"flavour": "tensorrt-rtx", "compatible": "versions"},
            "says to be compatible with versions, which only tensorrt",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_engine_that_says_what_cannot_be_is_refused_with_the_command_that_builds_it(
    changes: dict[str, object], reason: str, with_plan: Path, rewrite: Rewrite
) -> None:
    root = rewrite(engines=(msgspec.structs.replace(ENGINE, **changes),))
    message = refuse(root, f"manifest.json: the engine of graph '{changes.get('graph', ENGINE.graph)}' ", reason)
    if changes.get("targets") != () and "flavour" not in changes:
        assert message.endswith(BUILD_AGAIN.format(root=root))


@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_a_damaged_plan_is_built_again_and_not_exported_again(damage: str, with_plan: Path, rewrite: Rewrite) -> None:
    root = rewrite(engines=(ENGINE,))
    if damage == "gone":
        (root / PLAN).unlink()
    else:
        (root / PLAN).write_bytes(b"cut" if damage == "cut" else b"Never loaded here")
    message = refuse(root, PLAN)
    assert message.endswith(BUILD_AGAIN.format(root=root))
    assert "export again" not in message


# -- a graph made by somebody else, digests right
def edit_graph(path: Path, edit: Callable[[onnx.GraphProto], object]) -> None:
    model = onnx.load_model_from_string(path.read_bytes())
    edit(model.graph)
    path.write_bytes(model.SerializeToString())


def outside_data(graph: onnx.GraphProto, location: str) -> None:
    """Let a new initialiser refer to a file."""
    tensor = TensorProto(name="stolen", data_type=TensorProto.FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    graph.initializer.append(tensor)


@pytest.mark.parametrize("location", ["head.safetensors", "../weights/head.safetensors", "/etc/passwd"])
def test_a_bound_graph_that_refers_to_data_outside_itself_is_refused(
    location: str, rewrite: Rewrite, copy: Path
) -> None:
    edit_graph(copy / "graphs/layer_full.onnx", lambda graph: outside_data(graph, location))
    bundle = open_bundle(rewrite())
    with pytest.raises(IntegrityError, match=r"layer_full.*data"):
        bundle.graph_bytes("layer_full")


@pytest.mark.parametrize("location", ["/etc/passwd", "../weights/head.safetensors"])
@pytest.mark.parametrize("change", ["one more", "instead", "instead, and the right word in a text"])
def test_a_constant_graph_that_refers_to_a_file_is_refused(
    change: str, location: str, rewrite: Rewrite, copy: Path
) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        if change != "one more":
            external = [tensor for tensor in graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
            graph.initializer.remove(external[0])
        if change.endswith("in a text"):
            graph.doc_string = PLACEHOLDER
        outside_data(graph, location)

    edit_graph(copy / "graphs/layer_full.constant.onnx", edit)
    bundle = open_bundle(rewrite())
    with pytest.raises(IntegrityError, match=r"layer_full.*data"):
        bundle.constant_graph_bytes("layer_full")


def test_a_reference_that_is_overwritten_within_its_entry_is_refused(rewrite: Rewrite, copy: Path) -> None:
    file = copy / "graphs/embed.constant.onnx"
    model = onnx.load_model_from_string(file.read_bytes())
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL)
    entry = tensor.external_data[0].SerializeToString()
    assert PLACEHOLDER.encode() in entry
    # Of two values of one field protobuf takes the last. Its writer would tidy this up, hence the work on bytes.
    overwritten = entry + b"\x12\x0b/etc/passwd"
    stolen = replace_message(tensor.SerializeToString(), entry, overwritten)
    graph = replace_message(model.graph.SerializeToString(), tensor.SerializeToString(), stolen)
    file.write_bytes(replace_message(model.SerializeToString(), model.graph.SerializeToString(), graph))
    (read,) = onnx.load_model_from_string(file.read_bytes()).graph.initializer
    assert read.external_data[0].value == "/etc/passwd"
    bundle = open_bundle(rewrite())
    with pytest.raises(IntegrityError, match=r"embed.*data"):
        bundle.constant_graph_bytes("embed")


def replace_message(outer: bytes, old: bytes, new: bytes) -> bytes:
    """A protobuf message with one of its parts replaced, lengths included."""

    def with_length(data: bytes) -> bytes:
        length, prefix = len(data), b""
        while length > 127:
            prefix += bytes([length & 127 | 128])
            length >>= 7
        return prefix + bytes([length]) + data

    assert outer.count(with_length(old)) == 1
    return outer.replace(with_length(old), with_length(new))


@pytest.mark.parametrize("content", [b"", b"not a graph", bytes(100)], ids=["empty", "text", "zeros"])
def test_a_graph_that_cannot_be_parsed_is_an_integrity_error(content: bytes, rewrite: Rewrite, copy: Path) -> None:
    (copy / "graphs/embed.onnx").write_bytes(content)
    root = rewrite()
    with pytest.raises(IntegrityError, match="embed"):
        use_everything(root)


def test_weights_with_a_hostile_header_are_refused(rewrite: Rewrite, copy: Path) -> None:
    file = copy / "weights/layer.000.safetensors"
    file.write_bytes((2**63).to_bytes(8, "little") + file.read_bytes()[8:])
    root = rewrite()
    with pytest.raises(IntegrityError, match=r"layer\.000\.safetensors"):
        use_everything(root)


def test_weights_are_the_mapped_file_and_stay_readable_after_a_generation(copy: Path) -> None:
    bundle = open_bundle(copy)
    before = {name: array.copy() for name, array in bundle.graph_weights("layer_full", 0).items()}
    digest = (copy / "weights/layer.000.safetensors").read_bytes()
    with DiffusionLM.from_pretrained(copy, SessionOptions(threads=1, prepack="off")) as lm:
        lm.generate(["hi"], GenerationOptions(gen_length=4))
    assert all(np.array_equal(array, before[name]) for name, array in bundle.graph_weights("layer_full", 0).items())
    assert (copy / "weights/layer.000.safetensors").read_bytes() == digest
