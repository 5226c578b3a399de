"""PyTorch readings of `Ops`: eager, the reference that every engine is compared with, and one to compile.

Imported on demand only.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dllm_export.graphs.rotary import rotate_halves
from dllm_export.graphs.shape import Experts

WIDE_ROW = 4096
"""Longest axis that `top` sorts whole."""
GROUP = 64
"""Neighbours of which a compiled `top` looks at the largest first."""


class TorchOps:
    """Computes a graph eagerly; differentiable, so the training script runs the very graphs that are exported."""

    def scope(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def add(self, left: Tensor, right: Tensor) -> Tensor:
        return left + right

    def sub(self, left: Tensor, right: Tensor) -> Tensor:
        return left - right

    def mul(self, left: Tensor, right: Tensor) -> Tensor:
        return left * right

    def div(self, left: Tensor, right: Tensor) -> Tensor:
        return left / right

    def scale(self, x: Tensor, factor: float) -> Tensor:
        return x * factor

    def rsqrt(self, x: Tensor, eps: float) -> Tensor:
        return torch.rsqrt(x + eps)

    def silu(self, x: Tensor) -> Tensor:
        return torch.nn.functional.silu(x)

    def gelu(self, x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(x, approximate="tanh")

    def sigmoid(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def relu(self, x: Tensor) -> Tensor:
        return torch.relu(x)

    def exp(self, x: Tensor) -> Tensor:
        return torch.exp(x)

    def log(self, x: Tensor) -> Tensor:
        return torch.log(x)

    def floor(self, x: Tensor) -> Tensor:
        return torch.floor(x)

    def where(self, condition: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
        return torch.where(condition, chosen, other)

    def both(self, left: Tensor, right: Tensor) -> Tensor:
        return left & right

    def exceeds(self, left: Tensor, right: Tensor) -> Tensor:
        return left > right

    def matches(self, left: Tensor, right: Tensor) -> Tensor:
        return left == right

    def differs(self, left: Tensor, right: Tensor) -> Tensor:
        return left != right

    def at_most(self, left: Tensor, right: Tensor) -> Tensor:
        return left <= right

    def fill(self, like: Tensor, value: float) -> Tensor:
        return torch.full((), value, dtype=like.dtype, device=like.device)

    def widen(self, x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x.to(torch.float32)

    def narrow(self, x: Tensor, like: Tensor) -> Tensor:
        return x.to(like.dtype)

    def mean(self, x: Tensor) -> Tensor:
        return x.mean(-1, keepdim=True)

    def sum(self, x: Tensor, *, keep: bool) -> Tensor:
        return x.sum(-1, keepdim=keep)

    def max(self, x: Tensor, *, keep: bool) -> Tensor:
        return x.amax(-1, keepdim=keep)

    def softmax(self, x: Tensor) -> Tensor:
        return torch.softmax(x, dim=-1)

    def any_last(self, x: Tensor) -> Tensor:
        return x.any(-1)

    def max_pool(self, x: Tensor, width: int) -> Tensor:
        return torch.nn.functional.max_pool1d(x.unsqueeze(1), width, stride=1, padding=width // 2).squeeze(1)

    def top(self, x: Tensor, count: Tensor | int) -> tuple[Tensor, Tensor]:
        # torch.topk promises nothing about ties; ONNX TopK takes the lowest position first. A stable sort does too, but
        # sorting a vocabulary takes longer than the model, so wide rows are cut down before they are sorted.
        size = int(count)
        if x.shape[-1] <= WIDE_ROW:
            values, places = torch.sort(x, dim=-1, descending=True, stable=True)
            return values[..., :size], places[..., :size].to(torch.int32)
        places = self._find_top(x, size)
        values, order = torch.sort(x.gather(-1, places), dim=-1, descending=True, stable=True)
        return values, places.gather(-1, order).to(torch.int32)

    def _find_top(self, x: Tensor, size: int) -> Tensor:  # [..., V] -> [..., size] int64
        """Where the largest numbers of wide rows are, from left to right."""
        return torch.topk(x, size, dim=-1).indices.sort(dim=-1).values

    def count_rows(self, x: Tensor) -> Tensor:
        return torch.tensor([x.shape[0] * x.shape[1]])

    def smaller(self, left: Tensor, right: Tensor | int) -> Tensor:
        return torch.minimum(left, torch.as_tensor(right))

    def times(self, count: Tensor, factor: Tensor | int) -> Tensor:
        return count * factor

    def divide(self, count: Tensor, by: int) -> Tensor:
        return count // by

    def at_least(self, count: Tensor, least: int) -> Tensor:
        return count.clamp(min=least)

    def count_up(self, count: Tensor | int, beside: Tensor) -> Tensor:
        return torch.arange(int(count), dtype=torch.int32, device=beside.device)

    def matmul(self, x: Tensor, weight: Tensor, *, apart: bool = False) -> Tensor:
        return x @ weight

    def matmul_transposed(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weight)

    def split(self, x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        return torch.split(x, list(sizes), dim=-1)

    def piece(self, x: Tensor, start: int, stop: int) -> Tensor:
        return x[..., start:stop]

    def concat(self, pieces: tuple[Tensor, ...]) -> Tensor:
        return torch.cat(pieces, dim=-1)

    def join_rows(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.cat((first, second), dim=1)

    def take_turns(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, 0::2], x[:, 1::2]

    def split_heads(self, x: Tensor, heads: int, width: int) -> Tensor:
        return x.view(*x.shape[:-1], heads, width)

    def merge_heads(self, x: Tensor) -> Tensor:
        return x.flatten(-2)

    def unsqueeze(self, x: Tensor, axis: int) -> Tensor:
        return x.unsqueeze(axis)

    def column(self, x: Tensor, index: int) -> Tensor:
        return x[..., index]

    def swap_last(self, x: Tensor) -> Tensor:
        return x.transpose(-1, -2)

    def columns(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).T

    def positions(self, x: Tensor, axis: int = 1) -> Tensor:
        return torch.arange(x.shape[axis], dtype=torch.int32, device=x.device)

    def take_last(self, x: Tensor, index: Tensor) -> Tensor:
        return x.gather(-1, index.long())

    def take_rows(self, rows: Tensor, index: Tensor) -> Tensor:
        sequence = torch.arange(rows.shape[0], device=rows.device).unsqueeze(1)
        return rows[sequence, index.long()]

    def take_flat(self, rows: Tensor, index: Tensor) -> Tensor:
        return rows.flatten(0, 1)[index.long()]

    def lookup(self, table: Tensor, index: Tensor) -> Tensor:
        return torch.nn.functional.embedding(index.long(), table) if table.dim() == 2 else table[index.long()]

    def put_rows(
        self, rows: Tensor, index: Tensor, slot: Tensor, fresh: Tensor, cache: Tensor, *, all_fresh: bool = False
    ) -> Tensor:
        return torch.where(fresh[:, :, None], self.take_rows(rows, slot), cache)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """A mask of None hides no key, for which there are faster kernels."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        visible = mask if mask is None else mask[:, None] if mask.dim() == 3 else mask[:, None, None]
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=visible,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return mixed.transpose(1, 2)

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, widths: tuple[int, ...]) -> Tensor:
        return rotate_halves(self, x, cos, sin, widths)

    def experts(
        self, experts: Experts, x: Tensor, chosen: Tensor, share: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        rows, chosen, share = x.flatten(0, 1), chosen.flatten(0, 1), share.flatten(0, 1)
        total = torch.zeros(rows.shape, dtype=share.dtype, device=x.device)
        for expert in torch.unique(chosen).tolist():
            row, choice = torch.nonzero(chosen == expert, as_tuple=True)
            both = rows[row] @ gate_up[expert].T
            result = (torch.nn.functional.silu(both[:, 0::2]) * both[:, 1::2]) @ down[expert].T
            total.index_add_(0, row, share[row, choice, None] * result.to(share.dtype))
        return total.to(x.dtype).view_as(x)


class CompiledTorchOps(TorchOps):
    """Forms that PyTorch's compiler makes faster kernels of. Same results, but for the order in which floats are summed."""

    def put_rows(
        self, rows: Tensor, index: Tensor, slot: Tensor, fresh: Tensor, cache: Tensor, *, all_fresh: bool = False
    ) -> Tensor:
        # Where a cache is written in place, the compiler moves the new rows and nothing else.
        sequence = torch.arange(cache.shape[0], device=cache.device)[:, None]
        places = (sequence, index.long())
        known = fresh[places].unsqueeze(2)
        return torch.index_put(cache, places, torch.where(known, rows, cache[places]))

    def _find_top(self, x: Tensor, size: int) -> Tensor:
        # The largest `size` numbers lie in the `size` groups with the largest maxima. Maxima are one pass over the row that
        # joins other passes, and nothing needs the row's logits in memory; a sort of the row goes over it ten times.
        groups = -(-x.shape[-1] // GROUP)
        padded = torch.nn.functional.pad(x, (0, groups * GROUP - x.shape[-1]), value=-torch.inf)
        best = padded.view(*x.shape[:-1], groups, GROUP).amax(-1)
        chosen = torch.topk(best, min(size, groups), dim=-1).indices.sort(dim=-1).values
        places = (chosen.unsqueeze(-1) * GROUP + torch.arange(GROUP, device=x.device)).flatten(-2)
        within = torch.topk(padded.gather(-1, places), size, dim=-1).indices.sort(dim=-1).values
        return places.gather(-1, within)
