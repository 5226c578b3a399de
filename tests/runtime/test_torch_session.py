"""PyTorch beside its eager form: compiled graphs give the same tokens, and captured steps are kept, replayed and reported."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from dllm_export.errors import IncompatibleError, UsageError
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.captures import Captures
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import (
    CachePolicy,
    DllmCache,
    DualCache,
    NoCache,
)
from dllm_export.runtime.session import GraphCall, Program, SessionOptions
from dllm_export.runtime.sessions.torch import BoundCall, GraphFunction, TorchSession

PROMPT = [3, 14, 15, 92, 65]
CACHED = DllmCache(prompt_interval=4, response_interval=2)
OPTIONS = GenerationOptions(gen_length=8)


class Rerun:
    """A capture for a CPU: to replay is to run again."""

    def __init__(self, queue: Program, pool: object) -> None:
        self._queue, self.replays, self.closed = queue, 0, False

    def replay(self) -> None:
        assert not self.closed
        self._queue()
        self.replays += 1

    def close(self) -> None:
        self.closed = True


class CapturingSession(TorchSession):
    """Captures on the CPU, where there is nothing to capture with."""

    _capture = staticmethod(Rerun)  # type: ignore[assignment]

    def __init__(self, bundle: Bundle, limit: int) -> None:
        super().__init__(bundle, SessionOptions(provider="torch", threads=1))
        self._captures = Captures(limit)


def tokens(lm: DiffusionLM, policy: CachePolicy, options: GenerationOptions = OPTIONS) -> tuple[int, ...]:
    return lm.run(lm.continuation([PROMPT], options), options, policy)[0].tokens


@pytest.fixture(scope="module")
def eager(tiny_bundle: Bundle) -> dict[str, tuple[int, ...]]:
    """Tokens of eager PyTorch by policy."""
    session = TorchSession(tiny_bundle, SessionOptions(provider="torch", threads=1))
    with DiffusionLM(tiny_bundle, session) as lm:
        return {policy.name: tokens(lm, policy) for policy in (NoCache(), CACHED)}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what the compiler itself imports
def test_compiled_graphs_give_the_tokens_of_eager_ones(tiny_bundles: dict[str, Bundle]) -> None:
    bundle = tiny_bundles["gqa"]
    found = []
    for compiled in (False, True):
        options = SessionOptions(provider="torch", threads=1, compile=compiled)
        with DiffusionLM(bundle, TorchSession(bundle, options)) as lm:
            found.append([tokens(lm, policy) for policy in (NoCache(), CACHED)])
    assert found[0] == found[1]
    assert len(set(found[0])) == 2, "the cache must matter, or the comparison says nothing about it"


class Padding(TorchSession):
    """Notes how many rows heads run."""

    def __init__(self, bundle: Bundle, *, few_sizes: bool) -> None:
        super().__init__(bundle, SessionOptions(provider="torch", threads=1))
        self.few_sizes, self.rows = few_sizes, set[int]()

    def prepare(self, calls: Sequence[GraphCall]) -> Program:
        self.rows |= {call.tensors["index"].dims[1] for call in calls if call.graph == "head"}
        return super().prepare(calls)


def test_where_sizes_are_dear_heads_run_few_of_them_and_decide_the_same_tokens(tiny_bundle: Bundle) -> None:
    options, found = GenerationOptions(gen_length=112, steps=28), {}
    for few in (False, True):
        session = Padding(tiny_bundle, few_sizes=few)
        with DiffusionLM(tiny_bundle, session) as lm:
            found[few] = tokens(lm, CACHED, options), session.rows
    assert found[False][0] == found[True][0]
    assert found[False][1] == {4, *range(8, 113, 8)}
    assert found[True][1] == {4, 8, 16, 32, 64, 112}
    assert TorchSession(tiny_bundle, SessionOptions(provider="torch", compile=True)).few_sizes


class Unmasking(TorchSession):
    """Leaves masks out as on a GPU, and counts the calls that were left without one."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, SessionOptions(provider="torch", threads=1))
        self._unmasks, self.calls = True, Counter[bool]()

    def _function(self, call: BoundCall, feeds: Mapping[str, Any]) -> GraphFunction:
        if "mask" in feeds:
            self.calls[feeds["mask"] is None] += 1
        return super()._function(call, feeds)


def test_a_mask_that_hides_nothing_is_left_out_and_one_that_hides_is_not(tiny_bundle: Bundle) -> None:
    prompts = [[PROMPT, PROMPT[::-1]], [PROMPT, PROMPT[:3]], [PROMPT, PROMPT[::-1]]]
    found = []
    sessions = Unmasking(tiny_bundle), TorchSession(tiny_bundle, SessionOptions(provider="torch", threads=1))
    for session in sessions:
        with DiffusionLM(tiny_bundle, session) as lm:  # one workspace, and so the same programs, for all three
            found.append(
                [[one.tokens for one in lm.run(lm.continuation(some, OPTIONS), OPTIONS, CACHED)] for some in prompts]
            )
    assert found[0] == found[1]
    assert sessions[0].calls[True] == 2 * sessions[0].calls[False] > 0


def test_a_mask_of_blocks_is_never_left_out(tiny_bundles: dict[str, Bundle]) -> None:
    """It hides what is behind a row's block, whatever is padded."""
    bundle, found = tiny_bundles["blocks"], []
    sessions = Unmasking(bundle), TorchSession(bundle, SessionOptions(provider="torch", threads=1))
    for session in sessions:
        with DiffusionLM(bundle, session) as lm:
            found.append([tokens(lm, policy) for policy in (NoCache(), DualCache())])
    assert found[0] == found[1]
    assert sessions[0].calls.keys() == {False}


@pytest.mark.parametrize("limit", [0, 1, 32])
def test_captured_steps_give_the_tokens_of_queued_ones(
    limit: int, tiny_bundle: Bundle, eager: dict[str, tuple[int, ...]]
) -> None:
    session = CapturingSession(tiny_bundle, limit)
    with DiffusionLM(tiny_bundle, session) as lm:
        for _ in range(2):
            for policy in (NoCache(), CACHED):
                assert tokens(lm, policy) == eager[policy.name]
        report = session.inspect()
        assert report.capture_limit == limit
        assert len(report.captures) <= limit
        assert (report.evicted > 0) == (limit == 1)


def test_a_session_says_which_steps_it_replays(tiny_bundle: Bundle) -> None:
    session = CapturingSession(tiny_bundle, 32)
    with DiffusionLM(tiny_bundle, session) as lm:
        for _ in range(3):
            tokens(lm, NoCache())
        captures = {capture.calls: capture.replays for capture in session.inspect().captures}
        assert captures.keys() >= {"embed, 5 layer_full, gather", "head"}
        assert all(replays > 0 for replays in captures.values())
    assert not session.inspect().captures


def test_on_a_cpu_nothing_is_captured(tiny_bundle: Bundle) -> None:
    with TorchSession(tiny_bundle, SessionOptions(provider="torch", captures=32)) as session:
        assert session.inspect().capture_limit == 0


@pytest.mark.parametrize("provider", ["onnxruntime", "tensorrt"])
def test_compiling_belongs_to_torch(provider: str) -> None:
    with pytest.raises(UsageError, match=f"--compile does not go with --provider {provider}"):
        SessionOptions(provider=provider, compile=True)


def test_a_missing_gpu_is_named(tiny_bundle: Bundle) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU answers here")
    with pytest.raises(IncompatibleError, match="sees no CUDA device"):
        TorchSession(tiny_bundle, SessionOptions(provider="torch", device="cuda"))


@pytest.mark.gpu
def test_captured_steps_on_a_gpu_give_the_tokens_of_queued_ones(tiny_bundle: Bundle) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    found = []
    for captures in (0, 2, 32):
        options = SessionOptions(provider="torch", device="cuda", captures=captures)
        with DiffusionLM(tiny_bundle, TorchSession(tiny_bundle, options)) as lm:
            found.append([tokens(lm, policy) for policy in (NoCache(), CACHED, NoCache(), CACHED)])
    assert found[0] == found[1] == found[2]
