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
            raw = json.loads(file.read(length))
    except FileNotFoundError:
        raise IntegrityError(f"{path.name} is missing in {path.parent}") from None
    except (ValueError, UnicodeDecodeError):
        raise IntegrityError(f"{path.name}: the header is not JSON; not a safetensors file, or damaged") from None
    if not isinstance(raw, dict):
        raise IntegrityError(f"{path.name}: the header is not a JSON object")
    raw.pop("__metadata__", None)
    return {name: _read_entry(path, name, entry, 8 + length, size) for name, entry in raw.items()}


def _read_entry(path: Path, name: str, entry: Any, start: int, size: int) -> StoredTensor:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(dim) for dim in entry["shape"])
        begin, end = (int(bound) for bound in entry["data_offsets"])
        itemsize = np.dtype(NUMPY_TYPES[dtype]).itemsize
    except (KeyError, TypeError, ValueError):
        raise IntegrityError(f"{path.name}: header entry of '{name}' is malformed or of an unknown type") from None
    if not 0 <= begin <= end or min(shape, default=0) < 0 or end - begin != itemsize * math.prod(shape):
        raise IntegrityError(
            f"{path.name}: '{name}' states {shape} of {dtype} in {end - begin} bytes, which does not fit"
        )
    if start + end > size:
        raise IntegrityError(f"{path.name}: '{name}' ends at byte {start + end} of {size}; the file is truncated")
    return StoredTensor(dtype, shape, start + begin, end - begin)


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
