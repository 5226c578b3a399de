"""Copies between stored prefixes and the caches of one pass: in the provider's memory, prepared once per entry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from weakref import WeakKeyDictionary

import numpy as np

from dllm_export.runtime.buffers import Buffers, RequestShape
from dllm_export.runtime.policies.policy import PrefixState
from dllm_export.runtime.prefix_store import PrefixEntry
from dllm_export.runtime.session import Buffer, GraphCall, Program, Session

Halves = tuple[int, ...]
"""Which of its two copies a layer's cache is in, by layer."""


class PrefixPort:
    """Where a pass takes a stored prefix in and gives its own out."""

    def __init__(self, session: Session, buffers: Buffers, request: RequestShape) -> None:
        self._session, self._buffers, self._request = session, buffers, request
        self._loads: WeakKeyDictionary[PrefixEntry, dict[Halves, Program]] = WeakKeyDictionary()

    def place(self, prefix: PrefixState) -> None:
        """Upload where the prefix lies in each sequence."""
        column, start = np.arange(self._request.length), np.array(prefix.starts)[:, None]
        inside = (column >= start) & (column < start + prefix.rows)
        # The step that reads the copy computes every row outside the prefix, so that any will do there: the first.
        self._into().write(np.where(inside, column - start, 0).astype(np.int32))
        self._out(prefix.rows).write(np.arange(prefix.rows, dtype=np.int32)[None] + prefix.starts[0])

    def load(self, entry: PrefixEntry, halves: Halves) -> Program:
        """The entry into the caches that the next step reads, and its rows to where they join, in every sequence."""
        programs = self._loads.setdefault(entry, {})
        if halves not in programs:
            pairs = zip(entry.features, self._features(entry, halves), strict=True)
            rows = (entry.hidden, self._buffers.entering())
            programs[halves] = self._session.prepare(list(copies(pairs, self._into(), rows)))
        return programs[halves]

    def save(self, entry: PrefixEntry, halves: Halves) -> Program:
        """What the step just run gave the prefix in the first sequence, into the entry."""
        pairs = zip(self._features(entry, halves), entry.features, strict=True)
        rows = (self._buffers.entering(), entry.hidden)
        return self._session.prepare(list(copies(pairs, self._out(entry.rows), rows)))

    def _features(self, entry: PrefixEntry, halves: Halves) -> list[dict[str, Buffer]]:
        return [
            {name: self._buffers.cache(name, layer, halves[layer]) for name in ("key", "value")}
            for layer in range(len(entry.features))
        ]

    def _into(self) -> Buffer:
        """For every position its row of the prefix [B, S]."""
        return self._buffers.get("prefix.into", (self._request.batch, self._request.length), "int32")

    def _out(self, rows: int) -> Buffer:
        """The prefix's rows in the first sequence [1, n]."""
        return self._buffers.get(f"prefix.out.{rows}", (1, rows), "int32")


def copies(
    features: Iterator[tuple[Mapping[str, Buffer], Mapping[str, Buffer]]],
    index: Buffer,
    rows: tuple[Buffer | None, Buffer | None],
) -> Iterator[GraphCall]:
    """Copies of keys and values from source to target, layer by layer, and of rows where there are any."""
    for source, target in features:
        outputs = {f"{name}_out": buffer for name, buffer in target.items()}
        yield GraphCall("copy_features", None, {**source, "index": index, **outputs})
    if rows[0] is not None and rows[1] is not None:
        yield GraphCall("copy_rows", None, {"hidden": rows[0], "index": index, "hidden_out": rows[1]})
