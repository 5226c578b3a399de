"""Model directories that the exporter's tests write, in every form a hub offers, and the check of a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dllm_export.errors import DllmExportError
from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pipeline import export
from dllm_export.graphs import ModelShape
from dllm_export.runtime.bundle import Bundle
from dllm_export.tools.demo_layouts import byte_tokenizer
from dllm_export.tools.llada_config import llada_config
from dllm_export.tools.random_checkpoint import random_tensors

SHAPE = ModelShape(
    layers=3,
    hidden=32,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp=48,
    vocab=264,
    max_length=512,
    norm_eps=1e-5,
    rope_theta=1e4,
)
SHARDS = 3


def write_weights(path: Path, tensors: Mapping[str, torch.Tensor], form: str) -> None:
    """model.safetensors, pytorch_model.bin, or three shards of either with their index."""
    suffix = "bin" if form.startswith("bin") else "safetensors"
    stem = "pytorch_model" if suffix == "bin" else "model"
    names = sorted(tensors)
    if not form.endswith("shards"):
        groups = {f"{stem}.{suffix}": names}
    else:
        files = [f"{stem}-{number + 1:05d}-of-{SHARDS:05d}.{suffix}" for number in range(SHARDS)]
        groups = {file: names[number::SHARDS] for number, file in enumerate(files)}
        weight_map = {name: file for file, members in groups.items() for name in members}
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (path / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    for file, members in groups.items():
        chosen = {name: tensors[name] for name in members}
        if suffix == "bin":
            torch.save(chosen, path / file)
        else:
            save_file(chosen, path / file, metadata={"format": "pt"})


def draw_tensors() -> dict[str, torch.Tensor]:
    """The same numbers at every call."""
    return random_tensors(SHAPE, torch.Generator().manual_seed(1))


@pytest.fixture
def base_tensors() -> dict[str, torch.Tensor]:
    """The tensors that `write_checkpoint` starts from."""
    return draw_tensors()


@pytest.fixture(scope="session")
def write_checkpoint() -> Callable[..., Path]:
    """Writes a tiny LLaDA directory with a byte tokenizer; `tensors` and `config` are changes, None or `drop` removes."""

    def write(
        path: Path,
        *,
        form: str = "safetensors",
        tensors: Mapping[str, torch.Tensor | None] | None = None,
        config: Mapping[str, object] | None = None,
        drop: tuple[str, ...] = (),
    ) -> Path:
        path.mkdir(parents=True)
        settings = llada_config(SHAPE, mask=258, end=257)
        settings |= config or {}
        settings = {key: value for key, value in settings.items() if key not in drop}
        (path / "config.json").write_text(json.dumps(settings))
        byte_tokenizer().save(str(path / "tokenizer.json"))
        changed = {**draw_tensors(), **(tensors or {})}
        write_weights(path, {name: tensor for name, tensor in changed.items() if tensor is not None}, form)
        return path

    return write


@pytest.fixture(scope="session")
def checkpoint(write_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unchanged directory; not to be written to."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="session")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The export of `checkpoint` in float32; not to be written to."""
    return export(checkpoint, tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture
def refuse(tmp_path: Path) -> Callable[..., str]:
    """Exports what must be refused; returns the message after checking its form and that nothing was left behind."""

    def check(model: Path, error: type[DllmExportError], options: ExportOptions | None = None) -> str:
        output = tmp_path / "output"
        output.mkdir()
        with pytest.raises(DllmExportError) as refused:
            export(model, output / "bundle", options or ExportOptions())
        message = str(refused.value)
        assert type(refused.value) is error, message
        assert message.strip()
        assert message.count("\n") <= 1
        assert not list(output.iterdir()), "a refused export leaves no file"
        return message

    return check
