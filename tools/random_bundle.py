"""A bundle of random weights as large as a released model's, in seconds: for measurements, which need no checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dllm_export.exporter.options import ExportOptions, ExportType
from dllm_export.exporter.pipeline import export
from dllm_export.exporter.weights import layer_file
from dllm_export.graphs import ModelShape
from dllm_export.runtime.bundle import Bundle, file_digest, open_bundle
from dllm_export.runtime.manifest import MANIFEST, FileRecord, WeightRecord, encode_manifest
from dllm_export.tools.random_checkpoint import write_random_checkpoint

AT_ONCE = 6
"""Layers that are written at the same time: each is digested by one core."""


def write_random_bundle(
    target: Path, shape: ModelShape, *, dtype: ExportType, device: str = "cpu", seed: int = 0
) -> Bundle:
    """A bundle of LLaDA's layout; `device` draws the numbers, each its own.

    One layer is exported in the usual way. The matrices of the others are drawn with the spread of its own, and its norms
    are theirs. The bundle runs as any other, but the activations of its probe are those of a model of one layer, so that
    `verify` does not accept it.
    """
    with TemporaryDirectory(prefix="dllm-export-random-", dir=target.parent) as folder:
        stored = getattr(torch, dtype)
        one = replace(shape, layers=1)
        checkpoint = write_random_checkpoint(Path(folder, "model"), one, seed=seed, dtype=stored, device=device)
        manifest = export(checkpoint, target, ExportOptions(dtype=dtype, no_tokenizer=True)).manifest
    first = load_file(target / layer_file(0))
    write = partial(write_layer, target, first, seed, device)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        files = list(pool.map(write, range(1, shape.layers)))
    (bindings,) = manifest.layer_bindings
    manifest = msgspec.structs.replace(
        manifest,
        shape=replace(manifest.shape, layers=shape.layers),
        layer_bindings=tuple(
            {name: WeightRecord(file=layer_file(layer), tensor=record.tensor) for name, record in bindings.items()}
            for layer in range(shape.layers)
        ),
        files=tuple(sorted((*manifest.files, *files), key=lambda record: record.path)),
    )
    (target / MANIFEST).write_bytes(encode_manifest(manifest))
    return open_bundle(target)


def write_layer(target: Path, like: Mapping[str, Tensor], seed: int, device: str, layer: int) -> FileRecord:
    """One layer's file, with what the manifest says of it."""
    generator = torch.Generator(device).manual_seed(seed + layer)

    def draw(tensor: Tensor) -> Tensor:
        drawn = torch.randn(tensor.shape, generator=generator, device=device).mul(float(tensor.float().std()))
        return drawn.to(tensor.dtype).cpu()

    file = target / layer_file(layer)
    save_file({name: draw(tensor) if tensor.dim() > 1 else tensor for name, tensor in like.items()}, file)
    return FileRecord(path=layer_file(layer), size=file.stat().st_size, sha256=file_digest(file))
