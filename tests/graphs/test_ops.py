"""Operations that no graph of the catalog uses in every form."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnxruntime as ort
import torch

from dllm_export.exporter.onnx_graph import build_onnx
from dllm_export.graphs import GraphSpec, ModelShape, TensorSpec
from dllm_export.graphs.ops import Ops, T
from dllm_export.graphs.torch_ops import TorchOps

BATCH, ROWS, KEYS, HEADS, GROUPS, WIDTH = 2, 3, 7, 4, 2, 8


def attend(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    return {"mixed": ops.attention(t["query"], t["key"], t["value"], t["mask"])}


def test_each_row_attends_to_the_keys_that_its_own_mask_shows(llada_8b: ModelShape) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(size=dims).astype(np.float32)
        for name, dims in (
            ("query", (BATCH, ROWS, HEADS, WIDTH)),
            ("key", (BATCH, KEYS, GROUPS, WIDTH)),
            ("value", (BATCH, KEYS, GROUPS, WIDTH)),
        )
    }
    mask = rng.random((BATCH, ROWS, KEYS)) < 0.5
    mask[..., 0] = True
    expected = np.zeros((BATCH, ROWS, HEADS, WIDTH))
    for b, q, h in np.ndindex(BATCH, ROWS, HEADS):
        group, seen = h // (HEADS // GROUPS), mask[b, q]
        scores = tensors["key"][b, seen, group] @ tensors["query"][b, q, h] / WIDTH**0.5
        weights = np.exp(scores - scores.max())
        expected[b, q, h] = weights / weights.sum() @ tensors["value"][b, seen, group]

    inputs = (
        TensorSpec("query", "compute", ("B", "Q", HEADS, WIDTH)),
        *(TensorSpec(name, "compute", ("B", "S", GROUPS, WIDTH)) for name in ("key", "value")),
        TensorSpec("mask", "bool", ("B", "Q", "S")),
    )
    outputs = (TensorSpec("mixed", "compute", ("B", "Q", HEADS, WIDTH)),)
    spec = GraphSpec("attend", inputs, (), outputs, attend)
    feeds = {**tensors, "mask": mask}
    session = ort.InferenceSession(build_onnx(spec, llada_8b, "float32").SerializeToString())
    eager = attend(TorchOps(), llada_8b, {name: torch.from_numpy(array) for name, array in feeds.items()})

    # float32 sums of seven products: a rounding error of a few 1e-7.
    np.testing.assert_allclose(session.run(["mixed"], feeds)[0], expected, atol=2e-6)
    np.testing.assert_allclose(eager["mixed"].numpy(), expected, atol=2e-6)
