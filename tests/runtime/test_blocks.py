"""Models that attend by blocks: where blocks lie, what a step runs, and what is refused.

That the tokens are those of the published loops is shown in tests/exporter/test_transformers.py and test_time_families.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_export.errors import UsageError
from dllm_export.runtime.blocks import fill_blocks, number_blocks
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import (
    POLICIES,
    BlockCache,
    CachePolicy,
    DualCache,
    NoCache,
    SharedPrefix,
    SparseCache,
    StepPlan,
    StepState,
)
from dllm_export.runtime.policies.contract import suits
from dllm_export.runtime.session import SessionOptions
from dllm_export.runtime.sessions.torch import TorchSession
from dllm_export.runtime.transfers import Dynamic, Quota, SubBlocks, Threshold, TokenEditing, Transfer, Wino
from dllm_export.tools import cli

BLOCK, MASK, EOS = 4, 96, 95
PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 6, 5], [7, 3, 2, 1, 8, 8, 1, 2, 9, 4, 6]]
OPTIONS = GenerationOptions(gen_length=13)


@pytest.fixture(scope="module")
def lm(tiny_bundles: dict[str, Bundle]) -> Iterator[DiffusionLM]:
    """In float64, with blocks of four rows."""
    bundle = tiny_bundles["blocks"]
    assert bundle.manifest.shape.block == BLOCK
    with DiffusionLM(
        bundle, TorchSession(bundle, SessionOptions(provider="torch", threads=1), dtype="float64")
    ) as model:
        yield model


def run(
    lm: DiffusionLM, policy: CachePolicy, rule: Transfer, options: GenerationOptions = OPTIONS
) -> list[tuple[int, ...]]:
    return [result.tokens for result in lm.run(lm.continuation(PROMPTS, options), options, policy, rule)]


@dataclass(frozen=True)
class Recorded:
    """Another policy whose plans are kept."""

    base: CachePolicy
    plans: list[tuple[StepState, StepPlan]] = field(default_factory=list)
    name: ClassVar[str] = "recorded"

    def plan(self, state: StepState) -> StepPlan:
        plan = self.base.plan(state)
        self.plans.append((state, plan))
        return plan


# -- where blocks lie
@given(prompt=st.integers(1, 60), length=st.integers(1, 60), block=st.integers(1, 16))
def test_blocks_are_counted_from_the_first_token_and_hold_all_that_is_asked_for(
    prompt: int, length: int, block: int
) -> None:
    full, rows = fill_blocks(prompt, length, block)
    assert full % block == rows % block == 0
    assert prompt - block < full <= prompt
    assert prompt + length <= full + rows < prompt + length + block


@given(prompt=st.integers(1, 60), length=st.integers(1, 60), block=st.integers(1, 16))
def test_blocks_that_are_counted_from_the_response_begin_with_it(prompt: int, length: int, block: int) -> None:
    full, rows = fill_blocks(prompt, length, block, "response")
    assert full % block == rows % block == 0
    assert prompt <= full < prompt + block
    assert length <= rows < length + block


def test_padding_comes_after_every_block() -> None:
    visible = np.arange(12) >= np.array([[0], [4]])
    assert number_blocks(visible, 4).tolist() == [[0] * 4 + [1] * 4 + [2] * 4, [12] * 4 + [1] * 4 + [2] * 4]


def test_sequences_of_a_batch_have_their_blocks_in_the_same_columns(lm: DiffusionLM) -> None:
    request = lm.continuation(PROMPTS, OPTIONS)
    assert request.padding.tolist() == [4, 8, 0]
    assert (request.shape.prompt_rows, request.shape.response_rows, request.wanted) == (8, 16, 13)
    for canvas, padding, prompt in zip(request.canvas, request.padding.tolist(), PROMPTS, strict=True):
        assert canvas[padding : padding + len(prompt)].tolist() == prompt
        assert (canvas[padding + len(prompt) :] == MASK).all()


def test_the_tokens_that_were_asked_for_come_back_and_no_more(lm: DiffusionLM) -> None:
    for length in (1, 4, 13):
        options = GenerationOptions(gen_length=length)
        results = lm.run(lm.continuation(PROMPTS, options), options, BlockCache())
        assert [(len(one.tokens), len(one.confidence)) for one in results] == [(length, length)] * 3
        assert all(MASK not in one.tokens for one in results)


# -- what a step runs
def test_a_step_runs_its_block_and_the_first_one_the_block_before_as_well(lm: DiffusionLM) -> None:
    policy = Recorded(BlockCache())
    run(lm, policy, Quota())
    rows = []
    for _, plan in policy.plans:
        assert plan.rows is not None
        assert len(set(plan.rows.positions)) == 1
        rows.append((plan.rows.positions[0][0], plan.rows.positions[0][-1] + 1))
    assert rows == [
        (0, 12),
        (8, 12),  # the prompts have two rows of this block, or three
        (8, 16),
        *[(12, 16)] * 3,
        (12, 20),
        *[(16, 20)] * 3,
        (16, 24),
        *[(20, 24)] * 3,
    ]


def test_a_pass_that_missed_blocks_runs_all_that_changed_since() -> None:
    before = np.zeros((1, 16), np.bool_)
    before[0, 1:] = True
    masked = before.copy()
    masked[0, :12] = False
    state = replace(
        StepState.first(layers=2, prompt_rows=8, response_rows=16),
        step=5, block=(20, 24), masked=masked, masked_before=before,
    )  # fmt: skip
    plan = BlockCache().plan(state)
    assert plan.rows is not None
    assert plan.rows.positions == (tuple(range(8, 24)),)


@pytest.mark.parametrize(
    "rule",
    [
        Quota(),
        Dynamic(threshold=0.03),
        Threshold(threshold=0.03),
        TokenEditing(threshold=0.03, editing_threshold=0.03, max_post_steps=1),
    ],
    ids=lambda rule: rule.name,
)
@pytest.mark.parametrize(
    "changes",
    [{}, {"block_length": 2}, {"block_length": 8, "steps": 6}, {"cfg_scale": 1.0}, {"temperature": 1.0, "seed": 3},
     {"early_stop": True}],
    ids=str,
)  # fmt: skip
def test_blocks_that_are_kept_give_the_tokens_of_no_cache(
    changes: dict[str, Any], rule: Transfer, lm: DiffusionLM
) -> None:
    if "steps" in changes and not rule.keeps_schedule:
        pytest.skip("the rule has no steps to give")
    options = replace(OPTIONS, **changes)
    expected = run(lm, NoCache(), rule, options)
    assert len({token for tokens in expected for token in tokens}) > 3
    assert run(lm, BlockCache(), rule, options) == expected
    assert run(lm, DualCache(), rule, options) == expected


def test_a_cache_of_rows_that_are_not_run_again_would_be_seen(lm: DiffusionLM) -> None:
    """A finished block whose last tokens were never run: what the exactness above would catch."""

    @dataclass(frozen=True)
    class Forgetful(BlockCache):
        def plan(self, state: StepState) -> StepPlan:
            return BlockCache().plan(state if state.step == 1 else replace(state, masked_before=state.masked))

    options = replace(OPTIONS, gen_length=29)
    assert run(lm, Forgetful(), Quota(), options) != run(lm, NoCache(), Quota(), options)


def test_dynamic_ends_a_block_with_its_last_mask_and_keeps_to_its_steps(lm: DiffusionLM) -> None:
    options = replace(OPTIONS, steps=8)
    for threshold, least, most in ((0.0, 4, 4), (1.0, 5, 8)):
        frames = list(lm.stream(lm.continuation(PROMPTS, options), options, BlockCache(), Dynamic(threshold=threshold)))
        assert least <= len(frames) <= most
        assert not (frames[-1].tokens == MASK).any()


def test_a_part_of_a_block_runs_alone_where_the_rule_looks_at_no_other(lm: DiffusionLM) -> None:
    policy, rule = Recorded(BlockCache(sub_block_cache=4)), SubBlocks(threshold=1.0, sub_block=4)
    options = replace(OPTIONS, gen_length=8, block_length=8)
    (result,) = lm.run(lm.continuation([PROMPTS[0]], options), options, policy, rule)
    spans = [(plan.rows.positions[0][0], plan.rows.positions[0][-1] + 1) for _, plan in policy.plans if plan.rows]
    assert spans[:2] == [(0, 8), (4, 8)], "the prompt has the first part, and a row of the next is decided first"
    assert spans[2:4] == [(0, 16), (8, 16)], "the first row is decided, and the rest has not seen it"
    assert (spans[4], spans.count((8, 12)) + spans.count((12, 16)) > 3) == ((8, 12), True)
    assert (result.passes, MASK in result.tokens) == (2 + 8, False)


def test_parts_that_no_rule_asks_for_change_nothing(lm: DiffusionLM) -> None:
    for rule in (Quota(), Threshold(threshold=0.03)):
        assert run(lm, BlockCache(sub_block_cache=2), rule) == run(lm, BlockCache(), rule)
    with pytest.raises(UsageError, match="--sub-block-cache is -1, expected at least 0"):
        BlockCache(sub_block_cache=-1)


# -- what is refused
@pytest.mark.parametrize("policy", [SparseCache(), SharedPrefix()], ids=lambda policy: policy.name)
def test_a_policy_that_counts_on_full_attention_is_refused(policy: CachePolicy, lm: DiffusionLM) -> None:
    with pytest.raises(UsageError, match=f"--policy {policy.name} counts on .* take --policy block"):
        run(lm, policy, Quota())


def test_every_other_policy_runs(lm: DiffusionLM) -> None:
    for name, policy in POLICIES.items():
        if suits(policy, by_blocks=True) and name not in ("spa", "dkv-greedy"):
            assert all(MASK not in tokens for tokens in run(lm, policy(), Quota())), name


def test_a_model_whose_rows_see_all_refuses_the_policy(tiny_bundle: Bundle) -> None:
    session = TorchSession(tiny_bundle, SessionOptions(provider="torch", threads=1), dtype="float64")
    with (
        DiffusionLM(tiny_bundle, session) as lm,
        pytest.raises(UsageError, match=r"--policy block is for models that attend by blocks.* take --policy dual"),
    ):
        run(lm, BlockCache(), Quota())
    with pytest.raises(UsageError, match="--base is block"):
        SharedPrefix(base=BlockCache())


def test_rules_with_a_shadow_and_infilling_are_refused(lm: DiffusionLM) -> None:
    with pytest.raises(UsageError, match="--transfer wino needs shadow rows"):
        run(lm, NoCache(), Wino())
    with pytest.raises(UsageError, match=r"attends by blocks.* continue a prompt instead"):
        lm.infilling([[1, MASK, 2]], GenerationOptions())


def test_steps_that_do_not_fit_the_blocks_are_refused(lm: DiffusionLM) -> None:
    with pytest.raises(UsageError, match="--steps 6 is not divisible by the 4 blocks"):
        lm.continuation(PROMPTS, replace(OPTIONS, steps=6))


def test_inspect_says_how_such_a_model_attends(lm: DiffusionLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", str(lm.bundle.path)]) == 0
    assert "by blocks of 4 rows" in capsys.readouterr().out
