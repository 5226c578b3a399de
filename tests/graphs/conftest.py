"""Random inputs for every graph, and the two readings of a graph: TorchOps and ONNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from dllm_export.exporter.onnx_graph import build_onnx
from dllm_export.graphs import DType, GraphSpec, ModelShape, TensorSpec, graph_specs
from dllm_export.graphs.torch_ops import TorchOps
from dllm_export.runtime.blocks import number_blocks
from dllm_export.runtime.rope import rotary_tables

Array = NDArray[Any]
Feeds = dict[str, Array]
DrawFeeds = Callable[..., Feeds]
RunGraph = Callable[[str, ModelShape, str, Feeds], Feeds]

SIZES = {"B": 2, "C": 3, "S": 12, "X": 7, "Q": 4, "N": 9}
SIZES_OF = {"layer_compact": {"X": 3, "Q": 9}}
"""Sizes of a graph whose rows are others: the block's three and those that are kept with them."""
PADDING = np.array([[0], [2]])


def place(index: Array, length: int) -> tuple[Array, Array]:
    """slot and fresh [B, S]: the inverse of an index [B, Q] of rows in the sequence."""
    slot = np.zeros((len(index), length), np.int32)
    np.put_along_axis(slot, index.astype(np.int64), np.arange(index.shape[1], dtype=np.int32)[None], axis=1)
    fresh = np.zeros(slot.shape, np.bool_)
    np.put_along_axis(fresh, index.astype(np.int64), True, axis=1)
    return slot, fresh


def draw_index(rng: np.random.Generator, count: int, among: int) -> Array:
    """`count` rows of each sequence out of `among`, in no order."""
    return np.stack([rng.permutation(among)[:count] for _ in range(SIZES["B"])]).astype(np.int32)


def draw_copies(rng: np.random.Generator, sizes: dict[str, int]) -> Array:
    """Rows of any sequence of the source, for every sequence of the target."""
    return rng.integers(0, SIZES["B"] * sizes["N"], (sizes["C"], sizes["Q"])).astype(np.int32)


def draw_tensor(rng: np.random.Generator, tensor: TensorSpec, sizes: Mapping[str, int]) -> Array:
    """Normal numbers; a matrix is scaled so that its product with a row has a spread of 1.5, an expert's too."""
    dims = tuple(dim if isinstance(dim, int) else sizes[dim] for dim in tensor.dims)
    if tensor.name.startswith("expert_"):  # [E, out, in]
        return rng.normal(size=dims) * 1.5 * dims[2] ** -0.5
    matrix = len(dims) == 2 and isinstance(tensor.dims[0], int) and tensor.name != "embedding"
    return rng.normal(size=dims) * (1.5 * dims[0] ** -0.5 if matrix else 1.0)


def special_tensors(rng: np.random.Generator, shape: ModelShape, spec: GraphSpec, sizes: dict[str, int]) -> Feeds:
    """Inputs that are not just numbers: places, masks, rotary tables, token ids."""
    length, alive = sizes["S"], sizes["X"]
    column = np.arange(length)
    cos, sin = rotary_tables(shape, np.maximum(column - PADDING, 0))
    among = {"layer_partial": length, "layer_shadow": length, "gather": sizes["N"], "layer_indicator": sizes["N"]}.get(
        spec.name, alive
    )
    index = draw_index(rng, sizes["Q"], among)
    if any(tensor.name == "budget" for tensor in spec.inputs):
        index = np.tile(np.arange(length - alive, length, dtype=np.int32), (SIZES["B"], 1))
    if spec.name == "layer_compact":
        index = draw_index(rng, alive, length)
    slot, fresh = place(index, length)
    if spec.name == "commit":  # its candidates lie among the alive rows
        slot, fresh = place(draw_index(rng, sizes["Q"], alive), alive)
    bias = np.zeros(shape.vocab, np.float32)
    bias[3] = -1e30
    return {
        "tokens": rng.integers(0, shape.vocab, (SIZES["B"], alive)).astype(np.int32),
        "cos": cos,
        "sin": sin,
        "mask": column >= PADDING,
        "block": number_blocks(column >= PADDING, shape.block or length),
        "index": draw_copies(rng, sizes) if spec.name.startswith("copy_") else index,
        "slot": slot,
        "fresh": fresh,
        "bias": bias,
        "budget": np.array([sizes["Q"] if spec.name == "layer_compact" else 3]),
        "kept": np.arange(sizes["Q"]) < np.array([[sizes["Q"]], [alive + (sizes["Q"] - alive) // 2]]),
        "token": np.random.default_rng(6).integers(0, shape.vocab, (SIZES["B"], sizes["Q"])).astype(np.int32),
        "candidate": np.arange(sizes["Q"]) < np.array([[sizes["Q"]], [sizes["Q"] - 1]]),
        "quota": np.arange(1.0, SIZES["B"] + 1),
        "sure": np.array([0.5]),
        "forced": rng.random((SIZES["B"], alive)) < 0.15,
        "shown": rng.random((SIZES["B"], sizes["Q"])) < 0.7,
        "given": rng.integers(0, shape.vocab, (SIZES["B"], sizes["Q"])).astype(np.int32),
        "cfg_scale": np.array([1.5]),
        "distribution": np.log(rng.dirichlet(np.ones(shape.vocab), (SIZES["B"], sizes["Q"]))),
        "credit": rng.random((SIZES["B"], sizes["Q"], shape.vocab)) * 3,
        "credit_decay": np.array([0.8]),
        "credit_power": np.array([0.2]),
        "credit_weight": np.array([0.7]),
        "sharpness": np.array([0.8]),
        "present": np.random.default_rng(5).integers(0, shape.vocab, (SIZES["B"], sizes["Q"])).astype(np.int32),
        "moves": np.array([0.2, 0.002, 0.9, 0.01]),
        "uniform": np.random.default_rng(sizes["Q"]).random((SIZES["B"], sizes["Q"], 2)),
    }


@pytest.fixture(scope="session")
def draw_feeds() -> DrawFeeds:
    """`draw_feeds(shape, graph, seed=0, **sizes)`: inputs and weights of a graph in float64 and integers."""

    def draw(shape: ModelShape, graph: str, seed: int = 0, **sizes: int) -> Feeds:
        rng, spec, every = (
            np.random.default_rng(seed),
            graph_specs(shape)[graph],
            {**SIZES, **SIZES_OF.get(graph, {}), **sizes},
        )
        special = special_tensors(rng, shape, spec, every)
        declared = (*spec.inputs, *spec.weights)
        return {
            tensor.name: special[tensor.name] if tensor.name in special else draw_tensor(rng, tensor, every)
            for tensor in declared
        }

    return draw


@cache
def onnx_session(shape: ModelShape, graph: str, dtype: DType) -> ort.InferenceSession:
    data = build_onnx(graph_specs(shape)[graph], shape, dtype).SerializeToString()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def cast(spec: GraphSpec, feeds: Feeds, dtype: DType) -> Feeds:
    """Inputs as a graph of this compute type takes them."""
    types = {"compute": dtype, "float32": "float64" if dtype == "float64" else "float32"}
    named = {tensor.name: types.get(tensor.type, tensor.type) for tensor in (*spec.inputs, *spec.weights)}
    return {name: np.ascontiguousarray(feeds[name].astype(type)) for name, type in named.items()}


@pytest.fixture(scope="session")
def run_graph() -> RunGraph:
    """`run_graph(reading, shape, graph, feeds)`: float64 and float32 are TorchOps, onnxruntime is the ONNX form in
    float32, or in float16 as onnxruntime-float16."""

    def run(reading: str, shape: ModelShape, graph: str, feeds: Feeds) -> Feeds:
        spec = graph_specs(shape)[graph]
        if reading.startswith("onnxruntime"):
            dtype: DType = "float16" if reading.endswith("float16") else "float32"
            names = [tensor.name for tensor in spec.outputs]
            results = onnx_session(shape, graph, dtype).run(names, cast(spec, feeds, dtype))
            return dict(zip(names, results, strict=True))
        precise: DType = "float64" if reading == "float64" else "float32"
        tensors = {name: torch.from_numpy(array) for name, array in cast(spec, feeds, precise).items()}
        outputs: dict[str, torch.Tensor] = spec.function(TorchOps(), shape, tensors)
        return {tensor.name: outputs[tensor.name].numpy() for tensor in spec.outputs}

    return run
