"""Write a bundle all or nothing: into a temporary directory beside the target, then one rename."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dllm_export.errors import ResourceError, UsageError
from dllm_export.runtime.bundle import file_digest
from dllm_export.runtime.manifest import MANIFEST, FileRecord

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def replacing(target: Path, *, force: bool) -> Iterator[Path]:
    """A temporary directory that becomes `target` if the block succeeds; after any failure the target is as it was."""
    target = Path(os.path.realpath(target))
    if target.exists() and not (target / MANIFEST).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} exists and is not a bundle; choose another output directory")
    if (target / MANIFEST).is_file() and not force:
        raise UsageError(f"{target} already holds a bundle; pass --force to replace it, or choose another directory")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise UsageError(f"cannot write to {target.parent}: {error.strerror}") from None
    try:
        yield work
        os.chmod(work, 0o777 & ~current_umask())
        _swap(work, target)
    except OSError as error:
        if error.errno in FULL:
            place = target.parent
            raise ResourceError(
                f"no space left in {place} while writing {target.name}; free some and run again"
            ) from None
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _swap(work: Path, target: Path) -> None:
    if not target.exists():
        work.rename(target)
        return
    old = work.with_name(work.name.replace("partial", "old"))
    target.rename(old)
    try:
        work.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file, readable by whom the umask lets; a full disk is the OSError it is."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        number = next((number for number in FULL if f"os error {number}" in str(error)), None)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from None
    os.chmod(path, 0o666 & ~current_umask())


def current_umask() -> int:
    """The process's umask; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def require_space(target: Path, needed: int) -> None:
    """Refuse before writing when the disk cannot hold the bundle."""
    existing = next(parent for parent in (target, *target.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ResourceError(
            f"the bundle needs about {needed / 1e9:.2f} GB and {existing} has {free / 1e9:.2f} GB free; free some or choose "
            f"another disk with -o"
        )


def list_files(root: Path) -> tuple[FileRecord, ...]:
    """Size and digest of every file below a directory."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return tuple(
        FileRecord(path=path.relative_to(root).as_posix(), size=path.stat().st_size, sha256=file_digest(path))
        for path in files
    )
