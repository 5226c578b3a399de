"""Features of prefixes that requests share, kept from one request to the next in the provider's memory.

A prefix is found by its exact token ids. What is stored are the features that it had in the request that came first:
keys and values of the first layers, and the rows of the residual stream that enter the layer after those.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np

from dllm_export.errors import ResourceError, UsageError
from dllm_export.graphs import ModelShape
from dllm_export.runtime.request import Prefix
from dllm_export.runtime.session import Buffer, Session

PREFIX_BUDGET = 5000
"""Tokens of prefixes that are kept, unless told otherwise (arXiv 2606.07571)."""


@dataclass(eq=False)
class PrefixEntry:
    """One prefix in the provider's memory. Buffers are of one sequence: [1, n, width]."""

    key: str
    rows: int
    """n."""
    features: tuple[Mapping[str, Buffer], ...] = ()
    """`key` and `value` of each layer below the depth."""
    hidden: Buffer | None = None
    """The rows that enter layer `depth`; None where every layer is shared."""
    users: int = 1
    """Requests that hold it now."""
    ready: bool = False
    """Whether its buffers are filled."""


class PrefixStore:
    """Prefixes of one session, at most `budget` tokens in all; the least recently used one that nobody holds goes first.

    Bookkeeping is safe for several threads; the buffers are a session's, and so for one thread at a time.
    """

    def __init__(self, session: Session, shape: ModelShape, identity: str, budget: int = PREFIX_BUDGET) -> None:
        if budget < 0:
            raise UsageError(f"--prefix-budget is {budget}, expected 0 tokens or more")
        self._session, self._shape, self._identity, self.budget = session, shape, identity, budget
        self._entries: OrderedDict[str, PrefixEntry] = OrderedDict()
        self._lock = Lock()

    def key(self, tokens: Sequence[int], depth: int) -> str:
        """What a prefix is found by: its ids, the depth, and all that makes features differ."""
        ids = np.asarray(tokens, np.int64).tobytes()
        return hashlib.sha256(f"{self._identity} depth {depth}\n".encode() + ids).hexdigest()

    def check(self, prefix: Prefix, *, guided: bool) -> None:
        """Refuse a request whose prefix can never be stored. Guidance has a second pass, whose prefix is another."""
        needed = prefix.rows * (2 if guided else 1)
        if prefix.depth and needed > self.budget:
            twice = f", twice with --cfg-scale, which is {needed}" if guided else ""
            raise UsageError(
                f"the prefix is {prefix.rows} tokens long{twice}, but --prefix-budget keeps {self.budget}: raise it to at "
                f"least {needed}, or share a shorter prefix"
            )

    @property
    def tokens(self) -> int:
        """Tokens held now."""
        with self._lock:
            return self._held()

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    # -- entries
    def borrow(self, key: str) -> PrefixEntry | None:
        """The filled entry of this key, held by the caller until given back; it counts as used now."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or not entry.ready:
                return None
            self._entries.move_to_end(key)
            entry.users += 1
            return entry

    def reserve(self, key: str, rows: int, depth: int) -> PrefixEntry | None:
        """A new entry for the caller to fill and publish; None if it exists or if what is held by others leaves no room."""
        with self._lock:
            if key in self._entries or not self._make_room(rows):
                return None
            entry = self._entries[key] = PrefixEntry(key, rows)
        try:
            self._allocate(entry, depth)
        except BaseException:
            self.give_back(entry)
            raise
        return entry

    def publish(self, entry: PrefixEntry) -> None:
        """Its buffers are filled: others may borrow it."""
        with self._lock:
            entry.ready = True

    def give_back(self, entry: PrefixEntry) -> None:
        """The caller is done with it. An entry that was never published is forgotten."""
        with self._lock:
            entry.users -= 1
            if not entry.ready:
                self._entries.pop(entry.key, None)

    def clear(self) -> None:
        """Forget every entry that nobody holds."""
        with self._lock:
            self._make_room(self.budget)

    # -- with the lock held
    def _held(self) -> int:
        return sum(entry.rows for entry in self._entries.values())

    def _make_room(self, rows: int) -> bool:
        """Forget idle entries, the least recently used first, until so many tokens fit in."""
        for key in [key for key, entry in self._entries.items() if entry.users == 0]:
            if self._held() + rows <= self.budget:
                break
            del self._entries[key]
        return self._held() + rows <= self.budget

    # -- memory
    def _allocate(self, entry: PrefixEntry, depth: int) -> None:
        try:
            width = self._shape.key_width
            entry.features = tuple(
                {name: self._session.allocate((1, entry.rows, width), "compute") for name in ("key", "value")}
                for _ in range(depth)
            )
            if depth < self._shape.layers:
                entry.hidden = self._session.allocate((1, entry.rows, self._shape.hidden), "compute")
        except (MemoryError, ResourceError) as error:
            raise ResourceError(
                f"memory ran out for a shared prefix of {entry.rows} tokens and {depth} layers ({error}): lower "
                f"--prefix-depth, or --prefix-budget so that fewer prefixes are kept beside it"
            ) from error
