"""`--watch`: a generation step by step, as a map of all tokens and the text so far.

Every state has a glyph of its own, so that nothing depends on colour; where a terminal cannot redraw, a few plain frames
are printed instead.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from rich.cells import cell_len
from rich.console import Group
from rich.live import Live
from rich.text import Text

from dllm_export.graphs.families import SpecialTokens
from dllm_export.runtime.generate import Frame
from dllm_export.runtime.tokenizer import Tokenizer
from dllm_export.tools.output import Output, printable

MAP_WIDTH = 64
MAX_WIDTH = 100
FRAME_SECONDS = 1 / 15
PLAIN_FRAMES = 8
"""Frames that are printed where a terminal cannot redraw."""


@dataclass(frozen=True, slots=True)
class Look:
    """How a state is drawn: its glyph (also in ASCII), its style, and its name in the legend."""

    glyph: str
    ascii: str
    style: str
    label: str

    @property
    def colour(self) -> str:
        """The style of the glyph itself, which needs no underline and would vanish in reverse."""
        return self.style.removesuffix(" underline").removesuffix(" reverse")


LOOKS: Mapping[str, Look] = {
    "masked": Look("░", "_", "bright_black", "masked"),
    "masked_fresh": Look("▒", "=", "cyan", "+ recomputed"),
    "decided": Look("·", ".", "", "decided"),
    "decided_fresh": Look("○", "o", "cyan underline", "+ recomputed"),
    "committed": Look("█", "#", "bold green reverse", "decided now"),
}
END = Look("■", "$", "", "end")
NEWLINE = Look("↵", "\\", "bright_black", "newline")


class Canvas:
    """Draws frames as text. Only the first sequence of a batch is drawn."""

    def __init__(self, tokenizer: Tokenizer | None, special: SpecialTokens, *, unicode: bool) -> None:
        self._tokenizer, self._special, self._unicode = tokenizer, special, unicode
        self._pieces: dict[int, str] = {}

    def header(self, frame: Frame, seconds: float) -> Text:
        """Step, kind of step and speed so far."""
        decided, count = int((frame.tokens != self._special.mask).sum()), frame.tokens.size
        speed = f"{np.isfinite(frame.confidence).sum() / seconds:.1f} tok/s" if seconds else ""
        parts = (f"step {frame.step}/{frame.steps}", frame.kind.replace("_", " "), f"{decided}/{count} decided", speed)
        line = Text("   ".join(part for part in parts if part), "bold")
        others = len(frame.tokens) - 1
        return line.append(f"   (sequence 1 of {others + 1})", "dim") if others else line

    def legend(self) -> Text:
        """What the glyphs mean."""
        line = Text()
        for look in (*LOOKS.values(), END):
            line.append(self._glyph(look), look.colour).append(f" {look.label}  ", "dim")
        return line

    def states(self, frame: Frame, committed: NDArray[np.bool_]) -> list[str]:
        """The name of every token's state; `committed` [R] is what was decided since the frame drawn before."""
        fresh = np.zeros_like(committed) if frame.recomputed is None else frame.recomputed[0]
        masked = frame.tokens[0] == self._special.mask
        committed = committed & ~masked  # a rule may have masked a row again
        return [
            "committed" if new else ("masked" if hidden else "decided") + ("_fresh" if again else "")
            for new, hidden, again in zip(committed, masked, fresh, strict=True)
        ]

    def map(self, states: list[str], width: int) -> list[Text]:
        """One glyph per token, always at the same place."""
        lines = []
        for start in range(0, len(states), width):
            line = Text()
            for state in states[start : start + width]:
                look = LOOKS[state]
                line.append(self._glyph(look), look.colour)
            lines.append(line)
        return lines

    def text(self, tokens: NDArray[np.int32], states: list[str], width: int) -> tuple[list[Text], int]:
        """The tokens as lines of at most `width` cells, and the line of the first token decided just now."""
        lines: list[Text] = [Text()]
        focus: int | None = None
        for token, state in zip(tokens.tolist(), states, strict=True):
            style = LOOKS[state].style
            for part in self._parts(token, state):
                if part != "\n" and lines[-1].cell_len + cell_len(part) > width:
                    lines.append(Text())
                if state == "committed" and focus is None:
                    focus = len(lines) - 1
                if part == "\n":
                    lines[-1].append(self._glyph(NEWLINE), style if state == "committed" else NEWLINE.style)
                    lines.append(Text())
                else:
                    lines[-1].append(part, style)
        return lines, focus or 0

    def _parts(self, token: int, state: str) -> Iterator[str]:
        """What a token adds to the text: pieces without line breaks, and line breaks."""
        if token == self._special.mask:
            yield self._glyph(LOOKS[state])
        elif token in (*self._special.ends, self._special.pad):
            yield self._glyph(END)
        else:
            for number, line in enumerate(self._piece(token).split("\n")):
                if number:
                    yield "\n"
                if line:
                    yield line

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            text = self._tokenizer.piece(token) if self._tokenizer else f"{token} "
            text = printable(text.replace("\r\n", "\n").replace("\t", "    "))
            self._pieces[token] = text if self._unicode else text.encode("ascii", "replace").decode()
        return self._pieces[token]

    def _glyph(self, look: Look) -> str:
        return look.glyph if self._unicode else look.ascii


class Scroll:
    """A part of the lines that moves only when it must."""

    def __init__(self) -> None:
        self._top = 0

    def crop(self, lines: list[Text], focus: int, height: int) -> list[Text]:
        """At most `height` lines, the one at `focus` among them."""
        if not self._top <= focus < self._top + height:
            self._top = focus - height // 2
        self._top = max(0, min(self._top, len(lines) - height))
        return lines[self._top : self._top + height]


class Watch:
    """Shows the frames of one generation on a console; a context manager."""

    def __init__(self, tokenizer: Tokenizer | None, special: SpecialTokens, console: Output) -> None:
        self._console = console
        self._canvas = Canvas(tokenizer, special, unicode=console.encoding.startswith("utf"))
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_live else None
        self._seconds, self._shown = 0.0, 0.0
        self._committed: NDArray[np.bool_] | None = None
        self._map, self._text, self._rows = Scroll(), Scroll(), 0

    def __enter__(self) -> Watch:
        if self._live:
            self._live.start()
            self._live.update(Text("preparing", "dim"), refresh=True)
        else:
            self._console.print(self._canvas.legend(), soft_wrap=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def show(self, frame: Frame) -> None:
        """Draw the frame, unless it follows the one before too closely; what it decided then shows in the next."""
        self._seconds += frame.seconds
        new = frame.committed[0] | frame.edited[0]
        self._committed = new if self._committed is None else self._committed | new
        if not self._is_due(frame):
            return
        states = self._canvas.states(frame, self._committed)
        width = min(self._console.width, MAX_WIDTH)
        map_width = min(width, MAP_WIDTH)
        head, cells = self._canvas.header(frame, self._seconds), self._canvas.map(states, map_width)
        shown = frame.tokens if frame.drafts is None else frame.drafts
        lines, focus = self._canvas.text(shown[0], states, width)
        if self._live:
            newest = states.index("committed") // map_width if "committed" in states else 0
            self._live.update(Group(*self._fit(head, cells, newest, lines, focus)), refresh=True)
        else:
            for line in (Text(), head, *cells, Text(), *lines):
                self._console.print(line, soft_wrap=True)
        self._committed, self._shown = None, time.perf_counter()

    def _is_due(self, frame: Frame) -> bool:
        if frame.step in (1, frame.steps):
            return True
        if self._live:
            return time.perf_counter() - self._shown >= FRAME_SECONDS
        return frame.step % max(1, frame.steps // PLAIN_FRAMES) == 0

    def _fit(self, head: Text, cells: list[Text], newest: int, lines: list[Text], focus: int) -> list[Text]:
        """What the terminal has room for. The height never shrinks, so that nothing jumps."""
        height = self._console.height
        shown = self._map.crop(cells, newest, max(1, height // 3))
        room = max(1, height - len(shown) - 5)
        body = self._text.crop(lines, focus, room)
        self._rows = max(self._rows, len(body))
        body += [Text()] * (min(self._rows, room) - len(body))
        rows = [head, *shown, Text(), *body, Text(), self._canvas.legend()]
        for row in rows:
            row.no_wrap, row.overflow = True, "crop"
        return rows
