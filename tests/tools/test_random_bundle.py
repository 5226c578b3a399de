"""A random bundle without a checkpoint: layers have weights of their own, plain PyTorch decides the same tokens with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dllm_export.graphs import ModelShape
from dllm_export.runtime.bundle import Bundle, open_bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import NoCache
from dllm_export.runtime.session import SessionOptions, open_session
from dllm_export.tools.bench.eager_runs import EagerRequest
from dllm_export.tools.bench.eager_weights import unfuse_eager
from dllm_export.tools.gpu_check import TINY
from dllm_export.tools.random_bundle import write_random_bundle

SHAPE: ModelShape = replace(TINY, layers=3)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_random_bundle(tmp_path_factory.mktemp("random") / "bundle", SHAPE, dtype="float32")


def test_every_layer_is_drawn_by_itself_with_the_same_spread(bundle: Bundle) -> None:
    assert replace(bundle.manifest.shape, indicator_rank=0) == SHAPE
    layers = [bundle.graph_weights("layer_full", layer) for layer in range(3)]
    for name, first in layers[0].items():
        for other in layers[1:]:
            if first.ndim == 1:
                np.testing.assert_array_equal(other[name], first)
                continue
            assert other[name].std() == pytest.approx(first.std(), rel=0.05), "4096 numbers or more: 1 % and 5 sigma"
            assert abs(np.corrcoef(first.ravel(), other[name].ravel())[0, 1]) < 0.1
    assert abs(np.corrcoef(layers[1]["qk"].ravel(), layers[2]["qk"].ravel())[0, 1]) < 0.1


def test_it_is_a_bundle_as_any_other_and_the_same_for_the_same_seed(bundle: Bundle, tmp_path: Path) -> None:
    assert open_bundle(bundle.path).manifest == bundle.manifest
    again, other = (write_random_bundle(tmp_path / f"{seed}", SHAPE, dtype="float32", seed=seed) for seed in (0, 9))
    weights = [record for record in bundle.manifest.files if record.path.startswith("weights/")]
    assert len(weights) == 5
    assert [record for record in again.manifest.files if record.path.startswith("weights/")] == weights
    assert not {record.sha256 for record in weights} & {record.sha256 for record in other.manifest.files}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "9"]


def test_plain_pytorch_decides_the_same_tokens_with_its_weights(bundle: Bundle) -> None:
    prompt, counts = tuple(range(3, 20)), (1,) * 12
    with DiffusionLM(bundle, open_session(bundle, SessionOptions(provider="torch", threads=1))) as lm:
        (found,) = lm.run(lm.continuation([prompt], GenerationOptions(gen_length=12)), GenerationOptions(gen_length=12))
    request = EagerRequest(unfuse_eager(bundle, torch.float32), (prompt,), 12, counts)
    *_, last = request.steps(request.uncached(compiled=False, captured=False), NoCache())
    assert tuple(last.tokens.tolist()) == found.tokens
