"""The canvas of `--watch`: every state told apart without colour, lines at their place, nothing wider than the terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dllm_export.graphs.families import SpecialTokens
from dllm_export.runtime.generate import Frame
from dllm_export.runtime.tokenizer import Tokenizer
from dllm_export.tools import watch
from dllm_export.tools.demo_layouts import END, MASK, byte_tokenizer
from dllm_export.tools.output import Output
from dllm_export.tools.watch import END as END_LOOK
from dllm_export.tools.watch import LOOKS, NEWLINE, Canvas, Scroll, Watch

SPECIAL = SpecialTokens(mask=MASK, eos=END, pad=END)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    byte_tokenizer().save(str(file))
    return Tokenizer(file, None, "")


@pytest.fixture
def canvas(tokenizer: Tokenizer) -> Canvas:
    return Canvas(tokenizer, SPECIAL, unicode=True)


def make_frame(
    text: str,
    *,
    committed: Sequence[int] = (),
    recomputed: Sequence[int] = (),
    step: int = 1,
    steps: int = 4,
    batch: int = 1,
) -> Frame:
    """A frame whose response is `text`; `?` is a mask and `$` the end of text."""
    tokens = np.array([[{"?": MASK, "$": END}.get(c, ord(c)) for c in text]] * batch, np.int32)
    new, fresh = np.zeros(tokens.shape, np.bool_), np.zeros(tokens.shape, np.bool_)
    new[:, list(committed)], fresh[:, list(recomputed)] = True, True
    return Frame(
        step=step,
        steps=steps,
        block=0,
        kind="refresh_response",
        tokens=tokens,
        committed=new,
        edited=np.zeros_like(new),
        confidence=np.where(tokens == MASK, np.nan, 0.5),
        recomputed=fresh,
        passes=step,
        engine_seconds=0.1,
        strategy_seconds=0.1,
        seconds=0.5,
    )


def draw(canvas: Canvas, frame: Frame, width: int = 80) -> list[str]:
    """The text of a frame as plain lines."""
    states = canvas.states(frame, frame.committed[0])
    return [line.plain for line in canvas.text(frame.tokens[0], states, width)[0]]


def test_every_state_has_a_glyph_of_its_own() -> None:
    looks = (*LOOKS.values(), END_LOOK, NEWLINE)
    assert len({look.glyph for look in looks}) == len({look.ascii for look in looks}) == len(looks)
    assert all(look.ascii.isascii() for look in looks)


def test_the_legend_explains_every_state(canvas: Canvas) -> None:
    assert canvas.legend().plain.split("  ")[:-1] == [
        *("░ masked", "▒ + recomputed", "· decided", "○ + recomputed", "█ decided now", "■ end"),
    ]


def test_the_map_has_one_cell_per_token_at_a_fixed_place(canvas: Canvas) -> None:
    frame = make_frame("a?b?c?d", committed=[2], recomputed=[0, 1, 2])
    lines = canvas.map(canvas.states(frame, frame.committed[0]), 4)
    assert [line.plain for line in lines] == ["○▒█░", "·░·"]


def test_text_breaks_where_the_tokens_break(canvas: Canvas) -> None:
    assert draw(canvas, make_frame("A 9\nB?\n?$$")) == ["A 9↵", "B░↵", "░■■"]


def test_text_never_exceeds_the_width(canvas: Canvas) -> None:
    assert draw(canvas, make_frame("abcdef??"), width=3) == ["abc", "def", "░░"]


def test_control_characters_do_not_reach_the_terminal(canvas: Canvas) -> None:
    assert draw(canvas, make_frame("a\x1b[2J\tb")) == ["a\N{REPLACEMENT CHARACTER}[2J    b"]


def test_without_a_tokenizer_ids_are_shown() -> None:
    assert draw(Canvas(None, SPECIAL, unicode=False), make_frame("a?")) == ["97 _"]


def test_the_header_has_step_kind_and_speed(canvas: Canvas) -> None:
    header = canvas.header(make_frame("ab??", step=2), 1.0).plain
    assert header == "step 2/4   refresh response   2/4 decided   2.0 tok/s"
    assert canvas.header(make_frame("ab??", batch=3), 1.0).plain.endswith("(sequence 1 of 3)")


def test_a_scroll_moves_only_when_it_must(canvas: Canvas) -> None:
    lines = [line for row in range(10) for line in canvas.text(np.array([48 + row]), ["decided"], 9)[0]]
    scroll = Scroll()
    shown = ["".join(line.plain for line in scroll.crop(lines, focus, 4)) for focus in (0, 3, 4, 5, 9, 0)]
    assert shown == ["0123", "0123", "2345", "2345", "6789", "0123"]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_is_redrawn_and_left_clean(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(watch, "FRAME_SECONDS", 0.0)
    stream = Terminal()
    with Watch(tokenizer, SPECIAL, Output(file=stream, force_terminal=True, width=40, height=12)) as shown:
        for step in range(1, 5):
            shown.show(make_frame("ab\n" * 40 + "?" * 200, committed=[step], step=step))
    text = stream.getvalue()
    assert "step 4/4" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor must come back"
    frames = text.split("step ")[1:]
    assert all(frame.count("\n") < 12 for frame in frames), "a frame is higher than the terminal"


def test_frames_in_quick_succession_keep_what_was_decided(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(watch, "FRAME_SECONDS", 1000.0)
    stream = Terminal()
    with Watch(
        tokenizer, SPECIAL, Output(file=stream, force_terminal=True, no_color=True, width=80, height=24)
    ) as shown:
        for step in range(1, 5):
            shown.show(make_frame("a" * step + "?" * (4 - step), committed=[step - 1], step=step))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "step 2/4" not in text
    assert "█···" not in text
    assert "·███" in text


def test_a_pipe_gets_plain_frames_every_few_steps(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with (
        (tmp_path / "log").open("w", encoding="utf-8") as file,
        Watch(tokenizer, SPECIAL, Output(file=file, width=80)) as shown,
    ):
        for step in range(1, 65):
            shown.show(make_frame("ab?", step=step, steps=64))
    text = (tmp_path / "log").read_text(encoding="utf-8")
    assert "\x1b" not in text
    assert [line.split("/")[0] for line in text.splitlines() if line.startswith("step")] == [
        f"step {step}" for step in (1, 8, 16, 24, 32, 40, 48, 56, 64)
    ]


def test_a_stream_without_unicode_gets_ascii(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with (
        (tmp_path / "log").open("w", encoding="ascii") as file,
        Watch(tokenizer, SPECIAL, Output(file=file, width=80)) as shown,
    ):
        shown.show(make_frame("\xe9?"))
    assert "._" in (tmp_path / "log").read_text(encoding="ascii")


def test_a_row_that_was_masked_again_shows_as_masked(canvas: Canvas) -> None:
    frame = make_frame("a?", committed=[0, 1])
    assert canvas.states(frame, frame.committed[0]) == ["committed", "masked"]
