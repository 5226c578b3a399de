"""The indicator's weight: cosines of a value projection in fewer numbers, whichever way it was decomposed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from dllm_export.errors import UsageError
from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pipeline import export
from dllm_export.exporter.proxy import EXACT_WIDTH, make_proxy
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.manifest import Manifest
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import SpaCache

RANK = 64


def draw_projection(outputs: int, inputs: int, decay: float, seed: int = 0) -> torch.Tensor:
    """[out, in] with singular values that fall like n^-decay."""
    draw = torch.Generator().manual_seed(seed)
    count = min(outputs, inputs)
    left, right = (torch.linalg.qr(torch.randn(size, count, generator=draw))[0] for size in (outputs, inputs))
    return left * torch.arange(1, count + 1) ** -decay @ right.T


def drift(before: torch.Tensor, after: torch.Tensor, map: torch.Tensor) -> torch.Tensor:
    return 1 - cosine_similarity(before @ map, after @ map, dim=-1)


@pytest.mark.parametrize(("outputs", "inputs"), [(40, 64), (64, 64), (24, 96)])
def test_all_directions_keep_every_cosine(outputs: int, inputs: int) -> None:
    value = draw_projection(outputs, inputs, 0.5).double()
    before, after = torch.randn(2, 50, inputs, generator=torch.Generator().manual_seed(1)).double()
    proxy = make_proxy(value, min(outputs, inputs))
    assert proxy.shape == (inputs, min(outputs, inputs))
    expected = drift(before, after, value.T)
    torch.testing.assert_close(drift(before, after, proxy.double()), expected, rtol=0, atol=1e-6)  # stored in float32


def test_fewer_directions_are_the_nearest_of_their_rank() -> None:
    """Eckart and Young: what is left out is the singular values that are left out, and nothing else."""
    value = draw_projection(80, 96, 0.7).double()
    proxy = make_proxy(value, 10).double()
    rest = value @ value.T  # of all directions; both sides of it in the directions of the output
    directions = value @ proxy / (proxy**2).sum(0)
    left_out = torch.linalg.matrix_norm(rest - directions @ torch.diag((proxy**2).sum(0)) @ directions.T, 2)
    assert float(left_out) == pytest.approx(float(torch.linalg.svdvals(value)[10] ** 2), rel=1e-5)


@pytest.mark.parametrize(("decay", "shared"), [(0.3, 61), (0.7, 63)])
def test_the_randomised_decomposition_ranks_rows_as_the_exact_one_does(decay: float, shared: int) -> None:
    """Rows that move a little, some more than others: 64 of 256 are picked by either, and by whole values."""
    width = EXACT_WIDTH + 128
    value = draw_projection(width, width, decay)
    _, sizes, directions = torch.linalg.svd(value)
    exact, found = directions.T[:, :RANK] * sizes[:RANK], make_proxy(value, RANK)
    draw = torch.Generator().manual_seed(2)
    before = torch.randn(256, width, generator=draw)
    after = before + torch.rand(256, 1, generator=draw) * torch.randn(256, width, generator=draw)
    by_exact, by_found, by_value = (
        set(drift(before, after, map).topk(64).indices.tolist()) for map in (exact, found, value.T)
    )
    assert len(by_exact & by_found) >= shared
    assert len(by_found & by_value) >= len(by_exact & by_value) - 2


def test_a_proxy_is_the_same_in_every_export_and_leaves_the_caller_s_random_numbers_alone() -> None:
    value = draw_projection(EXACT_WIDTH + 64, EXACT_WIDTH + 64, 0.5)
    torch.manual_seed(5)
    first = make_proxy(value, RANK)
    drawn = torch.rand(3)
    torch.manual_seed(6)
    assert torch.equal(make_proxy(value, RANK), first)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)


def test_a_projection_of_zeros_has_a_proxy_of_zeros() -> None:
    assert not make_proxy(torch.zeros(16, 32), 8).any()


# -- in a bundle
@pytest.mark.parametrize(("asked", "rank"), [(7, 7), (16, 16), (128, 16), (0, 0)])
def test_the_rank_of_a_bundle_is_the_one_asked_for_or_the_width_of_a_key(
    asked: int, rank: int, checkpoint: Path, tmp_path: Path
) -> None:
    bundle = export(checkpoint, tmp_path / "bundle", ExportOptions(indicator_rank=asked, no_tokenizer=True))
    manifest: Manifest = bundle.manifest
    assert manifest.shape.indicator_rank == rank
    assert ("layer_indicated" in bundle.specs, "layer_indicator" in manifest.graphs) == (rank > 0, rank > 0)
    for records in manifest.layer_bindings:
        assert ("proxy" in records) == (rank > 0)
        if rank:
            proxy, value = (torch.from_numpy(np.array(bundle.weight(records[name]))) for name in ("proxy", "v"))
            assert proxy.shape == (manifest.shape.hidden, rank)
            sizes = torch.linalg.svdvals(value)[:rank]
            torch.testing.assert_close(proxy.norm(dim=0), sizes, rtol=1e-5, atol=1e-6)


def test_a_bundle_without_an_indicator_says_how_to_get_one(checkpoint: Path, tmp_path: Path) -> None:
    bundle = export(checkpoint, tmp_path / "bundle", ExportOptions(indicator_rank=0, no_tokenizer=True))
    options = GenerationOptions(gen_length=8)
    with DiffusionLM.from_pretrained(bundle.path) as lm:
        request = lm.continuation([[1, 2, 3]], options)
        with pytest.raises(UsageError, match=r"^--policy spa picks rows by an indicator.* with --indicator-rank 128$"):
            lm.run(request, options, SpaCache())
        assert lm.run(request, options), "the model stays usable"


def test_a_negative_rank_is_refused() -> None:
    with pytest.raises(UsageError, match="--indicator-rank is -1, expected 0"):
        ExportOptions(indicator_rank=-1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_proxies_are_the_nearest_numbers(dtype: str, checkpoint: Path, bundle: Bundle, tmp_path: Path) -> None:
    half = export(checkpoint, tmp_path / "bundle", ExportOptions(dtype=dtype, no_tokenizer=True))  # type: ignore[arg-type]
    for exact, rounded in zip(bundle.manifest.layer_bindings, half.manifest.layer_bindings, strict=True):
        full = torch.from_numpy(np.array(bundle.weight(exact["proxy"])))
        expected = full.to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(half.weight(rounded["proxy"]).astype(np.float32), expected)
