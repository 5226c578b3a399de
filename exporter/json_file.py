"""JSON files of a model directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dllm_export.errors import CheckpointError

JSON_LIMIT = 64 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path.name} is missing in {path.parent}; it must be a complete model directory")
    if path.stat().st_size > JSON_LIMIT:
        raise CheckpointError(f"{path.name} has {path.stat().st_size} bytes, more than any configuration needs")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path.name} is not valid JSON; download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} is not a JSON object")
    return value
