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
class ModelShape:
    """Sizes and flags of one dense bidirectional transformer; a family maps its config.json to this value."""

    layers: int
    hidden: int
    """D, width of the residual stream."""
    heads: int
    """H, query heads."""
    kv_heads: int
    """G, key/value heads; H must be a multiple."""
    head_dim: int
    mlp: int
    """Inner width of the MLP."""
    vocab: int
    """V, rows of the embedding table and of the head."""
    max_length: int
    """Longest sequence (prompt + response) the checkpoint was trained for, in tokens."""
    norm_eps: float
    rope_theta: float
    rope_float32: bool = True
    """Rotate q and k in float32 and cast back (LLaDA); otherwise in the compute type."""
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
    conditioning: int = 0
    """Width of what the time conditions norms and gates by in every step; 0 where a model does not see the time."""
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
    def weight_count(self) -> int:
        """Parameters in layers, embedding and head, without biases."""
        matrices = 3 if self.mlp_kind == "swiglu" else 2
        layer = self.hidden * (2 * self.query_width + 2 * self.key_width + matrices * self.mlp + 2)
        return self.layers * layer + self.vocab * self.hidden * (1 if self.tied_head else 2) + self.hidden
