"""Which profile holds a call, and that the profiles of `build` hold every call of the requests it was told of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_export.errors import UsageError
from dllm_export.exporter.build_options import BuildOptions
from dllm_export.exporter.ranges import make_profiles
from dllm_export.graphs import GraphSpec, ModelShape, graph_specs
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import (
    CachePolicy,
    DkvDecode,
    DllmCache,
    DynamicDllm,
    NoCache,
    PrefixCache,
    SpaCache,
    SparseCache,
)
from dllm_export.runtime.session import GraphCall, Program, SessionOptions
from dllm_export.runtime.sessions.torch import TorchSession
from dllm_export.runtime.tensorrt.library import Flavour
from dllm_export.runtime.tensorrt.profiles import FLAGS, Profile, choose_profile, measure_sizes
from dllm_export.runtime.transfers import Wino

NARROW: Profile = {"B": (1, 1, 4), "S": (1, 64, 100), "X": (1, 16, 16)}
WIDE: Profile = {"B": (1, 1, 4), "S": (1, 64, 100), "X": (1, 16, 100)}
BOTH = (NARROW, WIDE)
FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt-rtx")


# -- choosing
@pytest.mark.parametrize(
    ("sizes", "place"),
    [
        ({"B": 1, "S": 1, "X": 1}, 0),
        ({"B": 4, "S": 100, "X": 16}, 0),
        ({"B": 4, "S": 100, "X": 17}, 1),
        ({"B": 4, "S": 100, "X": 100}, 1),
        ({"B": 1, "S": 50, "X": 5, "Q": 1000}, 0),
    ],
    ids=["smallest", "edge of the narrow", "one row more", "edge of the wide", "a dim that no input has"],
)
def test_the_narrowest_profile_that_holds_the_sizes_is_chosen(sizes: dict[str, int], place: int) -> None:
    assert choose_profile("layer_adaptive", BOTH, sizes) == place


@pytest.mark.parametrize(
    ("graph", "profile", "sizes", "message"),
    [
        (
            "embed",
            WIDE,
            {"B": 5, "X": 3},
            "B = 5 in graph 'embed', its engine takes 1 to 4: build again with --max-batch 5",
        ),
        ("layer_full", WIDE, {"B": 4, "S": 101}, "S = 101 in .* takes 1 to 100: build again with --max-length 101"),
        ("layer_skip", WIDE, {"B": 4, "X": 200}, "X = 200 in .* takes 1 to 100: build again with --max-length 200"),
        ("gather", {"N": (1, 8, 8)}, {"N": 9}, "N = 9 in .* takes 1 to 8: build again with --max-length 9"),
        ("layer_partial", {"Q": (1, 8, 8)}, {"Q": 9}, "Q = 9 in .* takes 1 to 8: build again with --max-length 9"),
        ("head", {"Q": (1, 8, 8)}, {"Q": 9}, "Q = 9 in graph 'head', .* takes 1 to 8: build again with --rows 9"),
        ("layer_shadow", {"Q": (1, 8, 8)}, {"Q": 9}, "Q = 9 in graph 'layer_shadow', .*: build again with --rows 9"),
        ("head", {"X": (1, 8, 8), "Q": (1, 8, 8)}, {"X": 9, "Q": 8}, "X = 9 in .*: build again with --max-length 9"),
    ],
)
def test_a_call_that_fits_nowhere_is_refused_with_the_dim_its_range_and_the_flag(
    graph: str, profile: Profile, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        choose_profile(graph, [profile], sizes)


@pytest.mark.parametrize(("least", "size"), [(1, 0), (8, 7)])
def test_a_size_below_the_range_is_refused_without_a_flag_that_only_widens(least: int, size: int) -> None:
    with pytest.raises(
        UsageError, match=f"has S = {size} in graph 'embed', its engine takes {least} to 9: "
    ) as refused:
        choose_profile("embed", [{"S": (least, 8, 9)}], {"S": size})
    assert "build again" not in str(refused.value)
    assert "--max-length" not in str(refused.value)


def test_the_range_in_the_message_is_that_of_the_widest_profile() -> None:
    with pytest.raises(UsageError, match="X = 101 in graph 'layer_adaptive', its engine takes 1 to 100"):
        choose_profile("layer_adaptive", BOTH, {"B": 1, "S": 100, "X": 101})


SIZES = st.fixed_dictionaries({dim: st.integers(1, 120) for dim in "BSX"})
WIDENING = st.lists(st.fixed_dictionaries({dim: st.integers(1, 60) for dim in "BSX"}), min_size=1, max_size=4)


@given(steps=WIDENING, sizes=SIZES)
def test_the_chosen_profile_holds_the_sizes_and_no_earlier_one_does(
    steps: list[dict[str, int]], sizes: dict[str, int]
) -> None:
    """Each profile is wider than the one before it, as those of `build` are."""
    largest = dict.fromkeys("BSX", 0)
    profiles: list[Profile] = []
    for step in steps:
        largest = {dim: size + step[dim] for dim, size in largest.items()}
        profiles.append({dim: (1, 1, size) for dim, size in largest.items()})
    fits = [all(profile[dim][0] <= sizes[dim] <= profile[dim][2] for dim in sizes) for profile in profiles]
    if any(fits):
        assert choose_profile("embed", profiles, sizes) == fits.index(True)
    else:
        with pytest.raises(UsageError, match=r"this request has ([BSX]) = \d+ in graph 'embed'"):
            choose_profile("embed", profiles, sizes)


# -- measuring
def test_sizes_are_read_from_every_tensor_that_is_bound(llada_8b: ModelShape) -> None:
    spec = graph_specs(llada_8b)["layer_adaptive"]
    dims = {"hidden": (2, 7, 4096), "cos": (2, 9, 64), "index_out": (2, 3)}
    assert measure_sizes(spec, dims) == {"B": 2, "X": 7, "S": 9, "Q": 3}
    assert measure_sizes(spec, {}) == {}


def test_tensors_that_contradict_one_another_are_refused(llada_8b: ModelShape) -> None:
    spec = graph_specs(llada_8b)["layer_full"]
    with pytest.raises(ValueError, match="layer_full: S is 9 and, in cos, 8"):
        measure_sizes(spec, {"hidden": (1, 9, 4096), "cos": (1, 8, 64)})
    with pytest.raises(ValueError, match="zip"):
        measure_sizes(spec, {"hidden": (1, 9)})


# -- the profiles of build
def test_only_standard_tensorrt_has_a_second_profile_and_only_for_layers_that_compute_some_rows(
    llada_8b: ModelShape,
) -> None:
    counts = {
        flavour: {
            name: len(make_profiles(flavour, spec, 4096, BuildOptions()))
            for name, spec in graph_specs(llada_8b).items()
        }
        for flavour in FLAVOURS
    }
    assert set(counts["tensorrt-rtx"].values()) == {1}
    double = {name for name, count in counts["tensorrt"].items() if count == 2}
    assert double == {"layer_partial", "layer_adaptive", "layer_compact", "layer_tracking", "layer_indicated"}


@pytest.mark.parametrize(
    "options",
    [
        BuildOptions(),
        BuildOptions(max_length=100),
        BuildOptions(rows=1),
        BuildOptions(rows=5000),
        BuildOptions(max_length=1, max_batch=1000),
    ],
    ids=str,
)
def test_every_profile_is_within_the_next_and_every_dim_has_a_flag(options: BuildOptions, llada_8b: ModelShape) -> None:
    for spec in graph_specs(llada_8b).values():
        profiles = make_profiles("tensorrt", spec, 4096, options)
        for profile in profiles:
            assert set(profile) <= set(FLAGS)
            assert all(1 <= least <= usual <= most for least, usual, most in profile.values())
        for narrow, wide in pairwise(profiles):
            assert narrow.keys() == wide.keys()
            assert all(wide[dim][0] <= narrow[dim][0] and narrow[dim][2] <= wide[dim][2] for dim in wide)


class Recorder(TorchSession):
    """The torch session, with a list of the calls that it was given."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, SessionOptions(provider="torch", threads=1))
        self.calls: list[GraphCall] = []

    def prepare(self, calls: Sequence[GraphCall]) -> Program:
        self.calls += calls
        return super().prepare(calls)


BATCH, PROMPT, RESPONSE, BLOCK = 3, 24, 24, 8
BUILD = BuildOptions(max_batch=BATCH, max_length=PROMPT + RESPONSE, rows=RESPONSE)
POLICIES: Mapping[str, CachePolicy] = {
    "none": NoCache(),
    "dllm-cache": DllmCache(prompt_interval=4, response_interval=3),
    "update-none": DllmCache(prompt_interval=4, response_interval=3, update_ratio=0.0),
    "update-all": DllmCache(prompt_interval=4, response_interval=3, update_ratio=1.0, first_layer_rule=False),
    "prefix": PrefixCache(),
    "dkv-decode": DkvDecode(),
    "sparse": SparseCache(),
    "sparse, everything": SparseCache(keep_ratio=1.0),
    "dynamic-dllm": DynamicDllm(layer_budget=24, window=24, bucket=1),
    "spa": SpaCache(response_interval=4, peak_ratio=1.0),
}
LAYERS_OF_POLICY = {
    "none": {"layer_full"},
    "dllm-cache": {"layer_full", "layer_partial", "layer_adaptive"},
    "update-none": {"layer_full", "layer_partial", "layer_adaptive", "layer_skip"},
    "update-all": {"layer_full", "layer_partial", "layer_adaptive"},
    "prefix": {"layer_full", "layer_partial"},
    "dkv-decode": {"layer_full", "layer_partial"},
    "sparse": {"layer_full", "layer_partial", "layer_compact"},
    "sparse, everything": {"layer_full", "layer_partial", "layer_compact"},
    "dynamic-dllm": {"layer_full", "layer_tracking"},
    "spa": {"layer_full", "layer_partial", "layer_indicated", "layer_indicator"},
}


def real_calls(bundle: Bundle, policy: CachePolicy, block: int = BLOCK) -> Iterator[tuple[GraphSpec, dict[str, int]]]:
    """Graph and sizes of every call of a guided request of exactly the sizes of BUILD."""
    options = GenerationOptions(gen_length=RESPONSE, block_length=block, cfg_scale=0.5)
    session = Recorder(bundle)
    with session:
        lm = DiffusionLM(bundle, session)
        lm.run(lm.continuation([[1] * PROMPT, [2] * 5, [3] * 9], options), options, policy)
        for call in session.calls:
            spec = bundle.specs[call.graph]
            yield spec, measure_sizes(spec, {name: buffer.dims for name, buffer in call.tensors.items()})


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_call_of_a_request_of_the_largest_sizes_has_a_profile(
    policy: str, flavour: Flavour, tiny_bundle: Bundle
) -> None:
    chosen: dict[str, set[int]] = {}
    largest: Counter[str] = Counter()
    for spec, sizes in real_calls(tiny_bundle, POLICIES[policy]):
        profiles = make_profiles(flavour, spec, tiny_bundle.manifest.shape.max_length, BUILD)
        assert set(sizes) == set(profiles[0]), "every dim of a call has a range"
        chosen.setdefault(spec.name, set()).add(choose_profile(spec.name, profiles, sizes))
        largest |= Counter(sizes)
    assert {name for name in chosen if name.startswith("layer_")} == LAYERS_OF_POLICY[policy]
    assert chosen["embed"] == chosen["head"] == chosen["guidance"] == {0}
    assert (largest["B"], largest["S"], largest["X"]) == (BATCH, PROMPT + RESPONSE, PROMPT + RESPONSE)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("policy", [NoCache(), SparseCache(keep_ratio=1.0)], ids=lambda policy: policy.name)
def test_every_call_of_a_shadow_has_a_profile(policy: CachePolicy, flavour: Flavour, tiny_bundle: Bundle) -> None:
    options = GenerationOptions(gen_length=RESPONSE, block_length=RESPONSE)
    with Recorder(tiny_bundle) as session:
        lm = DiffusionLM(tiny_bundle, session)
        prompts = [[1] * PROMPT, [2] * 5, [3] * 9]
        lm.run(lm.continuation(prompts, options), options, policy, Wino(accept_threshold=0.0, accept_share=0.3))
        calls = [call for call in session.calls if call.graph in ("layer_shadow", "head")]
    assert {call.graph for call in calls} == {"layer_shadow", "head"}
    for call in calls:
        spec = tiny_bundle.specs[call.graph]
        for stage in (spec, *spec.stages):
            profiles = make_profiles(flavour, stage, tiny_bundle.manifest.shape.max_length, BUILD)
            sizes = measure_sizes(spec, {name: buffer.dims for name, buffer in call.tensors.items()})
            assert choose_profile(stage.name, profiles, sizes) == 0
            assert set(profiles[0]) <= set(sizes), "every range belongs to a dim of the call"


def test_steps_over_the_response_take_the_narrow_profile_and_those_over_the_sequence_the_wide_one(
    tiny_bundle: Bundle,
) -> None:
    for spec, sizes in real_calls(tiny_bundle, POLICIES["update-none"]):
        profiles = make_profiles("tensorrt", spec, tiny_bundle.manifest.shape.max_length, BUILD)
        if len(profiles) == 2:
            travelling = sizes.get("X", sizes.get("Q", 0))
            assert choose_profile(spec.name, profiles, sizes) == int(travelling > RESPONSE), spec.name


def choose_all(bundle: Bundle, options: BuildOptions, block: int = BLOCK) -> None:
    """A profile for every call of the request, in the order of its calls."""
    for spec, sizes in real_calls(bundle, NoCache(), block):
        choose_profile(spec.name, make_profiles("tensorrt", spec, 512, options), sizes)


def test_a_block_of_more_rows_than_the_head_takes_is_refused_with_the_flag_that_widens_it(tiny_bundle: Bundle) -> None:
    few = replace(BUILD, rows=BLOCK)
    choose_all(tiny_bundle, few)
    with pytest.raises(UsageError, match=r"Q = 24 in graph 'head', its engine takes 1 to 8: .* --rows 24"):
        choose_all(tiny_bundle, few, block=RESPONSE)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (replace(BUILD, max_batch=BATCH - 1), f"--max-batch {BATCH}"),
        (replace(BUILD, max_length=PROMPT + RESPONSE - 1), f"--max-length {PROMPT + RESPONSE}"),
    ],
)
def test_the_first_refusal_names_the_size_that_the_whole_request_needs(
    options: BuildOptions, remedy: str, tiny_bundle: Bundle
) -> None:
    with pytest.raises(UsageError, match=f"build again with {remedy},"):
        choose_all(tiny_bundle, options)
    choose_all(tiny_bundle, BUILD)
