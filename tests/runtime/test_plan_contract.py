"""What a policy's plan must keep to: every fault is named, stops the generation, and leaves the model usable."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest

from dllm_export.errors import StrategyError
from dllm_export.runtime.generate import Frame
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import (
    POLICIES,
    Compaction,
    LayerPlan,
    NoCache,
    PrefixState,
    Rows,
    StepPlan,
    StepState,
)
from dllm_export.runtime.policies.contract import find_fault

OpenModel = Callable[[str], DiffusionLM]

FIRST = StepState.first(layers=3, prompt_rows=4, response_rows=6, batch=2)
KEEPS = Compaction(Rows.span(4, 8, 2), (3, 6))
STATE = replace(FIRST, step=2, block_step=2, block=(4, 8), padding=(2, 0), compacted=KEEPS)
FULL = StepPlan.refresh(STATE)
SOME = StepPlan.recompute(STATE, Rows.span(4, 8, 2))


def run_all(graph: Any, plan: StepPlan) -> StepPlan:
    return replace(plan, layers=(plan.layers[0], LayerPlan(graph), plan.layers[2]))


def compacting(rows: Rows, *kept: int) -> StepPlan:
    return replace(FULL, compaction=Compaction(rows, kept))


PREFIX = PrefixState(rows=3, starts=(0, 1), depth=2, stored=True)
SHARING = replace(STATE, prefix=PREFIX)
SPLIT = StepPlan.split(SHARING, PREFIX, keep_delta=True)
PREFIX_FAULTS: dict[str, tuple[StepPlan, StepState, str]] = {
    "none to store": (replace(FULL, share=2), STATE, "it stores a prefix at layer 2, and the request shares none"),
    "none to join": (SPLIT, STATE, "it joins a prefix at layer 2, and the request shares none"),
    "store deeper": (replace(FULL, share=3), SHARING, "it stores a prefix at layer 3, expected 2"),
    "join earlier": (replace(SPLIT, join=1), SHARING, "it joins a prefix at layer 1, expected 2"),
    "depth 0": (
        replace(FULL, share=0),
        replace(SHARING, prefix=replace(PREFIX, depth=0)),
        "it stores a prefix at layer 0",
    ),
    "not computed": (replace(SPLIT, share=2), SHARING, "it stores the prefix, which takes layer_full in every layer"),
    "not stored": (
        SPLIT,
        replace(SHARING, prefix=replace(PREFIX, stored=False)),
        "it joins a prefix that is not stored",
    ),
    "other rows": (
        replace(SPLIT, rows=Rows.span(3, 10, 2)),
        SHARING,
        "it joins the prefix to rows that are not exactly",
    ),
    "no rows": (
        replace(SPLIT, rows=None, alive="sequence"),
        SHARING,
        "it joins the prefix to rows that are not exactly",
    ),
    "graph below": (run_all("layer_full", SPLIT), SHARING, "layer 1 runs layer_full, but chosen rows can only run"),
    "graph above": (
        replace(SPLIT, layers=(LayerPlan("layer_partial"),) * 3),
        SHARING,
        "layer 2 runs layer_partial, expected layer_full from the layer on where the prefix joins",
    ),
    "delta": (
        replace(SOME, keep_delta=True),
        STATE,
        "position 8 of sequence 0 keeps its delta in this step, but is not",
    ),
}


@pytest.mark.parametrize("name", PREFIX_FAULTS)
def test_every_fault_about_a_prefix_is_named(name: str) -> None:
    plan, state, sentence = PREFIX_FAULTS[name]
    assert (find_fault(plan, state) or "").startswith(sentence)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_plans_that_store_and_join_a_prefix_have_no_fault(depth: int) -> None:
    prefix = replace(PREFIX, depth=depth)
    state = replace(STATE, prefix=prefix)
    assert find_fault(replace(FULL, share=depth), state) is None
    assert find_fault(StepPlan.split(state, prefix, keep_delta=True), state) is None
    assert find_fault(StepPlan.recompute(state, Rows.outside(prefix, state.length)), state) is None


def adaptive(budget: int, alive: Any = "response", forced: Rows | None = None) -> StepPlan:
    return replace(FULL, alive=alive, layers=(LayerPlan("layer_adaptive", budget),) * 3, forced=forced)


FAULTS: dict[str, tuple[Any, str]] = {
    "nothing": (None, "it is a NoneType, expected a StepPlan"),
    "too few layers": (replace(FULL, layers=FULL.layers[:2]), "it has 2 layers, expected 3"),
    "no such graph": (run_all("layer_half", FULL), "layer 1 runs 'layer_half', expected one of: layer_full, layer_par"),
    "no such rows": (replace(FULL, alive="all"), "its alive rows are 'all', expected one of: sequence, response, rows"),
    "rows missing": (replace(SOME, rows=None), "its alive rows are 'rows', and rows are missing"),
    "rows given": (replace(FULL, rows=SOME.rows), "its alive rows are 'sequence', and rows are given"),
    "rows of one": (replace(SOME, rows=Rows.span(4, 8, 1)), "its rows are for 1 sequences, expected 2"),
    "ragged": (
        replace(SOME, rows=Rows(((4, 5, 6, 7), (4, 5, 6)))),
        "its rows number [3, 4] in the sequences of the ba",
    ),
    "no rows": (replace(SOME, rows=Rows.span(4, 4, 2)), "its rows number [0] in the sequences of the batch, expected"),
    "before": (replace(SOME, rows=Rows.span(-1, 8, 2)), "its rows reach from -1 to 7, expected positions from 0 to 9"),
    "behind": (replace(SOME, rows=Rows.span(4, 11, 2)), "its rows reach from 4 to 10, expected positions from 0 to 9"),
    "forced far": (adaptive(3, forced=Rows.span(9, 11, 2)), "its forced rows reach from 9 to 10, expected positions"),
    "full rows": (run_all("layer_full", SOME), "layer 1 runs layer_full, but chosen rows can only run layer_partial"),
    "candidates": (
        replace(SOME, rows=Rows(((4, 5, 6, 7), (7, 6, 4, 4)))),
        "position 5 of sequence 1 may be decided in",
    ),
    "compacted for": (compacting(Rows.span(4, 11, 2), 1, 1), "its rows to compact for reach from 4 to 10, expected po"),
    "twice": (compacting(Rows(((4, 5), (4, 4))), 1, 1), "its rows to compact for are not each once and by rising pos"),
    "not in order": (compacting(Rows(((4, 5), (6, 5))), 1, 1), "its rows to compact for are not each once and by ris"),
    "padding kept": (compacting(KEEPS.rows, 5, 6), "it keeps [5, 6] rows of the sequences, expected from 0 to [4, 6]"),
    "keeps less": (compacting(KEEPS.rows, 0, -1), "it keeps [0, -1] rows of the sequences, expected from 0 to [4, 6]"),
    "kept of one": (compacting(KEEPS.rows, 3), "it keeps [3] rows of the sequences, expected from 0 to [4, 6]"),
    "part compacted": (
        replace(adaptive(1), compaction=KEEPS),
        "it compacts a cache, which takes layer_full in every la",
    ),
    "other rows": (
        replace(SOME, compaction=KEEPS, rows=Rows.span(3, 8, 2)),
        "it runs against a compacted cache of oth",
    ),
    "not made": (replace(SOME, compaction=Compaction(KEEPS.rows, (2, 6))), "it runs against a compacted cache of othe"),
    "no budget": (adaptive(0), "layer 0 may pick 0 rows, expected 1 (those that are forced) to 6"),
    "large budget": (adaptive(7), "layer 0 may pick 7 rows, expected 1 (those that are forced) to 6"),
    "less than forced": (adaptive(2, forced=Rows.span(4, 7, 2)), "layer 0 may pick 2 rows, expected 3 (those that are"),
    "tracking a sequence": (
        replace(adaptive(6, "sequence", Rows.span(0, 4, 2)), layers=(LayerPlan("layer_tracking", 6),) * 3),
        "layer 0 runs layer_tracking, which needs the response alive",
    ),
    "inputs not kept": (
        replace(adaptive(3), layers=(LayerPlan("layer_tracking", 3),) * 3),
        "layer 0 runs layer_tracking, but inputs are not kept: its plan needs reference 'input'",
    ),
    "no such reference": (
        replace(FULL, reference="output"),
        "its reference is 'output', expected None or one of: input",
    ),
    "nothing to keep": (
        replace(adaptive(3), layers=(LayerPlan("layer_skip"),) * 3, reference="indicator"),
        "layer 0 runs layer_skip, which keeps no indicator for the next step",
    ),
    "no drift": (replace(FULL, measure_drift=True), "layer 0 runs layer_full, which measures no drift, but its plan"),
    "rows kept": (replace(SOME, reference="input"), "chosen rows keep no reference and measure no drift"),
    "rows measured": (replace(SOME, measure_drift=True), "chosen rows keep no reference and measure no drift"),
    "prompt left out": (
        adaptive(5, "sequence", Rows.span(0, 3, 2)),
        "layer 0 may leave out prompt rows, which have no",
    ),
    "prompt unforced": (adaptive(5, "sequence"), "layer 0 may leave out prompt rows, which have no cached delta: for"),
    "forced, not alive": (
        adaptive(5, "response", Rows.span(3, 5, 2)),
        "it forces rows before position 4, which are not",
    ),
    "full response": (replace(FULL, alive="response"), "layer 0 runs layer_full, which needs all rows of the sequence"),
    "skipped prompt": (run_all("layer_skip", FULL), "layer 1 runs layer_skip, which needs the response alive: only"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_of_a_plan_is_named(name: str) -> None:
    plan, sentence = FAULTS[name]
    assert (find_fault(plan, STATE) or "").startswith(sentence)


@pytest.mark.parametrize(
    "plan",
    [
        FULL,
        SOME,
        replace(FULL, compaction=KEEPS),
        replace(SOME, compaction=KEEPS),
        compacting(Rows(((3, 8), (0, 1))), 0, 0),
        replace(SOME, rows=Rows(((7, 6, 5, 4), (4, 5, 6, 7)))),
        replace(SOME, rows=Rows.span(0, 10, 2)),
        adaptive(1),
        adaptive(5, "sequence", Rows.span(0, 4, 2)),
        run_all("layer_skip", adaptive(6)),
    ],
)
def test_a_plan_that_can_be_run_has_no_fault(plan: StepPlan) -> None:
    assert find_fault(plan, STATE) is None


def test_rows_that_are_decided_or_lie_behind_the_block_may_be_left_out() -> None:
    masked = STATE.masked.copy()
    masked[0, 0] = masked[1, 2:4] = False
    state = replace(STATE, masked=masked)
    assert find_fault(replace(SOME, rows=Rows(((5, 6, 7), (4, 5, 5)))), state) is None
    assert "position 5 of sequence 0" in str(find_fault(replace(SOME, rows=Rows(((4, 6, 7), (4, 5, 5)))), state))


def test_where_it_is_known_what_a_step_decides_these_rows_alone_must_run() -> None:
    upcoming = np.zeros(STATE.masked.shape, np.bool_)
    upcoming[0, 1] = upcoming[1, 2] = True
    state = replace(STATE, upcoming=upcoming)
    assert find_fault(replace(SOME, rows=Rows(((5,), (6,)))), state) is None
    assert "position 6 of sequence 1" in str(find_fault(replace(SOME, rows=Rows(((5,), (5,)))), state))


def test_rows_of_an_earlier_block_that_are_still_masked_may_not_be_left_out() -> None:
    later = replace(STATE, block=(8, 10))
    assert "position 4 of sequence 0" in str(find_fault(StepPlan.recompute(later, Rows.span(8, 10, 2)), later))


def test_the_plans_of_every_policy_have_no_fault_in_a_first_step() -> None:
    for policy in POLICIES.values():
        assert find_fault(policy().plan(FIRST), FIRST) is None


# -- in a generation
@dataclass(frozen=True)
class Broken:
    """Somebody's policy: it works in the first two steps."""

    name: ClassVar[str] = "broken"
    fails: bool = False

    def plan(self, state: StepState) -> StepPlan:
        if state.step < 3:
            return StepPlan.refresh(state, keep_delta=False)
        if self.fails:
            raise ZeroDivisionError("no such thing")
        return StepPlan.recompute(state, Rows.span(0, 1, state.batch))


@pytest.mark.parametrize("provider", ["onnxruntime", "torch"])
@pytest.mark.parametrize(
    ("fails", "sentence"),
    [
        (
            True,
            "the cache policy 'broken' failed in step 3 with ZeroDivisionError: no such thing; use another --policy, or "
            "report it to the policy's author",
        ),
        (False, "the cache policy 'broken' gave a wrong plan for step 3: position "),
    ],
)
def test_a_broken_policy_stops_its_generation_and_no_other(
    fails: bool, sentence: str, provider: str, open_model: OpenModel
) -> None:
    lm, options = open_model(provider), GenerationOptions(gen_length=8)
    request = lm.continuation([[1, 2, 3]], options)
    before = [frame.tokens for frame in lm.stream(request, options)]
    frames: list[Frame] = []
    with pytest.raises(StrategyError, match=re.escape(sentence)) as caught:
        frames.extend(lm.stream(request, options, Broken(fails=fails)))
    assert caught.value.exit_code == 7
    assert isinstance(caught.value.__cause__, ZeroDivisionError) is fails
    assert len(frames) == 2, "the steps before are good, and handed out"
    after = [frame.tokens for frame in lm.stream(request, options, NoCache())]
    np.testing.assert_array_equal(before, after)


def test_a_policy_cannot_change_what_it_is_shown(open_model: OpenModel) -> None:
    @dataclass(frozen=True)
    class Scribbler:
        name: ClassVar[str] = "scribbler"

        def plan(self, state: StepState) -> StepPlan:
            state.masked[:] = False
            return StepPlan.refresh(state)

    lm, options = open_model("onnxruntime"), GenerationOptions(gen_length=4)
    with pytest.raises(StrategyError, match=r"'scribbler' failed in step 1 with ValueError: .*read-only"):
        lm.run(lm.continuation([[1, 2, 3]], options), options, Scribbler())
