"""Kinds of problems with checkable answers: how a question is drawn, written as a prompt line, and solved.

Everything works on many problems at once, as bytes in NumPy arrays: training takes thousands of sheets a second.

Possible questions: add 810 000, sort 100 000, reverse 11.9 million, copy 60 million, look up 9 * 10^17. One in 32 of
them, chosen by a hash of its bytes, is reserved for evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

WIDTH = 5
"""Bytes of the longest result."""

_DIGITS = np.frombuffer(b"0123456789", dtype=np.uint8)
_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", dtype=np.uint8)
_TENS = np.array([100, 10, 1])
_RESERVED_BITS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of problem. Items are the bytes that tell two questions of the kind apart."""

    name: str
    template: str
    """The prompt line: `@` is the label, every `#` one item."""
    draw: Callable[[np.random.Generator, int], Bytes]
    """`draw(rng, count)`: items [count, slots]."""
    solve: Callable[[Bytes], Bytes]
    """`solve(items)`: results [count, <= WIDTH], spaces at the left where they are shorter than WIDTH."""

    def lines(self, items: Bytes) -> Bytes:  # [count, slots] -> [count, len(template)]
        """The prompt lines of these questions; labels are still `@`."""
        template = np.frombuffer(self.template.encode(), dtype=np.uint8)
        lines = np.repeat(template[None], len(items), axis=0)
        lines[:, template == ord("#")] = items
        return lines


def _draw_numbers(rng: np.random.Generator, count: int, numbers: int) -> Bytes:
    """Digits of `numbers` numbers of 100..999 a row."""
    values = rng.integers(100, 1000, (count, numbers))
    digits: Bytes = _DIGITS[(values[..., None] // _TENS) % 10].reshape(count, 3 * numbers)
    return digits


def _draw_look_up(rng: np.random.Generator, count: int) -> Bytes:
    """The wanted key, then four keys with their values."""
    keys = rng.permuted(np.repeat(_LETTERS[None], count, axis=0), axis=1)[:, :4]
    wanted = keys[np.arange(count), rng.integers(0, 4, count)]
    pairs = np.concatenate((keys[..., None], _draw_numbers(rng, count, 4).reshape(count, 4, 3)), axis=2)
    return np.concatenate((wanted[:, None], pairs.reshape(count, 16)), axis=1)


def _solve_add(items: Bytes) -> Bytes:
    digits = items.reshape(-1, 2, 3).astype(np.int64) - ord("0")
    total = (digits @ _TENS).sum(axis=1)
    result: Bytes = _DIGITS[(total[:, None] // np.array([1000, 100, 10, 1])) % 10]
    result[total < 1000, 0] = ord(" ")
    return result


def _solve_look_up(items: Bytes) -> Bytes:
    pairs = items[:, 1:].reshape(-1, 4, 4)
    found = (pairs[:, :, 0] == items[:, :1]).argmax(axis=1)
    value: Bytes = pairs[np.arange(len(items)), found, 1:]
    return value


KINDS = (
    Kind(
        name="add",
        template="@) add ### + ###\n",
        draw=lambda rng, count: _draw_numbers(rng, count, 2),
        solve=_solve_add,
    ),
    Kind(
        name="sort",
        template="@) sort # # # # #\n",
        draw=lambda rng, count: _DIGITS[rng.integers(0, 10, (count, WIDTH))],
        solve=lambda items: np.sort(items, axis=1),
    ),
    Kind(
        name="reverse",
        template="@) reverse # # # # #\n",
        draw=lambda rng, count: _LETTERS[rng.integers(0, 26, (count, WIDTH))],
        solve=lambda items: items[:, ::-1],
    ),
    Kind(
        name="copy",
        template="@) copy # # # # #\n",
        draw=lambda rng, count: np.concatenate((_DIGITS, _LETTERS))[rng.integers(0, 36, (count, WIDTH))],
        solve=lambda items: items,
    ),
    Kind(
        name="look up",
        template="@) look up # in #=### #=### #=### #=###\n",
        draw=_draw_look_up,
        solve=_solve_look_up,
    ),
)


def draw_items(kind: Kind, rng: np.random.Generator, count: int, *, reserved: bool) -> Bytes:
    """Items of `count` questions, all reserved or none."""
    found = kind.draw(rng, 0)
    while len(found) < count:
        items = kind.draw(rng, count << _RESERVED_BITS if reserved else count + count // 16 + 1)
        found = np.concatenate((found, items[is_reserved(items) == reserved]))
    return found[:count]


def is_reserved(items: Bytes) -> npt.NDArray[np.bool_]:  # [count, slots] -> [count]
    """Whether each question belongs to the reserved part: the top bits of a multiplicative hash are zero."""
    powers = np.array([pow(1_000_003, slot, 1 << 64) for slot in range(items.shape[1])], dtype=np.uint64)
    mixed = (items.astype(np.uint64) * powers).sum(axis=1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    reserved: npt.NDArray[np.bool_] = (mixed >> np.uint64(64 - _RESERVED_BITS)) == 0
    return reserved
