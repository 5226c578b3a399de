"""dLLM-Cache as published (arXiv 2506.06295): four features per layer and segment. Test oracle and benchmark baseline.

Prompt and response rows each keep their key before RoPE, value, attention output and MLP output. Every step joins the
segments again, rotates all keys, adds the features of all rows, and runs the head on all rows, as the released code does.
One concession, so that exact comparisons are possible: drift below UNCHANGED counts as none, and ties go to the leftmost
row (the released code leaves them to topk).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dllm_export.runtime.policies import DllmCache
from dllm_export.tools.eager import Context, EagerModel

UNCHANGED = 1e-6


@dataclass(slots=True)
class Features:
    """The cached features of one segment of one layer."""

    key: Tensor  # [B, n, G*d], before RoPE
    value: Tensor  # [B, n, G*d]
    attention: Tensor  # [B, n, D], after the output projection
    mlp: Tensor  # [B, n, D], after the down projection


class FourFeatureCache:
    """One request. Of `settings` only the numbers are read; the schedule is written here once more."""

    def __init__(self, model: EagerModel, context: Context, prompt_rows: int, settings: DllmCache) -> None:
        self.model, self.context, self.settings = model, context, settings
        self.split = prompt_rows
        self.prompt: dict[int, Features] = {}
        self.response: dict[int, Features] = {}

    def forward(self, tokens: Tensor, step: int) -> Tensor:  # [B, T] -> [B, T, V]
        """Logits of every row in a step, 1-based and counted over the whole request."""
        x = self.model.embed(tokens)
        for layer in range(len(self.model.layers)):
            first = layer == 0 and self.settings.first_layer_rule
            refresh_prompt = first or (step - 1) % self.settings.prompt_interval == 0
            refresh_response = first or (step - 1) % self.settings.response_interval == 0
            if refresh_prompt and refresh_response:
                x = self._refresh_all(layer, x)
            elif refresh_response:
                x = self._refresh_response(layer, x)
            else:
                x = self._update(layer, x, refresh_prompt=refresh_prompt)
        return self.model.classify(x)

    # -- the cases of a layer; each returns the rows that leave it
    def _refresh_all(self, layer: int, x: Tensor) -> Tensor:
        model, weights, split = self.model, self.model.layers[layer], self.split
        inner = model.norm(x, weights["attn_norm.weight"])
        query, key, value = (model.project(weights, name, inner) for name in ("q_proj", "k_proj", "v_proj"))
        attention = model.attend(weights, query, key, value, self.context, self.context)
        x = x + attention
        mlp = model.mlp(weights, x)
        self.prompt[layer] = Features(*(part[:, :split] for part in (key, value, attention, mlp)))
        self.response[layer] = Features(*(part[:, split:] for part in (key, value, attention, mlp)))
        return x + mlp

    def _refresh_response(self, layer: int, x: Tensor) -> Tensor:
        model, weights, prompt = self.model, self.model.layers[layer], self.prompt[layer]
        inner = model.norm(x[:, self.split :], weights["attn_norm.weight"])
        query, key, value = (model.project(weights, name, inner) for name in ("q_proj", "k_proj", "v_proj"))
        places = torch.arange(inner.shape[1], device=x.device).expand(len(inner), -1)
        keys, values = torch.cat((prompt.key, key), dim=1), torch.cat((prompt.value, value), dim=1)
        attention = model.attend(weights, query, keys, values, self.context.at(self._place(places)), self.context)
        x = x + torch.cat((prompt.attention, attention), dim=1)
        mlp = model.mlp(weights, x[:, self.split :])
        self.response[layer] = Features(key, value, attention, mlp)
        return x + torch.cat((prompt.mlp, mlp), dim=1)

    def _update(self, layer: int, x: Tensor, *, refresh_prompt: bool) -> Tensor:
        """Recompute the response rows whose value drifted most, and with `refresh_prompt` all prompt rows."""
        model, weights, split = self.model, self.model.layers[layer], self.split
        prompt, response = self.prompt[layer], self.response[layer]
        if not refresh_prompt and self.settings.update_ratio == 0:
            x = x + torch.cat((prompt.attention, response.attention), dim=1)
            return x + torch.cat((prompt.mlp, response.mlp), dim=1)
        fresh = split if refresh_prompt else 0
        first, rest = (model.norm(rows, weights["attn_norm.weight"]) for rows in (x[:, :fresh], x[:, split:]))
        if refresh_prompt:
            prompt.key, prompt.value = (model.project(weights, name, first) for name in ("k_proj", "v_proj"))
        chosen = self._verify(layer, rest)
        picked = take(rest, chosen)
        put(response.key, chosen, model.project(weights, "k_proj", picked))

        query = model.project(weights, "q_proj", torch.cat((first, picked), dim=1))
        places = torch.cat((torch.arange(fresh, device=x.device).expand(len(x), -1), self._place(chosen)), dim=1)
        keys = torch.cat((prompt.key, response.key), dim=1)
        values = torch.cat((prompt.value, response.value), dim=1)
        attention = model.attend(weights, query, keys, values, self.context.at(places), self.context)
        put(response.attention, chosen, attention[:, fresh:])
        prompt.attention = attention[:, :fresh] if refresh_prompt else prompt.attention
        x = x + torch.cat((prompt.attention, response.attention), dim=1)

        mlp = model.mlp(weights, torch.cat((x[:, :fresh], take(x[:, split:], chosen)), dim=1))
        put(response.mlp, chosen, mlp[:, fresh:])
        prompt.mlp = mlp[:, :fresh] if refresh_prompt else prompt.mlp
        return x + torch.cat((prompt.mlp, response.mlp), dim=1)

    # -- V-verify
    def _verify(self, layer: int, inner: Tensor) -> Tensor:  # [B, R, D] -> [B, k]
        """Response rows to recompute; the values of all response rows are overwritten on the way."""
        count = int(inner.shape[1] * self.settings.update_ratio)
        if self.settings.update_ratio == 0:
            return torch.empty((len(inner), 0), dtype=torch.int64, device=inner.device)
        value = self.model.project(self.model.layers[layer], "v_proj", inner)
        chosen = most_drifted(value, self.response[layer].value, count)
        self._store_values(layer, value)
        return chosen

    def _store_values(self, layer: int, value: Tensor) -> None:
        self.response[layer].value = value

    def _place(self, rows: Tensor) -> Tensor:
        """Places in the sequence of response rows."""
        return self.split + rows


def most_drifted(new: Tensor, old: Tensor, count: int) -> Tensor:  # [B, R, G*d] twice -> [B, count]
    """The rows with the smallest cosine to their former self, over all heads at once."""
    drift = (1 - cosine_similarity(new, old, dim=-1, eps=1e-8) - UNCHANGED).clamp(min=0)
    return drift.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def take(rows: Tensor, index: Tensor) -> Tensor:  # [B, N, W], [B, Q] -> [B, Q, W]
    """Rows of each sequence."""
    return rows.gather(1, index.unsqueeze(2).expand(-1, -1, rows.shape[2]))


def put(target: Tensor, index: Tensor, rows: Tensor) -> None:
    """Write rows of each sequence in place."""
    target.scatter_(1, index.unsqueeze(2).expand(-1, -1, rows.shape[2]), rows)
