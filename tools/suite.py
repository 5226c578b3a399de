"""Tasks with right answers: the trained model's worksheets, or a file of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dllm_export.errors import UsageError
from dllm_export.tools.worksheets import grade, held_out


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt, how much to write, and how its answer is graded."""

    prompt: str
    length: int | None
    grade: Callable[[str], Sequence[bool]]


def make_worksheets(sheets: int, seed: int, problems: int, shared: int = 0) -> list[Task]:
    """Worksheets that the demo model was not trained on; the first `shared` problems are those of all of them."""
    drawn = held_out(sheets, seed, problems, shared)
    return [Task(sheet.prompt, len(sheet.answer), partial(grade, sheet)) for sheet in drawn]


def read_suite(path: Path, length: int | None) -> list[Task]:
    """The tasks of a JSONL file, `length` tokens for each answer."""
    if not path.is_file():
        raise UsageError(f"--suite is {str(path)!r}, expected demo or a JSONL file of prompt and answer")
    tasks = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            tasks.append(read_task(f"{path.name}, line {number}", line, length))
    if not tasks:
        raise UsageError(f"{path.name} has no line with a prompt and an answer")
    return tasks


def read_task(place: str, line: str, length: int | None) -> Task:
    """One line of a suite: right is the answer's exact text, but for space around it."""
    try:
        record = json.loads(line)
        prompt, answer = record["prompt"], record["answer"]
    except (ValueError, KeyError, TypeError):
        raise UsageError(f'{place} is not like {{"prompt": "...", "answer": "..."}}') from None
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise UsageError(f"{place}: prompt and answer must be texts")
    return Task(prompt, length, lambda text: (text.strip() == answer.strip(),))
