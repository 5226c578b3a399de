"""Worksheets: prompts of several small problems whose answers can be checked, the work that the demo model learns.

    Worksheet:                                      Results:
    A) add 347 + 588                                A   935
    B) look up q in k=310 q=471 x=902 m=118         B   471
    ...                                             ...
    Results:

The left column is the prompt, the right one below its heading is the answer. One token is one byte, every line of a
kind has the same length, and every answer cell is 8 bytes: label, space, 5 bytes right-aligned, newline. The labels A
to P stand nowhere else on a sheet. No held-out question is ever trained on (tools/problems.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dllm_export.errors import UsageError
from dllm_export.tools.problems import KINDS, WIDTH, Bytes, draw_items

Integers = npt.NDArray[np.int64]

HEADER = "Worksheet:\n"
FOOTER = "Results:\n"
CELL = 8
"""Bytes of one problem's part of the answer."""
PROBLEMS = (6, 16)
"""Fewest and most problems of a sheet."""
PROMPT_BYTES = (150, 400)
"""Shortest and longest prompt."""
COLUMNS = PROMPT_BYTES[1] + CELL * PROBLEMS[1]
"""Longest prompt and answer together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One line of a worksheet."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Worksheet:
    """Problems in order; the first is labelled A."""

    problems: tuple[Problem, ...]

    @property
    def prompt(self) -> str:
        """What the model reads."""
        lines = (f"{_label(place)}) {problem.question}\n" for place, problem in enumerate(self.problems))
        return HEADER + "".join(lines) + FOOTER

    def start(self, count: int) -> str:
        """The prompt up to and with this many problems."""
        lines = self.prompt.splitlines(keepends=True)
        return "".join(lines[: 1 + count])

    @property
    def cells(self) -> tuple[str, ...]:
        """The right answer, cell by cell."""
        return tuple(f"{_label(place)} {problem.answer.rjust(WIDTH)}\n" for place, problem in enumerate(self.problems))

    @property
    def answer(self) -> str:
        """What the model should write: CELL bytes a problem."""
        return "".join(self.cells)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheets:
    """A batch of worksheets with one number of problems as bytes; all answers end in the last column."""

    kinds: Integers
    """[B, problems] places in KINDS."""
    tokens: Bytes
    """[B, columns] zeros at the left, then prompt and answer."""
    start: Integers
    """[B] column of the first byte of each prompt."""

    @property
    def answer_length(self) -> int:
        """Bytes of every answer."""
        return CELL * int(self.kinds.shape[1])

    @property
    def longest(self) -> int:
        """Bytes of the longest sheet, prompt and answer."""
        return int(self.tokens.shape[1] - self.start.min())

    def cut(self, columns: int) -> Sheets:
        """The same sheets in this many columns: at least `longest`, at most the present number."""
        removed = self.tokens.shape[1] - columns
        return Sheets(kinds=self.kinds, tokens=self.tokens[:, removed:], start=self.start - removed)

    def worksheet(self, row: int) -> Worksheet:
        """One sheet of the batch as text."""
        text = bytes(self.tokens[row, self.start[row] :]).decode("ascii")
        lines = text.removeprefix(HEADER).splitlines()
        count = self.kinds.shape[1]
        return Worksheet(
            problems=tuple(
                Problem(kind=KINDS[kind].name, question=line[3:], answer=result[1:].strip())
                for kind, line, result in zip(self.kinds[row], lines[:count], lines[count + 1 :], strict=True)
            )
        )


def grade(worksheet: Worksheet, text: str) -> tuple[bool, ...]:
    """Whether each cell of `text`, by position, is exactly the right one, label included."""
    return tuple(text[place * CELL : (place + 1) * CELL] == cell for place, cell in enumerate(worksheet.cells))


def training_stream(seed: int) -> np.random.Generator:
    """The generator that training sheets are drawn from; independent of the held-out one of the same seed."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))


def held_out(count: int, seed: int, problems: int | None = None, shared: int = 0) -> tuple[Worksheet, ...]:
    """Worksheets of reserved questions only, with 6 to 16 problems each or with as many as `problems` says.

    A smaller count gives the first sheets of a larger one. With `shared`, all of them begin with the same look-up problems,
    so many of their own, and the other problems are the same as without.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
    low, high = PROBLEMS
    if not 0 <= shared < (low if problems is None else problems):
        raise UsageError(
            f"--shared-problems is {shared}, expected 0 to {(low if problems is None else problems) - 1}: every worksheet "
            f"has at least one problem of its own"
        )

    def draw() -> Worksheet:
        size = int(rng.integers(low, high + 1)) if problems is None else problems
        return draw_sheets(rng, 1, size, reserved=True).worksheet(0)

    sheets = tuple(draw() for _ in range(count))
    start = shared_start(seed, shared)
    return tuple(Worksheet(problems=(*start, *sheet.problems[shared:])) for sheet in sheets)


def shared_start(seed: int, count: int) -> tuple[Problem, ...]:
    """The look-up problems that held-out worksheets of this seed begin with."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2,)))
    look_up = next(kind for kind in KINDS if kind.name == "look up")
    items = draw_items(look_up, rng, count, reserved=True)
    return tuple(
        Problem(kind=look_up.name, question=bytes(line).decode()[3:-1], answer=bytes(result).decode().strip())
        for line, result in zip(look_up.lines(items), look_up.solve(items), strict=True)
    )


def draw_sheets(
    rng: np.random.Generator,
    count: int,
    problems: int,
    *,
    reserved: bool = False,
    shares: Sequence[float] | None = None,
) -> Sheets:
    """`count` random worksheets of `problems` problems each, of reserved questions or of all others.

    `shares` gives the probability of each kind, equal ones if left out.
    """
    low, high = PROBLEMS
    if not low <= problems <= high:
        raise UsageError(f"a worksheet has {low} to {high} problems, got {problems}")
    kinds, lengths = _draw_kinds(rng, count, problems, shares)
    footer = COLUMNS - CELL * problems - len(FOOTER)
    offsets = footer - lengths[:, ::-1].cumsum(axis=1)[:, ::-1]
    start = offsets[:, 0] - len(HEADER)
    tokens = np.zeros((count, COLUMNS), dtype=np.uint8)
    cells = np.full((count, problems, CELL), ord(" "), dtype=np.uint8)
    for place, kind in enumerate(KINDS):
        sheet, line = np.nonzero(kinds == place)
        items = draw_items(kind, rng, len(sheet), reserved=reserved)
        _place(tokens, sheet, offsets[sheet, line], kind.lines(items))
        results = kind.solve(items)
        cells[sheet, line, CELL - 1 - results.shape[1] : CELL - 1] = results
    every = np.arange(count)
    labels = np.frombuffer("".join(map(_label, range(problems))).encode(), dtype=np.uint8)
    tokens[every[:, None], offsets] = labels
    _place(tokens, every, start, np.frombuffer(HEADER.encode(), dtype=np.uint8)[None])
    _place(tokens, every, np.full(count, footer), np.frombuffer(FOOTER.encode(), dtype=np.uint8)[None])
    cells[:, :, 0] = labels
    cells[:, :, CELL - 1] = ord("\n")
    tokens[:, COLUMNS - CELL * problems :] = cells.reshape(count, -1)
    return Sheets(kinds=kinds, tokens=tokens, start=start)


def _label(place: int) -> str:
    return chr(ord("A") + place)


def _place(tokens: Bytes, row: npt.NDArray[Any], column: npt.NDArray[Any], text: Bytes) -> None:
    """Write text[i] into tokens[row[i]] from column[i] on."""
    tokens[row[:, None], column[:, None] + np.arange(text.shape[1])] = text


def _draw_kinds(
    rng: np.random.Generator, count: int, problems: int, shares: Sequence[float] | None
) -> tuple[Integers, Integers]:
    """Kinds [count, problems] whose prompts have a permitted length, and the lengths of their lines."""
    length = np.array([len(kind.template) for kind in KINDS])
    kinds = np.zeros((count, problems), dtype=np.int64)
    wrong = np.arange(count)
    while len(wrong):
        kinds[wrong] = rng.choice(len(KINDS), (len(wrong), problems), p=shares)
        total = length[kinds[wrong]].sum(axis=1) + len(HEADER) + len(FOOTER)
        wrong = wrong[(total < PROMPT_BYTES[0]) | (total > PROMPT_BYTES[1])]
    return kinds, length[kinds]
