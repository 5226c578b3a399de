"""Kernels that TensorRT for RTX compiled on this machine, kept for the next process: without them each starts anew.

The library checks what it reads and refuses kernels of another version, GPU or driver; the file's name keeps them apart.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dllm_export.runtime.files import replace_file
from dllm_export.runtime.tensorrt.library import TensorRt

FOLDER = "cache"
"""Beside the bundle's own folders; the manifest does not list it, and deleting it costs only time."""


class KernelCache:
    """One store for all engines of a session, read at its first use and written when the session closes."""

    def __init__(self, bundle: Path, version: str, gpu: str, driver: str) -> None:
        name = re.sub(r"[^A-Za-z0-9.]+", "-", f"tensorrt-rtx-{version}-{gpu}-cuda-{driver}").strip("-").lower()
        self.path = bundle / FOLDER / f"{name}.kernels"
        self._store: Any = None
        self._read = b""

    def attach(self, library: TensorRt, config: Any) -> None:
        """Let contexts made with this configuration take kernels from the store and add theirs."""
        if self._store is None:
            self._store = library.require(config.create_runtime_cache(), "create its kernel cache")
            self._read = self.load()
            if self._read and not self._store.deserialize(self._read):
                self._read = b""  # of another driver, say: filled anew, and then replaced
        library.require(config.set_runtime_cache(self._store), "use its kernel cache")

    def close(self) -> None:
        """Write the store if it has grown, and let go of it."""
        if self._store is not None:
            self.save(bytes(self._store.serialize()))
            self._store = None

    def load(self) -> bytes:
        """The stored kernels, or nothing."""
        try:
            return self.path.read_bytes()
        except OSError:
            return b""

    def save(self, data: bytes) -> None:
        """Replace the file; a bundle that cannot be written to simply has no cache."""
        if data == self._read:
            return
        try:
            self.path.parent.mkdir(exist_ok=True)
            replace_file(self.path, data)
        except OSError:
            return
