"""Which graphs exist: their inputs, weights and outputs by name, with dims and types. The contract in one place.

Dim letters: B batch, C batch of a copy, S sequence, X alive rows, Q recomputed, candidate or copied rows, N rows of a source,
K head candidates; numbers are sizes fixed by the model. Outputs end in `_out` where an input has the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

from dllm_export.graphs import commits, heads, picking, shadows, steps
from dllm_export.graphs.compaction import layer_compact
from dllm_export.graphs.latent_catalog import declare_latent_graphs
from dllm_export.graphs.shape import ModelShape
from dllm_export.graphs.spec import GraphFunction, GraphSpec, TensorSpec
from dllm_export.graphs.weights import head_weights, layer_weights, mlp_weights

TOP_TOKENS = 64
"""Candidates that the head returns for sampling; a model with fewer tokens returns all (docs/decisions.md)."""


HeadGraph = Literal["head", "head_tracked", "head_credited", "head_drawn", "head_moved"]
"""What a decoding rule may take its statistics from; all but `head_moved` take the guidance residual (times 0 without)."""

NORM1 = ("norm1", "norm1_bias", "norm1_modulation", "norm1_modulation_bias")
PROJECTIONS = (*NORM1, "qk", "v", "qk_bias", "v_bias", "q_norm", "k_norm")
"""Weights that a layer's first stage uses; its second stage has the others."""

LAYER_GRAPHS = ("layer_full", "layer_partial", "layer_adaptive", "layer_tracking")
"""Graphs that compute a layer of every bundle; `layer_indicated` comes with an indicator."""

MLP_GRAPHS = (*LAYER_GRAPHS, "layer_indicated", "layer_shadow")
"""Graphs that contain a layer's MLP."""

DENSE = "_dense"
"""What the graphs of layers with a plain MLP end in, in a model whose other layers have experts."""


def has_experts(spec: GraphSpec) -> bool:
    """Whether a graph runs a mixture of experts."""
    return any(weight.name == "router" for weight in spec.weights)


def layer_graph(shape: ModelShape, graph: str, layer: int) -> str:
    """The graph that is `graph` for this layer: layers with another MLP than the others have their own."""
    own = graph in MLP_GRAPHS and shape.experts is not None and not shape.has_experts(layer)
    return f"{graph}{DENSE}" if own else graph


def graph_layers(shape: ModelShape, graph: str) -> range | None:
    """The layers that a graph computes; None where it is no layer's."""
    if not graph.startswith("layer_"):
        return None
    dense = shape.experts.dense_layers if shape.experts else 0
    if graph.endswith(DENSE):
        return range(dense)
    return range(dense if graph in MLP_GRAPHS else 0, shape.layers)


def engine_specs(specs: Mapping[str, GraphSpec], *, staged: bool) -> dict[str, GraphSpec]:
    """What engines are built of, by name: every graph whole, or in stages where it has them."""
    split = ((spec.stages if staged else ()) or (spec,) for spec in specs.values())
    return {spec.name: spec for stages in split for spec in stages}


def with_stages(specs: Mapping[str, GraphSpec]) -> dict[str, GraphSpec]:
    """All graphs by name, the stages of some included: what a bundle holds."""
    return {**specs, **engine_specs(specs, staged=True)}


def graph_specs(shape: ModelShape) -> Mapping[str, GraphSpec]:
    """Every graph of a model of this shape, by name."""
    specs = {graph.name: graph for graph in declare_graphs(shape)}
    if shape.experts is not None and shape.experts.dense_layers:
        twins = (replace_experts(shape, specs[name]) for name in MLP_GRAPHS if name in specs)
        specs |= {twin.name: twin for twin in twins}
    return specs


def replace_experts(shape: ModelShape, spec: GraphSpec) -> GraphSpec:
    """The same graph for layers with a plain SwiGLU."""
    mixed, plain = (mlp_weights(shape, with_experts=with_experts) for with_experts in (True, False))
    weights = tuple(weight for weight in spec.weights if weight not in mixed)
    graph, dot, stage = spec.name.partition(".")
    return replace(
        spec,
        name=f"{graph}{DENSE}{dot}{stage}",
        weights=weights if weights == spec.weights else (*weights, *plain),
        stages=tuple(replace_experts(shape, part) for part in spec.stages),
    )


def declare_graphs(shape: ModelShape) -> tuple[GraphSpec, ...]:
    """The graphs of a model whose layers are all alike."""
    if shape.latent:
        return declare_latent_graphs(shape)
    d, kv, half = shape.hidden, shape.key_width, shape.rotary_width // 2
    rank, top = shape.indicator_rank, min(TOP_TOKENS, shape.vocab)
    layer = layer_weights(shape)
    table = TensorSpec("embedding", "compute", (shape.vocab, d))
    norm, head = head_weights(shape)
    classifier = (*norm, *head)

    def rows(name: str, count: str, width: int) -> TensorSpec:
        return TensorSpec(name, "compute", ("B", count, width))

    def positions(name: str, count: str) -> TensorSpec:
        return TensorSpec(name, "int32", ("B", count))

    def per_row(name: str) -> TensorSpec:
        return TensorSpec(name, "float32", ("B", "Q"))

    def every_token(name: str) -> TensorSpec:
        return TensorSpec(name, "float32", ("B", "Q", shape.vocab))

    def query(name: str) -> TensorSpec:
        return TensorSpec(name, "compute", ("B", "Q", shape.heads, shape.head_dim))

    projections = tuple(weight for weight in layer if weight.name in PROJECTIONS)
    others = tuple(weight for weight in layer if weight.name not in PROJECTIONS)
    timed = (TensorSpec("condition", "compute", ("B", shape.conditioning)),) if shape.conditioning else ()
    rotary = (*timed, *(TensorSpec(name, "float32", ("B", "S", half)) for name in ("cos", "sin")))
    mask = TensorSpec("mask", "bool", ("B", "S"))
    blocks = (positions("block", "S"),) if shape.block else ()
    context = (*rotary, mask, *blocks)
    seen = (mask, *blocks, *((positions("index", "Q"),) if blocks else ()))
    placed = (positions("slot", "S"), TensorSpec("fresh", "bool", ("B", "S")))
    cache = (rows("key", "S", kv), rows("value", "S", kv))
    cache_out = (rows("key_out", "S", kv), rows("value_out", "S", kv))
    proxy = TensorSpec("proxy", "compute", (d, rank))
    shown = TensorSpec("shown", "bool", ("B", "Q"))

    def pick(
        name: str,
        function: GraphFunction,
        project: GraphFunction,
        reference: tuple[TensorSpec, ...] = (),
        weights: tuple[TensorSpec, ...] = (),
        renewed: tuple[TensorSpec, ...] = (),
    ) -> GraphSpec:
        """A layer that picks `budget` of its alive rows by their drift from `reference`."""
        hidden, delta = rows("hidden", "X", d), rows("delta", "X", d)
        hidden_out, delta_out = rows("hidden_out", "X", d), rows("delta_out", "X", d)
        index_out, drift = positions("index_out", "Q"), TensorSpec("drift", "float32", ("B", "X"))
        chosen = (TensorSpec("budget", "int64", (1,)), TensorSpec("forced", "bool", ("B", "X")))
        placed_rows = (positions("index", "X"), *placed, *cache)
        return GraphSpec(
            name,
            (hidden, *placed_rows, delta, *reference, *chosen, *context),
            (*layer, *weights),
            (hidden_out, *cache_out, delta_out, *renewed, index_out, drift),
            function,
            stages=(
                GraphSpec(
                    f"{name}.project",
                    (hidden, *placed_rows, *reference, *chosen, *rotary),
                    (*projections, *weights),
                    (
                        query("query_out"),
                        *cache_out,
                        *renewed,
                        index_out,
                        positions("row_out", "Q"),
                        TensorSpec("chosen_out", "bool", ("B", "X")),
                        positions("rank_out", "X"),
                        drift,
                    ),
                    project,
                ),
                GraphSpec(
                    f"{name}.finish",
                    (
                        hidden,
                        delta,
                        query("query"),
                        *cache,
                        positions("row", "Q"),
                        TensorSpec("chosen", "bool", ("B", "X")),
                        positions("rank", "X"),
                        *timed,
                        *seen,
                    ),
                    others,
                    (hidden_out, delta_out),
                    picking.finish_picked,
                ),
            ),
        )

    indicated = (
        pick(
            "layer_indicated",
            steps.layer_indicated,
            steps.project_indicated,
            reference=(rows("indicator", "X", rank),),
            weights=(proxy,),
            renewed=(rows("indicator_out", "X", rank),),
        ),
        GraphSpec(
            "layer_indicator",
            (rows("hidden", "N", d), positions("index", "Q"), *timed),
            (*(weight for weight in layer if weight.name in NORM1), proxy),
            (rows("indicator_out", "Q", rank),),
            steps.layer_indicator,
        ),
    )
    shadow = GraphSpec(
        "layer_shadow",
        (rows("hidden", "Q", d), positions("index", "Q"), shown, *cache, *context),
        layer,
        (rows("hidden_out", "Q", d),),
        shadows.layer_shadow,
        stages=(
            GraphSpec(
                "layer_shadow.project",
                (rows("hidden", "Q", d), positions("index", "Q"), *rotary),
                projections,
                (query("query_out"), *(rows(f"own_{name}_out", "Q", kv) for name in ("key", "value"))),
                shadows.project_shadow,
            ),
            GraphSpec(
                "layer_shadow.finish",
                (
                    rows("hidden", "Q", d),
                    query("query"),
                    *(rows(f"own_{name}", "Q", kv) for name in ("key", "value")),
                    positions("index", "Q"),
                    shown,
                    *cache,
                    *timed,
                    mask,
                ),
                others,
                (rows("hidden_out", "Q", d),),
                shadows.finish_shadow,
            ),
        ),
    )
    compact = GraphSpec(
        "layer_compact",
        (
            rows("hidden", "S", d),
            positions("index", "X"),
            TensorSpec("fresh", "bool", ("B", "S")),
            TensorSpec("kept", "bool", ("B", "Q")),
            *cache,
            TensorSpec("budget", "int64", (1,)),
            *context,
        ),
        tuple(weight for weight in layer if weight.name in (*NORM1, "qk", "qk_bias", "q_norm")),
        (
            rows("key_out", "Q", kv),
            rows("value_out", "Q", kv),
            positions("index_out", "Q"),
            TensorSpec("relevance", "float32", ("B", "S")),
        ),
        layer_compact,
    )
    candidates = (
        rows("hidden", "X", d),
        positions("index", "Q"),
        TensorSpec("bias", "float32", (shape.vocab,)),
        *timed,
    )
    guided = (*candidates, rows("guidance", "X", d), TensorSpec("cfg_scale", "compute", (1,)))
    statistics = (
        positions("token", "Q"),
        *(per_row(name) for name in ("confidence", "margin", "entropy")),
        TensorSpec("top_tokens", "int32", ("B", "Q", top)),
        TensorSpec("top_logits", "float32", ("B", "Q", top)),
        per_row("logsumexp"),
        per_row("nll"),
    )
    drawn = (positions("drawn", "Q"), per_row("drawn_logit"))
    moved = GraphSpec(
        "head_moved",
        (
            *candidates,
            positions("present", "Q"),
            TensorSpec("moves", "float32", (4,)),
            TensorSpec("uniform", "float32", ("B", "Q", 2)),
        ),
        classifier,
        (*statistics, *drawn),
        partial(heads.head_moved, top=top),
    )
    width = shape.conditioning
    time = {"time1": (steps.TIME_WIDTH, width), "time1_bias": (width,), "time2": (width, width), "time2_bias": (width,)}
    conditioned = GraphSpec(
        "condition",
        (TensorSpec("time", "float32", ("B", steps.TIME_WIDTH)),),
        tuple(TensorSpec(name, "compute", dims) for name, dims in time.items()),
        (TensorSpec("condition_out", "compute", ("B", width)),),
        steps.condition_time,
    )
    return (
        *((conditioned,) if width else ()),
        GraphSpec("embed", (positions("tokens", "X"),), (table,), (rows("hidden_out", "X", d),), steps.embed),
        GraphSpec(
            "layer_full",
            (rows("hidden", "S", d), *context),
            layer,
            (rows("hidden_out", "S", d), *cache_out, rows("delta_out", "S", d)),
            steps.layer_full,
        ),
        GraphSpec(
            "layer_partial",
            (rows("hidden", "Q", d), positions("index", "Q"), *placed, *cache, *context),
            layer,
            (rows("hidden_out", "Q", d), *cache_out, rows("delta_out", "Q", d)),
            steps.layer_partial,
            stages=(
                GraphSpec(
                    "layer_partial.project",
                    (rows("hidden", "Q", d), positions("index", "Q"), *placed, *cache, *rotary),
                    projections,
                    (query("query_out"), *cache_out),
                    steps.project_partial,
                ),
                GraphSpec(
                    "layer_partial.finish",
                    (rows("hidden", "Q", d), query("query"), *cache, *timed, *seen),
                    others,
                    (rows("hidden_out", "Q", d), rows("delta_out", "Q", d)),
                    steps.finish_partial,
                ),
            ),
        ),
        *(() if shape.block else (shadow,)),
        pick("layer_adaptive", steps.layer_adaptive, steps.project_adaptive),
        pick("layer_tracking", steps.layer_tracking, steps.project_tracking, reference=(rows("seen", "X", d),)),
        *(indicated if rank else ()),
        *(() if shape.block else (compact,)),
        GraphSpec(
            "layer_skip",
            (rows("hidden", "X", d), rows("delta", "X", d)),
            (),
            (rows("hidden_out", "X", d),),
            steps.layer_skip,
        ),
        GraphSpec(
            "gather",
            (rows("hidden", "N", d), positions("index", "Q")),
            (),
            (rows("hidden_out", "Q", d),),
            steps.gather,
        ),
        GraphSpec(
            "copy_features",
            (rows("key", "N", kv), rows("value", "N", kv), TensorSpec("index", "int32", ("C", "Q"))),
            (),
            tuple(TensorSpec(name, "compute", ("C", "Q", kv)) for name in ("key_out", "value_out")),
            steps.copy_features,
        ),
        GraphSpec(
            "copy_rows",
            (rows("hidden", "N", d), TensorSpec("index", "int32", ("C", "Q"))),
            (),
            (TensorSpec("hidden_out", "compute", ("C", "Q", d)),),
            steps.copy_rows,
        ),
        GraphSpec(
            "join_rows",
            (rows("hidden", "Q", d), *placed, rows("rest", "S", d)),
            (),
            (rows("hidden_out", "S", d),),
            steps.join_rows,
        ),
        GraphSpec(
            "guidance",
            (rows("hidden", "X", d), rows("unconditional", "X", d), *timed),
            norm,
            (rows("guidance_out", "X", d),),
            steps.guidance,
        ),
        GraphSpec(
            "head",
            (*guided, positions("given", "Q")),
            classifier,
            (*statistics, per_row("probability")),
            partial(heads.head, top=top),
        ),
        GraphSpec(
            "head_tracked",
            (*guided, every_token("distribution")),
            classifier,
            (*statistics, every_token("distribution_out"), per_row("divergence"), per_row("similarity")),
            partial(heads.head_tracked, top=top),
        ),
        GraphSpec(
            "head_credited",
            (
                *guided,
                every_token("credit"),
                *(TensorSpec(f"credit_{name}", "float32", (1,)) for name in ("decay", "power", "weight")),
            ),
            classifier,
            (*statistics, every_token("credit_out")),
            partial(heads.head_credited, top=top),
        ),
        GraphSpec(
            "head_drawn",
            (*guided, TensorSpec("sharpness", "float32", (1,)), TensorSpec("uniform", "float32", ("B", "Q", 2))),
            classifier,
            (*statistics, *drawn),
            partial(heads.head_drawn, top=top),
        ),
        *((moved,) if shape.uniform_noise else ()),
        GraphSpec(
            "commit",
            (
                positions("tokens", "X"),
                positions("slot", "X"),
                TensorSpec("fresh", "bool", ("B", "X")),
                positions("token", "Q"),
                per_row("nll"),
                TensorSpec("candidate", "bool", ("B", "Q")),
                TensorSpec("quota", "float32", ("B",)),
                TensorSpec("sure", "float32", (1,)),
            ),
            (),
            (positions("tokens_out", "X"),),
            commits.commit,
        ),
    )
