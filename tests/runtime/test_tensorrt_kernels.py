"""The file of compiled kernels: its name, and that a reader never sees half of it. What is in it needs a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from dllm_export.runtime.tensorrt.kernels import KernelCache


def test_the_file_is_named_after_all_that_kernels_depend_on(tmp_path: Path) -> None:
    path = KernelCache(tmp_path, "1.7.1.116", "NVIDIA GeForce RTX 4090", "13.0").path
    assert path == tmp_path / "cache" / "tensorrt-rtx-1.7.1.116-nvidia-geforce-rtx-4090-cuda-13.0.kernels"
    names = {
        KernelCache(tmp_path, version, gpu, driver).path.name
        for version in ("1.7.1", "1.7.2")
        for gpu in ("NVIDIA L4", "NVIDIA L40")
        for driver in ("12.9", "13.0")
    }
    assert len(names) == 8


def test_what_is_saved_is_loaded_and_nothing_else_is_left(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path, "1.7.1", "NVIDIA L4", "13.0")
    assert cache.load() == b""
    cache.save(b"first")
    cache.save(b"second")
    assert KernelCache(tmp_path, "1.7.1", "NVIDIA L4", "13.0").load() == b"second"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [cache.path.name]


def test_a_bundle_that_takes_no_file_has_no_cache(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    cache = KernelCache(tmp_path, "1.7.1", "NVIDIA L4", "13.0")
    cache.save(b"kernels")
    assert cache.load() == b""


def test_the_library_has_what_the_cache_asks_for() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX has wheels for Linux on x86-64 only")
    for owner, names in {
        trt.IRuntimeConfig: ("create_runtime_cache", "set_runtime_cache"),
        trt.IRuntimeCache: ("serialize", "deserialize"),
    }.items():
        assert all(hasattr(owner, name) for name in names)
