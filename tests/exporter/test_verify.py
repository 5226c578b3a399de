"""verify passes for what export makes, and names the check that catches whatever was changed in a bundle."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from dllm_export.errors import IncompatibleError, IntegrityError
from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pack import list_files
from dllm_export.exporter.pipeline import export
from dllm_export.exporter.verify import Report, verify
from dllm_export.graphs import ModelShape
from dllm_export.runtime.bundle import Bundle, open_bundle
from dllm_export.runtime.manifest import MANIFEST, Manifest, encode_manifest
from dllm_export.runtime.safetensors_file import read_header
from dllm_export.runtime.session import SessionOptions
from dllm_export.tools.random_checkpoint import write_random_checkpoint

Tamper = Callable[[Bundle, Callable[[Path], object]], Bundle]
ORT = SessionOptions(threads=1)
TORCH = SessionOptions(provider="torch", threads=1)


@pytest.fixture
def tamper(tmp_path: Path) -> Tamper:
    """A copy of a bundle with files changed and the manifest's digests made to fit, so that only verify can tell."""

    def change(bundle: Bundle, edit: Callable[[Path], object]) -> Bundle:
        root = tmp_path / "tampered"
        shutil.copytree(bundle.path, root)
        edit(root)
        (root / MANIFEST).unlink()
        manifest: Manifest = msgspec.structs.replace(bundle.manifest, files=list_files(root))
        (root / MANIFEST).write_bytes(encode_manifest(manifest))
        return open_bundle(root)

    return change


def edit_weight(file: Path, tensor: str, edit: Callable[[NDArray[np.float32]], object]) -> None:
    """Change a stored float32 tensor in place."""
    entry = read_header(file)[tensor]
    data = bytearray(file.read_bytes())
    array = np.frombuffer(data, np.float32, entry.length // 4, entry.offset).reshape(entry.shape)
    edit(array)
    file.write_bytes(data)


def swap(root: Path, first: str, second: str) -> None:
    """Exchange two files."""
    (root / first).rename(root / "between")
    (root / second).rename(root / first)
    (root / "between").rename(root / second)


def failed(report: Report) -> dict[str, str]:
    """Failed checks and their details."""
    assert report.passed == all(check.passed for check in report.checks)
    return {check.name: check.detail for check in report.checks if not check.passed}


# -- what must pass
@pytest.mark.parametrize("variant", ["gqa", "bias", "tied", "qk_norm", "dream"])
def test_every_variant_passes_on_onnxruntime(variant: str, tiny_bundles: dict[str, Bundle]) -> None:
    report = verify(tiny_bundles[variant], ORT)
    assert not failed(report)
    assert (report.provider, report.device, report.dtype) == ("onnxruntime", "cpu", "float32")
    assert (report.agreement, report.first_difference) == (1.0, None)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [("float32", ORT), ("float32", TORCH), ("float16", ORT), ("float16", TORCH), ("bfloat16", TORCH)],
    ids=["float32 onnxruntime", "float32 torch", "float16 onnxruntime", "float16 torch", "bfloat16 torch"],
)
def test_every_type_passes_where_it_runs(dtype: str, options: SessionOptions, checkpoint: Path, tmp_path: Path) -> None:
    bundle = export(checkpoint, tmp_path / "bundle", ExportOptions(dtype=dtype))
    report = verify(bundle, options)
    assert not failed(report)
    assert report.dtype == dtype


@pytest.mark.parametrize("prepack", ["on", "off"])
def test_weights_as_constants_and_as_inputs_both_pass(prepack: str, bundle: Bundle) -> None:
    assert not failed(verify(bundle, SessionOptions(threads=1, prepack=prepack)))


def test_bfloat16_on_the_cpu_is_refused_with_the_alternatives(checkpoint: Path, tmp_path: Path) -> None:
    bundle = export(checkpoint, tmp_path / "bundle", ExportOptions(dtype="bfloat16"))
    with pytest.raises(IncompatibleError, match=r"no bfloat16.*--dtype float32.*--provider torch") as refused:
        verify(bundle, ORT)
    assert refused.value.exit_code == 4


def test_every_graph_and_layer_is_compared(bundle: Bundle) -> None:
    names = [check.name for check in verify(bundle, ORT).checks]
    assert len(set(names)) == len(names)
    assert [name for name in names if name.startswith("probe")] == [
        f"probe {session}: {part}"
        for session in ("reference", "onnxruntime")
        for part in ("embedding", "layers", "head")
    ]
    for graph, spec in bundle.specs.items():
        layers = [f" layer {layer}" for layer in range(3)] if graph.startswith("layer_") and spec.weights else [""]
        assert {f"graph {graph}{layer}" for layer in layers} <= set(names)
    assert names[-2:] == ["generation none", "generation dllm-cache"]


def test_progress_counts_up_to_its_own_total(bundle: Bundle) -> None:
    seen: list[tuple[int, int]] = []
    verify(bundle, ORT, lambda what, step, steps: seen.append((step, steps)))
    assert [step for step, _ in seen] == sorted(step for step, _ in seen)
    assert {steps for _, steps in seen} == {seen[-1][0]}


# -- what must fail: weights
@pytest.mark.parametrize("tensor", ["norm1", "qk", "v", "out", "norm2", "gate_up", "down"])
def test_one_changed_weight_fails_the_probe_of_its_layer(tensor: str, bundle: Bundle, tamper: Tamper) -> None:
    def double(array: NDArray[np.float32]) -> None:
        array.reshape(-1)[7] = 2 * array.reshape(-1)[7] + 0.5

    changed = tamper(bundle, lambda root: edit_weight(root / "weights/layer.001.safetensors", tensor, double))
    assert failed(verify(changed, ORT)) == {
        "probe reference: layers": "worst: layer 1",
        "probe onnxruntime: layers": "worst: layer 1",
    }


def test_a_changed_row_of_the_mask_token_fails_the_probe_of_the_embedding(bundle: Bundle, tamper: Tamper) -> None:
    def shift(array: NDArray[np.float32]) -> None:
        array[bundle.manifest.tokens.mask, 0] += 0.5

    changed = tamper(bundle, lambda root: edit_weight(root / "weights/embedding.safetensors", "embedding", shift))
    assert set(failed(verify(changed, ORT))) == {"probe reference: embedding", "probe onnxruntime: embedding"}


@pytest.mark.parametrize("tensor", ["norm", "head"])
def test_a_changed_head_fails_the_probe_of_the_head(tensor: str, bundle: Bundle, tamper: Tamper) -> None:
    def scale(array: NDArray[np.float32]) -> None:
        array[3] *= 1.5

    changed = tamper(bundle, lambda root: edit_weight(root / "weights/head.safetensors", tensor, scale))
    assert set(failed(verify(changed, ORT))) == {"probe reference: head", "probe onnxruntime: head"}


def test_a_weight_that_is_no_number_fails(bundle: Bundle, tamper: Tamper) -> None:
    def spoil(array: NDArray[np.float32]) -> None:
        array[0, 0] = np.nan

    changed = tamper(bundle, lambda root: edit_weight(root / "weights/layer.002.safetensors", "down", spoil))
    assert failed(verify(changed, ORT))["probe reference: layers"] == "worst: layer 2"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_swapped_layers_fail_the_probe_in_every_type(
    dtype: str, checkpoint: Path, tmp_path: Path, tamper: Tamper
) -> None:
    bundle = export(checkpoint, tmp_path / "bundle", ExportOptions(dtype=dtype))
    swapped = tamper(bundle, lambda root: swap(root, "weights/layer.000.safetensors", "weights/layer.002.safetensors"))
    assert set(failed(verify(swapped, TORCH))) == {"probe reference: layers", "probe torch: layers"}


@pytest.mark.parametrize(
    ("tensor", "what"), [("qk", "query and key"), ("gate_up", "gate and up")], ids=["query and key", "gate and up"]
)
def test_swapped_halves_of_a_fused_weight_fail_the_probe(
    tensor: str, what: str, tiny_bundles: dict[str, Bundle], tamper: Tamper
) -> None:
    def exchange(array: NDArray[np.float32]) -> None:
        half = array.shape[1] // 2
        array[:] = np.concatenate((array[:, half:], array[:, :half]), axis=1)

    def edit(root: Path) -> None:
        for layer in range(5):
            edit_weight(root / f"weights/layer.{layer:03d}.safetensors", tensor, exchange)

    report = verify(tamper(tiny_bundles["plain"], edit), ORT)
    assert set(failed(report)) == {"probe reference: layers", "probe onnxruntime: layers"}


def test_a_transposed_weight_fails_the_probe(bundle: Bundle, tamper: Tamper) -> None:
    def transpose(array: NDArray[np.float32]) -> None:
        array[:] = array.T.copy()

    changed = tamper(bundle, lambda root: edit_weight(root / "weights/layer.000.safetensors", "out", transpose))
    assert failed(verify(changed, ORT))["probe reference: layers"] == "worst: layer 0"


# -- what must fail: graphs
def edit_graph(file: Path, edit: Callable[[onnx.GraphProto], object]) -> None:
    """Change an ONNX file."""
    model = onnx.load_model_from_string(file.read_bytes())
    edit(model.graph)
    file.write_bytes(model.SerializeToString())


def swap_operands(graph: onnx.GraphProto) -> None:
    """a - b -> b - a in the first subtraction, or cosines for sines where rotation is one node."""
    node = next(node for node in graph.node if node.op_type in ("Sub", "RotaryEmbedding"))
    kept = node.input[:-2]
    node.input[:] = [*kept, *reversed(node.input[-2:])]


@pytest.mark.parametrize(("prepack", "suffix"), [("off", ".onnx"), ("on", ".constant.onnx")])
@pytest.mark.parametrize("graph", ["layer_full", "layer_partial", "layer_adaptive"])
def test_swapped_operands_fail_the_check_of_their_graph(
    graph: str, prepack: str, suffix: str, bundle: Bundle, tamper: Tamper
) -> None:
    changed = tamper(bundle, lambda root: edit_graph(root / f"graphs/{graph}{suffix}", swap_operands))
    names = set(failed(verify(changed, SessionOptions(threads=1, prepack=prepack))))
    assert {f"graph {graph} layer {layer}" for layer in range(3)} <= names
    assert not [name for name in names if name.startswith("graph") and graph not in name]
    assert ("probe onnxruntime: layers" in names) == (graph == "layer_full")
    assert "probe reference: layers" not in names


def test_a_changed_constant_fails_the_check_of_its_graph(bundle: Bundle, tamper: Tamper) -> None:
    def raise_epsilon(graph: onnx.GraphProto) -> None:
        for number, tensor in enumerate(graph.initializer):
            value = numpy_helper.to_array(tensor)
            if value.dtype == np.float32 and value.size == 1:
                graph.initializer[number].CopyFrom(numpy_helper.from_array(value + np.float32(0.5), tensor.name))
                return
        raise AssertionError("no float32 constant")

    changed = tamper(bundle, lambda root: edit_graph(root / "graphs/guidance.onnx", raise_epsilon))
    names = failed(verify(changed, SessionOptions(threads=1, prepack="off")))
    assert names == {"graph guidance": "worst: guidance_out"}


def test_exchanged_outputs_of_the_head_fail_by_output(bundle: Bundle, tamper: Tamper) -> None:
    def exchange(graph: onnx.GraphProto) -> None:
        names = {"margin": "entropy", "entropy": "margin"}
        for node in graph.node:
            node.output[:] = [names.get(name, name) for name in node.output]
            node.input[:] = [names.get(name, name) for name in node.input]

    changed = tamper(bundle, lambda root: edit_graph(root / "graphs/head.onnx", exchange))
    report = failed(verify(changed, SessionOptions(threads=1, prepack="off")))
    assert set(report) == {"graph head"}
    assert report["graph head"] in ("worst: margin", "worst: entropy")


# -- what cannot be compared
def test_a_probe_of_another_model_is_refused(bundle: Bundle, tiny_bundles: dict[str, Bundle], tamper: Tamper) -> None:
    other = tiny_bundles["gqa"].file("probe.safetensors")
    changed = tamper(bundle, lambda root: shutil.copyfile(other, root / "probe.safetensors"))
    with pytest.raises(IntegrityError, match=r"probe\.safetensors does not fit the model's shape; export again"):
        verify(changed, ORT)


def test_a_half_type_bundle_with_a_large_vocabulary_passes(tmp_path: Path) -> None:
    """Among 40,000 tokens the 64 best have near-ties that half types swap; that is no wrong graph."""
    shape = ModelShape(
        layers=1,
        hidden=64,
        heads=2,
        kv_heads=2,
        head_dim=32,
        mlp=96,
        vocab=40_000,
        max_length=64,
        norm_eps=1e-5,
        rope_theta=1e4,
    )
    model = write_random_checkpoint(tmp_path / "model", shape)
    bundle = export(model, tmp_path / "bundle", ExportOptions(dtype="float16", no_tokenizer=True))
    report = verify(bundle, SessionOptions(threads=1))
    assert not [check for check in report.checks if check.name.startswith("graph") and not check.passed]


def test_a_model_for_short_texts_is_verified_too(tmp_path: Path) -> None:
    shape = ModelShape(
        layers=1,
        hidden=32,
        heads=2,
        kv_heads=2,
        head_dim=16,
        mlp=48,
        vocab=97,
        max_length=30,
        norm_eps=1e-5,
        rope_theta=1e4,
    )
    model = write_random_checkpoint(tmp_path / "model", shape)
    assert verify(
        export(model, tmp_path / "bundle", ExportOptions(no_tokenizer=True)), SessionOptions(threads=1)
    ).passed
