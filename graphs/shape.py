"""The shape of a model: every number and flag that the graphs of a family depend on. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DType = Literal["float32", "float16", "bfloat16", "float64"]
"""Compute types. float64 exists for the exactness oracles (torch session only)."""

NormKind = Literal["rms", "layer"]
"""RMSNorm, or LayerNorm with a bias."""

MlpKind = Literal["swiglu", "gelu"]
"""down(silu(gate x) * up x), or down(gelu(up x)) with the tanh form of GELU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A mixture of experts in place of the SwiGLU: each row goes to `per_token` of `count` small ones."""

    count: int
    """E."""
    per_token: int
    """k, experts of a row."""
    mlp: int
    """F, inner width of an expert."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """What makes scores of the router's products."""
    renormalise: bool = False
    """Whether the shares of the chosen experts are scaled to a sum of 1."""
    scale: float = 1.0
    """What the shares are multiplied with in the end."""
    bias: bool = False
    """Whether numbers are added to the scores for the choice, and for the choice alone."""
    groups: int = 1
    groups_kept: int = 1
    """Only experts in this many of the groups can be chosen: in those whose two best have the largest sum."""
    shared: int = 0
    """Inner width of a SwiGLU that every row goes through as well; 0 for none."""
    dense_layers: int = 0
    """The first layers that have a plain SwiGLU instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes and flags of one bidirectional transformer; a family maps its config.json to this value."""

    layers: int
    hidden: int
    """D, width of the residual stream."""
    heads: int
    """H, query heads."""
    kv_heads: int
    """G, key/value heads; H must be a multiple."""
    head_dim: int
    mlp: int
    """Inner width of the MLP, of dense layers where there are `experts`."""
    vocab: int
    """V, rows of the embedding table and of the head."""
    max_length: int
    """Longest sequence (prompt + response) the checkpoint was trained for, in tokens."""
    norm_eps: float
    rope_theta: float
    rope_float32: bool = True
    """Rotate q and k in float32 and cast back (LLaDA); otherwise in the compute type."""
    rope_fraction: float = 1.0
    """Share of a head's dimensions, the first ones, that are rotated."""
    experts: Experts | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    """RMSNorm of every query and key head before RoPE; one weight of head_dim for all query heads and one for all keys."""
    mlp_bias: bool = False
    head_bias: bool = False
    tied_head: bool = False
    norm: NormKind = "rms"
    mlp_kind: MlpKind = "swiglu"
    block: int = 0
    """Rows of a block, where a row sees its own block and those before it; 0 where every row sees all."""
    block_anchor: Literal["prompt", "response"] = "prompt"
    """Which one a block begins with: blocks are counted from the first token on, or from the first mask both ways."""
    conditioning: int = 0
    """Width of what the time conditions norms and gates by in every step; 0 where a model does not see the time."""
    uniform_noise: bool = False
    """Whether noise turns a token into any other one, so that the vocabulary has no mask; else into the mask."""
    latent: int = 0
    """Width of the vectors that a continuous model denoises in place of tokens; 0 for a model of tokens."""
    embedding_scale: float = 1.0
    logits_scale: float = 1.0
    shift: bool = False
    """The logits of a row are those of the next token, as in a model made from an autoregressive one; else of its own."""
    indicator_rank: int = 0
    """Width of the change indicator that an export prepared for `layer_indicated`; 0 for a bundle without."""

    @property
    def query_width(self) -> int:
        """H * head_dim."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """G * head_dim, the width of a cached key or value row."""
        return self.kv_heads * self.head_dim

    @property
    def rotary_width(self) -> int:
        """Dimensions of a head that are rotated."""
        return int(self.head_dim * self.rope_fraction)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return self.experts is not None and layer >= self.experts.dense_layers

    @property
    def weight_count(self) -> int:
        """Parameters in layers, embedding and head, without biases."""
        matrices = 3 if self.mlp_kind == "swiglu" else 2
        attention = 2 * self.query_width + 2 * self.key_width + 2
        widths = self.layers * (attention + matrices * self.mlp)
        if self.experts is not None:
            mixture = self.experts.count * (3 * self.experts.mlp + 1) + 3 * self.experts.shared
            widths += (self.layers - self.experts.dense_layers) * (mixture - matrices * self.mlp)
        entering = self.latent or self.hidden
        return self.hidden * (widths + 1) + self.vocab * (entering + (0 if self.tied_head else self.hidden))
