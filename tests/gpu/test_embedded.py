"""Weights as constants against weights as inputs, on the real library: what is compared in speed computes the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

LENGTH, ROWS = 80, 16


def test_a_layer_that_holds_its_weights_computes_what_one_that_is_given_them_does(served: Path, tmp_path: Path) -> None:
    from dllm_export.exporter.build_options import BuildOptions
    from dllm_export.exporter.engines import build_engines
    from dllm_export.runtime.bundle import open_bundle
    from dllm_export.tools.bench.embedded import compare_forms
    from dllm_export.tools.bench.records import EmbeddedTask

    bundle = open_bundle(shutil.copytree(served, tmp_path / "bundle"))
    build_engines(
        bundle, BuildOptions(flavour="tensorrt", max_batch=1, max_length=LENGTH, rows=ROWS, graphs="layer_partial")
    )
    task = EmbeddedTask(bundle=str(bundle.path), flavour="tensorrt", length=LENGTH, rows=ROWS, rounds=1)
    found = compare_forms(task)
    # float32: the same products, whose sums two engines may take in another order.
    assert found.difference < 1e-5
    assert all(len(times) == 1 for parts in found.ms.values() for times in parts.values())
    assert found.ms["bound"].keys() == found.ms["embedded"].keys() > {"all"}
    weights = sum(array.nbytes for array in bundle.graph_weights("layer_partial", 0).values())
    assert found.plan_bytes["embedded"] - found.plan_bytes["bound"] > weights / 2  # code of an engine varies
