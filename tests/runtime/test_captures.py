"""Captured steps: which one makes room, that none is closed twice or left open, and when a program is captured."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_export.runtime.captures import CapturedProgram, Captures, NamedCapture, describe_calls, report_captures
from dllm_export.runtime.session import GraphCall


@dataclass(eq=False, slots=True)
class Step:
    """Counts how often it was closed."""

    closed: int = 0
    replays: int = 0

    def replay(self) -> None:
        self.replays += 1

    def close(self) -> None:
        self.closed += 1


def fill(captures: Captures[Step], *keys: str) -> dict[str, Step]:
    """Steps added under these keys, in this order."""
    steps = {key: Step() for key in keys}
    for key, step in steps.items():
        captures.add(key, step)
    return steps


def keys(captures: Captures[Step]) -> list[object]:
    return [key for key, _ in captures]


def test_the_least_recently_used_makes_room_and_is_closed() -> None:
    captures: Captures[Step] = Captures(2)
    steps = fill(captures, "a", "b")
    assert captures.get("a") is steps["a"]
    steps |= fill(captures, "c")
    assert keys(captures) == ["a", "c"]
    assert {key: step.closed for key, step in steps.items()} == {"a": 0, "b": 1, "c": 0}
    assert captures.get("b") is None
    assert (captures.evicted, len(captures)) == (1, 2)


def test_a_limit_of_zero_keeps_nothing_open() -> None:
    captures: Captures[Step] = Captures(0)
    steps = fill(captures, "a", "b")
    assert not len(captures)
    assert captures.get("a") is None
    assert [step.closed for step in steps.values()] == [1, 1]


def test_a_discarded_step_is_closed_and_no_eviction() -> None:
    captures: Captures[Step] = Captures(2)
    steps = fill(captures, "a", "b")
    captures.discard("a")
    captures.discard("a")
    captures.discard("never there")
    assert (steps["a"].closed, steps["b"].closed, captures.evicted) == (1, 0, 0)
    assert keys(captures) == ["b"]


def test_a_step_under_a_known_key_closes_the_one_before_and_counts_as_used_last() -> None:
    captures: Captures[Step] = Captures(2)
    before = fill(captures, "a", "b")
    after = fill(captures, "a")
    assert (before["a"].closed, after["a"].closed, captures.evicted) == (1, 0, 0)
    assert keys(captures) == ["b", "a"]
    fill(captures, "c")
    assert keys(captures) == ["a", "c"]
    assert (before["a"].closed, before["b"].closed) == (1, 1)


def test_clearing_closes_each_step_once() -> None:
    captures: Captures[Step] = Captures(3)
    steps = fill(captures, "a", "b", "c")
    captures.clear()
    captures.clear()
    assert [step.closed for step in steps.values()] == [1, 1, 1]
    assert keys(captures) == []
    assert captures.evicted == 0


def test_steps_may_go_while_they_are_listed() -> None:
    captures: Captures[Step] = Captures(3)
    fill(captures, "a", "b", "c")
    for key, _ in captures:
        captures.discard(key)
    assert not len(captures)


ACTIONS = st.lists(st.tuples(st.sampled_from(["get", "add", "discard", "clear"]), st.integers(0, 5)), max_size=60)


@pytest.mark.parametrize("limit", [0, 1, 3])
@given(actions=ACTIONS)
def test_any_sequence_does_what_a_list_in_order_of_use_would(limit: int, actions: list[tuple[str, int]]) -> None:
    """The model: (key, step) pairs, the last one used last."""
    captures: Captures[Step] = Captures(limit)
    model: list[tuple[int, Step]] = []
    gone: list[Step] = []
    for action, key in actions:
        found = next((pair for pair in model if pair[0] == key), None)
        if action == "get":
            assert captures.get(key) is (found and found[1])
            model = [pair for pair in model if pair != found] + ([found] if found else [])
        elif action == "add":
            captures.add(key, step := Step())
            gone += [found[1]] if found else []
            model = [*(pair for pair in model if pair != found), (key, step)]
            while len(model) > limit:
                gone.append(model.pop(0)[1])
        elif action == "discard":
            captures.discard(key)
            gone += [found[1]] if found else []
            model = [pair for pair in model if pair != found]
        elif action == "clear":
            captures.clear()
            gone += [step for _, step in model]
            model = []
        assert list(captures) == model
        assert {step.closed for step in gone} <= {1}
        assert not any(step.closed for _, step in model)


# -- programs
def program(captures: Captures[NamedCapture], log: list[str], name: str = "step") -> CapturedProgram:
    """A program that writes down what is done with it."""

    def capture(queue: object) -> Step:
        log.append(f"capture {name}")
        return Step()

    return CapturedProgram(captures, lambda: log.append(f"queue {name}"), capture, name)


def test_a_program_is_queued_then_captured_and_replayed() -> None:
    captures: Captures[NamedCapture] = Captures(2)
    log: list[str] = []
    run = program(captures, log)
    for _ in range(4):
        run()
    assert log == ["queue step", "capture step"]
    assert [(one.calls, one.replays) for one in report_captures(captures)] == [("step", 3)]


def test_without_captures_a_program_is_queued_every_time() -> None:
    log: list[str] = []
    run = program(Captures(0), log)
    for _ in range(3):
        run()
    assert log == ["queue step"] * 3


def test_a_program_whose_capture_made_room_is_captured_again() -> None:
    captures: Captures[NamedCapture] = Captures(1)
    log: list[str] = []
    first, second = program(captures, log, "a"), program(captures, log, "b")
    for run in (first, first, second, second, first):
        run()
    assert log == ["queue a", "capture a", "queue b", "capture b", "capture a"]
    assert captures.evicted == 2


def test_a_program_that_is_gone_takes_its_capture_along() -> None:
    captures: Captures[NamedCapture] = Captures(2)
    run = program(captures, [])
    run(), run()
    assert len(captures) == 1
    del run
    assert not len(captures)


def test_calls_in_words_count_repeats() -> None:
    calls = [GraphCall(name, None, {}) for name in ("embed", "layer_full", "layer_full", "gather")]
    assert describe_calls(calls) == "embed, 2 layer_full, gather"
