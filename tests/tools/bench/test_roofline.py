"""Work and limits of steps against the figures derived by hand for LLaDA-8B: prompt 893, response 256, batch 1, ratio 0.25."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature

import numpy as np
import pytest

from dllm_export.graphs import Experts, ModelShape, Ops, graph_specs
from dllm_export.graphs.counting_ops import CountingOps, Outline, Product, count_products
from dllm_export.graphs.experts import run_experts
from dllm_export.runtime.buffers import RequestShape
from dllm_export.runtime.head import Head
from dllm_export.runtime.policies import CachePolicy, DllmCache, NoCache, StepState
from dllm_export.runtime.trunk import Trunk
from dllm_export.tools.bench.metering import MeteredSession, OutlineSession
from dllm_export.tools.bench.roofline import Call, Limits, Model, Work

PROMPT, RESPONSE = 893, 256
TERA, GIGA = 1e12, 1e9
H100 = Limits(flops_per_second=0.65 * 989e12, bytes_per_second=0.85 * 3.35e12)
RTX_4090 = Limits(flops_per_second=0.70 * 165e12, bytes_per_second=0.85 * 1.008e12)
H200 = replace(H100, bytes_per_second=0.85 * 4.8e12)


def work_of_step(shape: ModelShape, policy: CachePolicy, step: int, batch: int = 1) -> Work:
    """The work of one step with the head on all response rows, from the calls that the runtime makes."""
    model = Model(graph_specs(shape), shape, "bfloat16")
    request = RequestShape(batch=batch, prompt_rows=PROMPT, response_rows=RESPONSE)
    session = MeteredSession(OutlineSession("bfloat16"), model)
    trunk, head = Trunk(session, shape, request), Head(session, shape, request)
    first = StepState.first(layers=shape.layers, prompt_rows=PROMPT, response_rows=RESPONSE, batch=batch)
    plan = policy.plan(replace(first, step=step, block_step=step))
    trunk.prepare(plan, np.zeros((batch, PROMPT + RESPONSE), np.int32))()
    rows = np.tile(np.arange(RESPONSE, dtype=np.int32), (batch, 1))
    head.prepare(trunk.hidden, rows, frozenset())()
    return session.meter.take()


def test_a_full_step_of_llada_8b_has_seventeen_teraflops(llada_8b: ModelShape) -> None:
    work = work_of_step(llada_8b, NoCache(), 1)
    assert work.flops / TERA == pytest.approx(17.00, abs=0.005)
    assert work.weight_bytes / GIGA == pytest.approx(15.0, abs=0.05)
    assert work.cache_bytes == 0


@pytest.mark.parametrize(("step", "flops"), [(1, 17.00), (2, 1.48), (6, 3.99), (26, 17.00)])
def test_steps_of_dllm_cache_have_the_flops_of_the_trimmed_algorithm(
    step: int, flops: float, llada_8b: ModelShape
) -> None:
    assert work_of_step(llada_8b, DllmCache(), step).flops / TERA == pytest.approx(flops, abs=0.005)


def test_a_cached_step_reads_keys_and_values_of_every_row(llada_8b: ModelShape) -> None:
    assert work_of_step(llada_8b, DllmCache(), 2).cache_bytes == 32 * 2 * (PROMPT + RESPONSE) * 4096 * 2


def test_one_layer_and_the_head_have_the_flops_of_the_reference(llada_8b: ModelShape) -> None:
    specs, length = graph_specs(llada_8b), PROMPT + RESPONSE

    def flops(graph: str, **sizes: int) -> float:
        return sum(product.flops for product in count_products(specs[graph], llada_8b, {"B": 1, **sizes})) / TERA

    assert flops("layer_full", S=length) == pytest.approx(0.523, abs=0.0005)
    assert flops("head", X=RESPONSE, Q=RESPONSE) == pytest.approx(0.265, abs=0.0005)
    assert flops("head", X=length, Q=length) == pytest.approx(1.190, abs=0.0005)
    assert 31 * flops("layer_adaptive", S=length, X=RESPONSE, Q=RESPONSE // 4) == pytest.approx(1.10, abs=0.005)
    # 15 GFLOP for every row of the whole network, attention aside
    row = 32 * 2 * (4 * 4096**2 + 3 * 4096 * 12288) + 2 * 4096 * 126464
    assert row / GIGA == pytest.approx(15, abs=0.05)


@pytest.mark.parametrize(
    ("limits", "batch", "step", "milliseconds"),
    [
        (RTX_4090, 1, 2, 18.2),
        (RTX_4090, 1, 6, 34.6),
        (RTX_4090, 4, 2, 51.4),
        (H100, 1, 2, 5.5),
        (H100, 1, 6, 6.2),
        (H100, 4, 2, 9.2),
        (H100, 16, 6, 99),
        (H200, 1, 2, 3.8),
    ],
)
def test_the_limit_of_a_step_is_that_of_the_reference(
    limits: Limits, batch: int, step: int, milliseconds: float, llada_8b: ModelShape
) -> None:
    work = work_of_step(llada_8b, DllmCache(), step, batch)
    assert 1e3 * limits.seconds(work) == pytest.approx(milliseconds, rel=0.01)


def test_a_full_step_with_the_head_on_all_rows_is_bound_by_arithmetic() -> None:
    assert 1e3 * H100.seconds(Work(flops=int(17.92e12), weight_bytes=15 * 10**9)) == pytest.approx(27.9, abs=0.05)


def test_below_the_break_even_rows_a_step_is_bound_by_reading(llada_8b: ModelShape) -> None:
    rows = Limits(flops_per_second=600e12, bytes_per_second=3.35e12).break_even_rows(type_bytes=2)
    assert rows == pytest.approx(179, abs=1)


def test_a_weight_that_two_calls_of_a_layer_use_is_read_once(llada_8b: ModelShape) -> None:
    model = Model(graph_specs(llada_8b), llada_8b, "float16")
    full = Call("layer_full", 0, {"B": 1, "S": 64})
    assert model.work([full, full]).weight_bytes == model.work([full]).weight_bytes
    assert model.work([full, replace(full, layer=1)]).weight_bytes == 2 * model.work([full]).weight_bytes


def test_a_step_looks_up_rows_of_the_embedding_and_not_all_of_it(llada_8b: ModelShape) -> None:
    model = Model(graph_specs(llada_8b), llada_8b, "float16")
    assert model.work([Call("embed", None, {"B": 2, "X": 10})]).weight_bytes == 2 * 10 * 4096 * 2


GROUPED = Experts(
    count=64, per_token=8, mlp=1024, router="sigmoid", bias=True, groups=8, groups_kept=4, shared=512, dense_layers=1
)


@pytest.mark.parametrize(
    "change",
    [{}, {"kv_heads": 8}, {"qkv_bias": True}, {"tied_head": True}, {"indicator_rank": 16}, {"experts": GROUPED}],
)
def test_every_graph_of_every_shape_can_be_counted(change: dict[str, object], llada_8b: ModelShape) -> None:
    shape = replace(llada_8b, layers=2, **change)  # type: ignore[arg-type]
    sizes = {"B": 2, "C": 1, "S": 48, "X": 16, "Q": 8, "N": 48}
    for name, spec in graph_specs(shape).items():
        products = count_products(spec, shape, sizes)
        computes = any(weight.name in ("qk", "head", "proxy") for weight in spec.weights) or name.startswith("head")
        assert bool(products) == computes, name


def test_experts_count_for_the_rows_that_go_to_them_and_are_read_as_far_as_rows_ask(llada_8b: ModelShape) -> None:
    shape = replace(llada_8b, layers=1, experts=Experts(count=64, per_token=8, mlp=1024))
    specs, one = graph_specs(shape), 3 * 4096 * 1024
    routed = count_products(specs["layer_full"], shape, {"B": 1, "S": 100})
    assert [product for product in routed if product.rows == 800] == [
        Product(800, 4096, 2048), Product(800, 1024, 4096),
    ]  # fmt: skip
    model = Model(specs, shape, "float16")
    read = [model.work([Call("layer_full", 0, {"B": 1, "S": rows})]).weight_bytes for rows in (1, 2, 8, 9, 100)]
    assert [later - read[0] for later in read] == [2 * one * experts for experts in (0, 8, 56, 56, 56)]


@pytest.mark.parametrize("rows", [(1, 1), (1, 300), (2, 700)])
def test_tiles_multiply_no_more_than_the_documented_rows(rows: tuple[int, int]) -> None:
    experts, ops, pairs = Experts(count=64, per_token=8, mlp=16), CountingOps(), rows[0] * rows[1] * 8
    dims = ((*rows, 32), (*rows, 8), (*rows, 8), (64, 32, 32), (64, 32, 16))
    run_experts(ops, experts, *map(Outline, dims))
    tile = min(rows[0] * rows[1], 256)
    further = max(1, pairs // 256 if rows[0] * rows[1] > 256 else 0)
    found = [product.count for product in ops.products if (product.inner, product.columns) == (32, tile)]
    assert found == [64, further]


def test_every_operation_of_a_graph_can_be_counted() -> None:
    """A new operation of `Ops` must be followed here too, with the same parameters."""
    for name, operation in vars(Ops).items():
        if not name.startswith("_") and callable(operation):
            expected, found = (signature(one).parameters for one in (operation, getattr(CountingOps, name)))
            assert len(found) == len(expected), name


def test_attention_counts_two_products_for_every_head_of_every_sequence(llada_8b: ModelShape) -> None:
    products = count_products(graph_specs(llada_8b)["layer_partial"], llada_8b, {"B": 2, "S": 48, "Q": 8})
    inner = [product for product in products if not product.stored]
    assert inner == [Product(8, 128, 48, 64, stored=False), Product(8, 48, 128, 64, stored=False)]
