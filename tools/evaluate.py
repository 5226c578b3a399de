"""`dllm-export evaluate`: answers and speed of every cache policy with every decoding rule, on the same tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import click

from dllm_export.errors import UsageError
from dllm_export.runtime.generate import check_strategies
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions, option
from dllm_export.runtime.plugins import find_installed
from dllm_export.runtime.policies import CachePolicy
from dllm_export.runtime.session import SessionOptions
from dllm_export.runtime.transfers import Transfer
from dllm_export.tools.flags import Command, describe, from_fields, report_flag, shared_flags
from dllm_export.tools.generate_text import count_tokens
from dllm_export.tools.output import encode_json, make_table, print_json, print_table, show_progress, write_report
from dllm_export.tools.worksheets import grade, held_out

QUANTILE = 1.959964
"""Of the normal distribution: intervals hold the true share in 95 of 100 cases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """Which tasks, and what to answer them with."""

    suite: str = option("demo", "demo: the trained model's worksheets; or a JSONL file of prompt and answer")
    policies: str = option("all", "cache policies with a comma between, or all that need no random order")
    transfers: str = option("all", "decoding rules with a comma between, or all")
    sheets: int = option(40, "worksheets of the demo suite; none of them was trained on")
    problems: int = option(12, "problems on each worksheet, 6 to 16")
    gen_length: int | None = option(None, "tokens to generate for each line of a JSONL suite")
    block_length: int | None = option(None, "semi-autoregressive block; default: the whole response")
    seed: int = option(7, "which worksheets")

    def __post_init__(self) -> None:
        if self.sheets < 1 or self.seed < 0:
            raise UsageError("--sheets must be at least 1 and --seed at least 0")


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt, how much to write, and how its answer is graded."""

    prompt: str
    length: int | None
    grade: Callable[[str], Sequence[bool]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """All tasks with one policy and one rule, one after the other. `low` and `high` bound the share of right answers."""

    policy: str
    policy_settings: Mapping[str, Any]
    transfer: str
    transfer_settings: Mapping[str, Any]
    right: int
    asked: int
    low: float
    high: float
    tokens: int
    passes: int
    seconds: float

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Outcomes under the settings that all of them share."""

    settings: Mapping[str, Any]
    outcomes: Sequence[Outcome]


@click.command("evaluate", cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@from_fields(EvaluateOptions, "options", "Options")
@from_fields(SessionOptions, "session", "Provider")
@report_flag
@shared_flags
def command(
    bundle: Path, options: EvaluateOptions, session: SessionOptions, report: Path | None, as_json: bool
) -> None:
    """Compare cache policies and decoding rules by speed and by right answers.

    Every policy runs with every rule, each at its default settings, on the same tasks, one at a time. With --report the
    outcome of each pair is written as soon as it is known, and pairs that are in the file already are not run again.
    """
    known = find_installed()
    # A policy that needs an order drawn beforehand does not go with the order by confidence that tasks are answered in.
    every = [name for name, kind in known.policies.kinds.items() if not getattr(kind, "needs_upcoming", False)]
    policies = [known.policies.find(name)() for name in split_names(options.policies, every)]
    rules = [known.transfers.find(name)() for name in split_names(options.transfers, known.transfers.kinds)]
    for policy, rule in product(policies, rules):
        check_strategies(GenerationOptions(), policy, rule)
    tasks = load_tasks(options)
    with DiffusionLM.from_pretrained(bundle, session) as lm:
        settings = describe_evaluation(lm, options, session)
        outcomes = load_outcomes(report, settings)
        done = {(outcome.policy, outcome.transfer) for outcome in outcomes}
        pairs = [pair for pair in product(policies, rules) if (pair[0].name, pair[1].name) not in done]
        with show_progress() as progress:
            for number, (policy, rule) in enumerate(pairs):

                def advance(share: float, number: int = number, name: str = f"{policy.name}, {rule.name}") -> None:
                    progress(name, int(100 * (number + share)), 100 * len(pairs))

                outcomes.append(answer_tasks(lm, tasks, policy, rule, options, advance))
                write_report(report, Evaluation(settings=settings, outcomes=outcomes))
    evaluation = Evaluation(settings=settings, outcomes=outcomes)
    if as_json:
        print_json(evaluation)
    else:
        print_outcomes(outcomes)


def split_names(text: str, known: Iterable[str]) -> list[str]:
    """Names with a comma between; `all` stands for every known one."""
    names = list(known) if text.strip() == "all" else [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(f"nothing to evaluate: name some of {', '.join(known)}, or all")
    return names


def load_tasks(options: EvaluateOptions) -> list[Task]:
    """The suite's tasks, read and checked before the model is opened."""
    if options.suite == "demo":
        sheets = held_out(options.sheets, options.seed, options.problems)
        return [Task(sheet.prompt, len(sheet.answer), partial(grade, sheet)) for sheet in sheets]
    path = Path(options.suite)
    if not path.is_file():
        raise UsageError(f"--suite is {options.suite!r}, expected demo or a JSONL file of prompt and answer")
    tasks = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            tasks.append(read_task(f"{path.name}, line {number}", line, options.gen_length))
    if not tasks:
        raise UsageError(f"{path.name} has no line with a prompt and an answer")
    return tasks


def read_task(place: str, line: str, length: int | None) -> Task:
    """One line of a JSONL suite: right is the answer's exact text, but for space around it."""
    try:
        record = json.loads(line)
        prompt, answer = record["prompt"], record["answer"]
    except (ValueError, KeyError, TypeError):
        raise UsageError(f'{place} is not like {{"prompt": "...", "answer": "..."}}') from None
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise UsageError(f"{place}: prompt and answer must be texts")
    return Task(prompt, length, lambda text: (text.strip() == answer.strip(),))


def describe_evaluation(lm: DiffusionLM, options: EvaluateOptions, session: SessionOptions) -> dict[str, Any]:
    """What makes two outcomes comparable; names that were asked for are not part of it."""
    own = {name: value for name, value in describe(options).items() if name not in ("policies", "transfers")}
    settings = {"bundle": lm.bundle.manifest.digest, "options": own, "session": describe(session)}
    plain: dict[str, Any] = json.loads(encode_json(settings, -1))
    return plain


def load_outcomes(report: Path | None, settings: Mapping[str, Any]) -> list[Outcome]:
    """Outcomes of an earlier run with these settings; a report of other settings is refused and not overwritten."""
    if report is None or not report.exists():
        return []
    try:
        found = json.loads(report.read_text(encoding="utf-8"))
        outcomes = [Outcome(**outcome) for outcome in found["outcomes"]]
        same = found["settings"] == settings
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{report} is not a report of this command: name another file, or delete it") from None
    if not same:
        raise UsageError(
            f"{report} was measured with other settings or another bundle: name another file, or delete it"
        )
    return outcomes


def answer_tasks(
    lm: DiffusionLM,
    tasks: Sequence[Task],
    policy: CachePolicy,
    rule: Transfer,
    options: EvaluateOptions,
    advance: Callable[[float], None],
) -> Outcome:
    """Every task once; the first also runs before the clock, since sessions prepare a step when they first meet it."""
    right = asked = tokens = passes = 0
    seconds = 0.0
    for number, task in enumerate([tasks[0], *tasks]):
        given = GenerationOptions(gen_length=task.length, block_length=options.block_length)
        result = lm.run(lm.continuation([lm.encode(task.prompt)], given), given, policy, rule)[0]
        if number == 0:
            continue
        marks = task.grade(result.text)
        right, asked = right + sum(marks), asked + len(marks)
        tokens, passes, seconds = tokens + count_tokens([result]), passes + result.passes, seconds + result.seconds
        advance(number / len(tasks))
    low, high = wilson_interval(right, asked)
    return Outcome(
        policy=policy.name,
        policy_settings=describe(policy),
        transfer=rule.name,
        transfer_settings=describe(rule),
        right=right,
        asked=asked,
        low=low,
        high=high,
        tokens=tokens,
        passes=passes,
        seconds=seconds,
    )


def wilson_interval(right: int, asked: int) -> tuple[float, float]:
    """Bounds of a share (Wilson 1927), which stay within 0 and 1 and are honest near both."""
    share, square = right / asked, QUANTILE**2 / asked
    centre, spread = share + square / 2, QUANTILE * math.sqrt(share * (1 - share) / asked + square / asked / 4)
    return max(0.0, (centre - spread) / (1 + square)), min(1.0, (centre + spread) / (1 + square))


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    """The frontier: fastest first, each speed beside its answers."""
    numbers = ("tokens/s", "tokens/pass", "right", "95 % interval")
    table = make_table("policy", "rule", *numbers, right=numbers)
    for outcome in sorted(outcomes, key=lambda outcome: -outcome.speed):
        table.add_row(
            outcome.policy,
            outcome.transfer,
            f"{outcome.speed:.0f}",
            f"{outcome.tokens / outcome.passes:.2f}",
            f"{outcome.right / outcome.asked:.1%}",
            f"{outcome.low:.1%} to {outcome.high:.1%}",
        )
    print_table(table)
