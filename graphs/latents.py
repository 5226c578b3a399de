"""The graphs of a continuous model (Plaid, arXiv 2305.18619): noisy vectors in, an estimate of the clean ones out.

Between them lie the layers of every other model. Logits [B, S, V] never leave a graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dllm_export.graphs.layers import normalize, project
from dllm_export.graphs.ops import Ops, T
from dllm_export.graphs.shape import ModelShape

LEVEL_WIDTH = 64
"""Numbers that describe a noise level: half sines, half cosines."""


def embed_latent(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """Vectors, the last estimate of the clean ones and the noise level -> hidden.

    `latent_scale` brings the vectors to a spread of 1: 1 / sqrt(alpha^2 / w + sigma^2).
    """
    latent = ops.narrow(ops.mul(t["latent"], t["latent_scale"]), t["latent_in"])
    hidden = ops.matmul(latent, t["latent_in"])
    hidden = ops.add(hidden, ops.matmul(ops.narrow(t["estimate"], latent), t["estimate_in"]))
    return {
        "hidden_out": ops.add(hidden, ops.unsqueeze(project(ops, ops.narrow(t["level"], latent), t, "level_in"), 1))
    }


def head_latent(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """Hidden rows and the noisy vectors -> what vectors are expected, and the likeliest token of every row.

    logits = head(norm(hidden)) + `pull` latent . latents, pull = alpha / sigma^2: how much nearer a vector is to one token's
    than to another's. estimate = softmax(logits) latents, in float32.
    """
    # The last norm is a LayerNorm without a bias, though the layers have RMSNorm.
    rows = normalize(ops, replace(shape, norm="layer"), t["hidden"], t, "norm")
    product = ops.matmul(rows, t["head"])
    with ops.scope("statistics"):
        logits = ops.add(ops.widen(product), ops.widen(t["head_bias"]))
        near = ops.matmul_transposed(ops.mul(t["latent"], t["pull"]), t["latents"])
        logits = ops.add(logits, near)
        best, token = ops.top(logits, 1)
        weights = ops.exp(ops.sub(logits, best))
        share = ops.div(weights, ops.sum(weights, keep=True))
        return {
            "estimate_out": ops.matmul(share, t["latents"]),
            "token": ops.column(token, 0),
            "confidence": ops.max(share, keep=False),
        }
