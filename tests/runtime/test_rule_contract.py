"""What a decoding rule may do: memory, masking again, and the check that names a rule which does more."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest

from dllm_export.errors import StrategyError, UsageError
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import CachePolicy, DllmCache, DualCache, NoCache
from dllm_export.runtime.transfers import Choice, Factor, Quota, Threshold, Transfer, TransferState
from dllm_export.runtime.transfers.contract import find_fault
from dllm_export.tools.eager import EagerModel

OpenModel = Callable[[str], DiffusionLM]
MASK = 96
PROMPTS = [[3, 14, 15, 92, 6], [5, 35, 89, 79]]
STATE = TransferState(
    quota=2,
    block=(8, 16),
    block_step=3,
    block_masks=8,
    rows=np.array([9, 12, 13, 15]),
    ranking=np.array([0.4, 0.1, 0.3, 0.2]),
    confidence=np.array([0.4, 0.1, 0.3, 0.2]),
    second=np.array([0.1, 0.1, 0.1, 0.1]),
    entropy=np.ones(4),
    decided=np.array([8, 10, 11, 14]),
    decided_confidence=np.array([0.3, 0.9, 0.5, 0.2]),
    rival=np.array([np.nan, 0.7, np.nan, 0.1]),
)


@dataclass(frozen=True)
class Given(Transfer):
    """Returns what it was made with."""

    choice: Any
    name: ClassVar[str] = "given"

    def choose(self, state: TransferState) -> Choice:
        return self.choice


class Scheduled(Given):
    keeps_schedule = True


class Remasking(Given):
    remasks = True


class Editing(Given):
    edits = True


class RemaskingEditing(Given):
    remasks, edits = True, True


class ScheduledEditing(Given):
    keeps_schedule, edits = True, True


class Narrowing(Given):
    narrows = True

    def narrow(self, rows: np.ndarray, block: tuple[int, int], block_step: int) -> np.ndarray:
        return np.array(self.choice, np.int64)


class Headless(Given):
    head = "heads"  # type: ignore[assignment]


class ScheduledRemasking(Given):
    keeps_schedule, remasks = True, True


def pick(*commit: int, remask: tuple[int, ...] = ()) -> Choice:
    return Choice(np.array(commit, np.int64), np.array(remask, np.int64))


def edit(*rows: int, **others: Any) -> Choice:
    return replace(pick(0), edit=np.array(rows, np.int64), **others)


@pytest.mark.parametrize(
    ("rule", "fault"),
    [
        (Given(pick(0)), None),
        (Given(pick(3, 1)), None),
        (Given(np.array([0])), "returned a ndarray, expected a Choice"),
        (Given(Choice([0])), "its commits are .0., expected an array of indices into the candidates"),  # type: ignore[arg-type]
        (Given(Choice(np.array([0.0]))), "expected an array of indices"),
        (Given(Choice(np.array([True]))), "expected an array of indices"),
        (Given(pick()), "commits 0 rows, expected at least 1 of 4"),
        (Given(pick(1, 4)), "its commits reach from 1 to 4, expected indices into the 4 candidates"),
        (Given(pick(-1)), "its commits reach from -1 to -1"),
        (Given(pick(2, 0, 2)), r"its commits name a row twice: \[2, 0, 2\]"),
        (Scheduled(pick(0)), "commits 1 rows, expected at least 2 of 4"),
        (Scheduled(pick(0, 1)), None),
        (Given(pick(0, 1, remask=(0,))), "masks decided rows again, which takes 'remasks = True'"),
        (ScheduledRemasking(pick(0, 1, remask=(0,))), "and no schedule"),
        (Remasking(pick(0, 1, remask=(0, 2))), "leaves 4 rows masked, expected at most 5"),
        (Remasking(pick(0, 1, remask=(4,))), "its remasks reach from 4 to 4, expected indices into the 4 decided rows"),
        (Remasking(pick(0, remask=(1, 1))), "its remasks name a row twice"),
        (Editing(edit(1, 3, goes_on=True)), None),
        (Editing(edit(4)), "its edits reach from 4 to 4, expected indices into the 4 decided rows"),
        (Editing(edit(0)), "it replaces a token that is the likeliest one of its row"),
        (
            Given(edit(1)),
            "replaces decided tokens or goes on without masks, which takes 'edits = True' and no schedule",
        ),
        (Given(edit(goes_on=True)), "which takes 'edits = True'"),
        (ScheduledEditing(replace(pick(0, 1), goes_on=True)), "and no schedule"),
        (RemaskingEditing(edit(1, remask=np.array([1]))), "it replaces a token in a row that it masks again"),
    ],
)
def test_a_choice_is_checked_against_its_state(rule: Transfer, fault: str | None) -> None:
    found = find_fault(rule, rule.choose(STATE), STATE)
    if "leaves" in (fault or ""):
        assert found is None, "four masks left, and five may be"
        found = find_fault(rule, rule.choose(STATE), replace(STATE, block_step=5))
        fault = "leaves 4 rows masked, expected at most 3"
    assert (found is None) == (fault is None)
    assert re.search(fault or "", found or "")


def test_a_block_that_would_never_end_is_a_fault() -> None:
    review = replace(STATE, rows=STATE.rows[:0], block_step=8)
    on = Choice(np.zeros(0, np.int64), edit=np.array([1]), goes_on=True)
    assert find_fault(Editing(on), on, replace(review, block_step=7)) is None
    fault = find_fault(Editing(on), on, review)
    assert fault == "it goes on after 8 steps, expected to end after 8: its masks and 'extra_steps'"


class Failing(Transfer):
    name = "failing"

    def choose(self, state: TransferState) -> Choice:
        raise KeyError(state.block_step)


class Writing(Transfer):
    """Not pure: it changes what it was given."""

    name = "writing"

    def choose(self, state: TransferState) -> Choice:
        state.confidence[0] = 1.0
        return pick(0)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            Failing(),
            r"the decoding rule 'failing' failed in step 1 of a block with KeyError: 1; use another --transfer",
        ),
        (Writing(), "the decoding rule 'writing' failed .* read-only"),
        (Headless(pick(0)), "the decoding rule 'given' asks for the head 'heads', expected one of: head, head_tracked"),
        (Narrowing([]), "made a wrong choice in step 1 of a block: it narrows the 8 masked rows of a block to none"),
        (Narrowing([9]), "its candidates reach from 9 to 9, expected indices into the 8 masked rows"),
        (Given(pick(99)), "the decoding rule 'given' made a wrong choice in step 1 of a block: its commits reach"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_loop_names_a_rule_that_breaks_its_contract(rule: Transfer, message: str, open_model: OpenModel) -> None:
    lm, options = open_model("onnxruntime"), GenerationOptions(gen_length=8)
    with pytest.raises(StrategyError, match=message):
        lm.run(lm.continuation(PROMPTS, options), options, NoCache(), rule)


@pytest.mark.parametrize(
    ("keywords", "rule", "message"),
    [
        ({"steps": 6}, Threshold(), "--steps has no effect with --transfer threshold"),
        ({"remasking": "margin"}, Factor(), "--remasking margin has no effect with --transfer factor"),
        ({"early_stop": True}, Remasking(pick(0)), "--early-stop does not go with --transfer given"),
    ],
)
def test_an_option_that_a_rule_ignores_or_breaks_is_refused(
    keywords: dict[str, Any], rule: Transfer, message: str, open_model: OpenModel
) -> None:
    lm, options = open_model("onnxruntime"), GenerationOptions(gen_length=12, **keywords)
    with pytest.raises(UsageError, match=message):
        lm.run(lm.continuation(PROMPTS, options), options, NoCache(), rule)


# -- a rule that masks again, with a memory
@dataclass(frozen=True)
class Doubting(Transfer):
    """Commit the two surest rows and mask the least sure decided one again, in every second choice of a block."""

    name: ClassVar[str] = "doubting"
    remasks: ClassVar[bool] = True

    def choose(self, state: TransferState) -> Choice:
        choices = 0 if state.block_step == 1 else state.memory
        commit = np.argsort(-state.confidence, kind="stable")[:2]
        remask = np.argsort(state.decided_confidence, kind="stable")[: choices % 2]
        if len(commit) == 1:
            remask = remask[:0]
        return Choice(commit, remask, choices + 1)


def doubt(model: EagerModel, prompt: list[int], length: int, block: int) -> tuple[list[int], int]:
    """The same, every logit of every row, nothing cached: (response, rows masked again)."""
    canvas = torch_canvas(prompt, length)
    context, again = model.context([0], canvas.shape[1]), 0
    for start in range(len(prompt), canvas.shape[1], block):
        sure: dict[int, float] = {}
        step = 0
        while len(sure) < block:
            step += 1
            logits = model.forward(canvas, context)[0]
            logits[:, MASK] = -np.inf
            best, tokens = logits.softmax(-1).max(-1)
            open_rows = [row for row in range(start, start + block) if row not in sure]
            commit = sorted(open_rows, key=lambda row: (-float(best[row]), row))[:2]
            if step % 2 == 0 and len(commit) == 2:
                least = min(sure, key=lambda row: (sure[row], row))
                canvas[0, least] = MASK
                del sure[least]
                again += 1
            for row in commit:
                canvas[0, row], sure[row] = tokens[row], float(best[row])
    return canvas[0, len(prompt) :].tolist(), again


def torch_canvas(prompt: list[int], length: int) -> Any:
    import torch

    return torch.tensor([[*prompt, *[MASK] * length]])


@pytest.mark.parametrize("block", [8, 24])
def test_a_rule_may_mask_again_and_remember(
    block: int, open_model: OpenModel, tiny_eager: dict[str, EagerModel]
) -> None:
    lm, options = open_model("float64"), GenerationOptions(gen_length=24, block_length=block)
    found = lm.run(lm.continuation(PROMPTS, options), options, NoCache(), Doubting())
    expected = [doubt(tiny_eager["plain"], prompt, 24, block) for prompt in PROMPTS]
    assert all(again for _, again in expected), "nothing was masked again, so that this test cannot see it"
    assert [list(result.tokens) for result in found] == [tokens for tokens, _ in expected]


@pytest.mark.parametrize("policy", [NoCache(), DllmCache(prompt_interval=5, response_interval=3), DualCache()], ids=str)
def test_rows_that_were_masked_again_end_decided_under_every_policy(policy: CachePolicy, open_model: OpenModel) -> None:
    lm, options = open_model("onnxruntime"), GenerationOptions(gen_length=24, block_length=12)
    frames = list(lm.stream(lm.continuation(PROMPTS, options), options, policy, Doubting()))
    before, again = np.full((2, 24), MASK), 0
    for frame in frames:
        changed = (frame.tokens != before) & ~frame.committed
        assert (frame.tokens[changed] == MASK).all()
        assert np.array_equal(np.isnan(frame.confidence), frame.tokens == MASK)
        again, before = again + int(changed.sum()), frame.tokens
    assert again > 0
    assert (before != MASK).all()
    assert len(frames) <= frames[-1].steps


def test_infilling_never_masks_given_text(open_model: OpenModel) -> None:
    lm = open_model("onnxruntime")
    text = [MASK if place % 3 else place for place in range(3, 24)]
    frames = list(lm.stream(lm.infilling([text], GenerationOptions()), policy=NoCache(), transfer=Doubting()))
    given = np.array(text[1:]) != MASK
    assert all((frame.tokens[0, given] == np.array(text[1:])[given]).all() for frame in frames)
    assert (frames[-1].tokens != MASK).all()


def test_quota_commits_what_is_left_where_an_early_stop_took_the_rest() -> None:
    assert Quota().choose(replace(STATE, quota=99)).commit.tolist() == [0, 2, 3, 1]
