"""Blocks and commit counts. Sources: the published sampling loops of LLaDA (arXiv 2502.09992) and Dream (2508.15487)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dllm_export.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Blocks of `block_length` rows, decoded left to right in `steps_per_block` steps each."""

    gen_length: int
    block_length: int
    steps_per_block: int

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.gen_length // self.block_length

    @property
    def steps(self) -> int:
        """Forward passes over all blocks."""
        return self.blocks * self.steps_per_block


def make_schedule(gen_length: int, block_length: int, steps: int) -> Schedule:
    """A checked schedule; the errors state the rule that was broken."""
    if gen_length % block_length:
        raise UsageError(
            f"--gen-length {gen_length} is not divisible by --block-length {block_length}; blocks must fill the response: "
            f"use a block length among {divisors(gen_length)}"
        )
    blocks = gen_length // block_length
    if steps % blocks:
        raise UsageError(
            f"--steps {steps} is not divisible by the {blocks} blocks; every block gets the same number: use a multiple of "
            f"{blocks}"
        )
    return Schedule(gen_length=gen_length, block_length=block_length, steps_per_block=steps // blocks)


def divisors(number: int) -> str:
    """The divisors of a number, as the text of an error message."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def commit_counts(masks: NDArray[np.int64], steps: int) -> NDArray[np.int64]:
    """Masks per sequence [B] -> tokens to commit per step [B, steps]: split evenly, the remainder to the first steps."""
    base, remainder = np.divmod(masks, steps)
    return base[:, None] + (np.arange(steps)[None, :] < remainder[:, None])


def reveal_share(step: int, steps: int, eps: float) -> np.float32:
    """The share of its masks that a step reveals: 1 - t_step / t_(step - 1), with times that fall evenly from 1 to eps.

    In float32, as published: where a share of the masks is nearly a whole number, the rounding decides. So times are counted
    from the nearer end, as torch.linspace does.
    """
    first, last = np.float32(1.0), np.float32(eps)
    fall = (last - first) / np.float32(steps)
    before, after = (
        first + fall * np.float32(place) if 2 * place < steps + 1 else last - fall * np.float32(steps - place)
        for place in (step - 1, step)
    )
    share: np.float32 = 1.0 - after / before
    return share
