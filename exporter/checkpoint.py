"""A model directory as it comes from a hub: config, shards and their tensors, checked before anything is loaded."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dllm_export.errors import CheckpointError, IntegrityError
from dllm_export.exporter.json_file import read_json
from dllm_export.exporter.plaid_files import read_sizes
from dllm_export.exporter.token_files import find_token
from dllm_export.graphs.families import ModelConfig, Source, detect_family, detect_files
from dllm_export.graphs.families.plaid import SCHEDULE_WIDTH
from dllm_export.graphs.latents import LEVEL_WIDTH
from dllm_export.graphs.steps import TIME_WIDTH
from dllm_export.runtime.safetensors_file import read_header

IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "sampling_eps_min", "sampling_eps_max")
"""Buffers that some checkpoints store and that are recomputed from the configuration, or that only training reads."""

PICKLED = (".bin", ".pt")
"""Files that are read with weights_only, where a checkpoint has no safetensors: .pt of families that publish nothing else."""

FLOAT_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

Load = Callable[[str], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checked model directory: every tensor the graphs need is there, with the right shape, and no other."""

    path: Path
    architecture: str
    config: ModelConfig
    shards: Mapping[str, str]
    """Tensor name -> file name."""

    @contextmanager
    def reading(self) -> Iterator[Load]:
        """A loader of tensors by name; shards are mapped while the context lives and closed after it."""
        open_files: dict[str, Any] = {}

        def load(name: str) -> torch.Tensor:
            file = self.shards[name]
            if file not in open_files:
                open_files[file] = _open_shard(self.path / file)
            tensor = open_files[file][name] if file.endswith(PICKLED) else open_files[file].get_tensor(name)
            if tensor.dtype not in FLOAT_TYPES or tensor.layout != torch.strided:
                raise CheckpointError(
                    f"{file}: tensor '{name}' is {tensor.dtype}, expected plain floats; quantised weights cannot be exported"
                )
            if not all_finite(tensor):
                raise CheckpointError(
                    f"{file}: tensor '{name}' holds NaN or infinity; download or train the file again"
                )
            return torch.as_tensor(tensor)

        try:
            yield load
        finally:
            open_files.clear()


def open_checkpoint(
    path: Path,
    *,
    family: str | None = None,
    mask_id: int | None = None,
    layers: int | None = None,
    tokenizer: Path | None = None,
) -> Checkpoint:
    """Read configuration and headers only.

    `layers` keeps the first few layers of a deeper model; `tokenizer` is where the tokenizer's files are, if not there too.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; give the local directory of a downloaded model")
    shown = None if (path / "config.json").is_file() else detect_files(file.name for file in path.iterdir())
    if shown is None:
        raw = read_json(path / "config.json")
        shards, shapes = find_shards(path)
    else:
        shards, shapes = _read_shards(path, list(shown.marks.files), kept=True)
        raw = read_sizes(shapes)
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith(IGNORED_SUFFIXES)}
    finder = partial(find_token, tokenizer or path)
    source = Source(config=raw, tensors=frozenset(shapes), mask_id=mask_id, find_token=finder)
    found = shown if shown is not None and family is None else detect_family(source, family)
    config = found.read_config(source)
    expected = expected_tensors(config)
    spare = {config.names.head} & shapes.keys() if config.shape.tied_head else set()
    _compare(expected, {name: shape for name, shape in shapes.items() if name not in spare})
    if layers is not None:
        config = truncate(config, layers)
        expected = expected_tensors(config)
    places = {name: shards[name] for name in (*expected, *spare)}
    return Checkpoint(path, source.architecture or config.family, config, places)


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; takes no memory, unlike torch.isfinite on a large tensor."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def add_indicator(config: ModelConfig, rank: int) -> ModelConfig:
    """The same model with a change indicator of this width, or as wide as a key if that is less."""
    shape = config.shape
    rank = 0 if shape.latent else rank  # of no use where no feature is kept
    return replace(config, shape=replace(shape, indicator_rank=min(rank, shape.key_width, shape.hidden)))


def truncate(config: ModelConfig, layers: int) -> ModelConfig:
    """The same model with its first layers only."""
    if not 1 <= layers <= config.shape.layers:
        raise CheckpointError(f"--num-layers is {layers}, expected 1 to {config.shape.layers}")
    experts = config.shape.experts
    if experts is not None and experts.dense_layers >= layers:
        experts = None
    return replace(config, shape=replace(config.shape, layers=layers, experts=experts))


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape, as PyTorch stores it, of every tensor the model consists of."""
    shape, names, width = config.shape, config.names, config.conditioning
    query, kv, d, mlp = shape.query_width, shape.key_width, shape.hidden, shape.mlp
    in_layer: dict[str, tuple[int, ...]] = {
        "norm1": (d,), "q": (query, d), "k": (kv, d), "v": (kv, d), "out": (d, query), "norm2": (d,),
        "gate": (mlp, d), "up": (mlp, d), "down": (d, mlp), "q_bias": (query,), "k_bias": (kv,), "v_bias": (kv,),
        "q_norm": (shape.head_dim,), "k_norm": (shape.head_dim,), "qkv": (query + 2 * kv, d),
        "up_bias": (mlp,), "down_bias": (d,), "modulation": (6 * d, width), "modulation_bias": (6 * d,),
    }  # fmt: skip
    others: dict[str, tuple[int, ...]] = {
        "head_bias": (shape.vocab,), "norm_modulation": (2 * d, width), "norm_modulation_bias": (2 * d,),
        "time1": (width, TIME_WIDTH), "time1_bias": (width,), "time2": (width, width), "time2_bias": (width,),
    }  # fmt: skip
    hidden, latent = SCHEDULE_WIDTH, shape.latent
    others |= {
        "latent_in": (d, latent), "estimate_in": (d, latent), "level_in": (d, LEVEL_WIDTH), "schedule_in": (hidden, 1),
        "schedule_bias": (hidden,), "schedule_out": (1, hidden), "gamma_first": (), "gamma_last": (),
    }  # fmt: skip
    experts = shape.experts
    if experts is not None:
        wide = {"gate": (experts.shared, d), "up": (experts.shared, d), "down": (d, experts.shared)}
        in_layer |= {f"shared_{slot}": size for slot, size in wide.items()}
        in_layer |= {"router": (experts.count, d), "router_bias": (experts.count,)}
    expected: dict[str, tuple[int, ...]] = {}
    for layer in range(shape.layers):
        expected |= {names.in_layer(slot, layer): in_layer[slot] for slot in config.stored_slots(layer)}
        if experts is not None and shape.has_experts(layer):
            narrow = {"gate": (experts.mlp, d), "up": (experts.mlp, d), "down": (d, experts.mlp)}
            expected |= {
                names.of_expert(slot, layer, expert): size
                for expert in range(experts.count)
                for slot, size in narrow.items()
            }
    expected |= {names.embedding: (shape.vocab, latent or d), names.norm: (d,)}
    expected |= {name: others[slot] for slot, name in names.others.items()}
    return expected if shape.tied_head else {**expected, names.head: (shape.vocab, d)}


def find_shards(path: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """(tensor -> file, tensor -> shape) of model.safetensors, a sharded index, or .bin files, in this order."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = path / f"{stem}.{suffix}.index.json"
        if (path / f"{stem}.{suffix}").is_file():
            return _read_shards(path, [f"{stem}.{suffix}"])
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise CheckpointError(f"{index.name} has no 'weight_map' of tensor names to file names")
            files = sorted(set(weight_map.values()))
            for file in files:
                if Path(file).name != file or "\\" in file or not file.endswith("." + suffix):
                    raise CheckpointError(
                        f"{index.name} names the file {file!r}; only .{suffix} files beside it are read"
                    )
            shards, shapes = _read_shards(path, files)
            moved = [
                name
                for name, file in weight_map.items()
                if shards.get(name) != file and not name.endswith(IGNORED_SUFFIXES)
            ]
            if moved:
                raise CheckpointError(
                    f"{index.name} places {moved[0]!r} in {weight_map[moved[0]]}, which does not hold it"
                )
            return shards, shapes
    raise CheckpointError(
        f"{path} holds no weights: expected model.safetensors, model.safetensors.index.json or pytorch_model*.bin"
    )


def _read_shards(path: Path, files: list[str], kept: bool = False) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    shards: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        if not (path / file).is_file():
            raise CheckpointError(f"shard {file} is missing in {path}; download it again")
        if file.endswith(PICKLED):
            entries = {name: tuple(tensor.shape) for name, tensor in _open_shard(path / file).items()}
        else:
            entries = {name: entry.shape for name, entry in read_header(path / file).items()}
        for name, shape in entries.items():
            if name in shards:
                raise CheckpointError(f"tensor '{name}' is in both {shards[name]} and {file}; remove one of them")
            if kept or not name.endswith(IGNORED_SUFFIXES):
                shards[name], shapes[name] = file, shape
    return shards, shapes


def _open_shard(path: Path) -> Any:
    if path.suffix not in PICKLED:
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise IntegrityError(f"{path.name} is damaged ({error}); download it again") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # unpickling, zip and runtime errors alike; all mean that the file is refused
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise IntegrityError(
            f"{path.name} is damaged or holds more than tensors ({reason}); it was not loaded"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise IntegrityError(f"{path.name} holds no plain table of tensors; save the model's state_dict")
    # Files of a family without shards are its parts, whose tensors may be called alike.
    return content if path.suffix == ".bin" else {f"{path.stem}.{name}": tensor for name, tensor in content.items()}


def _compare(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {_listing(missing)}; a shard is missing or config.json is another model's"
        )
    if extra:
        raise CheckpointError(
            f"the checkpoint holds {_listing(extra)}, which this model does not use; remove it or fix config.json"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(f"tensor '{name}' is {found[name]}, expected {shape} from config.json")


def _listing(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
