"""The demo model's work: its format, its answers and the separation of held-out questions."""

from __future__ import annotations

import re

import numpy as np
import pytest

from dllm_export.errors import UsageError
from dllm_export.tools.problems import KINDS, Kind, is_reserved
from dllm_export.tools.worksheets import CELL, Problem, Worksheet, draw_sheets, grade, held_out, training_stream


def solve(problem: Problem) -> str:
    """The answer worked out from the text of the question, without the generator's arrays."""
    _, *items = problem.question.split()
    if problem.kind == "look up":
        pairs = dict(item.split("=") for item in items[3:])
        return pairs[items[1]]
    if problem.kind == "add":
        return str(int(items[0]) + int(items[2]))
    if problem.kind == "sort":
        items.sort()
    if problem.kind == "reverse":
        items.reverse()
    return "".join(items)


@pytest.fixture(scope="module")
def sheets() -> tuple[Worksheet, ...]:
    return held_out(200, seed=5)


def test_prompts_and_answers_have_the_promised_lengths(sheets: tuple[Worksheet, ...]) -> None:
    assert {len(sheet.problems) for sheet in sheets} == set(range(6, 17))
    for sheet in sheets:
        assert 150 <= len(sheet.prompt.encode()) <= 400
        assert 48 <= len(sheet.answer.encode()) == CELL * len(sheet.problems) <= 128
        assert all(len(cell) == CELL and cell.endswith("\n") for cell in sheet.cells)


def test_every_answer_is_the_solution_of_its_question(sheets: tuple[Worksheet, ...]) -> None:
    problems = [problem for sheet in sheets for problem in sheet.problems]
    assert {problem.kind for problem in problems} == {kind.name for kind in KINDS}
    assert [problem.answer for problem in problems] == [solve(problem) for problem in problems]


@pytest.mark.parametrize("problems", [6, 11, 16])
def test_a_training_batch_holds_the_bytes_of_its_worksheets(problems: int) -> None:
    sheets = draw_sheets(training_stream(3), 64, problems)
    for batch in (sheets, sheets.cut(sheets.longest)):
        for row in range(64):
            sheet = batch.worksheet(row)
            text = (sheet.prompt + sheet.answer).encode()
            assert bytes(batch.tokens[row, batch.start[row] :]) == text
            assert not batch.tokens[row, : batch.start[row]].any()
            assert [problem.answer for problem in sheet.problems] == [solve(problem) for problem in sheet.problems]


def test_labels_stand_nowhere_else_on_a_sheet(sheets: tuple[Worksheet, ...]) -> None:
    for sheet in sheets:
        labels = [letter for letter in sheet.prompt if "A" <= letter <= "P"]
        assert labels == [chr(ord("A") + place) for place in range(len(sheet.problems))]


def test_grading_finds_a_wrong_byte_in_its_cell_only(sheets: tuple[Worksheet, ...]) -> None:
    sheet = sheets[0]
    assert grade(sheet, sheet.answer) == (True,) * len(sheet.problems)
    for place in (0, CELL, 2 * CELL - 1, 2 * CELL - 2):
        wrong = sheet.answer[:place] + "#" + sheet.answer[place + 1 :]
        assert [number for number, right in enumerate(grade(sheet, wrong)) if not right] == [place // CELL]
    assert not any(grade(sheet, ""))


def test_held_out_sheets_depend_on_the_seed_alone(sheets: tuple[Worksheet, ...]) -> None:
    assert held_out(20, seed=5) == sheets[:20]
    assert held_out(20, seed=6) != sheets[:20]
    assert {len(sheet.problems) for sheet in held_out(3, seed=5, problems=9)} == {9}


def test_held_out_sheets_may_begin_with_the_same_problems() -> None:
    plain, shared = held_out(6, 5, 9), held_out(6, 5, 9, 4)
    assert len({sheet.problems[:4] for sheet in shared}) == 1
    assert [sheet.problems[4:] for sheet in shared] == [sheet.problems[4:] for sheet in plain]
    for sheet in shared:
        assert sheet.prompt.startswith(shared[0].start(4))
        assert grade(sheet, sheet.answer) == (True,) * 9
        assert all(problem.answer == look_up(problem.question) for problem in sheet.problems[:4])


def look_up(question: str) -> str:
    """'look up b in a=1 b=2' -> 2."""
    wanted, pairs = question.removeprefix("look up ").split(" in ")
    return dict(pair.split("=") for pair in pairs.split())[wanted]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("reserved", [False, True])
def test_held_out_questions_are_never_trained_on(kind: Kind, reserved: bool) -> None:
    sheets = draw_sheets(np.random.default_rng(0), 100, 8, reserved=reserved)
    letters = kind.template.rstrip("\n")
    pattern = re.compile("".join({"@": ".", "#": "(.)"}.get(letter, re.escape(letter)) for letter in letters))
    lines = (line for row in range(100) for line in sheets.worksheet(row).prompt.splitlines())
    items = ["".join(found.groups()) for found in map(pattern.fullmatch, lines) if found]
    assert len(items) > 20
    assert (is_reserved(np.array([list(item.encode()) for item in items], dtype=np.uint8)) == reserved).all()


def test_a_worksheet_of_too_many_problems_is_refused() -> None:
    with pytest.raises(UsageError, match="6 to 16 problems, got 17"):
        draw_sheets(training_stream(0), 1, 17)
