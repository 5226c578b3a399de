"""`dllm-export evaluate`: answers and speed of every cache policy with every decoding rule, on the same tasks."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from dllm_export.errors import IncompatibleError, StrategyError, UsageError
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions, option
from dllm_export.runtime.plugins import Strategies, find_installed
from dllm_export.runtime.policies import CachePolicy
from dllm_export.runtime.request import Request
from dllm_export.runtime.session import SessionOptions
from dllm_export.runtime.transfers import Transfer
from dllm_export.tools.flags import Command, Flag, check_report, describe, from_fields, report_flag, shared_flags
from dllm_export.tools.frontier import (
    Evaluation,
    Outcome,
    Refusal,
    load_outcomes,
    print_evaluation,
    save_evaluation,
    wilson_interval,
)
from dllm_export.tools.generate_text import count_tokens
from dllm_export.tools.machine import Others, describe_machine, pip_line
from dllm_export.tools.output import encode_json, print_json, print_warning, show_progress
from dllm_export.tools.suite import Task, make_worksheets, read_suite


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """Which tasks, and what to answer them with."""

    suite: str = option("demo", "demo: the trained model's worksheets; or a JSONL file of prompt and answer")
    policies: str = option("all", "cache policies with a comma between, or all")
    transfers: str = option("all", "decoding rules with a comma between, or all")
    sheets: int = option(40, "worksheets of the demo suite; none of them was trained on")
    problems: int = option(12, "problems on each worksheet, 6 to 16")
    gen_length: int | None = option(None, "tokens to generate for each line of a JSONL suite")
    block_length: int | None = option(None, "semi-autoregressive block; default: the whole response")
    seed: int = option(7, "which worksheets")

    def __post_init__(self) -> None:
        if self.sheets < 1 or self.seed < 0:
            raise UsageError("--sheets must be at least 1 and --seed at least 0")


def check_chart(context: click.Context, flag: click.Parameter, path: Path | None) -> Path | None:
    """The path, refused before anything runs if it cannot be written or drawn."""
    if path is None:
        return None
    try:
        importlib.import_module("matplotlib")
    except ModuleNotFoundError:
        raise IncompatibleError(f"--chart needs the package matplotlib: {pip_line('matplotlib')}") from None
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise click.BadParameter(f"{path.name} is no picture that can be drawn, expected a name in .png, .svg or .pdf")
    return check_report(context, flag, path)


@click.command("evaluate", cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@from_fields(EvaluateOptions, "options", "Options")
@from_fields(SessionOptions, "session", "Provider")
@report_flag
@click.option(
    "--chart",
    cls=Flag,
    section="Output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    callback=check_chart,
    help="draw right answers against speed into this .png, .svg or .pdf file",
)
@shared_flags
def command(
    bundle: Path,
    options: EvaluateOptions,
    session: SessionOptions,
    report: Path | None,
    chart: Path | None,
    as_json: bool,
) -> None:
    """Compare cache policies and decoding rules by speed and by right answers.

    Every policy runs with every rule, each at its default settings, on the same tasks, one at a time. With --report the
    outcome of each pair is written as soon as it is known, with a table in a .md file beside it, and pairs that are in
    the file already are not run again.
    """
    installed = find_installed()
    policies = choose_strategies(options.policies, installed.policies)
    rules = choose_strategies(options.transfers, installed.transfers)
    if options.suite == "demo":
        tasks = make_worksheets(options.sheets, options.seed, options.problems)
    else:
        tasks = read_suite(Path(options.suite), options.gen_length)
    with DiffusionLM.from_pretrained(bundle, session) as lm:
        settings, machine = plain(describe_evaluation(lm, options, session)), plain(describe_machine(session.threads))
        questions = [ask(lm, task, options) for task in tasks]
        outcomes, refusals = load_outcomes(report, settings, machine), []
        done = {(outcome.policy, outcome.transfer) for outcome in outcomes}
        pairs = [(policy, rule) for policy in policies for rule in rules if (policy.name, rule.name) not in done]
        with show_progress() as progress:
            for number, (policy, rule) in enumerate(pairs):

                def advance(share: float, number: int = number, name: str = f"{policy.name}, {rule.name}") -> None:
                    progress(name, int(100 * (number + share)), 100 * len(pairs))

                try:
                    outcomes.append(answer_all(lm, questions, policy, rule, advance))
                except (UsageError, StrategyError, IncompatibleError) as error:  # this pair's; others may work
                    refusals.append(Refusal(policy=policy.name, transfer=rule.name, reason=str(error)))
                evaluation = Evaluation(settings=settings, machine=machine, outcomes=outcomes, refusals=refusals)
                save_evaluation(report, evaluation)
    evaluation = Evaluation(settings=settings, machine=machine, outcomes=outcomes, refusals=refusals)
    if not outcomes:
        raise StrategyError(f"no policy could be run with any rule; the first reason: {refusals[0].reason}")
    if chart is not None:
        from dllm_export.tools.frontier_chart import draw_chart

        draw_chart(evaluation, chart)
    if as_json:
        print_json(evaluation)
    else:
        print_evaluation(evaluation)


def choose_strategies(names: str, known: Strategies[Any]) -> list[Any]:
    """Instances of the named ones at their defaults; `all` stands for every one that can be used."""
    if names.strip() == "all":
        for fault in known.faults.values():
            print_warning(fault)
    chosen = list(known.kinds) if names.strip() == "all" else [name.strip() for name in names.split(",")]
    chosen = list(dict.fromkeys(name for name in chosen if name))
    if not chosen:
        raise UsageError(f"nothing to evaluate: name some of {', '.join(known.kinds)}, or all")
    return [known.find(name)() for name in chosen]


def describe_evaluation(lm: DiffusionLM, options: EvaluateOptions, session: SessionOptions) -> dict[str, Any]:
    """What makes two outcomes comparable; names that were asked for are not part of it."""
    own = {name: value for name, value in describe(options).items() if name not in ("policies", "transfers")}
    return {"bundle": lm.bundle.manifest.digest, "options": own, "session": describe(session)}


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """The values as a report holds them."""
    decoded: dict[str, Any] = json.loads(encode_json(value, -1))
    return decoded


@dataclass(frozen=True, slots=True)
class Question:
    """A task as a checked request."""

    task: Task
    request: Request
    options: GenerationOptions


def ask(lm: DiffusionLM, task: Task, options: EvaluateOptions) -> Question:
    """The request of a task; a prompt that does not fit is an error of the suite and not of a policy."""
    given = GenerationOptions(gen_length=task.length, block_length=options.block_length)
    return Question(task, lm.continuation([lm.encode(task.prompt)], given), given)


def answer_all(
    lm: DiffusionLM,
    questions: Sequence[Question],
    policy: CachePolicy,
    rule: Transfer,
    advance: Callable[[float], None],
) -> Outcome:
    """Every task once; the first also runs before the clock, since sessions prepare a step when they first meet it."""
    right = asked = tokens = passes = 0
    seconds = 0.0
    lm.run(questions[0].request, questions[0].options, policy, rule)
    with Others() as others:
        for number, question in enumerate(questions, 1):
            result = lm.run(question.request, question.options, policy, rule)[0]
            marks = question.task.grade(result.text)
            right, asked = right + sum(marks), asked + len(marks)
            tokens, passes, seconds = tokens + count_tokens([result]), passes + result.passes, seconds + result.seconds
            advance(number / len(questions))
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
        others=others.share,
    )
