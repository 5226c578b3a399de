"""Fixed sizes: which graphs get a profile of their own for them."""

from __future__ import annotations

import pytest

from dllm_export.errors import UsageError
from dllm_export.exporter.build_options import BuildOptions
from dllm_export.exporter.ranges import check_fixed_sizes, make_profiles
from dllm_export.graphs import ModelShape, graph_specs
from dllm_export.runtime.tensorrt.library import Flavour
from dllm_export.runtime.tensorrt.profiles import choose_profile

FIXED = BuildOptions(fixed="S=1149,X=256,Q=64;S=1149,Q=64;S=1149;S=9000", max_batch=2)


def test_only_graphs_with_exactly_these_dims_get_the_profile_and_it_comes_first(llada_8b: ModelShape) -> None:
    specs = graph_specs(llada_8b)
    profiles = {name: make_profiles("tensorrt", spec, 4096, FIXED) for name, spec in specs.items()}
    adaptive = {"B": (1, 1, 2), "S": (1149,) * 3, "X": (256,) * 3, "Q": (64,) * 3}
    assert profiles["layer_adaptive"][0] == adaptive
    assert profiles["layer_partial"][0] == {"B": (1, 1, 2), "S": (1149,) * 3, "Q": (64,) * 3}
    assert profiles["layer_full"][0] == {"B": (1, 1, 2), "S": (1149,) * 3}
    assert len(profiles["layer_full"]) == 2, "S=9000 is beyond the model and S alone does not name layer_partial's dims"
    for name in ("embed", "gather", "head", "layer_skip", "guidance"):
        assert profiles[name] == make_profiles("tensorrt", specs[name], 4096, BuildOptions(max_batch=2))


def test_a_call_of_the_fixed_sizes_takes_that_profile_and_others_do_not(llada_8b: ModelShape) -> None:
    profiles = make_profiles("tensorrt", graph_specs(llada_8b)["layer_partial"], 4096, FIXED)
    assert choose_profile("layer_partial", profiles, {"B": 2, "S": 1149, "Q": 64}) == 0
    assert choose_profile("layer_partial", profiles, {"B": 2, "S": 1148, "Q": 64}) == 1
    assert choose_profile("layer_partial", profiles, {"B": 2, "S": 1149, "Q": 300}) == 2


@pytest.mark.parametrize("group", ["S=9000", "S=1149,X=256", "S=1149,Q=1200,X=9999"])
def test_sizes_that_no_graph_would_use_are_refused(group: str, llada_8b: ModelShape) -> None:
    specs = graph_specs(llada_8b)
    check_fixed_sizes(specs, 4096, BuildOptions(fixed="S=1149,X=256,Q=64;S=1149"))
    with pytest.raises(UsageError, match=rf"--fixed has '{group}', which no graph has .*layer_full S"):
        check_fixed_sizes(specs, 4096, BuildOptions(fixed=f"S=1149;{group}"))


@pytest.mark.parametrize("flavour", ["tensorrt-rtx"])
def test_a_library_that_specialises_by_itself_keeps_one_profile(flavour: Flavour, llada_8b: ModelShape) -> None:
    assert len(make_profiles(flavour, graph_specs(llada_8b)["layer_partial"], 4096, FIXED)) == 1


@pytest.mark.parametrize("text", ["S", "S=", "S=0", "B=1", "S=1,S=2x", "Z=3", "S=-1", "S=1;;Q=a"])
def test_sizes_that_cannot_be_meant_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--fixed has .* expected sizes of the dims S, X, Q or N"):
        BuildOptions(fixed=text)
