"""Tiny seeded models that several test folders share: LLaDA's layout, and another's for what it cannot hold."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import settings

from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pipeline import export
from dllm_export.graphs import ModelShape
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.session import SessionOptions, open_session
from dllm_export.runtime.sessions.torch import TorchSession
from dllm_export.tools.eager import EagerModel, load_eager
from dllm_export.tools.gpu_check import LLADA_8B
from dllm_export.tools.random_checkpoint import write_random_checkpoint

# The same examples in every run, and no time limit for one: a busy machine is no failure.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

TINY = ModelShape(
    layers=5,
    hidden=64,
    heads=4,
    kv_heads=4,
    head_dim=16,
    mlp=160,
    vocab=97,
    max_length=512,
    norm_eps=1e-5,
    rope_theta=1e4,
)
VARIANTS = {
    "plain": TINY,
    "gqa": replace(TINY, layers=2, kv_heads=2),
    "bias": replace(TINY, layers=2, qkv_bias=True),
    "tied": replace(TINY, layers=2, tied_head=True),
    "qk_norm": replace(TINY, layers=2, kv_heads=2, head_dim=20, qk_norm=True, rope_float32=False),
    "dream": replace(TINY, layers=3, kv_heads=2, qkv_bias=True, rope_float32=False, shift=True),
    "blocks": replace(TINY, layers=2, kv_heads=2, qk_norm=True, rope_float32=False, block=4),
}
"""Shapes by name; the mask token is 96 and the end-of-text token 95."""
LAYOUTS = {"qk_norm": "a2d-qwen3", "dream": "dream", "blocks": "sdar"}
"""Families of the variants that LLaDA's layout cannot hold."""

OpenModel = Callable[[str], DiffusionLM]


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """Tiny matrices gain nothing from threads, and on a busy machine threads wait for one another at every operation."""
    torch.set_num_threads(1)


@pytest.fixture
def one_core() -> Iterator[None]:
    """One core for what this test starts: threads of two would wait for one another and for the test beside them."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores, worker = os.sched_getaffinity(0), os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    os.sched_setaffinity(0, {sorted(cores)[int(worker.removeprefix("gw")) % len(cores)]})
    yield
    os.sched_setaffinity(0, cores)


@pytest.fixture(scope="session")
def llada_8b() -> ModelShape:
    """The shape of the released model, for graphs, which hold no weights."""
    return LLADA_8B


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random checkpoint of every variant."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        name: write_random_checkpoint(root / name, shape, family=LAYOUTS.get(name, "llada"))
        for name, shape in VARIANTS.items()
    }


@pytest.fixture(scope="session")
def tiny_bundles(tiny_checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Every variant exported in float32."""
    root, options = tmp_path_factory.mktemp("bundles"), ExportOptions(no_tokenizer=True)
    return {name: export(path, root / name, options) for name, path in tiny_checkpoints.items()}


@pytest.fixture(scope="session")
def narrow_bundles(tiny_checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Every variant with a change indicator that is narrower than a value."""
    root, options = tmp_path_factory.mktemp("narrow"), ExportOptions(no_tokenizer=True, indicator_rank=7)
    return {name: export(path, root / name, options) for name, path in tiny_checkpoints.items()}


@pytest.fixture(scope="session")
def tiny_eager(tiny_checkpoints: dict[str, Path]) -> dict[str, EagerModel]:
    """Every variant in plain PyTorch, its float32 weights widened to float64."""
    return {name: load_eager(path, torch.float64) for name, path in tiny_checkpoints.items()}


@pytest.fixture(scope="session")
def tiny_bundle(tiny_bundles: dict[str, Bundle]) -> Bundle:
    """The plain variant's bundle."""
    return tiny_bundles["plain"]


@pytest.fixture(scope="session")
def open_model(tiny_bundle: Bundle) -> Iterator[OpenModel]:
    """A DiffusionLM on the tiny bundle by provider: onnxruntime, torch, or float64 for torch in double precision."""
    with ExitStack() as stack:
        yield partial(open_on, stack, tiny_bundle)


@pytest.fixture(scope="session")
def open_shifted(tiny_bundle: Bundle) -> Iterator[OpenModel]:
    """The same weights, read as a model whose rows predict the next token."""
    shape = replace(tiny_bundle.manifest.shape, shift=True)
    bundle = replace(tiny_bundle, manifest=msgspec.structs.replace(tiny_bundle.manifest, shape=shape))
    with ExitStack() as stack:
        yield partial(open_on, stack, bundle)


@pytest.fixture(scope="module")
def open_anywhere() -> Iterator[Callable[[Bundle, str], DiffusionLM]]:
    """The same for any bundle: (bundle, provider)."""
    with ExitStack() as stack:
        yield partial(open_on, stack)


def open_on(stack: ExitStack, bundle: Bundle, provider: str) -> DiffusionLM:
    """A DiffusionLM that is closed with the stack."""
    options = SessionOptions(provider="torch" if provider == "float64" else provider, threads=1)
    if provider == "float64":
        return stack.enter_context(DiffusionLM(bundle, TorchSession(bundle, options, dtype="float64")))
    return stack.enter_context(DiffusionLM(bundle, open_session(bundle, options)))
