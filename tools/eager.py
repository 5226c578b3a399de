"""LLaDA, and its relatives in the layout of Hugging Face, in plain PyTorch: test oracle and benchmark baseline.

Written from the published modelling code (arXiv 2502.09992) over the checkpoint's own tensors. It shares nothing with the
graphs, the exporter or the runtime, so that agreement with them means something.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import embedding, linear, scaled_dot_product_attention, silu

PREFIX = "model.transformer."
RENAMED = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
    "model.embed_tokens": "wte",
    "model.norm": "ln_f",
    "lm_head": "ff_out",
}
"""Names in the layout of Hugging Face -> LLaDA's, which this file uses."""


@dataclass(frozen=True, slots=True)
class Context:
    """What stays fixed during a request of B sequences with T rows."""

    cos: Tensor  # [B, T, head_dim], each half the same
    sin: Tensor
    visible: Tensor | None  # [B, 1, 1, T] bool, or None where nothing is padded

    def at(self, places: Tensor) -> Context:  # [B, Q]
        """The same with the rotary rows of these places only."""
        index = places.unsqueeze(2).expand(-1, -1, self.cos.shape[2])
        return Context(self.cos.gather(1, index), self.sin.gather(1, index), self.visible)


@dataclass(frozen=True, slots=True)
class EagerModel:
    """A loaded checkpoint. Weights have LLaDA's names and stay [out, in]."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    theta: float
    mask_token: int
    eos_token: int
    top: Mapping[str, Tensor]
    layers: tuple[Mapping[str, Tensor], ...]
    rope_float32: bool = True
    """Rotate in float32 at least, as LLaDA does; the others rotate in the type of their weights."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.top["wte.weight"].device

    def forward(self, tokens: Tensor, context: Context) -> Tensor:  # [B, T] -> [B, T, V]
        """Logits of every row, nothing cached."""
        x = self.embed(tokens)
        for layer in self.layers:
            inner = self.norm(x, layer["attn_norm.weight"])
            query, key, value = (self.project(layer, name, inner) for name in ("q_proj", "k_proj", "v_proj"))
            x = x + self.attend(layer, query, key, value, context, context)
            x = x + self.mlp(layer, x)
        return self.classify(x)

    def context(self, padding: Sequence[int], length: int) -> Context:
        """Rotary tables and visible keys of sequences that are padded on the left by `padding` rows.

        The published cache code attends to padded rows and counts their positions. Here they are hidden and uncounted, as
        in LLaDA's own attention-mask path, so that a sequence gets the same answer in every batch.
        """
        column, start = np.arange(length), np.asarray(padding)[:, None]
        position = np.maximum(column - start, 0).astype(np.float32)
        # numpy and not torch: their float32 powers differ in the last bit, and the runtime computes on the host.
        step = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        frequency = np.float32(1) / np.float32(self.theta) ** step
        angle = torch.from_numpy(position[:, :, None] * frequency).double()
        angle = torch.cat((angle, angle), dim=-1)
        visible = torch.from_numpy(column >= start)[:, None, None, :] if any(padding) else None
        dtype = self.top["wte.weight"].dtype
        dtype = torch.float32 if self.rope_float32 and dtype != torch.float64 else dtype
        cos, sin = (table.to(self.device, dtype) for table in (angle.cos(), angle.sin()))
        return Context(cos, sin, visible if visible is None else visible.to(self.device))

    def embed(self, tokens: Tensor) -> Tensor:
        """Embedding rows."""
        return embedding(tokens, self.top["wte.weight"])

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm with statistics in float32 at least."""
        wide = x if x.dtype == torch.float64 else x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    def project(self, layer: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
        """A linear map of a layer with its bias, if it has one."""
        return linear(x, layer[f"{name}.weight"], layer.get(f"{name}.bias"))

    def attend(
        self, layer: Mapping[str, Tensor], query: Tensor, key: Tensor, value: Tensor, at: Context, context: Context
    ) -> Tensor:  # query [B, Q, H*d]; key and value [B, T, G*d], not rotated -> [B, Q, D]
        """Attention output after its projection; `at` holds the rotary rows of the queries."""
        query, key = self._split(query, self.heads), self._split(key, self.kv_heads)
        if "q_norm.weight" in layer:
            query, key = self.norm(query, layer["q_norm.weight"]), self.norm(key, layer["k_norm.weight"])
        query, key = rotate(query, at), rotate(key, context)
        value = self._split(value, self.kv_heads)
        if self.heads != self.kv_heads:
            key, value = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (key, value))
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=context.visible)
        return self.project(layer, "attn_out", mixed.transpose(1, 2).flatten(2))

    def mlp(self, layer: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """SwiGLU of the rows after their norm."""
        inner = self.norm(x, layer["ff_norm.weight"])
        gate, up = self.project(layer, "ff_proj", inner), self.project(layer, "up_proj", inner)
        return self.project(layer, "ff_out", silu(gate) * up)

    def classify(self, x: Tensor) -> Tensor:  # [..., D] -> [..., V]
        """Logits of rows that left the last layer."""
        head = self.top["ff_out.weight"] if "ff_out.weight" in self.top else self.top["wte.weight"]
        return linear(self.norm(x, self.top["ln_f.weight"]), head)

    def _split(self, x: Tensor, heads: int) -> Tensor:  # [B, N, heads * d] -> [B, heads, N, d]
        return x.view(*x.shape[:2], heads, self.head_dim).transpose(1, 2)


def rotate(x: Tensor, context: Context) -> Tensor:  # [B, heads, N, d]
    """Rotary embedding in the type of the tables: dimension j turns with j + d/2."""
    wide = x.to(context.cos.dtype)
    low, high = wide.chunk(2, dim=-1)
    turned = wide * context.cos.unsqueeze(1) + torch.cat((-high, low), dim=-1) * context.sin.unsqueeze(1)
    return turned.to(x.dtype)


def load_eager(directory: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> EagerModel:
    """The model of a checkpoint directory with one model.safetensors file."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    stored = load_file(directory / "model.safetensors", device=device)
    layers: list[dict[str, Tensor]] = []
    top = {}
    for name in sorted(stored):
        place, layer = rename(name)
        if layer is None:
            top[place] = stored[name].to(dtype)
        else:
            layers += [{} for _ in range(layer + 1 - len(layers))]
            layers[layer][place] = stored[name].to(dtype)
    if config.get("tie_word_embeddings"):
        top.pop("ff_out.weight", None)
    published = "n_heads" in config
    heads = config["n_heads" if published else "num_attention_heads"]
    return EagerModel(
        heads=heads,
        kv_heads=config["n_kv_heads" if published else "num_key_value_heads"],
        head_dim=config["d_model"] // heads if published else config["head_dim"],
        eps=config["rms_norm_eps"],
        theta=config["rope_theta"],
        mask_token=config["mask_token_id"],
        eos_token=config["eos_token_id"],
        top=top,
        layers=tuple(layers),
        rope_float32=published,
    )


def rename(name: str) -> tuple[str, int | None]:
    """(LLaDA's name of a tensor without its prefix, its layer or None) from a published name."""
    start, *rest = name.removeprefix(PREFIX).removeprefix("model.layers.").removeprefix("blocks.").split(".", 1)
    layer = int(start) if start.isdecimal() else None
    short = rest[0] if layer is not None else name.removeprefix(PREFIX)
    module, _, kind = short.rpartition(".")
    return f"{RENAMED.get(module, module)}.{kind}", layer
