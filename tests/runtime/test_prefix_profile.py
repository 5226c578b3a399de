"""How deep a prefix may be shared: similarities against a plain computation in torch, and the rule that follows from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dllm_export.errors import UsageError
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.prefix_profile import PrefixProfile, RatioRecord, measure_profile, read_profile
from dllm_export.runtime.session import SessionOptions
from dllm_export.runtime.sessions.torch import TorchSession
from dllm_export.tools.eager import EagerModel
from dllm_export.tools.output import write_report

PREFIX = list(range(3, 15))
TEXTS = [[*PREFIX, *([20 + length] * length), 96, 96] for length in (1, 4, 4, 12, 30)]


def features(model: EagerModel, tokens: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Keys before rotation and values of every layer: rotating both sides alike changes no cosine."""
    context = model.context((0,), len(tokens))
    x, found = model.embed(torch.tensor([tokens])), []
    for layer in model.layers:
        inner = model.norm(x, layer["attn_norm.weight"])
        query, key, value = (model.project(layer, name, inner) for name in ("q_proj", "k_proj", "v_proj"))
        found.append((key[0], value[0]))
        x = x + model.attend(layer, query, key, value, context, context)
        x = x + model.mlp(layer, x)
    return found


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.97, 0.999])
def test_a_profile_holds_the_mean_cosines_of_keys_and_values(
    threshold: float, tiny_bundle: Bundle, tiny_eager: dict[str, EagerModel]
) -> None:
    model, rows = tiny_eager["plain"], len(PREFIX)
    alone, expected = features(model, PREFIX), {}
    for text in TEXTS:
        layers = []
        for own, whole in zip(alone, features(model, text), strict=True):
            cosines = [
                torch.cosine_similarity(mine, its[:rows], dim=1).mean() for mine, its in zip(own, whole, strict=True)
            ]
            layers.append(float(sum(cosines)) / 2)
        expected.setdefault(round(100 * rows / len(text)), []).append(layers)
    session = TorchSession(tiny_bundle, SessionOptions(provider="torch", threads=1), dtype="float64")
    profile = measure_profile(session, tiny_bundle.manifest, PREFIX, TEXTS, threshold)
    assert [record.ratio for record in profile.ratios] == sorted(expected) == [27, 46, 67, 80]
    for record in profile.ratios:
        texts = expected[record.ratio]
        assert record.texts == len(texts)
        means = [sum(layer) / len(texts) for layer in zip(*texts, strict=True)]
        # The rotated keys of one side and the plain ones of the other: equal but for rounding in float64.
        assert record.similarity == pytest.approx(means, abs=1e-12)
        depth = 0
        while depth < 5 and means[depth] > threshold:
            depth += 1
        assert record.depth == depth
    assert profile.ratios[0].similarity[0] == pytest.approx(1.0), "the first layer sees tokens alone"
    assert profile.ratios[0].similarity[4] < 0.999, "deeper ones do not, or this test would see nothing"


def make_profile(depths: dict[int, int], model: str = "m") -> PrefixProfile:
    records = (RatioRecord(ratio=ratio, texts=1, similarity=(), depth=depth) for ratio, depth in depths.items())
    return PrefixProfile(model=model, threshold=0.97, ratios=tuple(records))


def test_a_ratio_is_stored_only_where_its_depth_exceeds_those_of_all_smaller_ones() -> None:
    profile = make_profile({70: 4, 10: 0, 20: 2, 30: 2, 40: 1, 50: 3})
    assert profile.depths == {20: 2, 50: 3, 70: 4}
    lengths = {5: 0, 19: 0, 20: 2, 49: 2, 50: 3, 69: 3, 70: 4, 100: 4}
    assert {ratio: profile.depth(ratio, 100) for ratio in lengths} == lengths


@given(st.dictionaries(st.integers(0, 100), st.integers(0, 32)), st.integers(1, 300), st.integers(1, 300))
def test_the_depth_is_that_of_the_nearest_lower_stored_ratio(depths: dict[int, int], prefix: int, tail: int) -> None:
    ratio = round(100 * prefix / (prefix + tail))
    found = make_profile(depths).depth(prefix, prefix + tail)
    assert found == max([0, *(depth for stored, depth in depths.items() if stored <= ratio)])


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    profile = make_profile({20: 2, 50: 3})
    write_report(tmp_path / "profile.json", profile)
    assert read_profile(tmp_path / "profile.json") == profile


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"model": 1, "threshold": 0.9, "ratios": []}', b"\xff"])
def test_what_is_no_profile_is_refused_with_the_command_that_writes_one(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(
        UsageError, match=r"--prefix-profile .*a\.json is not a profile .* 'dllm-export profile-prefix'"
    ):
        read_profile(tmp_path / "a.json")
    with pytest.raises(UsageError, match="cannot read --prefix-profile"):
        read_profile(tmp_path / "b.json")
