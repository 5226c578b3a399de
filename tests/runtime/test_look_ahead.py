"""Steps that are queued before the host has decided the step before them: the same frames, token for token."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dllm_export.errors import MismatchError
from dllm_export.graphs import TensorType
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.device_commit import least_logarithm
from dllm_export.runtime.generate import Frame
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import POLICIES, CachePolicy, DllmCache, NoCache, SharedPrefix, StepState
from dllm_export.runtime.session import Buffer, Fetch, GraphCall, Program, SessionOptions
from dllm_export.runtime.sessions.torch import TorchBuffer, TorchSession
from dllm_export.runtime.transfers import TRANSFERS, Factor, Quota, Threshold, Transfer

EAGER = SessionOptions(provider="torch", threads=1)
PROMPTS = [[3, 14, 15, 92, 65], [3, 5, 8]]
CACHED = DllmCache(prompt_interval=4, response_interval=2)
OPTIONS = GenerationOptions(gen_length=16, block_length=8)
ALL = [kind() for kind in POLICIES.values()]


class LateBuffer(TorchBuffer):
    """A buffer that is written when the device comes to it."""

    def __init__(self, tensor: torch.Tensor, device: LateSession) -> None:
        super().__init__(tensor)
        self._late = device

    def write(self, array: NDArray[Any]) -> None:
        sent = array.copy()  # as a copy to pinned memory, the caller may reuse the array
        self._late.work.append(lambda: super(LateBuffer, self).write(sent))

    def read(self) -> NDArray[Any]:
        return self._late.fetch([self])()[0]


class LateSession(TorchSession):
    """A device that does nothing before somebody waits for it, and then no more than is waited for."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, EAGER)
        self.queues = True
        self.work: deque[Callable[[], object]] = deque()

    def allocate(self, dims: tuple[int, ...], type: TensorType) -> LateBuffer:
        return LateBuffer(super().allocate(dims, type).tensor, self)

    def prepare(self, calls: Sequence[GraphCall]) -> Program:
        program = super().prepare(calls)
        return lambda: self.work.append(program)

    def fetch(self, buffers: Sequence[Buffer]) -> Fetch:
        found: list[NDArray[Any]] = []
        super_fetch = super().fetch
        self.work.append(lambda: found.extend(super_fetch(buffers)()))

        def wait() -> list[NDArray[Any]]:
            while not found:
                self.work.popleft()()
            return found

        return wait


class Stubborn(LateSession):
    """A device that commits nothing."""

    def prepare(self, calls: Sequence[GraphCall]) -> Program:
        if calls[0].graph != "commit":
            return super().prepare(calls)
        known, tokens = (calls[0].tensors[name] for name in ("tokens", "tokens_out"))
        assert isinstance(known, LateBuffer)
        assert isinstance(tokens, LateBuffer)
        return lambda: self.work.append(lambda: tokens.tensor.copy_(known.tensor))


def stream(
    lm: DiffusionLM, policy: CachePolicy, options: GenerationOptions = OPTIONS, rule: Transfer | None = None
) -> Iterator[Frame]:
    return lm.stream(lm.continuation(PROMPTS, options), options, policy, rule)


def assert_same(found: Sequence[Frame], expected: Sequence[Frame]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.step, one.steps, one.block, one.kind, one.passes) == (
            other.step,
            other.steps,
            other.block,
            other.kind,
            other.passes,
        )
        for name in ("tokens", "committed", "edited", "confidence"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.fixture(params=["plain", "gqa", "shifted"])
def bundle(request: pytest.FixtureRequest, tiny_bundles: dict[str, Bundle]) -> Bundle:
    if request.param != "shifted":
        return tiny_bundles[request.param]
    manifest = tiny_bundles["plain"].manifest
    shifted = msgspec.structs.replace(manifest, shape=replace(manifest.shape, shift=True))
    return replace(tiny_bundles["plain"], manifest=shifted)


@pytest.mark.parametrize(
    "policy", [policy for policy in ALL if policy.name not in ("block", "spa")], ids=lambda one: one.name
)
def test_every_policy_gives_the_frames_of_a_session_that_waits(policy: CachePolicy, bundle: Bundle) -> None:
    random = policy.name == "dkv-greedy"
    options = replace(OPTIONS, steps=8, remasking="random" if random else None)
    with DiffusionLM(bundle, TorchSession(bundle, EAGER)) as lm:
        expected = list(stream(lm, policy, options))
    with DiffusionLM(bundle, LateSession(bundle)) as lm:
        for _ in range(2):  # the second request finds the buffers and programs of the first
            found = list(stream(lm, policy, options))
            assert_same(found, expected)
    foreseen = getattr(policy, "foreseeable", False)
    assert [frame.ahead for frame in found] == [foreseen and step % 4 != 0 for step in range(1, 9)], (
        "but for the block's last"
    )
    assert not any(frame.ahead for frame in expected)


def test_the_next_layers_are_queued_when_a_frame_is_given_and_not_run(tiny_bundle: Bundle) -> None:
    session = LateSession(tiny_bundle)
    with DiffusionLM(tiny_bundle, session) as lm:
        queued = [(frame.ahead, len(session.work)) for frame in stream(lm, CACHED)]
    assert {ahead for ahead, _ in queued} == {True, False}
    assert all((work > 0) == ahead for ahead, work in queued)


class CountingSession(LateSession):
    """A device whose clock ticks once for every program, whenever that runs."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self.ticks = 0

    def prepare(self, calls: Sequence[GraphCall]) -> Program:
        program = super().prepare(calls)

        def run() -> None:
            program()
            self.work.append(self.tick)

        return run

    def tick(self) -> None:
        self.ticks += 1

    def mark(self) -> DeviceMark:
        return DeviceMark(self)


class DeviceMark:
    """What the device's clock shows when the device comes to it."""

    def __init__(self, device: CountingSession) -> None:
        self._device, self._at = device, -1
        device.work.append(self._pass)

    def _pass(self) -> None:
        self._at = self._device.ticks

    def seconds_until(self, later: DeviceMark) -> float:
        assert later._at >= 0, "a step asks for the time of programs that have not run yet"
        return later._at - self._at


@pytest.mark.parametrize("rule", [None, Threshold(threshold=0.5)])
def test_a_step_has_the_time_of_its_own_programs(rule: Transfer | None, tiny_bundle: Bundle) -> None:
    with DiffusionLM(tiny_bundle, CountingSession(tiny_bundle)) as lm:
        frames = list(stream(lm, CACHED, rule=rule))
    # Layers and head, and the decision where the next step's layers were queued behind it.
    assert [frame.engine_seconds for frame in frames] == [2 + frame.ahead for frame in frames]
    assert {frame.ahead for frame in frames} == {True, False}


def test_infilled_texts_are_the_same(tiny_bundle: Bundle) -> None:
    mask = tiny_bundle.manifest.tokens.mask
    texts = [[1, mask, 5, mask, mask, 9, mask, 3], [mask, 4, 4, mask, 6]]
    options, results = GenerationOptions(steps=3), []
    for session in (TorchSession(tiny_bundle, EAGER), LateSession(tiny_bundle)):
        with DiffusionLM(tiny_bundle, session) as lm:
            results.append(list(lm.stream(lm.infilling(texts, options), options, CACHED)))
    assert_same(*results)
    assert any(frame.ahead for frame in results[1])


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (replace(OPTIONS, temperature=0.7), None),
        (replace(OPTIONS, remasking="margin"), None),
        (replace(OPTIONS, remasking="random"), None),
        (replace(OPTIONS, cfg_scale=1.5), None),
        (replace(OPTIONS, early_stop=True), None),
        (replace(OPTIONS, confidence_eos_eot_inf=True), None),
        (replace(OPTIONS, early_stop=True), Threshold()),
        (OPTIONS, Factor()),
    ],
    ids=lambda value: "",
)
def test_nothing_is_queued_ahead_where_the_device_cannot_decide(
    options: GenerationOptions, rule: Transfer | None, tiny_bundle: Bundle
) -> None:
    results = []
    for session in (TorchSession(tiny_bundle, EAGER), LateSession(tiny_bundle)):
        with DiffusionLM(tiny_bundle, session) as lm:
            results.append(list(stream(lm, CACHED, options, rule)))
    assert_same(*results)
    assert not any(frame.ahead for frame in results[1])


def test_an_abandoned_request_leaves_nothing_behind(tiny_bundle: Bundle) -> None:
    with DiffusionLM(tiny_bundle, TorchSession(tiny_bundle, EAGER)) as lm:
        expected = list(stream(lm, CACHED))
    with DiffusionLM(tiny_bundle, LateSession(tiny_bundle)) as lm:
        frames = stream(lm, CACHED)
        assert next(frames).ahead
        frames.close()  # type: ignore[attr-defined]
        assert_same(list(stream(lm, CACHED)), expected)


def test_streams_may_be_interleaved(tiny_bundle: Bundle) -> None:
    with DiffusionLM(tiny_bundle, TorchSession(tiny_bundle, EAGER)) as lm:
        expected = [list(stream(lm, policy)) for policy in (CACHED, NoCache())]
    with DiffusionLM(tiny_bundle, LateSession(tiny_bundle)) as lm:
        pairs = list(zip(stream(lm, CACHED), stream(lm, NoCache()), strict=True))
    for found, wanted in zip(zip(*pairs, strict=True), expected, strict=True):
        assert_same(found, wanted)


def test_a_device_that_decides_otherwise_is_told_apart_and_the_next_session_works(tiny_bundle: Bundle) -> None:
    with (
        DiffusionLM(tiny_bundle, Stubborn(tiny_bundle)) as lm,
        pytest.raises(
            MismatchError, match=r"before step 2: token \d+ in alive row \d+ of sequence 0, expected \d+; use"
        ),
    ):
        list(stream(lm, CACHED))


@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("block", [8, 16])
def test_a_threshold_is_decided_ahead_in_the_last_block(threshold: float, block: int, tiny_bundle: Bundle) -> None:
    options, results = GenerationOptions(gen_length=16, block_length=block), []
    for session in (TorchSession(tiny_bundle, EAGER), LateSession(tiny_bundle)):
        with DiffusionLM(tiny_bundle, session) as lm:
            for _ in range(2):
                found = list(stream(lm, CACHED, options, Threshold(threshold=threshold)))
            results.append(found)
    assert_same(*results)
    *before, last = [frame for frame in results[1] if frame.block == 16 // block - 1]
    assert all(frame.ahead for frame in before), "and at the end unless one row was left"
    assert last.ahead == (last.committed.sum(1).max() > 1)
    assert not any(frame.ahead for frame in results[1] if frame.block < 16 // block - 1)


def test_requests_of_one_shape_have_rules_of_their_own(tiny_bundle: Bundle) -> None:
    """Buffers and programs of a request are the next one's, whatever that decides by."""
    rules = [Threshold(threshold=0.4), None, Threshold(threshold=0.5), Threshold(threshold=0.4)]
    options, results = GenerationOptions(gen_length=16, block_length=16), []
    for session in (TorchSession(tiny_bundle, EAGER), LateSession(tiny_bundle)):
        with DiffusionLM(tiny_bundle, session) as lm:
            results.append([list(stream(lm, CACHED, options, rule)) for rule in rules])
    for found, expected in zip(*results, strict=True):
        assert_same(found, expected)
    assert all(any(frame.ahead for frame in frames) for frames in results[1])


def test_thresholds_of_the_test_decide_one_row_some_and_all(tiny_bundle: Bundle) -> None:
    options = GenerationOptions(gen_length=16, block_length=16)
    with DiffusionLM(tiny_bundle, TorchSession(tiny_bundle, EAGER)) as lm:
        steps = [len(list(stream(lm, CACHED, options, Threshold(threshold=one)))) for one in (0.0, 0.4, 0.5, 0.9)]
    assert steps[0] == 1
    assert steps[0] < steps[1] < steps[2] < steps[3] == 16


@given(st.floats(0, 1))
def test_the_least_logarithm_is_where_the_comparison_of_the_host_turns(probability: float) -> None:
    least = least_logarithm(probability)
    assert np.exp(np.float64(least)) >= probability
    if least > np.finfo(np.float32).min:  # else any finite number will do
        below = np.nextafter(np.float32(least), np.float32(-np.inf))
        assert np.exp(np.float64(below)) < probability


def test_no_logarithm_is_least_above_one() -> None:
    assert least_logarithm(np.inf) == np.finfo(np.float32).max


def test_only_rules_that_take_the_best_say_so() -> None:
    assert [name for name, rule in TRANSFERS.items() if rule.takes_best] == ["quota", "threshold"]


class OwnPolicy(DllmCache):
    """May plan by what is decided."""


class OwnRule(Quota):
    """May choose otherwise."""


@pytest.mark.parametrize(("policy", "rule"), [(OwnPolicy(), Quota()), (NoCache(), OwnRule())])
def test_what_a_class_says_of_itself_is_not_inherited(policy: CachePolicy, rule: Transfer, tiny_bundle: Bundle) -> None:
    with DiffusionLM(tiny_bundle, LateSession(tiny_bundle)) as lm:
        assert not any(frame.ahead for frame in stream(lm, policy, OPTIONS, rule))


@given(st.data())
def test_plans_that_can_be_foreseen_are_the_same_whatever_is_decided(data: st.DataObject) -> None:
    policy = data.draw(st.sampled_from([one for one in ALL if getattr(one, "foreseeable", False)]))
    start = data.draw(st.sampled_from([0, 8]))
    state = replace(
        StepState.first(layers=3, prompt_rows=7, response_rows=16, batch=2),
        step=data.draw(st.integers(1, 30)),
        block_step=data.draw(st.integers(1, 8)),
        block=(7 + start, 15 + start),
        indicator_rank=4,
    )
    masks = st.lists(st.booleans(), min_size=32, max_size=32).map(lambda bits: np.reshape(bits, (2, 16)))
    drift = np.full((2, 3), data.draw(st.floats(0, 1)))
    other = replace(state, masked=data.draw(masks), masked_before=data.draw(masks), drift=drift)
    assert policy.plan(other) == policy.plan(state)


def test_policies_that_look_at_what_is_decided_are_not_foreseeable() -> None:
    found = {policy.name for policy in ALL if getattr(policy, "foreseeable", False)}
    assert found == {"none", "dllm-cache", "dual", "prefix", "freecache", "window", "sparse", "spa", "shared-prefix"}
    assert not SharedPrefix(base=POLICIES["dkv-decode"]()).foreseeable
