"""The checkpoint's own answer on a fixed input, recorded at export and compared by `verify`.

A plain float32 forward pass straight from the checkpoint's tensors, written without the graphs, the fused weights or the
exporter's layout. Whatever the export gets wrong later (a swapped tensor, a transposed matrix, a damaged weight) shows as
a difference from these activations, and shows in which layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import embedding, gelu, layer_norm, linear, scaled_dot_product_attention, silu

from dllm_export.exporter.folding import time_table
from dllm_export.exporter.pack import save_tensors
from dllm_export.graphs.families import MLP_SLOTS, SHARED_SLOTS, ModelConfig
from dllm_export.graphs.latents import LEVEL_WIDTH
from dllm_export.runtime.rope import rotary_tables

FILE = "probe.safetensors"
ROWS = 8
TOP = 8
HEAD_PIECE = 512
PROBE_SIGMA = 0.5
"""Noise level of the probe, for models that see one."""

PROBE_GAMMA = 0.5
"""The same of a continuous model, which counts noise by gamma = log(sigma^2 / alpha^2)."""

LoadExpert = Callable[[str, int], torch.Tensor]
"""(gate, up or down; number of the expert) -> its tensor, [out, in]."""


class Probe:
    """Runs alongside the conversion, one layer at a time."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, config.shape.vocab, ROWS)
        if config.tokens.mask < config.shape.vocab:
            tokens[ROWS // 2 :] = config.tokens.mask
        self._tokens = torch.from_numpy(tokens)
        blocks = torch.arange(ROWS) // (config.shape.block or ROWS)
        self._visible = blocks[None, :] <= blocks[:, None]
        self._conditioning: torch.Tensor | None = None
        self._sigma = 0.0
        self._states: list[torch.Tensor] = []
        self._results: dict[str, torch.Tensor] = {}
        self._latent: dict[str, torch.Tensor] = {}  # what a continuous model starts from
        self.latents = torch.empty(0)
        """Vectors [V, w] that stand for tokens, of a continuous model."""

    def embed(self, table: torch.Tensor) -> None:
        """Start from the embedding rows."""
        self._states = [embedding(self._tokens, table).float() * self._config.shape.embedding_scale]

    def enter(self, raw: Mapping[str, torch.Tensor]) -> None:
        """Start from vectors, an estimate of the clean ones and a noise level, by the matrices they enter through."""
        width = self._config.shape.latent
        numbers = np.random.default_rng(1).standard_normal((2, ROWS, width))
        vectors, estimate = torch.from_numpy(numbers).float()
        alpha, sigma = torch.sigmoid(torch.tensor([-PROBE_GAMMA, PROBE_GAMMA]).double()).sqrt().tolist()
        frequency = torch.linspace(-5, 5, LEVEL_WIDTH // 2, dtype=torch.float64).exp() * PROBE_GAMMA
        level = torch.cat((frequency.sin(), frequency.cos())).float()
        scale, pull = (alpha**2 / width + sigma**2) ** -0.5, alpha / sigma**2
        entered = vectors * scale @ raw["latent_in"].float().T + estimate * width**0.5 @ raw["estimate_in"].float().T
        self._states = [entered + level @ raw["level_in"].float().T]
        scalars = {"latent_scale": torch.tensor([scale]), "pull": torch.tensor([pull])}
        self._latent = {"latent": vectors, "estimate": estimate, "level": level, **scalars}

    def condition(self, conditioning: torch.Tensor | None, sigma: float) -> None:
        """What the norms are modulated by, where they are, and the noise level that it came from."""
        self._conditioning = conditioning if conditioning is None else conditioning.float()
        self._sigma = sigma

    def run_layer(self, raw: dict[str, torch.Tensor], load_expert: LoadExpert) -> None:
        """One layer from its tensors by canonical slot, [out, in] as stored; experts are loaded as rows go to them."""
        shape, x = self._config.shape, self._states[-1]
        weights = {slot: tensor.float() for slot, tensor in raw.items()}
        shift1, scale1, gate1, shift2, scale2, gate2 = self._modulation(weights, "modulation", 6)
        inner = self._norm(x, weights["norm1"]) * (1 + scale1) + shift1
        if "qkv" in weights:
            weights |= dict(zip("qkv", weights["qkv"].chunk(3), strict=True))
        heads = {}
        for slot, count in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
            projected = inner @ weights[slot].T + weights.get(f"{slot}_bias", torch.zeros(()))
            heads[slot] = projected.view(ROWS, count, shape.head_dim).transpose(0, 1)
            if f"{slot}_norm" in weights:
                heads[slot] = self._norm(heads[slot], weights[f"{slot}_norm"])
        query, key = self._rotate(heads["q"]), self._rotate(heads["k"])
        repeat = shape.heads // shape.kv_heads
        key, value = (tensor.repeat_interleave(repeat, 0) for tensor in (key, heads["v"]))
        mixed = scaled_dot_product_attention(query, key, value, self._visible).transpose(0, 1).reshape(ROWS, -1)
        branch = self._config.branch_scale
        x = x + branch * gate1 * (mixed @ weights["out"].T)
        inner = self._norm(x, weights["norm2"]) * (1 + scale2) + shift2
        result = self._mix(inner, weights, load_expert) if "router" in weights else self._mlp(inner, weights)
        self._states.append(x + branch * gate2 * result)

    def _mix(self, rows: torch.Tensor, weights: dict[str, torch.Tensor], load_expert: LoadExpert) -> torch.Tensor:
        """Row by row through the experts that the router chooses, and through the shared one."""
        experts, results = self._config.shape.experts, []
        assert experts is not None
        for row in rows:
            logits = weights["router"] @ row
            scores = logits.softmax(0) if experts.router == "softmax" else logits.sigmoid()
            groups = (scores + weights.get("router_bias", torch.zeros(()))).view(experts.groups, -1)
            if experts.groups > 1:
                worst = groups.topk(2).values.sum(1).argsort(descending=True, stable=True)[experts.groups_kept :]
                groups[worst] = -torch.inf
            chosen = groups.flatten().argsort(descending=True, stable=True)[: experts.per_token]
            shares = scores[chosen] / (scores[chosen].sum() if experts.renormalise else 1) * experts.scale
            outputs = [
                run_swiglu(row, *(load_expert(slot, expert).float() for slot in MLP_SLOTS))
                for expert in chosen.tolist()
            ]
            results.append(shares @ torch.stack(outputs))
        shared = run_swiglu(rows, *(weights[slot] for slot in SHARED_SLOTS)) if "shared_gate" in weights else 0.0
        return torch.stack(results) + shared

    def finish(self, raw: dict[str, torch.Tensor]) -> None:
        """The most likely tokens of every row, from the tensors of the last norm and the head by slot."""
        head = raw["head"]
        shift, scale = self._modulation(raw, "norm_modulation", 2)
        kind = "layer" if self._latent else self._config.shape.norm
        rows = self._norm(self._states[-1], raw["norm"].float(), kind) * (1 + scale) + shift
        rows = rows * self._config.head_scale
        logits = torch.empty(ROWS, len(head))
        # Piece by piece through one buffer: a whole head in float32 would be the largest thing in memory.
        buffer = torch.empty(HEAD_PIECE, head.shape[1])
        for start in range(0, len(head), HEAD_PIECE):
            piece = head[start : start + HEAD_PIECE]
            logits[:, start : start + len(piece)] = rows @ buffer[: len(piece)].copy_(piece).T
        if "head_bias" in raw:
            logits += raw["head_bias"].float()
        logits = logits * self._config.shape.logits_scale + self._config.logit_offset
        if self._latent:
            latents = self.latents.float()
            logits += self._latent["pull"] * self._latent["latent"] @ latents.T
            self._results["estimate_out"] = logits.softmax(-1) @ latents
        top = torch.topk(logits, min(TOP, logits.shape[-1]), dim=-1)
        self._results |= {"top_tokens": top.indices.int(), "top_logits": top.values}

    def save(self, root: Path) -> str:
        """Write the activations; returns the file's name in the bundle."""
        states = torch.stack(self._states)
        time = {"time": time_table(self._sigma).float()} if self._config.shape.conditioning else {}
        save_tensors(
            {"tokens": self._tokens.int(), "hidden": states, **time, **self._latent, **self._results}, root / FILE
        )
        return FILE

    def _modulation(self, raw: dict[str, torch.Tensor], slot: str, count: int) -> tuple[torch.Tensor, ...]:
        """Shift, scale and gate of each branch; without modulation what changes nothing."""
        if self._conditioning is None:
            return tuple(torch.tensor(number) for number in (0.0, 0.0, 1.0, 0.0, 0.0, 1.0)[:count])
        return linear(self._conditioning, raw[slot].float(), raw[f"{slot}_bias"].float()).chunk(count)

    def _mlp(self, x: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        up = linear(x, weights["up"], weights.get("up_bias"))
        gated = self._config.shape.mlp_kind == "swiglu"
        inner = silu(x @ weights["gate"].T) * up if gated else gelu(up, approximate="tanh")
        return linear(inner, weights["down"], weights.get("down_bias"))

    def _norm(self, x: torch.Tensor, weight: torch.Tensor, kind: str = "") -> torch.Tensor:
        if (kind or self._config.shape.norm) == "layer":
            return layer_norm(x, x.shape[-1:], weight, eps=self._config.shape.norm_eps)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self._config.shape.norm_eps) * weight

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:  # [heads, rows, d]
        cos, sin = (torch.from_numpy(t[0]).float() for t in rotary_tables(self._config.shape, np.arange(ROWS)[None]))
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        x, still = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        low, high = x.chunk(2, dim=-1)
        return torch.cat((x * cos + torch.cat((-high, low), -1) * sin, still), -1)


def run_swiglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """down(silu(gate x) * up x), weights [out, in]."""
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T
