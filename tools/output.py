"""What the commands print: results to stdout; notes, progress and errors to stderr, and those only where one reads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from dllm_export.errors import UsageError

Report = Callable[[str, int, int], None]
"""Called with what is being done, the step and the number of steps."""

PIPED_WIDTH = 120


class Output(Console):
    """A console that leaves a closed pipe to `main`."""

    @property
    def is_live(self) -> bool:
        """Whether lines can be redrawn: a terminal, and not one without a cursor."""
        return self.file.isatty() and not self.is_dumb_terminal

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def results() -> Output:
    """The console on stdout."""
    return Output(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False, markup=False, emoji=False)


def notes() -> Output:
    """The console on stderr."""
    width = None if sys.stderr.isatty() else PIPED_WIDTH
    return Output(stderr=True, width=width, highlight=False, markup=False, emoji=False)


def on_terminal() -> bool:
    """Whether a person reads stdout."""
    return sys.stdout.isatty()


def print_note(text: str, style: str = "dim") -> None:
    """A line on stderr."""
    notes().print(Text(printable(text), style))


def print_warning(text: str) -> None:
    """`warning: ...` on stderr."""
    notes().print(Text.assemble(("warning: ", "yellow"), printable(text)), soft_wrap=True)


def print_error(text: str) -> None:
    """`error: ...` on stderr."""
    notes().print(Text.assemble(("error: ", "bold red"), printable(text)), soft_wrap=True)


def encode_json(value: object, indent: int) -> str:
    """JSON of dataclasses, msgspec structs and plain values; nan becomes null."""
    return msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=indent).decode()


def print_json(value: object) -> None:
    """One JSON document on stdout: in one line, but laid out on a terminal."""
    click.echo(encode_json(value, 2 if on_terminal() else -1))


def write_report(path: Path | None, value: object) -> None:
    """Write JSON to a file; without a path do nothing."""
    if path is None:
        return
    write_text(path, encode_json(value, 2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a result to a file."""
    try:
        path.write_text(text, encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UsageError(f"cannot write the report to {path}: {error.strerror}") from None


def print_result_text(text: str) -> None:
    """Generated text on stdout: exact when piped, without control characters on a terminal."""
    click.echo(printable(text) if on_terminal() else text, nl=not text.endswith("\n"))


def printable(text: str) -> str:
    """The text with every character that could steer a terminal replaced."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def make_table(*columns: str, right: Sequence[str] = ()) -> Table:
    """A table without frames; the columns named in `right` hold numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def print_pairs(pairs: Sequence[tuple[str, object]]) -> None:
    """Names and values in two columns on stdout."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(name, printable(str(value)))
    print_table(table)


def print_table(table: Table) -> None:
    """A table on stdout; without trailing spaces where no terminal reads it."""
    console = results()
    if console.is_live:
        console.print(table)
        return
    with console.capture() as capture:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


@contextmanager
def show_progress() -> Iterator[Report]:
    """A callback that moves a bar on stderr; on anything but a terminal it stays silent."""
    console = notes()
    if not console.is_live:
        yield lambda what, step, steps: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda what, step, steps: progress.update(task, description=what, completed=step, total=steps)


def format_bytes(size: float) -> str:
    """1234567 -> 1.2 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def plural(count: int, one: str, many: str = "") -> str:
    """1 token, 2 tokens."""
    return f"{count} {one if count == 1 else many or one + 's'}"
