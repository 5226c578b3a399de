"""What the store of shared prefixes promises, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_export.errors import ResourceError, UsageError
from dllm_export.graphs import TensorType
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import SharedPrefix
from dllm_export.runtime.prefix_profile import PrefixProfile, RatioRecord, digest_weights
from dllm_export.runtime.prefix_store import PrefixStore
from dllm_export.runtime.session import Buffer, SessionOptions, open_session
from dllm_export.tools.gpu_check import LLADA_8B

MASK = 96
OpenModel = Callable[[str], DiffusionLM]


# -- the store by itself
class Memory:
    """A session that allocates host arrays, up to a limit in buffers."""

    provider = "memory"

    def __init__(self, limit: int = 10**9) -> None:
        self.limit, self.made = limit, 0

    def allocate(self, dims: tuple[int, ...], type: TensorType) -> Buffer:
        self.made += 1
        if self.made > self.limit:
            raise MemoryError("no more")
        return np.zeros(1)  # type: ignore[return-value]


def make_store(bundle: Bundle, budget: int, limit: int = 10**9, identity: str = "a") -> PrefixStore:
    return PrefixStore(Memory(limit), bundle.manifest.shape, identity, budget)  # type: ignore[arg-type]


def fill(store: PrefixStore, key: str, rows: int) -> None:
    entry = store.reserve(key, rows, 1)
    assert entry is not None
    store.publish(entry)
    store.give_back(entry)


def test_the_least_recently_used_prefix_makes_room(tiny_bundle: Bundle) -> None:
    store = make_store(tiny_bundle, 10)
    for key in "abc":
        fill(store, key, 3)
    entry = store.borrow("a")
    assert entry is not None
    store.give_back(entry)
    fill(store, "d", 4)
    assert [key for key in "abcd" if store.borrow(key)] == ["a", "c", "d"]
    assert store.tokens == 10


def test_a_key_tells_apart_all_that_makes_features_differ(tiny_bundle: Bundle) -> None:
    store, other = make_store(tiny_bundle, 10), make_store(tiny_bundle, 10, identity="b")
    keys = [store.key([1, 2], 3), store.key([2, 1], 3), store.key([1, 2], 2), store.key([1], 3), other.key([1, 2], 3)]
    assert len(set(keys)) == 5
    assert store.key((1, 2), 3) == keys[0]


def test_memory_that_runs_out_names_the_flags_and_keeps_no_half_an_entry(tiny_bundle: Bundle) -> None:
    store = make_store(tiny_bundle, 10, limit=3)
    with pytest.raises(
        ResourceError, match=r"prefix of 4 tokens and 2 layers .* lower --prefix-depth, or --prefix-budget"
    ):
        store.reserve("a", 4, 2)
    assert len(store) == 0


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 3)), max_size=60))
def test_the_budget_is_kept_and_what_is_held_stays(actions: list[tuple[str, int]]) -> None:
    """Any order of borrowing, storing and giving back, against a plain list of who holds what."""
    store, held = PrefixStore(Memory(), LLADA_8B, "a", 9), []  # type: ignore[arg-type,var-annotated]
    for key, action in actions:
        rows = ord(key) - ord("a") + 1
        if action == 0 and held:
            store.give_back(held.pop())
        elif action == 1 and (entry := store.borrow(key)):
            held.append(entry)
        elif action == 2 and (entry := store.reserve(key, rows, 1)):
            store.publish(entry)
            held.append(entry)
        elif action == 3 and (entry := store.reserve(key, rows, 1)):
            assert store.borrow(key) is None, "it is not filled yet"
            store.give_back(entry)
            assert store.borrow(key) is None
        assert store.tokens <= 9
        for entry in held:
            again = store.borrow(entry.key)
            assert again is entry
            store.give_back(entry)
    for entry in held:
        store.give_back(entry)
    store.clear()
    assert store.tokens == len(store) == 0


def test_threads_that_share_a_store_leave_its_books_in_order(tiny_bundle: Bundle) -> None:
    store, faults = make_store(tiny_bundle, 12), []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(400):
            key = "abcdefgh"[rng.integers(8)]
            entry = store.borrow(key) or store.reserve(key, int(rng.integers(1, 6)), 1)
            if entry is None:
                continue
            if store.tokens > 12 or entry.users < 1:
                faults.append(key)
            store.publish(entry)
            store.give_back(entry)

    threads = [Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    store.clear()
    assert store.tokens == len(store) == 0


# -- wrong input
@pytest.mark.parametrize(
    ("prefix", "depth", "message"),
    [
        ([], 1, "the prefix of --prefix-file is empty"),
        ([7, 8], 1, "prompt 2 does not start with the prefix of --prefix-file: its token 2 is 9, expected 8"),
        ([7, 8, 1, 1, 1], 1, "is 5 tokens long, longer than prompt 1, which has 4"),
        ([7], 6, "--prefix-depth is 6, expected 0 to 5"),
        ([7], -1, "--prefix-depth is -1, expected 0 to 5"),
        ([7], None, "needs a depth: give --prefix-depth, or --prefix-profile"),
    ],
)
def test_a_prefix_that_cannot_be_shared_is_refused(
    prefix: list[int], depth: int | None, message: str, open_model: OpenModel
) -> None:
    lm, options = open_model("onnxruntime"), GenerationOptions(gen_length=4)
    request = lm.continuation([[7, 8, 1, 1], [7, 9, 3, 3, 3, 3]], options)
    with pytest.raises(UsageError, match=message):
        lm.share(request, prefix, depth=depth)


def test_a_prefix_ends_before_the_first_mask_of_an_infilled_text(open_model: OpenModel) -> None:
    lm, options = open_model("onnxruntime"), GenerationOptions()
    request = lm.infilling([[7, 8, 1, MASK, 5], [7, 8, 2, 2, MASK]], options)
    lm.share(request, [7, 8], depth=1)
    with pytest.raises(UsageError, match="longer than prompt 1, which has 3 before its first mask"):
        lm.share(request, [7, 8, 1, 4], depth=1)


@pytest.mark.parametrize(
    ("scale", "message"), [(0.0, "is 6 tokens long, but"), (1.0, "twice with --cfg-scale, which is 12")]
)
def test_a_prefix_larger_than_the_budget_is_refused_before_anything_runs(
    scale: float, message: str, tiny_bundle: Bundle
) -> None:
    options = GenerationOptions(gen_length=4, cfg_scale=scale)
    session = open_session(tiny_bundle, SessionOptions(threads=1))
    with DiffusionLM(tiny_bundle, session, prefix_budget=5) as lm:
        request = lm.share(lm.continuation([[1, 2, 3, 4, 5, 6, 7]], options), [1, 2, 3, 4, 5, 6], depth=2)
        with pytest.raises(UsageError, match=message):
            lm.run(request, options, SharedPrefix())
    with pytest.raises(UsageError, match="--prefix-budget is -1"):
        make_store(tiny_bundle, -1)


def test_a_profile_of_another_model_is_refused(open_model: OpenModel) -> None:
    lm, options = open_model("onnxruntime"), GenerationOptions(gen_length=4)
    request = lm.continuation([[7, 8, 9, 9]], options)
    record = RatioRecord(ratio=10, texts=1, similarity=(1.0,) * 5, depth=3)
    other = PrefixProfile(model="f" * 64, threshold=0.97, ratios=(record,))
    with pytest.raises(UsageError, match="--prefix-profile was measured with weights ffffffffffff, this bundle has"):
        lm.share(request, [7], profile=other)
    own = PrefixProfile(model=digest_weights(lm.bundle.manifest), threshold=0.97, ratios=(record,))
    shared = lm.share(request, [7], profile=own).prefix
    assert shared is not None
    assert shared.depth == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SharedPrefix(refresh_interval=0), "--refresh-interval is 0"),
        (lambda: SharedPrefix(base=SharedPrefix()), "--base is shared-prefix itself"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
