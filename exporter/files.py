"""Files that are whole or not there. No torch here, unlike in exporter/pack.py: engines are built without it."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from dllm_export.errors import ResourceError, UsageError


def replace_file(path: Path, data: bytes) -> None:
    """Write beside the file, then rename: a reader sees the old bytes or the new ones."""
    work = path.with_name(f".{path.name}.partial")
    try:
        work.write_bytes(data)
        os.replace(work, path)
    except BaseException:
        work.unlink(missing_ok=True)
        raise


def require_writable(folder: Path) -> None:
    """Refuse a directory that takes no file, before the work whose result it is to hold."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        kind = ResourceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else UsageError
        raise kind(f"cannot write into {folder}: {error.strerror}") from None
