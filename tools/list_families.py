"""`dllm-export families`: which checkpoints can be exported, what applies to them, and why others cannot."""

from __future__ import annotations

from dataclasses import dataclass

import click

from dllm_export.graphs.families import FAMILIES, KNOWN_FAMILIES, Family, Marks, SamplerDefaults
from dllm_export.runtime.policies import POLICIES, NoCache, SharedPrefix
from dllm_export.runtime.policies.contract import suits
from dllm_export.runtime.transfers import TRANSFERS
from dllm_export.tools.flags import Command, shared_flags
from dllm_export.tools.output import make_table, print_json, print_table


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyLine:
    """One family as the command lists it."""

    name: str
    checkpoints: str
    recognised_by: str
    """The architecture in config.json, else the model type or the files."""
    supported: bool
    sizes: tuple[str, ...] = ()
    layout: str = ""
    sampler: SamplerDefaults | None = None
    policies: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    reason: str = ""
    """What does not work, or for families that are recognised and refused, what is missing."""


@click.command("families", cls=Command)
@shared_flags
def command(as_json: bool) -> None:
    """Show which model families are known, and which of them can be exported.

    A checkpoint's family is recognised by its config.json; `export --family NAME` takes one for another.
    """
    lines = list_families()
    if as_json:
        print_json(lines)
        return
    table = make_table("family", "checkpoints", "sampler", "status")
    for line in lines:
        if line.supported:
            table.add_row(line.name, line.checkpoints, describe_sampler(line.sampler), describe_status(line))
    print_table(table)
    click.echo()
    table = make_table("refused", "checkpoints", "why")
    for line in lines:
        if not line.supported:
            table.add_row(line.name, line.checkpoints, line.reason)
    print_table(table)


def list_families() -> list[FamilyLine]:
    """Every family that is known, those first that can be exported."""
    supported = [
        FamilyLine(
            name=family.name,
            checkpoints=family.title,
            recognised_by=describe_marks(family.marks),
            supported=True,
            sizes=family.sizes,
            layout=family.layout,
            sampler=family.sampler,
            policies=list_policies(family),
            rules=list_rules(family),
            reason=family.limits,
        )
        for family in FAMILIES.values()
    ]
    refused = [
        FamilyLine(
            name=family.name,
            checkpoints=family.title,
            recognised_by=describe_marks(family.marks),
            supported=False,
            reason=family.reason,
        )
        for family in KNOWN_FAMILIES.values()
    ]
    return supported + refused


def describe_marks(marks: Marks) -> str:
    """The first thing that a checkpoint of the family shows."""
    if marks == Marks():
        return "its name alone"
    shown = (*marks.architectures, *(f"model_type {kind}" for kind in marks.model_types if kind), *marks.files)
    return shown[0] if shown else "a nested configuration"


def describe_status(line: FamilyLine) -> str:
    """How far a supported family goes."""
    return f"supported: {line.reason}" if line.reason else "supported"


def describe_sampler(sampler: SamplerDefaults | None) -> str:
    """The sampling of the family's own code."""
    if sampler is None:
        return ""
    temperature = f", temperature {sampler.temperature:g}" if sampler.temperature else ""
    return f"{sampler.transfer}, {sampler.gen_length} in blocks of {sampler.block_length}{temperature}"


def sees_noise(family: Family) -> bool:
    """Whether its layers see the noise level of a step, as its own rule does."""
    return family.sampler is not None and TRANSFERS[family.sampler.transfer].sees_noise


def list_policies(family: Family) -> tuple[str, ...]:
    """Cache policies that go with it; features that follow the noise level are no other request's."""
    if family.continuous:
        return (NoCache.name,)
    return tuple(
        name
        for name, policy in POLICIES.items()
        if suits(policy, by_blocks=family.by_blocks) and not (sees_noise(family) and name == SharedPrefix.name)
    )


def list_rules(family: Family) -> tuple[str, ...]:
    """Decoding rules that go with it."""
    return tuple(
        name
        for name, rule in TRANSFERS.items()
        if rule.sees_noise == sees_noise(family)
        and rule.continuous == family.continuous
        and not (family.by_blocks and rule.verifies)
    )
