"""Folders that results go into. No torch here, unlike in exporter/pack.py: engines are built without it."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

from dllm_export.errors import ResourceError, UsageError


def require_writable(folder: Path) -> None:
    """Refuse a directory that takes no file, before the work whose result it is to hold."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        kind = ResourceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else UsageError
        raise kind(f"cannot write into {folder}: {error.strerror}") from None
