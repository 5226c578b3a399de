"""Runs a module of the benchmark in a process of its own: a record in on stdin, a record out in the last line of stdout."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec

from dllm_export.tools.bench.records import Record

R = TypeVar("R", bound=Record)


class Failed(Exception):
    """A process that did not succeed; says why in one line."""


def ask(module: str, task: Record, answer: type[R], python: Sequence[str] = (), threads: int = 0) -> R:
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
        return msgspec.json.decode(lines[-1] if lines else b"", type=answer)
    except msgspec.DecodeError as error:
        raise Failed(
            f"its answer cannot be read ({error}): both sides must be the same version of dllm-export"
        ) from None


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
