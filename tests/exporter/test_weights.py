"""The stored weights are the checkpoint's: transposed and fused, each tensor once, rounded once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pipeline import export
from dllm_export.graphs import ModelShape
from dllm_export.runtime.bundle import Bundle

Tensors = dict[str, torch.Tensor]
PREFIX = "model.transformer."


def checkpoint_tensors(bundle: Bundle) -> dict[str, NDArray[np.generic]]:
    """The bundle's weights cut back into tensors under the checkpoint's names, [out, in]."""
    shape, manifest = bundle.manifest.shape, bundle.manifest
    top = {name: bundle.weight(record) for name, record in manifest.model_bindings.items()}
    tensors = {"wte.weight": top.pop("embedding"), "ln_f.weight": top.pop("norm")}
    if not shape.tied_head:
        tensors["ff_out.weight"] = top.pop("head").T
    assert not top
    for layer, bindings in enumerate(manifest.layer_bindings):
        stored = {name: bundle.weight(record) for name, record in bindings.items()}
        block = {"attn_norm.weight": stored.pop("norm1"), "ff_norm.weight": stored.pop("norm2")}
        block |= cut(stored.pop("qk"), {"q_proj.weight": shape.query_width, "k_proj.weight": shape.key_width})
        block |= cut(stored.pop("gate_up"), {"ff_proj.weight": shape.mlp, "up_proj.weight": shape.mlp})
        for name, place in (("v", "v_proj"), ("out", "attn_out"), ("down", "ff_out")):
            block[f"{place}.weight"] = stored.pop(name).T
        if shape.qkv_bias:
            block |= cut(stored.pop("qk_bias"), {"q_proj.bias": shape.query_width, "k_proj.bias": shape.key_width})
            block["v_proj.bias"] = stored.pop("v_bias")
        assert set(stored) == {"proxy"}, "the one weight that is no tensor of the checkpoint"
        tensors |= {f"blocks.{layer}.{name}": tensor for name, tensor in block.items()}
    return {PREFIX + name: tensor for name, tensor in tensors.items()}


def cut(fused: NDArray[np.generic], widths: dict[str, int]) -> dict[str, NDArray[np.generic]]:
    """The pieces of a fused weight side by side in its last axis, each [out, in]."""
    ends = np.cumsum(list(widths.values()))
    assert fused.shape[-1] == ends[-1]
    pieces = np.split(fused, ends[:-1], axis=-1)
    return {name: piece.T for name, piece in zip(widths, pieces, strict=True)}


def assert_equal(bundle: Bundle, expected: dict[str, NDArray[np.generic]]) -> None:
    stored = checkpoint_tensors(bundle)
    assert stored.keys() == expected.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == expected[name].dtype, name
        assert tensor.shape == expected[name].shape, name
        assert tensor.tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize("variant", ["plain", "gqa", "bias", "tied"])
def test_float32_weights_equal_the_checkpoint_bit_for_bit(
    variant: str, tiny_checkpoints: dict[str, Path], tiny_bundles: dict[str, Bundle]
) -> None:
    expected = load_file(tiny_checkpoints[variant] / "model.safetensors")
    assert_equal(tiny_bundles[variant], {name: tensor.numpy() for name, tensor in expected.items()})


@pytest.mark.parametrize(("dtype", "numpy_type"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)])
def test_half_weights_are_the_nearest_numbers(
    dtype: str, numpy_type: type, checkpoint: Path, base_tensors: Tensors, tmp_path: Path
) -> None:
    bundle = export(checkpoint, tmp_path / "bundle", ExportOptions(dtype=dtype))
    assert_equal(bundle, {name: tensor.numpy().astype(numpy_type) for name, tensor in base_tensors.items()})


def test_half_weights_of_a_half_checkpoint_are_its_own_bits(
    write_checkpoint: Callable[..., Path], base_tensors: Tensors, tmp_path: Path
) -> None:
    halves = {name: tensor.bfloat16() for name, tensor in base_tensors.items()}
    model = write_checkpoint(tmp_path / "model", tensors=halves)
    bundle = export(model, tmp_path / "bundle", ExportOptions(dtype="bfloat16"))
    raw = {name: tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) for name, tensor in halves.items()}
    assert_equal(bundle, raw)


def test_a_tied_head_is_not_stored_twice(tiny_bundles: dict[str, Bundle]) -> None:
    bundle = tiny_bundles["tied"]
    assert set(bundle.manifest.model_bindings) == {"embedding", "norm"}
    assert [weight.name for weight in bundle.specs["head"].weights] == ["norm", "embedding"]


def test_every_graph_binds_the_stored_weights_of_its_layer(bundle: Bundle) -> None:
    shape: ModelShape = bundle.manifest.shape
    for graph, spec in bundle.specs.items():
        layers = range(shape.layers) if graph.startswith("layer_") else [None]
        for layer in layers:
            weights = bundle.graph_weights(graph, layer)
            assert {name: array.shape for name, array in weights.items()} == {w.name: w.dims for w in spec.weights}
    first, second = (bundle.graph_weights("layer_full", layer)["down"] for layer in (0, 1))
    assert not np.array_equal(first, second)
