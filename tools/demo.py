"""`dllm-export demo`: the whole path with a small trained model, from checkpoint to graded answers."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.text import Text

from dllm_export.errors import UsageError
from dllm_export.runtime.model import DiffusionLM, Generation
from dllm_export.runtime.options import GenerationOptions, option
from dllm_export.runtime.policies import CachePolicy, DllmCache, NoCache
from dllm_export.runtime.session import SessionOptions
from dllm_export.tools.flags import Command, Flag, describe, from_fields, shared_flags
from dllm_export.tools.generate_text import count_tokens, denoise
from dllm_export.tools.output import make_table, plural, print_json, print_note, print_table, printable, show_progress
from dllm_export.tools.verify_bundle import require_passed
from dllm_export.tools.worksheets import CELL, Worksheet, grade, held_out

if TYPE_CHECKING:
    from dllm_export.exporter.verify import Report

MODEL = Path(__file__).resolve().parents[1] / "models" / "worksheets-4m"
OUTPUT = Path("build/demo")
POLICIES: tuple[CachePolicy, ...] = (
    NoCache(),
    DllmCache(prompt_interval=25, response_interval=5, update_ratio=0.25),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """How much work the demo does."""

    sheets: int = option(8, "worksheets to answer; they run as one batch")
    problems: int = option(6, "problems on each, 6 to 16")
    seed: int = option(7, "which worksheets; none of them was trained on")

    def __post_init__(self) -> None:
        if self.sheets < 1 or self.seed < 0:
            raise UsageError("--sheets must be at least 1 and --seed at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a policy did with the worksheets."""

    policy: str
    settings: dict[str, object]
    tokens_per_second: float
    seconds: float
    passes: int
    partial_share: float
    agreement: float
    """Share of tokens equal to those without a cache."""
    right: int
    problems: int
    answers: tuple[str, ...]


@click.command("demo", cls=Command)
@click.option("--model", cls=Flag, type=click.Path(path_type=Path), metavar="DIR", help="the demo's model directory")
@click.option(
    "-o",
    "--output",
    cls=Flag,
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    default=OUTPUT,
    show_default=True,
    help="bundle to write; only the default place is overwritten",
)
@from_fields(DemoOptions, "options", "Options")
@from_fields(SessionOptions, "session", "Provider")
@shared_flags
def command(model: Path | None, output: Path, options: DemoOptions, session: SessionOptions, as_json: bool) -> None:
    """Export, verify and run the small trained model that comes with the repository.

    The model answers worksheets (sums, sorting, look-ups) whose answers can be checked, without and with the feature
    cache. Takes less than a minute on two cores.
    """
    start = time.perf_counter()
    sheets = held_out(options.sheets, options.seed, options.problems)
    report = make_bundle(find_model(model), output, session)
    with DiffusionLM.from_pretrained(output, session) as opened:
        scores = answer_sheets(opened, sheets)
    prompt = output.with_name(f"{output.name}.prompt.txt")
    prompt.write_text(sheets[0].prompt, encoding="utf-8")
    seconds = time.perf_counter() - start
    if as_json:
        example = {"prompt": sheets[0].prompt, "answer": sheets[0].answer}
        print_json({"bundle": output, "verify": report, "policies": scores, "worksheet": example, "seconds": seconds})
        return
    print_scores(scores)
    print_sheet(sheets[0], scores)
    print_commands(output, prompt, CELL * options.problems)
    print_note(f"all of it took {seconds:.0f} s")


def find_model(given: Path | None) -> Path:
    """The model directory: the given one or the repository's."""
    if given is None and not MODEL.is_dir():
        raise UsageError(
            f"the demo's model comes with the repository and is not at {MODEL}: clone the repository and run "
            f"'make demo' there, or pass --model DIR"
        )
    return given or MODEL


def make_bundle(model: Path, output: Path, session: SessionOptions) -> Report:
    """Export and verify; returns the report of a bundle that passed."""
    from dllm_export.exporter.options import ExportOptions
    from dllm_export.exporter.pipeline import export
    from dllm_export.exporter.verify import verify

    start = time.perf_counter()
    with show_progress() as progress:
        bundle = export(model, output, ExportOptions(force=output == OUTPUT), progress)
    print_note(f"exported {model.name} to {output}: {time.perf_counter() - start:.1f} s")
    start = time.perf_counter()
    with show_progress() as progress:
        report = verify(bundle, session, progress)
    require_passed(report)
    checks = plural(len(report.checks), "check")
    print_note(f"verified against the checkpoint and PyTorch: {checks} passed, {time.perf_counter() - start:.1f} s")
    return report


def answer_sheets(model: DiffusionLM, sheets: Sequence[Worksheet]) -> list[Score]:
    """Every policy on the same worksheets; the first is the one that the others are compared with."""
    prompts = [model.encode(sheet.prompt) for sheet in sheets]
    if [len(prompt) for prompt in prompts] != [len(sheet.prompt) for sheet in sheets]:
        raise UsageError("the demo grades answers by byte, so that it needs a model whose tokens are bytes")
    options = GenerationOptions(gen_length=CELL * len(sheets[0].problems))
    request = model.continuation(prompts, options)
    batches: list[list[Generation]] = []
    scores = []
    for policy in POLICIES:
        batches.append(denoise(model, request, options, policy, watch=False))
        scores.append(score(policy, batches[-1], batches[0], sheets))
        print_note(f"answered {plural(len(sheets), 'worksheet')} with policy {policy.name}: {scores[-1].seconds:.1f} s")
    return scores


def score(
    policy: CachePolicy, batch: Sequence[Generation], baseline: Sequence[Generation], sheets: Sequence[Worksheet]
) -> Score:
    """Speed beside agreement and accuracy."""
    grades = [right for one, sheet in zip(batch, sheets, strict=True) for right in grade(sheet, one.text)]
    pairs = [
        pair for one, other in zip(batch, baseline, strict=True) for pair in zip(one.tokens, other.tokens, strict=True)
    ]
    return Score(
        policy=policy.name,
        settings=describe(policy),
        tokens_per_second=count_tokens(batch) / batch[0].seconds,
        seconds=batch[0].seconds,
        passes=batch[0].passes,
        partial_share=batch[0].partial_share,
        agreement=sum(a == b for a, b in pairs) / len(pairs),
        right=sum(grades),
        problems=len(grades),
        answers=tuple(one.text for one in batch),
    )


def print_scores(scores: Sequence[Score]) -> None:
    """One line per policy."""
    numbers = ("tokens/s", "passes", "partial steps", "agreement", "problems right")
    table = make_table("policy", *numbers, right=numbers)
    for one in scores:
        table.add_row(
            " ".join([one.policy, *("/".join(map(str, list(one.settings.values())[:3])),)]).strip(),
            f"{one.tokens_per_second:.0f}",
            str(one.passes),
            f"{one.partial_share:.0%}",
            f"{one.agreement:.1%}",
            f"{one.right} of {one.problems} ({one.right / one.problems:.0%})",
        )
    click.echo()
    print_table(table)


def print_sheet(sheet: Worksheet, scores: Sequence[Score]) -> None:
    """The first worksheet with the answers of every policy."""
    table = make_table("worksheet 1", "right answer", *(one.policy for one in scores))
    lines = sheet.prompt.splitlines()[1:-1]
    for place, (line, cell) in enumerate(zip(lines, sheet.cells, strict=True)):
        answers = [one.answers[0][place * CELL : (place + 1) * CELL] for one in scores]
        marks = [Text(show_answer(answer), "green" if answer == cell else "red") for answer in answers]
        for mark, answer in zip(marks, answers, strict=True):
            mark.append("" if answer == cell else "  wrong")
        table.add_row(line, cell.strip(), *marks)
    click.echo()
    print_table(table)


def show_answer(cell: str) -> str:
    """What the model wrote for one problem, in one line."""
    return " ".join(printable(cell).split()) or "-"


def program() -> str:
    """How this command is called here."""
    if shutil.which("dllm-export"):
        return "dllm-export"
    return shlex.quote(sys.argv[0]) if Path(sys.argv[0]).name == "dllm-export" else "python -m dllm_export.tools.cli"


def print_commands(bundle: Path, prompt: Path, length: int) -> None:
    """What to try next, ready to paste."""
    run, place, file = program(), shlex.quote(str(bundle)), shlex.quote(str(prompt))
    click.echo(
        f"""
Watch the cache at work, look into the bundle, see what else this machine can run:
  {run} generate {place} --prompt-file {file} --gen-length {length} --policy dllm-cache --watch
  {run} inspect {place}
  {run} doctor {place}"""
    )
