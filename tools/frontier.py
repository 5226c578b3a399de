"""What an evaluation found: an outcome for each policy and rule, which of them nothing beats, and both as tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_export.errors import UsageError
from dllm_export.tools.machine import QUIET
from dllm_export.tools.output import make_table, print_note, print_table, print_warning, write_report

QUANTILE = 1.959964
"""Of the normal distribution: intervals hold the true share in 95 of 100 cases."""

COLUMNS = (
    "policy",
    "rule",
    "tokens/s",
    "tokens per pass",
    "right",
    "95 % interval",
    "outside engines",
    "plan and sampling",
)


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
    engine_seconds: float
    """Of these, the time inside the provider; the rest is planning, sampling and what surrounds them."""
    strategy_seconds: float
    """Of these, the time for plans and for sampling."""
    others: float | None = None
    """Share of the machine's processor time that other processes took meanwhile; None where the system does not tell."""

    @property
    def share(self) -> float:
        """Right answers among all."""
        return self.right / self.asked

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def outside(self) -> float:
        """Share of the time that was not spent in the provider."""
        return 1 - self.engine_seconds / self.seconds

    @property
    def deciding(self) -> float:
        """Share of the time that plans and sampling took."""
        return self.strategy_seconds / self.seconds

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a forward pass decides."""
        return self.tokens / self.passes


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A policy and a rule that do not go together, and why."""

    policy: str
    transfer: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Outcomes under the settings that all of them share, and what the figures depend on beside them."""

    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    outcomes: Sequence[Outcome]
    refusals: Sequence[Refusal] = ()

    @property
    def others(self) -> float | None:
        """The largest share of the processors that other processes took during an outcome."""
        return max((outcome.others for outcome in self.outcomes if outcome.others is not None), default=None)

    @property
    def by_speed(self) -> list[Outcome]:
        """The fastest first."""
        return sorted(self.outcomes, key=lambda outcome: -outcome.speed)


def wilson_interval(right: int, asked: int) -> tuple[float, float]:
    """Bounds of a share (Wilson 1927), which stay within 0 and 1 and are honest near both."""
    share, square = right / asked, QUANTILE**2 / asked
    centre, spread = share + square / 2, QUANTILE * math.sqrt(share * (1 - share) / asked + square / asked / 4)
    return max(0.0, (centre - spread) / (1 + square)), min(1.0, (centre + spread) / (1 + square))


def find_frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points (speed, share) that no other one beats: as good in both and better in one. By rising speed."""
    best = -math.inf
    found: list[int] = []
    order = sorted(range(len(points)), key=lambda place: (-points[place][0], -points[place][1]))
    for place in order:
        speed, share = points[place]
        if share > best or (found and points[found[-1]] == (speed, share)):
            found.append(place)
            best = share
    return found[::-1]


def load_outcomes(report: Path | None, settings: Mapping[str, Any], machine: Mapping[str, Any]) -> list[Outcome]:
    """Outcomes of an earlier run with these settings; a report of other settings is refused and not overwritten."""
    if report is None or not report.exists():
        return []
    try:
        found = json.loads(report.read_text(encoding="utf-8"))
        outcomes = [Outcome(**outcome) for outcome in found["outcomes"]]
        same = (found["settings"], found["machine"]) == (settings, machine)
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{report} is not a report of this command: name another file, or delete it") from None
    if not same:
        raise UsageError(
            f"{report} was measured with other settings, another bundle or on another machine: name another file, or "
            f"delete it"
        )
    return outcomes


def save_evaluation(report: Path | None, evaluation: Evaluation) -> None:
    """The report as JSON, and its table beside it as Markdown."""
    write_report(report, evaluation)
    if report is not None:
        report.with_suffix(".md").write_text(format_markdown(evaluation), encoding="utf-8")


def cells_of(outcome: Outcome) -> tuple[str, ...]:
    """One line of the table."""
    return (
        outcome.policy,
        outcome.transfer,
        f"{outcome.speed:.0f}",
        f"{outcome.tokens_per_pass:.1f}",
        f"{outcome.share:.1%} of {outcome.asked}",
        f"{outcome.low:.1%} to {outcome.high:.1%}",
        f"{outcome.outside:.1%}",
        f"{outcome.deciding:.1%}",
    )


def format_markdown(evaluation: Evaluation) -> str:
    """The table, fastest first, then what does not go together and how loaded the machine was."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(cells_of, evaluation.by_speed)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    for note in (*refusal_lines(evaluation), *load_lines(evaluation)):
        lines += ["", note]
    return "\n".join(lines) + "\n"


def refusal_lines(evaluation: Evaluation) -> Iterator[str]:
    """A sentence for each pair that cannot be combined."""
    for refusal in evaluation.refusals:
        yield f"Not possible: {refusal.policy} with {refusal.transfer}: {refusal.reason}"


def load_lines(evaluation: Evaluation) -> Iterator[str]:
    """What other processes took, where that is known."""
    machine, others = evaluation.machine, evaluation.others
    if others is not None:
        yield (
            f"Measured on {machine['cores']} cores ({machine['cpu']}); other processes took up to {others:.0%} of the "
            f"processors."
        )


def print_evaluation(evaluation: Evaluation) -> None:
    """The table on stdout; what does not go together, and a warning where speeds are not to be believed, on stderr."""
    table = make_table(*COLUMNS, right=COLUMNS[2:])
    for outcome in evaluation.by_speed:
        table.add_row(*cells_of(outcome))
    print_table(table)
    for line in refusal_lines(evaluation):
        print_note(line)
    if evaluation.others is not None and evaluation.others > QUIET:
        print_warning(
            f"other processes took up to {evaluation.others:.0%} of the processors: answers and tokens per pass are what "
            f"they are, speeds are not to be believed"
        )
