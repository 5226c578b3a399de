"""Policies and rules of real installed packages, each in a process of its own; broken ones take nobody with them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import click
import pytest

from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.options import COMMAND_FLAGS
from dllm_export.runtime.plugins import built_in_flags
from dllm_export.runtime.policies import POLICIES
from dllm_export.runtime.transfers import TRANSFERS
from dllm_export.tools import cli

GOOD = '''
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal
import numpy as np
from dllm_export.runtime.options import option
from dllm_export.runtime.policies import StepPlan
from dllm_export.runtime.transfers import Choice, Transfer

Path(__file__).with_name("imported").touch()

@dataclass(frozen=True)
class Every:
    """Everything in every n-th step, the block's rows in the others."""
    beat: int = option(4, "n: steps between refreshes")
    mode: Literal["plain", "odd"] = option("plain", "nothing")
    update_ratio: float = option(0.5, "the same flag as dllm-cache has, with another default")
    name: ClassVar[str] = "every"

    def plan(self, state):
        if (state.step - 1) % self.beat == 0:
            return StepPlan.refresh(state, keep_delta=False)
        from dllm_export.runtime.policies import Rows
        return StepPlan.recompute(state, Rows.span(*state.block, state.batch))

@dataclass(frozen=True)
class Pairs(Transfer):
    pair: int = option(2, "rows of a step")
    name: ClassVar[str] = "pairs"

    def choose(self, state):
        return Choice(np.arange(min(self.pair, len(state.rows))))
'''
GOOD_ENTRIES = """
[dllm_export.policies]
every = good_plugin:Every
[dllm_export.transfers]
pairs = good_plugin:Pairs
"""

POLICY = """
from dataclasses import dataclass, field
from typing import ClassVar
from dllm_export.runtime.options import option
{before}
@dataclass({settings})
class It:
    {body}
    name: ClassVar[str] = "{name}"
    def {method}(self, state):
        return None
"""


def policy(name: str, body: str = "", *, before: str = "", settings: str = "frozen=True", method: str = "plan") -> str:
    return POLICY.format(name=name, body=body, before=before, settings=settings, method=method)


BROKEN: Mapping[str, tuple[str, str]] = {
    # entry point: (the module, what the sentence says)
    "absent": ("import module_that_is_not_there", "ModuleNotFoundError: No module named 'module_that_is_not_there'"),
    "garbled": ("def", "SyntaxError: "),
    "leaving": ("raise SystemExit(3)", "SystemExit: 3"),
    "missing": ("Other = 1", "AttributeError: module 'broken_missing' has no attribute 'It'"),
    "function": ("def It(state): ...", "is not a frozen dataclass"),
    "open": (policy("open", settings=""), "is not a frozen dataclass"),
    "misnamed": (policy("other"), "its class calls itself 'other', expected the entry point's name"),
    "idle": (policy("idle", method="plans"), "its class has no method 'plan'"),
    "silent": (policy("silent", "count: int = 3"), "its field 'count' is not declared with"),
    "lists": (policy("lists", "count: list = option(None, 'x')"), "expected one of int, float, str, bool, Path or"),
    "unions": (policy("unions", "count: int | str = option(1, 'x')"), "expected one of int, float, str, bool, Path or"),
    "seeded": (policy("seeded", "seed: int = option(0, 'x')"), "would be the flag --seed, which the command has already"),
    "watching": (policy("watching", "watch: bool = option(False, 'x')"), "the flag --watch, which the command has already"),
    "sure": (policy("sure", "threshold: float = option(0.5, 'x')"), "--threshold, which a decoding rule has already"),
    "texts": (policy("texts", "update_ratio: str = option('', 'x')"), "'update_ratio' has another type than the same field"),
    "refusing": (policy("refusing", "def __post_init__(self): raise ValueError('no')"), "ValueError: no"),
    "dual": (policy("dual"), "the name is that of a built-in one, which is used in its place"),
}  # fmt: skip

Install = Callable[..., None]
Execute = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A directory of installed packages."""
    (tmp_path / "site").mkdir()
    return tmp_path / "site"


@pytest.fixture
def install(site: Path) -> Install:
    """Put a package there as pip would: its modules, and a dist-info with its name, version and entry points."""

    def put(name: str, entries: str, **modules: str) -> None:
        record = site / f"{name.replace('-', '_')}-1.0.dist-info"
        record.mkdir()
        (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (record / "entry_points.txt").write_text(entries)
        for module, source in modules.items():
            (site / f"{module}.py").write_text(source)

    return put


@pytest.fixture
def execute(site: Path) -> Execute:
    """The command line in a process that has these packages."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join((str(site), os.environ.get("PYTHONPATH", "")))
        command = [sys.executable, "-m", "dllm_export.tools.cli", *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "120"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    return run


def ask(bundle: Bundle, *flags: object) -> tuple[object, ...]:
    return ("generate", bundle.path, "--prompt-ids", "1 2 3", "--gen-length", 8, "--threads", 1, *flags)


def test_a_package_adds_a_policy_and_a_rule_with_their_flags(
    install: Install, execute: Execute, tiny_bundle: Bundle
) -> None:
    install("good-plugin", GOOD_ENTRIES, good_plugin=GOOD)
    help_text = execute("generate", "-h").stdout
    assert "|".join((*POLICIES, "every")) in "".join(help_text.split())
    assert "|".join((*TRANSFERS, "pairs")) in "".join(help_text.split())
    assert "n: steps between refreshes  [every; default: 4]" in help_text
    assert "--mode [plain|odd]" in help_text
    assert re.search(r"\[dllm-cache, .*every; default: 0.25, .*0.5\]", " ".join(help_text.split()))
    flags = ("--policy", "every", "--beat", 2, "--transfer", "pairs", "--pair", 3, "--json")
    done = execute(*ask(tiny_bundle, *flags))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["settings"]["policy"] == {"name": "every", "beat": 2, "mode": "plain", "update_ratio": 0.5}
    assert result["settings"]["transfer"] == {"name": "pairs", "pair": 3}
    assert (result["passes"], result["steps_by_kind"]) == (3, {"full": 2, "partial": 1})


def test_errors_list_what_packages_bring(install: Install, execute: Execute, tiny_bundle: Bundle) -> None:
    install("good-plugin", GOOD_ENTRIES, good_plugin=GOOD)
    done = execute(*ask(tiny_bundle, "--policy", "evry"))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"there are: {', '.join((*POLICIES, 'every'))}; did you mean every?" in done.stderr
    done = execute(*ask(tiny_bundle, "--beat", 3))
    assert "--beat is no option of the cache policy 'none', it belongs to: every" in done.stderr


def test_broken_packages_are_named_and_the_others_work(install: Install, execute: Execute, tiny_bundle: Bundle) -> None:
    install("good-plugin", GOOD_ENTRIES, good_plugin=GOOD)
    for name, (source, _) in BROKEN.items():
        entries = f"[dllm_export.policies]\n{name} = broken_{name}:It\n"
        install(f"broken-{name}", entries, **{f"broken_{name}": source})
    for package in ("one", "two"):
        install(package, f"[dllm_export.policies]\ntwice = {package}:It\n", **{package: policy("twice")})
    late = policy("late", "beat: int = option(1, 'x')", method="choose").replace(
        "def ch", "keeps_schedule = ranks = remasks = verifies = idles = sees_noise = False\n    def ch"
    )
    unsure = policy("unsure", method="choose")
    install("rules", "[dllm_export.transfers]\nlate = late:It\nunsure = unsure:It\n", late=late, unsure=unsure)

    found = json.loads(execute("doctor", "--json").stdout)["plugins"]
    faults = {plugin["name"]: plugin["fault"] for plugin in found}
    assert {name for name, fault in faults.items() if fault is None} == {"every", "pairs"}
    for name, (_, sentence) in BROKEN.items():
        assert sentence in faults[name]
        assert faults[name].startswith(f"the cache policy '{name}' of the package broken-{name} 1.0 cannot be used: ")
    assert "of the package one 1.0 and two 1.0 cannot be used: a name can be used once" in faults["twice"]
    assert "--beat, which a cache policy has already" in faults["late"]
    assert "no 'keeps_schedule' that is True or False" in faults["unsure"]
    assert len(found) == len(BROKEN) + 6

    done = execute(*ask(tiny_bundle, "--policy", "absent"))
    assert (done.returncode, done.stdout, done.stderr) == (7, "", f"error: {faults['absent']}\n")
    done = execute(*ask(tiny_bundle, "--policy", "every", "--transfer", "pairs"))
    assert (done.returncode, done.stderr) == (0, "")
    done = execute(*ask(tiny_bundle, "--policy", "dual", "--json"))
    assert done.stderr == f"warning: {faults['dual']}\n"
    assert json.loads(done.stdout)["steps_by_kind"] == {"full": 1, "partial": 7}, "the built-in one ran"


def test_doctor_shows_packages_to_people(install: Install, execute: Execute) -> None:
    install("good-plugin", GOOD_ENTRIES, good_plugin=GOOD)
    assert "plug-in" not in execute("inspect", "-h").stdout
    (line,) = (line for line in execute("doctor").stdout.splitlines() if line.startswith("pairs"))
    assert line.split() == ["pairs", "decoding", "rule", "good-plugin", "1.0", "ok"]


def test_packages_are_imported_only_where_they_can_be_chosen(
    install: Install, execute: Execute, site: Path, tiny_bundle: Bundle
) -> None:
    install("good-plugin", GOOD_ENTRIES, good_plugin=GOOD)
    for arguments in (("-h",), ("inspect", tiny_bundle.path), ("export", "-h")):
        assert execute(*arguments).returncode == 0
        assert not (site / "imported").exists(), arguments
    execute("generate", "-h")
    assert (site / "imported").exists()


def test_every_flag_of_the_commands_that_generate_is_protected() -> None:
    taken = built_in_flags().keys()
    names: set[str] = set()
    for name in ("generate", "dump"):
        command = cli.cli.get_command(click.Context(cli.cli), name)
        assert command is not None
        names |= {str(parameter.name) for parameter in command.params}
    assert names <= taken
    assert names >= COMMAND_FLAGS - {"json", "help", "debug", "rule"}, "--rule is another spelling of --transfer"
