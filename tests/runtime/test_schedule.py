"""Blocks and commit counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_export.errors import UsageError
from dllm_export.runtime.schedule import commit_counts, make_schedule

MASKS = st.lists(st.integers(0, 300), min_size=1, max_size=4)
STEPS = st.integers(1, 64)


@given(MASKS, STEPS)
def test_commit_counts_add_up_to_the_masks(masks: list[int], steps: int) -> None:
    counts = commit_counts(np.array(masks), steps)
    assert counts.shape == (len(masks), steps)
    assert counts.sum(1).tolist() == masks
    assert counts.min() >= 0


@given(MASKS, STEPS)
def test_commit_counts_differ_by_one_at_most_and_never_rise(masks: list[int], steps: int) -> None:
    counts = commit_counts(np.array(masks), steps)
    assert (np.diff(counts, axis=1) <= 0).all()
    assert (counts[:, 0] - counts[:, -1] <= 1).all()


@pytest.mark.parametrize(
    ("masks", "steps", "counts"),
    [(8, 8, [1] * 8), (8, 3, [3, 3, 2]), (5, 2, [3, 2]), (2, 4, [1, 1, 0, 0]), (0, 2, [0, 0]), (7, 1, [7])],
)
def test_the_remainder_goes_to_the_first_steps(masks: int, steps: int, counts: list[int]) -> None:
    assert commit_counts(np.array([masks]), steps).tolist() == [counts]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_a_schedule_cuts_the_response_into_equal_blocks(blocks: int, block_length: int, steps_per_block: int) -> None:
    schedule = make_schedule(blocks * block_length, block_length, blocks * steps_per_block)
    assert (schedule.blocks, schedule.steps_per_block) == (blocks, steps_per_block)
    assert schedule.steps == blocks * steps_per_block


def test_a_block_length_that_does_not_divide_is_refused_with_those_that_do() -> None:
    with pytest.raises(UsageError, match="--gen-length 12 is not divisible by --block-length 5") as refused:
        make_schedule(12, 5, 12)
    assert "1, 2, 3, 4, 6, 12" in str(refused.value)


def test_steps_that_do_not_fit_the_blocks_are_refused() -> None:
    with pytest.raises(UsageError, match="--steps 7 is not divisible by the 3 blocks"):
        make_schedule(12, 4, 7)
