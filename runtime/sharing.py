"""One pass of a request and the prefix that it shares: which entry of the store it holds, and when it copies."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from dllm_export.runtime.policies.policy import PrefixState
from dllm_export.runtime.prefix_store import PrefixEntry, PrefixStore
from dllm_export.runtime.session import Program
from dllm_export.runtime.trunk import Trunk


@dataclass(slots=True)
class Sharing:
    """Holds its entry from the first step that finds it stored to `close`."""

    store: PrefixStore
    trunk: Trunk
    prefix: PrefixState
    key: str
    _entry: PrefixEntry | None = field(init=False, default=None)

    @classmethod
    def start(cls, store: PrefixStore, trunk: Trunk, prefix: PrefixState, canvas: NDArray[np.int32]) -> Sharing:
        """For a pass over this canvas [B, S]; the unconditional pass of guidance blanks it, and so has an entry of its own."""
        start = prefix.starts[0]
        trunk.port.place(prefix)
        return cls(store, trunk, prefix, store.key(canvas[0, start : start + prefix.rows].tolist(), prefix.depth))

    def look(self) -> PrefixState:
        """The prefix and whether it is stored now."""
        self._entry = self._entry or self.store.borrow(self.key)
        return replace(self.prefix, stored=self._entry is not None)

    def load(self) -> Program:
        """The stored features into the caches of the next step."""
        assert self._entry is not None, "plans that join a prefix are checked against its state"
        return self.trunk.port.load(self._entry, self.trunk.halves)

    def save(self) -> Program | None:
        """What stores the features of the step just run; None where what others hold leaves no room."""
        entry = self.store.reserve(self.key, self.prefix.rows, self.prefix.depth)
        if entry is None:
            return None
        self._entry = entry
        copy = self.trunk.port.save(entry, self.trunk.halves)

        def run() -> None:
            copy()
            self.store.publish(entry)

        return run

    def close(self) -> None:
        """Give the entry back."""
        if self._entry is not None:
            self.store.give_back(self._entry)
            self._entry = None
