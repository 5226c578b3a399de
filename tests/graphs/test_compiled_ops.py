"""The forms that PyTorch compiles against the eager ones, run eagerly: same numbers, not nearly the same."""

from __future__ import annotations

import pytest
import torch

from dllm_export.graphs.torch_ops import GROUP, WIDE_ROW, CompiledTorchOps, TorchOps

EAGER, COMPILED = TorchOps(), CompiledTorchOps()


def draw(*dims: int, seed: int = 0, values: int = 0) -> torch.Tensor:
    """Random numbers, or as many different ones as `values` says."""
    generator = torch.Generator().manual_seed(seed)
    if values:
        return torch.randint(values, dims, generator=generator).float()
    return torch.randn(*dims, generator=generator)


@pytest.mark.parametrize("width", [WIDE_ROW + 1, WIDE_ROW + GROUP, 70 * GROUP - 1, 126_464])
@pytest.mark.parametrize("count", [1, 2, 64])
def test_the_largest_of_a_wide_row(width: int, count: int) -> None:
    x = draw(1, 3, width, seed=width)
    x[0, 1, -1] = 100.0  # the last one, in a group that may not be full
    x[0, 2, : 2 * GROUP] = torch.arange(2 * GROUP) + 10.0  # all in two groups
    for found, wanted in zip(COMPILED.top(x, count), EAGER.top(x, count), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("seed", range(5))
def test_equal_numbers_are_all_found_and_the_first_comes_first(seed: int) -> None:
    x = draw(1, 4, 5000, seed=seed, values=400)
    values, places = COMPILED.top(x, 64)
    assert torch.equal(values, EAGER.top(x, 64)[0])
    assert torch.equal(x.gather(-1, places.long()), values)
    assert all(len(set(row)) == 64 for row in places[0].tolist())
    tied = values[..., 1:] == values[..., :-1]
    assert bool((places[..., 1:] > places[..., :-1])[tied].all())
    most = x.amax(-1, keepdim=True)
    assert torch.equal(places[..., 0].long(), (x == most).to(torch.int32).argmax(-1))


def test_banned_tokens_are_found_last_of_all() -> None:
    x = torch.full((1, 1, WIDE_ROW + 4), -1e30)
    x[0, 0, -3:] = torch.tensor([1.0, 3.0, 2.0])
    values, places = COMPILED.top(x, 64)
    assert places[0, 0, :3].tolist() == [WIDE_ROW + 2, WIDE_ROW + 3, WIDE_ROW + 1]
    assert bool((values[0, 0, 3:] == -1e30).all())
    assert int(places.max()) < x.shape[-1]


def test_rows_are_put_where_they_belong_and_stale_ones_are_not() -> None:
    rows, cache = draw(2, 4, 8, seed=1), draw(2, 9, 8, seed=2)
    index = torch.tensor([[5, 2, 7, 7], [0, 8, 3, 1]])
    rows[0, 3] = rows[0, 2]  # a place that is named twice is named for equal rows
    slot, fresh = torch.zeros(2, 9, dtype=torch.int32), torch.zeros(2, 9, dtype=torch.bool)
    for sequence in range(2):
        slot[sequence, index[sequence]] = torch.arange(4, dtype=torch.int32)
        fresh[sequence, index[sequence]] = True
    fresh[1, 3] = False
    slot[0, 7] = 2
    index = index.to(torch.int32)
    wanted = EAGER.put_rows(rows, index, slot, fresh, cache)
    assert torch.equal(COMPILED.put_rows(rows, index, slot, fresh, cache), wanted)
    assert torch.equal(wanted[1, 3], cache[1, 3])
    assert not torch.equal(wanted[1, 1], cache[1, 1])
