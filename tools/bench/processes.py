"""Runs a module of the benchmark in a process of its own: a record in on stdin, a record out in the last line of stdout."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import msgspec

from dllm_export.tools.bench.records import Record

T = TypeVar("T", bound=Record)
R = TypeVar("R", bound=Record)


class Failed(Exception):
    """A process that did not succeed; says why in one line."""


def ask(module: str, task: Record, answered: type[R], python: Sequence[str] = (), threads: int = 0) -> R:
    """What the module answers. `python` is the command that starts its interpreter, this one by default."""
    command = [*(python or (sys.executable,)), "-m", f"dllm_export.tools.bench.{module}"]
    try:
        done = subprocess.run(command, input=msgspec.json.encode(task), capture_output=True, env=environment(threads))
    except OSError as error:
        raise Failed(f"{command[0]} cannot be started: {error.strerror}") from None
    if done.returncode:
        raise Failed(explain_exit(done.returncode, done.stderr.decode(errors="replace")))
    lines = done.stdout.splitlines()
    try:
        return msgspec.json.decode(lines[-1] if lines else b"", type=answered)
    except msgspec.DecodeError as error:
        raise Failed(
            f"its answer cannot be read ({error}): both sides must be the same version of dllm-export"
        ) from None


def answer(task: type[T], work: Callable[[T], Record]) -> int:
    """The other side of `ask`: the exit code; what went wrong is the last line of stderr."""
    from dllm_export.tools.cli import explain

    try:
        print(msgspec.json.encode(work(msgspec.json.decode(sys.stdin.buffer.read(), type=task))).decode())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        code, lines = explain(error)
        print(lines[0], file=sys.stderr)
        return code


def environment(threads: int) -> Mapping[str, str]:
    """This process's environment; libraries that only listen there are told the number of threads."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return {**os.environ, **({name: str(threads) for name in names} if threads else {})}


def explain_exit(code: int, errors: str) -> str:
    """Why a process ended with this code: its last line, or the signal that ended it."""
    if code == -signal.SIGKILL:
        return "was killed, as happens when memory runs out"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return (lines or [f"ended with exit code {code}"])[-1][:500]
