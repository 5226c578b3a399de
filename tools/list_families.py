"""`dllm-export families`: which checkpoints can be exported, and why others cannot."""

from __future__ import annotations

from dataclasses import dataclass

import click

from dllm_export.graphs.families import FAMILIES, KNOWN_FAMILIES, Marks
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
    reason: str
    """What is missing, for families that are recognised and refused."""


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
    table = make_table("family", "checkpoints", "recognised by", "status")
    for line in lines:
        table.add_row(line.name, line.checkpoints, line.recognised_by, "supported" if line.supported else line.reason)
    print_table(table)


def list_families() -> list[FamilyLine]:
    """Every family that is known, those first that can be exported."""
    supported = [
        FamilyLine(
            name=family.name,
            checkpoints=family.title,
            recognised_by=describe_marks(family.marks),
            supported=True,
            reason="",
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
    shown = (*marks.architectures, *(f"model_type {kind}" for kind in marks.model_types if kind), *marks.files)
    return shown[0] if shown else "a nested configuration"
