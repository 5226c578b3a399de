"""The map from a layer's normed input to its change indicator (SPA-Cache, arXiv 2602.02544): the value projection, narrowed.

With the value projection W = U S V^T, values of an input u are u U S V^T. V^T turns vectors without changing the angle
between two of them, so that u U S drifts by the same cosine as the value; its first columns carry the most of it.
"""

from __future__ import annotations

import torch

EXACT_WIDTH = 512
"""Widest matrix that is decomposed whole: 0.6 s. At 1024 it takes 3 s, at 2048 23 s a layer (2 cores), and at the 4096 of an
8B model the 32 layers would take hours; the randomised method finds the first directions there in seconds."""
OVERSAMPLING = 32
"""Directions that the randomised method looks for beyond the wanted ones, which are the better for it."""
ITERATIONS = 4
"""Enough for singular values that hardly fall: then the picked quarter of 256 rows is the exact one's but for two, where 2
leave three apart, and is as near to what whole values pick (tests/exporter/test_proxy.py)."""
SEED = 0


def make_proxy(value: torch.Tensor, rank: int) -> torch.Tensor:
    """value [G*d, D] as a checkpoint stores it -> [D, rank]: its first input directions times their singular values."""
    if min(value.shape) <= EXACT_WIDTH or rank + OVERSAMPLING > min(value.shape):
        _, sizes, directions = torch.linalg.svd(value.double(), full_matrices=False)
        directions = directions.T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            wide = value.float()
            _, sizes, directions = torch.svd_lowrank(wide, q=rank + OVERSAMPLING, niter=ITERATIONS)
    proxy: torch.Tensor = (directions[:, :rank] * sizes[:rank]).float()
    return proxy
