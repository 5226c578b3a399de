"""The command `dllm-export`: which commands there are, and how every failure becomes one line and an exit code.

Commands are imported when they are run, so that help is instant and `inspect` works where PyTorch is not installed.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import click

from dllm_export import __version__
from dllm_export.errors import DllmExportError, IncompatibleError, ResourceError, UsageError

PROGRAM = "dllm-export"
INTERRUPTED = 130
CLOSED_PIPE = 141


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a command lives, and its line in the list of commands."""

    module: str
    summary: str


COMMANDS: Mapping[str, Entry] = {
    "export": Entry("export_bundle", "Turn a model directory into a bundle of ONNX graphs and weights."),
    "build": Entry("build_engines", "Build TensorRT engines of a bundle's graphs."),
    "verify": Entry("verify_bundle", "Check that a bundle computes what its checkpoint computes."),
    "generate": Entry("generate_text", "Generate text, or fill masks in a text."),
    "inspect": Entry("inspect_bundle", "Show what is in a bundle."),
    "dump": Entry("dump_graph", "Record one graph call of a generation as Polygraphy data."),
    "evaluate": Entry("evaluate", "Compare cache policies and decoding rules by speed and by right answers."),
    "profile-prefix": Entry("profile_prefix", "Measure how many layers may share a prefix."),
    "families": Entry("list_families", "Show which model families are known, and which of them can be exported."),
    "doctor": Entry("doctor", "Show what this machine can run, and what to install for the rest."),
    "bench": Entry(
        "bench.command",
        "Measure every provider and PyTorch on one request, against one another and the machine's limits.",
    ),
    "gpu-check": Entry("gpu_check", "Measure every provider on this machine's GPU, and check its answers."),
    "demo": Entry("demo", "Export, verify and run the small trained model that comes with the repository."),
}
"""Every module defines its command as `command`."""

MEMORY_MESSAGES = ("out of memory", "not enough memory", "failed to allocate memory", "bad allocation", "bad_alloc")


class Commands(click.Group):
    """Commands by name, each imported at its first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"dllm_export.tools.{COMMANDS[cmd_name].module}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise click.UsageError(f"no command is called '{args[0]}'; there are: {', '.join(COMMANDS)}{hint}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            # Python would complain once more when it flushes stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(CLOSED_PIPE)


@click.group(
    PROGRAM,
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    invoke_without_command=True,
)
@click.version_option(__version__, prog_name=PROGRAM)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Diffusion LLM checkpoints to split ONNX graphs, and generation with cached features.

    \b
    dllm-export export MODEL -o BUNDLE
    dllm-export generate BUNDLE --prompt "..." --policy dllm-cache --watch
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(UsageError.exit_code)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code; docs/cli.md lists the codes."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    # Ended from outside like by Ctrl-C: what was begun is cleaned up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(given))


def run(arguments: Sequence[str]) -> int:
    """The exit code of a command line; failures are reported on stderr."""
    try:
        code = cli.main(list(arguments), prog_name=PROGRAM, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (Exception, KeyboardInterrupt) as error:
        from dllm_export.tools.output import print_error

        code, lines = explain(error)
        if "--debug" in arguments:
            traceback.print_exc()
        print_error("\n".join(lines))
        return code


def explain(error: BaseException) -> tuple[int, list[str]]:
    """(exit code, what the user reads) of anything that ended a command."""
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return INTERRUPTED, ["interrupted"]
    if isinstance(error, click.ClickException):
        context = error.ctx if isinstance(error, click.UsageError) else None
        hint = [f"see '{context.command_path} -h'"] if context else []
        return error.exit_code, [error.format_message(), *hint]
    if isinstance(error, DllmExportError):
        return error.exit_code, [str(error)]
    if isinstance(error, ModuleNotFoundError):
        from dllm_export.tools.machine import EXTRAS, pip_line

        package = str(error.name).split(".")[0]
        if package in EXTRAS:
            return IncompatibleError.exit_code, [f"this command needs the package {package}: {pip_line(package)}"]
    if _is_memory(error):
        remedy = "use a shorter prompt, a smaller batch or a half type, or free some"
        return ResourceError.exit_code, [f"memory ran out: {remedy}"]
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError.exit_code, [f"no space left on the disk of {error.filename or 'the output'}; free some"]
    if isinstance(error, OSError) and error.filename is not None:
        return UsageError.exit_code, [f"{error.filename}: {error.strerror}"]
    first = (str(error).splitlines() or ["no message"])[0]
    return 1, [
        f"unexpected {type(error).__name__}: {first}",
        "this is a bug in dllm-export, please report it; --debug shows the traceback",
    ]


def _is_memory(error: BaseException) -> bool:
    """Libraries report it as MemoryError, as an OutOfMemoryError of their own, or in words."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(message in str(error).lower() for message in MEMORY_MESSAGES)


if __name__ == "__main__":
    main()
