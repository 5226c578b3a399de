"""Memory-mapped view of a .safetensors file: header, numpy views without a copy, and byte ranges for ONNX.

The `safetensors` package copies tensors and hides offsets; serving 16 GB of weights and pointing ONNX initialisers into
the same file needs neither. The reader rejects and never repairs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from dllm_export.errors import IntegrityError

HEADER_LIMIT = 100 * 2**20
RANK_LIMIT = 8
NUMPY_TYPES: Mapping[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: safetensors dtype name, shape, and byte range in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors by name, after checking that every range lies in the file and fits its shape."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(HEADER_LIMIT, size - 8):
                raise IntegrityError(f"{path.name}: {size} bytes, too short for its header; the file is truncated")
            raw = json.loads(file.read(length), object_pairs_hook=_without_repeats)
    except FileNotFoundError:
        raise IntegrityError(f"{path.name} is missing in {path.parent}") from None
    except (ValueError, RecursionError):
        raise IntegrityError(f"{path.name}: the header is not JSON; not a safetensors file, or damaged") from None
    if not isinstance(raw, dict):
        raise IntegrityError(f"{path.name}: the header is not a JSON object")
    raw.pop("__metadata__", None)
    tensors = {name: _read_entry(path, name, entry, 8 + length, size) for name, entry in raw.items()}
    end = 8 + length
    for entry in sorted(tensors.values(), key=lambda entry: (entry.offset, entry.length)):
        if entry.offset != end:
            raise IntegrityError(f"{path.name}: tensors overlap or leave a gap at byte {end}; the file is damaged")
        end += entry.length
    if end != size:
        raise IntegrityError(f"{path.name}: {size - end} bytes at the end belong to no tensor; the file is damaged")
    return tensors


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) != len(dict(pairs)):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _read_entry(path: Path, name: str, entry: Any, start: int, size: int) -> StoredTensor:
    try:
        dtype, shape = entry["dtype"], entry["shape"]
        begin, end = entry["data_offsets"]
        itemsize = np.dtype(NUMPY_TYPES[dtype]).itemsize
        if not isinstance(shape, list) or not isinstance(entry["data_offsets"], list) or len(shape) > RANK_LIMIT:
            raise ValueError
        if any(type(number) is not int or abs(number) >= 2**63 for number in (*shape, begin, end)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise IntegrityError(f"{path.name}: header entry of '{name}' is malformed or of an unknown type") from None
    if not 0 <= begin <= end or min(shape, default=0) < 0 or end - begin != itemsize * math.prod(shape):
        raise IntegrityError(
            f"{path.name}: '{name}' states {shape} of {dtype} in {end - begin} bytes, which does not fit"
        )
    if start + end > size:
        raise IntegrityError(f"{path.name}: '{name}' ends at byte {start + end} of {size}; the file is truncated")
    return StoredTensor(dtype, tuple(shape), start + begin, end - begin)


class SafetensorsFile:
    """Numpy views into one file; valid while the object lives."""

    def __init__(self, path: Path) -> None:
        self.tensors = read_header(path)
        self._bytes = np.memmap(path, dtype=np.uint8, mode="c") if path.stat().st_size else np.empty(0, np.uint8)

    def view(self, name: str) -> NDArray[Any]:
        """The tensor over the mapped file, copy-on-write: nothing written to it reaches the disk."""
        entry = self.tensors[name]
        raw = self._bytes[entry.offset : entry.offset + entry.length]
        tensor: NDArray[Any] = raw.view(NUMPY_TYPES[entry.dtype]).reshape(entry.shape)
        return tensor
