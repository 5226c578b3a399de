"""Mixtures of experts: the router against plain loops, and the product in tiles against the product expert by expert."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor

from dllm_export.exporter.contrib_ops import CONTRIB
from dllm_export.exporter.onnx_graph import build_onnx
from dllm_export.exporter.onnx_ops import OnnxOps, Value
from dllm_export.graphs import Experts, ModelShape, graph_layers, graph_specs, has_experts, layer_graph, layer_weights
from dllm_export.graphs.catalog import MLP_GRAPHS
from dllm_export.graphs.experts import choose_experts, run_experts
from dllm_export.graphs.torch_ops import TorchOps

Feeds = dict[str, NDArray[Any]]
DrawFeeds = Callable[..., Feeds]
RunGraph = Callable[[str, ModelShape, str, Feeds], Feeds]

OPS = TorchOps()
HIDDEN, INNER = 6, 5

ROUTERS = {
    "softmax": Experts(count=8, per_token=3, mlp=INNER),
    "renormalised": Experts(count=8, per_token=3, mlp=INNER, renormalise=True),
    "one expert": Experts(count=8, per_token=1, mlp=INNER, renormalise=True),
    "every expert": Experts(count=4, per_token=4, mlp=INNER, renormalise=True),
    "sigmoid": Experts(count=8, per_token=2, mlp=INNER, router="sigmoid"),
    "bias": Experts(count=8, per_token=2, mlp=INNER, router="sigmoid", bias=True, renormalise=True, scale=2.5),
    "groups": Experts(count=12, per_token=3, mlp=INNER, groups=4, groups_kept=2),
    "all": Experts(
        count=12,
        per_token=4,
        mlp=INNER,
        router="sigmoid",
        renormalise=True,
        scale=2.5,
        bias=True,
        groups=4,
        groups_kept=2,
    ),
}
MIXED = ModelShape(
    layers=3,
    hidden=16,
    heads=2,
    kv_heads=2,
    head_dim=8,
    mlp=20,
    vocab=31,
    max_length=64,
    norm_eps=1e-5,
    rope_theta=1e4,
    indicator_rank=4,
    experts=Experts(count=6, per_token=2, mlp=10, shared=10, dense_layers=1),
)


# -- router
def route_row(experts: Experts, logits: list[float], bias: list[float]) -> dict[int, float]:
    """Expert -> share of one row, from the published formulas, number by number."""
    highest = max(logits)
    if experts.router == "softmax":
        total = sum(np.exp(logit - highest) for logit in logits)
        scores = [float(np.exp(logit - highest) / total) for logit in logits]
    else:
        scores = [float(1 / (1 + np.exp(-logit))) for logit in logits]
    ranks = [score + (number if experts.bias else 0.0) for score, number in zip(scores, bias, strict=True)]
    size = experts.count // experts.groups
    worth = []
    for group in range(experts.groups):
        inside = sorted(ranks[group * size : (group + 1) * size])
        worth.append(inside[-1] + inside[-2] if experts.groups > 1 else 0.0)
    groups = sorted(range(experts.groups), key=lambda group: (-worth[group], group))[: experts.groups_kept]
    allowed = [expert for expert in range(experts.count) if expert // size in groups]
    chosen = sorted(allowed, key=lambda expert: (-ranks[expert], expert))[: experts.per_token]
    total = sum(scores[expert] for expert in chosen) if experts.renormalise else 1.0
    return {expert: scores[expert] / total * experts.scale for expert in chosen}


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_chooses_and_weighs_as_the_formulas_do(name: str) -> None:
    experts = ROUTERS[name]
    rng = np.random.default_rng(len(name))
    x, router = rng.normal(size=(2, 9, HIDDEN)), rng.normal(size=(HIDDEN, experts.count))
    bias = rng.normal(size=experts.count) * 0.3
    weights = {"router": torch.from_numpy(router), "router_bias": torch.from_numpy(bias)}
    chosen, share = choose_experts(OPS, experts, torch.from_numpy(x), weights)
    assert chosen.shape == share.shape == (2, 9, experts.per_token)
    for row in np.ndindex(2, 9):
        expected = route_row(experts, (x[row] @ router).tolist(), bias.tolist())
        found = dict(zip(chosen[row].tolist(), share[row].tolist(), strict=True))
        assert list(found) == list(expected), "the same experts, the best first"
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-12)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "groups"])
def test_ties_go_to_the_lower_expert(name: str) -> None:
    experts = ROUTERS[name]
    weights = {"router": torch.zeros(HIDDEN, experts.count)}
    chosen, _ = choose_experts(OPS, experts, torch.ones(1, 2, HIDDEN), weights)
    assert chosen.tolist() == [[list(range(experts.per_token))] * 2]


def test_a_bias_decides_who_is_chosen_and_not_for_how_much() -> None:
    experts = Experts(count=4, per_token=1, mlp=INNER, router="sigmoid", bias=True)
    weights = {"router": torch.zeros(HIDDEN, 4), "router_bias": torch.tensor([0.0, 0.0, 0.7, 0.0])}
    chosen, share = choose_experts(OPS, experts, torch.ones(1, 1, HIDDEN), weights)
    assert (chosen.item(), share.item()) == (2, 0.5)


# -- tiles
def draw_choices(kind: str, rows: tuple[int, int], experts: Experts, rng: np.random.Generator) -> Tensor:
    """k different experts of every row: at random, the same of all, or some that nobody else chooses."""
    chosen = np.argsort(rng.random((*rows, experts.count)), axis=-1)[..., : experts.per_token]
    if kind == "the same of all rows":
        chosen[:] = chosen[0, 0]
    if kind == "the first and the last":
        ends = np.concatenate((np.arange(experts.per_token), np.arange(experts.count)[-experts.per_token :]))
        chosen[:] = np.where(rng.random((*rows, 1)) < 0.5, ends[: experts.per_token], ends[experts.per_token :])
    return torch.from_numpy(chosen.astype(np.int32))


def loop(experts: Experts, x: Tensor, chosen: Tensor, share: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Row by row and choice by choice."""
    result = torch.zeros_like(x)
    for sequence, row in np.ndindex(*x.shape[:2]):
        for choice in range(experts.per_token):
            expert = int(chosen[sequence, row, choice])
            gate, up = gate_up[expert, 0::2] @ x[sequence, row], gate_up[expert, 1::2] @ x[sequence, row]
            inner = gate / (1 + torch.exp(-gate)) * up
            result[sequence, row] += share[sequence, row, choice] * (down[expert] @ inner)
    return result


def draw_products(experts: Experts, rows: tuple[int, int], kind: str, seed: int) -> tuple[Tensor, ...]:
    rng = np.random.default_rng(seed)
    sizes = ((*rows, HIDDEN), (experts.count, 2 * INNER, HIDDEN), (experts.count, HIDDEN, INNER))
    x, gate_up, down = (torch.from_numpy(rng.normal(size=size)) for size in sizes)
    return (
        x,
        draw_choices(kind, rows, experts, rng),
        torch.from_numpy(rng.random((*rows, experts.per_token))),
        gate_up,
        down,
    )


KINDS = ("at random", "the same of all rows", "the first and the last")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [(1, 1), (1, 7), (2, 9), (3, 16)], ids=str)
@pytest.mark.parametrize("tile", [1, 2, 3, 4, 8, 48, 256])
def test_tiles_give_what_a_loop_over_rows_gives(tile: int, rows: tuple[int, int], kind: str) -> None:
    experts = Experts(count=6, per_token=2, mlp=INNER)
    products = draw_products(experts, rows, kind, seed=tile)
    expected = loop(experts, *products)
    # Only the order of sums differs between the three.
    torch.testing.assert_close(run_experts(OPS, experts, *products, tile=tile), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(OPS.experts(experts, *products), expected, rtol=1e-12, atol=1e-12)


@given(
    count=st.integers(1, 9),
    rows=st.tuples(st.integers(1, 3), st.integers(1, 30)),
    tile=st.integers(1, 12),
    kind=st.sampled_from(KINDS),
    data=st.data(),
)
def test_there_is_a_tile_for_every_row_wherever_the_router_sends_it(
    count: int, rows: tuple[int, int], tile: int, kind: str, data: st.DataObject
) -> None:
    experts = Experts(count=count, per_token=data.draw(st.integers(1, count)), mlp=INNER)
    products = draw_products(experts, rows, kind, seed=count)
    found = run_experts(OPS, experts, *products, tile=tile)
    torch.testing.assert_close(found, OPS.experts(experts, *products), rtol=1e-12, atol=1e-12)


def test_the_worst_spread_of_rows_still_has_its_tiles() -> None:
    """Every expert one row above full tiles: the most further tiles that so many rows can need."""
    experts, tile = Experts(count=8, per_token=1, mlp=INNER), 4
    x, _, share, gate_up, down = draw_products(experts, (1, 8 * (tile + 1)), "at random", 0)
    chosen = torch.arange(8, dtype=torch.int32).repeat(tile + 1).view(1, -1, 1)
    products = (x, chosen, share, gate_up, down)
    expected = loop(experts, *products)
    torch.testing.assert_close(run_experts(OPS, experts, *products, tile=tile), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [(1, 1), (2, 9)], ids=str)
def test_the_onnx_form_of_the_tiles_gives_the_same(rows: tuple[int, int], kind: str) -> None:
    experts = Experts(count=6, per_token=2, mlp=INNER)
    products = draw_products(experts, rows, kind, seed=3)
    dims: dict[str, tuple[str | int, ...]] = {
        "x": ("B", "N", HIDDEN),
        "chosen": ("B", "N", 2),
        "share": ("B", "N", 2),
        "gate_up": (6, 2 * INNER, HIDDEN),
        "down": (6, HIDDEN, INNER),
    }
    types = {name: TensorProto.INT32 if name == "chosen" else TensorProto.FLOAT for name in dims}
    ops = OnnxOps()
    result = run_experts(ops, experts, *(Value(name, types[name], dims[name]) for name in dims), tile=3)
    graph = helper.make_graph(
        ops.nodes,
        "experts",
        [helper.make_tensor_value_info(name, types[name], dims[name]) for name in dims],
        [helper.make_tensor_value_info(result.name, TensorProto.FLOAT, ("B", "N", HIDDEN))],
        ops.initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {
        name: tensor.numpy().astype(np.int32 if name == "chosen" else np.float32)
        for name, tensor in zip(dims, products, strict=True)
    }
    (found,) = session.run(None, feeds)
    np.testing.assert_allclose(found, loop(experts, *products).numpy(), rtol=1e-4, atol=1e-5)


# -- layers
def test_layers_of_one_model_may_have_graphs_of_two_kinds() -> None:
    specs = graph_specs(MIXED)
    assert {name for name in specs if name.endswith("_dense")} == {f"{name}_dense" for name in MLP_GRAPHS}
    assert [layer_graph(MIXED, "layer_full", layer) for layer in range(3)] == ["layer_full_dense", *["layer_full"] * 2]
    assert [layer_graph(MIXED, "layer_skip", layer) for layer in range(3)] == ["layer_skip"] * 3
    assert [graph_layers(MIXED, name) for name in ("layer_full_dense", "layer_full", "layer_compact", "head")] == [
        range(1), range(1, 3), range(3), None,
    ]  # fmt: skip
    for name, spec in specs.items():
        layers = graph_layers(MIXED, name)
        for layer in layers or ():
            own = {weight.name for weight in layer_weights(MIXED, layer)} | {"proxy"}
            assert {weight.name for weight in spec.weights} <= own, "a layer has what its graphs take"
        assert has_experts(spec) == (name in MLP_GRAPHS)


def test_models_without_experts_or_without_dense_layers_have_one_kind() -> None:
    for shape in (replace(MIXED, experts=None), replace(MIXED, experts=replace(MIXED.experts, dense_layers=0))):
        assert not [name for name in graph_specs(shape) if name.endswith("_dense")]
        assert layer_graph(shape, "layer_full", 0) == "layer_full"


@pytest.mark.parametrize("graph", [f"{name}_dense" for name in MLP_GRAPHS])
def test_both_readings_of_a_dense_layers_graph_agree(graph: str, draw_feeds: DrawFeeds, run_graph: RunGraph) -> None:
    feeds = draw_feeds(MIXED, graph.removesuffix("_dense"))
    feeds |= {name: array for name, array in draw_feeds(MIXED, graph).items() if name not in feeds}
    expected, found = (run_graph(reading, MIXED, graph, feeds) for reading in ("float64", "onnxruntime"))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("graph", MLP_GRAPHS)
def test_onnxruntimes_own_operator_gives_what_the_portable_form_gives(
    graph: str, dtype: Any, draw_feeds: DrawFeeds
) -> None:
    spec, feeds = graph_specs(MIXED)[graph], draw_feeds(MIXED, graph, seed=5)
    types = {"compute": dtype}
    feeds = {
        tensor.name: feeds[tensor.name].astype(types.get(tensor.type, tensor.type))
        for tensor in (*spec.inputs, *spec.weights)
    }
    results = []
    for contrib in (False, True):
        model = build_onnx(spec, MIXED, dtype, contrib=contrib)
        assert (CONTRIB in {opset.domain for opset in model.opset_import}) is contrib
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        names = [tensor.name for tensor in spec.outputs]
        results.append(dict(zip(names, session.run(names, feeds), strict=True)))
    # float32: the order of sums, and a share as the exponential of its logarithm. float16: its rounding, 2^-11 of numbers
    # up to 8, a few times.
    limits = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 2e-2, "atol": 3e-2}
    for name, portable in results[0].items():
        np.testing.assert_allclose(results[1][name], portable, err_msg=name, **limits)


def test_a_graph_without_experts_has_no_operator_for_them() -> None:
    model = build_onnx(graph_specs(MIXED)["layer_full_dense"], MIXED, "float32", contrib=True)
    assert "MoE" not in {node.op_type for node in model.graph.node}


def test_rows_of_a_partial_layer_are_those_of_the_full_layer(draw_feeds: DrawFeeds, run_graph: RunGraph) -> None:
    feeds = draw_feeds(MIXED, "layer_full")
    full = run_graph("float64", MIXED, "layer_full", feeds)
    rows = np.tile(np.array([1, 4, 5, 10], np.int32), (2, 1))
    slot, fresh = np.zeros((2, 12), np.int32), np.zeros((2, 12), np.bool_)
    slot[:, rows[0]], fresh[:, rows[0]] = np.arange(4), True
    cached = {"key": full["key_out"], "value": full["value_out"]}
    chosen = {"hidden": feeds["hidden"][:, rows[0]], "index": rows, "slot": slot, "fresh": fresh}
    partial = run_graph("float64", MIXED, "layer_partial", {**feeds, **cached, **chosen})
    np.testing.assert_allclose(partial["hidden_out"], full["hidden_out"][:, rows[0]], rtol=0, atol=1e-12)
