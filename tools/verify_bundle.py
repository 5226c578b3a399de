"""`dllm-export verify`: the checks of a bundle as a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.text import Text

from dllm_export.errors import MismatchError
from dllm_export.runtime.bundle import open_bundle
from dllm_export.runtime.session import SessionOptions
from dllm_export.tools.flags import Command, from_fields, report_flag, shared_flags
from dllm_export.tools.output import (
    make_table,
    plural,
    print_json,
    print_table,
    show_progress,
    write_report,
)

if TYPE_CHECKING:
    from dllm_export.exporter.verify import Report


@click.command("verify", cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@from_fields(SessionOptions, "session", "Provider under test")
@report_flag
@shared_flags
def command(bundle: Path, session: SessionOptions, report: Path | None, as_json: bool) -> None:
    """Check that a bundle computes what its checkpoint computes.

    Compares with the activations that the checkpoint itself gave at export, then every graph and a short generation
    with PyTorch as the reference. Needs the extra `export`. Exit code 3 means that a check failed.
    """
    from dllm_export.exporter.verify import verify

    opened = open_bundle(bundle)
    with show_progress() as progress:
        outcome = verify(opened, session, progress)
    if as_json:
        print_json(outcome)
    else:
        print_checks(outcome)
    write_report(report, outcome)
    require_passed(outcome)


def require_passed(report: Report) -> None:
    """Raise MismatchError, which names the first failed checks."""
    failed = [check.name for check in report.checks if not check.passed]
    if not report.passed:
        named = ", ".join(failed[:3]) + (f" and {len(failed) - 3} more" if len(failed) > 3 else "")
        raise MismatchError(
            f"{len(failed)} of {plural(len(report.checks), 'check')} failed: {named}; do not use this bundle with "
            f"provider '{report.provider}' on {report.device}"
        )


def print_checks(report: Report) -> None:
    """One line per check, then the verdict."""
    table = make_table("", "check", "error", "allowed", "detail", right=("error", "allowed"))
    for check in report.checks:
        mark = Text("ok", "green") if check.passed else Text("FAILED", "bold red")
        table.add_row(mark, check.name, f"{check.worst:.1e}", f"{check.tolerance:.1e}", check.detail)
    print_table(table)
    passed = sum(check.passed for check in report.checks)
    click.echo(
        f"\n{passed} of {plural(len(report.checks), 'check')} passed: {report.dtype} on {report.provider}, {report.device}"
    )
    click.echo(f"{report.agreement:.1%} of the generated tokens equal the reference's")
