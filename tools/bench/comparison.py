"""Two reports against each other: how many times less time the same runs take, and how sure that is."""

from __future__ import annotations

from pathlib import Path

import msgspec

from dllm_export.errors import MismatchError, UsageError
from dllm_export.tools.bench.records import BenchReport, MachineRecord, Record
from dllm_export.tools.bench.statistics import bootstrap_ratio
from dllm_export.tools.bench.summary import all_runs, count_tokens, find_run, pool
from dllm_export.tools.output import make_table, print_note, print_table, print_warning


class Change(Record, frozen=True):
    """A run in both reports: time for a token in A / in B, with a 95 % interval of bootstrapped steps."""

    column: str
    policy: str
    value: float
    low: float
    high: float
    verdict: str
    """faster, slower or equal: whether the interval holds 1."""
    same_tokens: bool


class Comparison(Record, frozen=True):
    """Report B against report A."""

    a: str
    b: str
    differences: tuple[str, ...]
    """What is not the same in both."""
    changes: tuple[Change, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]


def read_bench(path: Path) -> BenchReport:
    """A report from its file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=BenchReport)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} is no report of this version's bench ({error}): measure again with --report"
        ) from None


def compare_reports(first: Path, second: Path, *, force: bool) -> Comparison:
    """The comparison, refused where machine or request differ unless it is forced."""
    a, b = read_bench(first), read_bench(second)
    differences = tuple(find_differences(a, b))
    if differences and not force:
        raise UsageError(
            f"these reports are not comparable, they differ in {'; '.join(differences)}: measure both on one machine with "
            f"the same options, or add --force"
        )
    changes = []
    runs = {name: {(column, run.policy) for column, run in all_runs(one.columns)} for name, one in (("a", a), ("b", b))}
    for column, policy in sorted(runs["a"] & runs["b"]):
        slow, fast = (pool(one.columns, column, policy) for one in (a, b))
        gain = count_tokens(b.columns, column, policy) / count_tokens(a.columns, column, policy)
        value, low, high = bootstrap_ratio(slow, fast, gain=gain)
        before, after = find_run(a.columns, column, policy), find_run(b.columns, column, policy)
        assert before is not None
        assert after is not None
        changes.append(
            Change(
                column=column,
                policy=policy,
                value=value,
                low=low,
                high=high,
                verdict="faster" if low > 1 else "slower" if high < 1 else "equal",
                same_tokens=before.raw.tokens == after.raw.tokens,
            )
        )
    return Comparison(
        a=str(first),
        b=str(second),
        differences=differences,
        changes=tuple(changes),
        only_a=tuple(" ".join(run) for run in sorted(runs["a"] - runs["b"])),
        only_b=tuple(" ".join(run) for run in sorted(runs["b"] - runs["a"])),
    )


def find_differences(a: BenchReport, b: BenchReport) -> list[str]:
    """What makes two reports incomparable: another machine, another request, another number of forward passes."""
    found = [
        f"machine {name} ({left} and {right})"
        for name, left, right in zip(("processor", "cores", "GPUs"), facts(a.machine), facts(b.machine), strict=True)
        if left != right
    ]
    names = (
        "shape",
        "dtype",
        "prompt",
        "response",
        "batch",
        "steps",
        "transfer",
        "tokens_per_step",
        "threads",
        "device",
    )
    found += [
        f"{name} ({getattr(a.settings, name)} and {getattr(b.settings, name)})"
        for name in names
        if getattr(a.settings, name) != getattr(b.settings, name)
    ]
    for left in a.settings.policies:
        right = next((one for one in b.settings.policies if one.name == left.name), left)
        if left.settings != right.settings:
            found.append(f"settings of {left.name} ({left.settings} and {right.settings})")
    return found


def facts(machine: MachineRecord) -> tuple[str, int, tuple[str, ...]]:
    """What tells machines apart."""
    return machine.cpu, machine.cores, tuple(gpu.name for gpu in machine.gpus)


def print_comparison(comparison: Comparison) -> None:
    """The changes as a table."""
    header = ("column", "policy", "B is x times as fast", "95 % interval", "", "tokens")
    table = make_table(*header, right=header[2:4])
    for one in comparison.changes:
        tokens = "equal" if one.same_tokens else "differ"
        table.add_row(
            one.column, one.policy, f"{one.value:.3f}", f"{one.low:.3f} to {one.high:.3f}", one.verdict, tokens
        )
    print_table(table)
    for name, runs in (("A", comparison.only_a), ("B", comparison.only_b)):
        if runs:
            print_note(f"only in {name}: {', '.join(runs)}")
    for difference in comparison.differences:
        print_warning(f"not comparable: {difference}")


def require_ratios(comparison: Comparison, least: float | None) -> None:
    """Fail where a ratio is below a limit beyond doubt."""
    slow = [one for one in comparison.changes if least is not None and one.high < least]
    if slow:
        named = ", ".join(f"{one.column} {one.policy} {one.value:.3f}" for one in slow)
        raise MismatchError(f"slower than --fail-below {least} allows: {named}")
