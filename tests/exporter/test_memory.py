"""Export needs the memory of one shard and a margin, not of the model: measured in a child process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dllm_export.exporter.checkpoint import expected_tensors
from dllm_export.graphs import ModelShape
from dllm_export.graphs.families import FAMILIES, Source
from dllm_export.tools.llada_config import llada_config

SHAPE = ModelShape(
    layers=24,
    hidden=1280,
    heads=20,
    kv_heads=20,
    head_dim=64,
    mlp=3456,
    vocab=50000,
    max_length=4096,
    norm_eps=1e-5,
    rope_theta=5e5,
)
"""0.6 billion parameters. Of a much smaller model an export could hold everything and still stay within the margin."""
SHARDS = 8
MARGIN = 0.9e9
"""Bytes; imports take 0.25e9 of it. The rest is for a layer, the embedding and the head in more than one type."""

EXPORT_AND_MEASURE = """
import json, sys
from pathlib import Path
from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pipeline import export

def peak():
    # Of this program alone: getrusage's ru_maxrss starts from the parent's memory at the time of the fork.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

model, bundle = map(Path, sys.argv[1:])
before = peak()
export(model, bundle, ExportOptions(dtype="bfloat16", no_tokenizer=True))
print(json.dumps([before, peak()]))
"""


def write_large_checkpoint(path: Path, shape: ModelShape) -> int:
    """A sharded bfloat16 directory, one shard in memory at a time; returns the size of the largest shard."""
    path.mkdir()
    raw = llada_config(shape, mask=shape.vocab - 1, end=shape.vocab - 2)
    (path / "config.json").write_text(json.dumps(raw))
    expected = expected_tensors(FAMILIES["llada"].read_config(Source(config=raw)))
    numbers = (torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    total = sum(torch.Size(dims).numel() for dims in expected.values())
    shards: list[dict[str, torch.Size]] = [{}]
    filled = 0
    for name, dims in expected.items():
        size = torch.Size(dims)
        if filled + size.numel() > total / SHARDS * len(shards) and len(shards) < SHARDS:
            shards.append({})
        shards[-1][name] = size
        filled += size.numel()
    weight_map, largest = {}, 0
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            name: numbers.repeat(-(-size.numel() // len(numbers)))[: size.numel()] for name, size in shard.items()
        }
        save_file({name: tensor.view(shard[name]).clone() for name, tensor in tensors.items()}, path / file)
        weight_map |= dict.fromkeys(shard, file)
        largest = max(largest, (path / file).stat().st_size)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return largest


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A place for gigabytes, emptied after the test."""
    if shutil.disk_usage(tmp_path).free < 6 * SHAPE.weight_count:
        pytest.skip("needs 4 GB of disk")
    yield tmp_path
    for path in tmp_path.iterdir():
        shutil.rmtree(path)


def test_an_export_stays_within_its_largest_shard_and_a_margin(disk: Path) -> None:
    largest = write_large_checkpoint(disk / "model", SHAPE)
    assert 2 * SHAPE.weight_count > largest + MARGIN, "an export that loads the whole model must fail this test"
    command = [sys.executable, "-c", EXPORT_AND_MEASURE, str(disk / "model"), str(disk / "bundle")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    before, peak = json.loads(result.stdout)
    assert peak <= largest + MARGIN, (
        f"{peak / 1e9:.2f} GB, {before / 1e9:.2f} of it for imports, {largest / 1e9:.2f} a shard"
    )
