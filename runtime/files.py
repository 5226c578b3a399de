"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Write beside the file, then rename: a reader sees the old bytes or the new ones."""
    work = path.with_name(f".{path.name}.partial")
    try:
        work.write_bytes(data)
        os.replace(work, path)
    except BaseException:
        work.unlink(missing_ok=True)
        raise
