"""Prepared programs, the last used of them: what a program binds would pile up."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable

from dllm_export.runtime.session import GraphCall, Program, Session

PROGRAM_LIMIT = 64
"""Prepared programs that are kept. A policy makes a few kinds of steps, twice each for the halves, unless it gives every
layer a budget of its own: then hardly a step comes again."""


class ProgramStore:
    """Programs by what they depend on."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._programs: OrderedDict[Hashable, Program] = OrderedDict()

    def __len__(self) -> int:
        return len(self._programs)

    def find(self, key: Hashable, calls: Callable[[], Iterable[GraphCall]]) -> Program:
        """The program of this key, prepared from its calls where it is not kept."""
        if key not in self._programs:
            if len(self._programs) == PROGRAM_LIMIT:
                self._programs.popitem(last=False)
            self._programs[key] = self._session.prepare(list(calls()))
        self._programs.move_to_end(key)
        return self._programs[key]
