"""What a bundle consists of: small graphs, self-contained graphs that plain ONNX Runtime opens, a stable manifest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from dllm_export.errors import UsageError
from dllm_export.exporter.contrib_ops import CONTRIB
from dllm_export.exporter.feeds import make_feeds
from dllm_export.exporter.onnx_graph import build_onnx
from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pipeline import export
from dllm_export.exporter.verify import run_graph
from dllm_export.graphs import LAYER_GRAPHS, ModelShape, graph_specs
from dllm_export.runtime.bundle import Bundle, open_bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.session import Session, SessionOptions, open_session
from dllm_export.tools.random_checkpoint import write_random_checkpoint

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "manifest.json"
GRAPH_LIMIT = 32 * 1024
"""Bytes. A graph without weights has a size of its own, whatever the model's."""
EMBEDDED = ModelShape(
    layers=2,
    hidden=256,
    heads=4,
    kv_heads=2,
    head_dim=64,
    mlp=704,
    vocab=4000,
    max_length=512,
    norm_eps=1e-5,
    rope_theta=1e4,
)
LLADA_8B = replace(
    EMBEDDED, layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, mlp=12288, vocab=126464, max_length=4096
)
Array = NDArray[Any]


# -- bound graphs
def test_graph_files_hold_no_weights(bundle: Bundle) -> None:
    graphs = [record for record in bundle.manifest.files if record.path.startswith("graphs/")]
    assert len(graphs) >= len(bundle.specs)
    assert all(record.size < GRAPH_LIMIT for record in graphs)


@pytest.mark.parametrize("name", list(graph_specs(LLADA_8B)))
def test_a_graph_of_the_8b_model_is_as_small_as_that_of_a_tiny_one(name: str) -> None:
    model = build_onnx(graph_specs(LLADA_8B)[name], LLADA_8B, "bfloat16")
    assert model.ByteSize() < GRAPH_LIMIT
    assert all(np.prod(constant.dims) <= 64 for constant in model.graph.initializer)


def test_graphs_use_the_recorded_opset_and_standard_operators_only(bundle: Bundle) -> None:
    for record in bundle.manifest.files:
        if record.path.endswith(".onnx"):
            model = onnx.load_model_from_string((bundle.path / record.path).read_bytes())
            # Only forms that ONNX Runtime alone loads may have operators of its own.
            own = [(CONTRIB, 1)] if any(node.domain == CONTRIB for node in model.graph.node) else []
            assert not own or record.path.endswith(".constant.onnx")
            opsets = [(opset.domain, opset.version) for opset in model.opset_import]
            assert opsets == [("", bundle.manifest.opset), *own]
            assert {node.domain for node in model.graph.node} <= {"", CONTRIB}
            assert not model.functions


def test_graphs_have_the_inputs_and_outputs_that_the_manifest_states(bundle: Bundle) -> None:
    for record in bundle.manifest.graphs.values():
        model = onnx.load_model_from_string((bundle.path / record.file).read_bytes())
        inputs = [tensor.name for tensor in model.graph.input]
        assert inputs == [tensor.name for tensor in (*record.inputs, *record.weights)]
        assert [tensor.name for tensor in model.graph.output] == [tensor.name for tensor in record.outputs]


def test_a_partial_graph_never_makes_logits_of_the_whole_sequence(bundle: Bundle) -> None:
    vocab = bundle.manifest.shape.vocab
    for name in LAYER_GRAPHS:
        model = onnx.load_model_from_string((bundle.path / bundle.manifest.graphs[name].file).read_bytes())
        shapes = onnx.shape_inference.infer_shapes(model).graph.value_info
        assert not [
            value.name for value in shapes for dim in value.type.tensor_type.shape.dim if dim.dim_value == vocab
        ]
    for output in bundle.manifest.graphs["head"].outputs:
        assert output.dims[:2] == ("B", "Q")
        assert vocab not in output.dims


# -- embedded graphs
@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with self-contained graphs, exported at one place and moved to another."""
    root = tmp_path_factory.mktemp("embedded")
    model = write_random_checkpoint(root / "model", EMBEDDED)
    export(model, root / "first", ExportOptions(weights="embedded", no_tokenizer=True))
    shutil.rmtree(model)
    (root / "first").rename(root / "moved")
    return open_bundle(root / "moved")


@pytest.fixture(scope="module")
def bound_session(embedded: Bundle) -> Session:
    return open_session(embedded, SessionOptions(threads=1, prepack="off"))


def typed_feeds(bundle: Bundle, graph: str) -> dict[str, Array]:
    """Feeds in the types that the graph's inputs have."""
    types = {"compute": np.float32, "float32": np.float32, "int32": np.int32, "int64": np.int64, "bool": np.bool_}
    feeds = make_feeds(bundle, graph)
    return {spec.name: np.asarray(feeds[spec.name]).astype(types[spec.type]) for spec in bundle.specs[graph].inputs}


@pytest.mark.parametrize("graph", list(graph_specs(EMBEDDED)))
def test_an_embedded_graph_runs_alone_and_equals_the_bound_one(
    graph: str, embedded: Bundle, bound_session: Session
) -> None:
    feeds = typed_feeds(embedded, graph)
    by_layer = graph.startswith("layer_") and bool(embedded.specs[graph].weights)
    files = embedded.manifest.embedded[graph]
    assert len(files) == (EMBEDDED.layers if by_layer else 1)
    for layer, file in enumerate(files):
        path = str(embedded.file(file))
        onnx.checker.check_model(path, full_check=True)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert [tensor.name for tensor in session.get_inputs()] == list(feeds)
        results: Mapping[str, Array] = dict(
            zip((tensor.name for tensor in session.get_outputs()), session.run(None, feeds), strict=True)
        )
        expected = run_graph(embedded, bound_session, graph, layer if by_layer else None, feeds)
        assert results.keys() == expected.keys()
        for name, result in results.items():
            # The two may add in another order, which a sum near 0 of large terms shows most.
            atol = 1e-6 * max(10.0, float(np.abs(expected[name]).max()))
            np.testing.assert_allclose(result, expected[name], rtol=1e-4, atol=atol, err_msg=f"{file}: {name}")


def test_embedded_layers_differ_from_one_another(embedded: Bundle) -> None:
    feeds = typed_feeds(embedded, "layer_full")
    outputs = []
    for file in embedded.manifest.embedded["layer_full"]:
        session = onnxruntime.InferenceSession(str(embedded.file(file)), providers=["CPUExecutionProvider"])
        outputs.append(session.run(["delta_out"], feeds)[0])
    assert not np.allclose(outputs[0], outputs[1])


def test_embedded_graphs_refer_to_plain_file_names_and_exact_ranges(embedded: Bundle) -> None:
    for files in embedded.manifest.embedded.values():
        for file in files:
            model = onnx.load_model(str(embedded.file(file)), load_external_data=False)
            for tensor in model.graph.initializer:
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    place = {entry.key: entry.value for entry in tensor.external_data}
                    assert set(place) == {"location", "offset", "length"}
                    data = embedded.file(f"weights/{place['location']}")
                    assert int(place["offset"]) + int(place["length"]) <= data.stat().st_size


def test_a_bundle_with_embedded_graphs_stores_the_weights_once(embedded: Bundle) -> None:
    total = sum(path.stat().st_size for path in embedded.path.rglob("*") if path.is_file())
    proxies = EMBEDDED.layers * EMBEDDED.hidden * embedded.manifest.shape.indicator_rank
    assert total <= 1.05 * (EMBEDDED.weight_count + proxies) * 4


# -- the directory
def test_a_moved_bundle_generates_the_same(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.path, tmp_path / "else where" / "b")
    runs = []
    for path in (bundle.path, tmp_path / "else where" / "b"):
        with DiffusionLM.from_pretrained(path, SessionOptions(threads=1)) as lm:
            runs.append(lm.generate(["a moved bundle"], GenerationOptions(gen_length=8))[0].tokens)
    assert runs[0] == runs[1]


@pytest.mark.parametrize("weights", ["bound", "embedded"])
def test_no_file_of_a_bundle_names_a_place_on_the_machine(
    weights: str, write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = write_checkpoint(tmp_path / "a_model_directory")
    bundle = export(model, tmp_path / "a_bundle_directory", ExportOptions(weights=weights))
    words = [str(tmp_path), "a_model_directory", "a_bundle_directory", str(Path.home()) + "/", os.getcwd(), "/tmp/"]
    for path in bundle.path.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not [word for word in words if word.encode() in data], path.name


def test_files_can_be_read_by_everyone_whom_the_umask_lets(
    write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model, old = write_checkpoint(tmp_path / "model"), os.umask(0o022)
    try:
        bundle = export(model, tmp_path / "bundle")
    finally:
        os.umask(old)
    modes = {path.relative_to(bundle.path).as_posix(): path.stat().st_mode & 0o777 for path in bundle.path.rglob("*")}
    closed = {name: oct(mode) for name, mode in modes.items() if mode != (0o755 if "." not in name else 0o644)}
    assert not closed
    assert bundle.path.stat().st_mode & 0o777 == 0o755


def test_two_exports_of_one_checkpoint_are_byte_identical(bundle: Bundle, checkpoint: Path, tmp_path: Path) -> None:
    again = export(checkpoint, tmp_path / "again")
    assert (again.path / "manifest.json").read_bytes() == (bundle.path / "manifest.json").read_bytes()


def test_the_manifest_lists_every_file_and_no_other(bundle: Bundle) -> None:
    found = {path.relative_to(bundle.path).as_posix() for path in bundle.path.rglob("*") if path.is_file()}
    assert found == {record.path for record in bundle.manifest.files} | {"manifest.json"}


def test_the_manifest_is_the_golden_one(bundle: Bundle, tmp_path: Path) -> None:
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    manifest["digest"] = "digest of this file"
    manifest["tools"] = dict.fromkeys(manifest["tools"], "version")
    manifest["source"] = dict.fromkeys(manifest["source"], "digest")
    for record in manifest["files"]:
        record["sha256"] = "digest"
        if record["path"].endswith((".onnx", "tokenizer.json")):
            record["size"] = 0  # may change with the library that writes it
    text = json.dumps(manifest, indent=1) + "\n"
    (tmp_path / "manifest.json").write_text(text)
    assert text == GOLDEN.read_text(), f"if this is meant: raise FORMAT, then cp {tmp_path}/manifest.json {GOLDEN}"


def test_what_the_checkpoint_does_not_state_is_said_in_the_manifest(
    write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    table = torch.zeros(126464, 32, dtype=torch.float16)
    model = write_checkpoint(
        tmp_path / "model",
        tensors={"model.transformer.wte.weight": table, "model.transformer.ff_out.weight": table.clone()},
        config={"embedding_size": 126464},
        drop=("mask_token_id",),
    )
    manifest = export(model, tmp_path / "bundle", ExportOptions(dtype="float16")).manifest
    assert manifest.tokens.mask == 126336
    assert manifest.assumed == ("mask_token_id 126336: not in config.json, taken from the released LLaDA",)


def test_sources_are_digests_of_the_files_beside_the_weights(bundle: Bundle, checkpoint: Path) -> None:
    expected = {
        name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in ("config.json", "tokenizer.json")
    }
    assert bundle.manifest.source == expected


def test_progress_counts_up_to_its_own_total(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    export(checkpoint, tmp_path / "bundle", progress=lambda what, step, steps: seen.append((what, step, steps)))
    steps = [step for _, step, _ in seen]
    assert steps == sorted(set(steps))
    assert {total for *_, total in seen} == {steps[-1]}


def test_an_unknown_option_value_is_refused_with_the_known_ones(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="float32, float16, bfloat16"):
        export(checkpoint, tmp_path / "bundle", ExportOptions(**{"dtype": "int8"}))
    with pytest.raises(UsageError, match="embedded"):
        export(checkpoint, tmp_path / "bundle", ExportOptions(**{"weights": "both"}))
    assert not (tmp_path / "bundle").exists()
