"""`dllm-export evaluate`: answers and speed of every cache policy with every decoding rule, on the same tasks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from dllm_export.errors import IncompatibleError, StrategyError, UsageError
from dllm_export.runtime.model import DiffusionLM, Generation
from dllm_export.runtime.options import GenerationOptions, option
from dllm_export.runtime.plugins import Strategies, find_installed
from dllm_export.runtime.policies import CachePolicy, SharedPrefix
from dllm_export.runtime.policies.contract import suits
from dllm_export.runtime.request import Request
from dllm_export.runtime.session import SessionOptions
from dllm_export.runtime.transfers import Transfer
from dllm_export.tools.flags import Command, check_chart, describe, file_flag, from_fields, report_flag, shared_flags
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
from dllm_export.tools.machine import Others, describe_machine
from dllm_export.tools.output import encode_json, print_json, print_warning, show_progress
from dllm_export.tools.prefix_flags import PrefixOptions
from dllm_export.tools.prompts import read_prompt
from dllm_export.tools.suite import Task, make_worksheets, read_suite
from dllm_export.tools.worksheets import held_out


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """Which tasks, and what to answer them with."""

    suite: str = option("demo", "demo: the trained model's worksheets; or a JSONL file of prompt and answer")
    policies: str = option("all", "cache policies with a comma between, or all")
    transfers: str = option("all", "decoding rules with a comma between, or all")
    sheets: int = option(40, "worksheets of the demo suite; none of them was trained on")
    problems: int = option(12, "problems on each worksheet, 6 to 16")
    shared_problems: int = option(
        0, "look-up problems that all worksheets begin with; the text up to there is a prefix"
    )
    gen_length: int | None = option(None, "tokens to generate for each line of a JSONL suite")
    block_length: int | None = option(None, "semi-autoregressive block; default: the whole response")
    seed: int = option(7, "which worksheets")
    base: str = option("none", "what shared-prefix wraps")
    interleave: bool = option(
        False, "answer a task with all pairs before the next, so that noise hits all of them alike"
    )

    def __post_init__(self) -> None:
        if self.sheets < 1 or self.seed < 0:
            raise UsageError("--sheets must be at least 1 and --seed at least 0")
        if self.shared_problems and self.suite != "demo":
            raise UsageError("--shared-problems belongs to --suite demo; name a file's common start with --prefix-file")


@click.command("evaluate", cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@from_fields(EvaluateOptions, "options", "Options")
@from_fields(PrefixOptions, "prefix", "Shared prefix")
@from_fields(SessionOptions, "session", "Provider")
@report_flag
@file_flag("--chart", "draw right answers against speed into this .png, .svg or .pdf file", check_chart)
@shared_flags
def command(
    bundle: Path,
    options: EvaluateOptions,
    prefix: PrefixOptions,
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
    base = installed.policies.find(options.base)()
    policies = [SharedPrefix(base=base) if isinstance(policy, SharedPrefix) else policy for policy in policies]
    if options.suite == "demo":
        tasks = make_worksheets(options.sheets, options.seed, options.problems, options.shared_problems)
    else:
        tasks = read_suite(Path(options.suite), options.gen_length)
    shared = find_prefix(options, prefix)
    with DiffusionLM.from_pretrained(bundle, session, prefix_budget=prefix.prefix_budget) as lm:
        if options.policies.strip() == "all":
            policies = [policy for policy in policies if suits(policy, by_blocks=lm.bundle.manifest.shape.block > 0)]
        settings = plain(describe_evaluation(lm, options, prefix, session))
        machine = plain(describe_machine(session.threads))
        questions = [ask(lm, task, options, prefix, shared) for task in tasks]
        outcomes = load_outcomes(report, settings, machine)
        refusals: list[Refusal] = []
        done = {(outcome.policy, outcome.transfer) for outcome in outcomes}
        pairs = [Tally(policy, rule) for policy in policies for rule in rules if (policy.name, rule.name) not in done]
        groups = [pairs] if options.interleave else [[pair] for pair in pairs]
        with show_progress() as progress:
            for number, group in enumerate(groups):

                def advance(name: str, share: float, number: int = number) -> None:
                    progress(name, int(100 * (number + share)), 100 * len(groups))

                found, refused = answer_all(lm, questions, group, advance)
                outcomes, refusals = [*outcomes, *found], [*refusals, *refused]
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


def find_prefix(options: EvaluateOptions, prefix: PrefixOptions) -> str | None:
    """The text that all prompts start with, where one is named."""
    if prefix.prefix_file is not None:
        return read_prompt(prefix.prefix_file)
    if options.shared_problems:
        return held_out(1, options.seed, options.problems, options.shared_problems)[0].start(options.shared_problems)
    if prefix.given:
        raise UsageError("--prefix-depth and --prefix-profile need a prefix: --prefix-file, or --shared-problems")
    return None


def describe_evaluation(
    lm: DiffusionLM, options: EvaluateOptions, prefix: PrefixOptions, session: SessionOptions
) -> dict[str, Any]:
    """What makes two outcomes comparable; names that were asked for are not part of it."""
    own = {name: value for name, value in describe(options).items() if name not in ("policies", "transfers")}
    shared = describe(prefix)
    return {"bundle": lm.bundle.manifest.digest, "options": own, "prefix": shared, "session": describe(session)}


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """The values as a report holds them."""
    decoded: dict[str, Any] = json.loads(encode_json(value, -1))
    return decoded


@dataclass(frozen=True, slots=True)
class Question:
    """A task as a checked request, and as one that names the prefix which all of them share."""

    task: Task
    request: Request
    sharing: Request | None
    options: GenerationOptions


def ask(lm: DiffusionLM, task: Task, options: EvaluateOptions, prefix: PrefixOptions, shared: str | None) -> Question:
    """The request of a task; a prompt that does not fit is an error of the suite and not of a policy."""
    given = GenerationOptions(gen_length=task.length, block_length=options.block_length)
    request = lm.continuation([lm.encode(task.prompt)], given)
    return Question(task, request, None if shared is None else prefix.share(lm, request, shared), given)


@dataclass(slots=True)
class Tally:
    """One policy with one rule, and what it has answered so far."""

    policy: CachePolicy
    rule: Transfer
    right: int = 0
    asked: int = 0
    tokens: int = 0
    passes: int = 0
    seconds: float = 0.0
    engine_seconds: float = 0.0
    strategy_seconds: float = 0.0

    def answer(self, lm: DiffusionLM, question: Question) -> Generation:
        """The answer to a question, not counted."""
        request = question.request
        if isinstance(self.policy, SharedPrefix):
            if question.sharing is None:
                raise UsageError("it needs a prefix: give --prefix-file or, with --suite demo, --shared-problems")
            request = question.sharing
        return lm.run(request, question.options, self.policy, self.rule)[0]

    def count(self, question: Question, result: Generation) -> None:
        """Grade and count an answer."""
        marks = question.task.grade(result.text)
        self.right, self.asked = self.right + sum(marks), self.asked + len(marks)
        self.tokens, self.passes = self.tokens + count_tokens([result]), self.passes + result.passes
        self.seconds, self.engine_seconds = self.seconds + result.seconds, self.engine_seconds + result.engine_seconds
        self.strategy_seconds += result.strategy_seconds

    def outcome(self, others: float | None) -> Outcome:
        """All that was counted; `others` is the share of the machine that others took, where it is known."""
        low, high = wilson_interval(self.right, self.asked)
        return Outcome(
            policy=self.policy.name,
            policy_settings=describe(self.policy),
            transfer=self.rule.name,
            transfer_settings=describe(self.rule),
            right=self.right,
            asked=self.asked,
            low=low,
            high=high,
            tokens=self.tokens,
            passes=self.passes,
            seconds=self.seconds,
            engine_seconds=self.engine_seconds,
            strategy_seconds=self.strategy_seconds,
            others=others,
        )


def answer_all(
    lm: DiffusionLM, questions: Sequence[Question], tallies: Sequence[Tally], advance: Callable[[str, float], None]
) -> tuple[list[Outcome], list[Refusal]]:
    """Every task once with each of the pairs, the first and the last of them taking turns; what fails leaves the others.

    The first task also runs before the clock, since sessions prepare a step when they first meet it. What it stored of a
    shared prefix is forgotten, so that a request of those that count pays for that.
    """
    going, refusals = list(tallies), []

    def attempt(tally: Tally, question: Question) -> Generation | None:
        try:
            return tally.answer(lm, question)
        except (UsageError, StrategyError, IncompatibleError) as error:  # this pair's; others may work
            going.remove(tally)
            refusals.append(Refusal(policy=tally.policy.name, transfer=tally.rule.name, reason=str(error)))
            return None

    for tally in tallies:
        attempt(tally, questions[0])
        lm.prefixes.clear()
    with Others() as others:
        for number, question in enumerate(questions):
            for tally in tuple(going) if number % 2 == 0 else tuple(reversed(going)):
                result = attempt(tally, question)
                if result is not None:
                    tally.count(question, result)
                advance(f"{tally.policy.name}, {tally.rule.name}", (number + 1) / len(questions))
    return [tally.outcome(others.share) for tally in going], refusals
