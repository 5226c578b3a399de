"""A choice against the state that it was made for: what a decoding rule, perhaps somebody else's, must keep to."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dllm_export.errors import StrategyError
from dllm_export.runtime.transfers.transfer import Choice, Transfer, TransferState


def choose_rows(rule: Transfer, state: TransferState) -> Choice:
    """The rule's choice for this state, checked; StrategyError names the rule that failed and how."""
    for name in state.__dataclass_fields__:
        if isinstance(value := getattr(state, name), np.ndarray):
            value.setflags(write=False)
    try:
        choice = rule.choose(state)
    except Exception as error:
        raise StrategyError(
            f"the decoding rule '{rule.name}' failed in step {state.block_step} of a block with "
            f"{type(error).__name__}: {error}; use another --transfer, or report it to the rule's author"
        ) from error
    fault = find_fault(rule, choice, state)
    if fault:
        raise StrategyError(
            f"the decoding rule '{rule.name}' made a wrong choice in step {state.block_step} of a block: {fault}"
        )
    return choice


def narrow_rows(rule: Transfer, rows: NDArray[np.int64], block: tuple[int, int], block_step: int) -> NDArray[np.int64]:
    """Those of a block's masked rows that a rule wants as candidates, checked."""
    kept = rule.narrow(rows, block, block_step)
    fault = _find_index_fault("candidates", kept, len(rows), "masked rows")
    if not fault and not len(kept):
        fault = f"it narrows the {len(rows)} masked rows of a block to none, expected at least one candidate"
    if fault:
        raise StrategyError(
            f"the decoding rule '{rule.name}' made a wrong choice in step {block_step} of a block: {fault}"
        )
    return rows[kept]


def find_fault(rule: Transfer, choice: Choice, state: TransferState) -> str | None:
    """What is wrong with a choice, or None."""
    if not isinstance(choice, Choice):
        return f"it returned a {type(choice).__name__}, expected a Choice"
    masked, decided = len(state.rows), len(state.decided)
    fault = _find_index_fault("commits", choice.commit, masked, "candidates")
    fault = fault or _find_index_fault("remasks", choice.remask, decided, "decided rows")
    fault = fault or _find_index_fault("edits", choice.edit, decided, "decided rows")
    if fault:
        return fault
    due = min(state.quota if rule.keeps_schedule else 1, masked)
    if len(choice.commit) < due:
        return f"it commits {len(choice.commit)} rows, expected at least {due} of {masked}"
    if len(choice.remask) and (not rule.remasks or rule.keeps_schedule):
        return "it masks decided rows again, which takes 'remasks = True' and no schedule"
    if len(choice.edit) or choice.goes_on:
        fault = _find_edit_fault(rule, choice, state)
        if fault:
            return fault
    left, most = masked - len(choice.commit) + len(choice.remask), state.block_masks - state.block_step
    if len(choice.remask) and left > most:
        return (
            f"it leaves {left} rows masked, expected at most {most}: one fewer than at the block's start for each step"
        )
    return None


def _find_edit_fault(rule: Transfer, choice: Choice, state: TransferState) -> str | None:
    """Tokens that are replaced by a rule that may not, or by themselves, and a block that would never end."""
    if not rule.edits or rule.keeps_schedule:
        return "it replaces decided tokens or goes on without masks, which takes 'edits = True' and no schedule"
    if set(choice.edit.tolist()) & set(choice.remask.tolist()):
        return "it replaces a token in a row that it masks again"
    if len(choice.edit) and (state.rival is None or np.isnan(state.rival[choice.edit]).any()):
        return "it replaces a token that is the likeliest one of its row"
    most = state.block_masks + rule.extra_steps
    if choice.goes_on and len(choice.commit) == len(state.rows) and state.block_step >= most:
        return f"it goes on after {state.block_step} steps, expected to end after {most}: its masks and 'extra_steps'"
    return None


def _find_index_fault(what: str, index: object, count: int, noun: str) -> str | None:
    if not isinstance(index, np.ndarray) or index.ndim != 1 or index.dtype.kind not in "iu":
        return f"its {what} are {index!r}, expected an array of indices into the {noun}"
    places = index.tolist()  # few, and this runs at every step: numpy would take longer
    if places and not (min(places) >= 0 and max(places) < count):
        return f"its {what} reach from {min(places)} to {max(places)}, expected indices into the {count} {noun}"
    if len(set(places)) != len(places):
        return f"its {what} name a row twice: {places}"
    return None
