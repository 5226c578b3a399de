"""Which graphs a continuous model has, whose rows are vectors and not tokens until the end."""

from __future__ import annotations

from dataclasses import replace

from dllm_export.graphs import latents, steps
from dllm_export.graphs.shape import ModelShape
from dllm_export.graphs.spec import GraphSpec, TensorSpec
from dllm_export.graphs.weights import head_weights, layer_weights


def declare_latent_graphs(shape: ModelShape) -> tuple[GraphSpec, ...]:
    """A step of a continuous model: every row of it changes every time, so that there is one way to compute a layer."""
    d, w, half = shape.hidden, shape.latent, shape.rotary_width // 2

    hidden, table = TensorSpec("hidden", "compute", ("B", "S", d)), TensorSpec("latents", "float32", (shape.vocab, w))
    hidden_out = replace(hidden, name="hidden_out")
    rotary = tuple(TensorSpec(name, "float32", ("B", "S", half)) for name in ("cos", "sin"))
    vectors = tuple(TensorSpec(name, "float32", ("B", "S", w)) for name in ("latent", "estimate", "estimate_out"))
    cached = tuple(TensorSpec(name, "compute", ("B", "S", shape.key_width)) for name in ("key_out", "value_out"))
    return (
        GraphSpec(
            "embed_latent",
            (
                *vectors[:2],
                TensorSpec("level", "float32", ("B", latents.LEVEL_WIDTH)),
                TensorSpec("latent_scale", "float32", (1,)),
            ),
            tuple(
                TensorSpec(name, "compute", (width, d))
                for name, width in (("latent_in", w), ("estimate_in", w), ("level_in", latents.LEVEL_WIDTH))
            ),
            (hidden_out,),
            latents.embed_latent,
        ),
        GraphSpec(
            "layer_full",
            (hidden, *rotary, TensorSpec("mask", "bool", ("B", "S"))),
            layer_weights(shape),
            (hidden_out, *cached, replace(hidden, name="delta_out")),
            steps.layer_full,
        ),
        GraphSpec(
            "head_latent",
            (hidden, vectors[0], TensorSpec("pull", "float32", (1,))),
            (*(weight for weights in head_weights(shape) for weight in weights), table),
            (vectors[2], TensorSpec("token", "int32", ("B", "S")), TensorSpec("confidence", "float32", ("B", "S"))),
            latents.head_latent,
        ),
    )
