"""Rules that hold for every file: what may be imported, loaded and named."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("graphs", "runtime", "exporter", "tools")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

NAMES_THAT_SAY_NOTHING = {"utils", "common", "manager", "base", "helpers"}
UNSAFE_LOADERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve"}


def modules_after(statement: str) -> set[str]:
    """Top-level names of sys.modules after a fresh interpreter has run the statement."""
    program = (
        f"{statement}\nimport json, sys; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", ["dllm_export", "dllm_export.graphs", "dllm_export.runtime"])
def test_importing_the_runtime_loads_no_torch_onnx_or_transformers(module: str) -> None:
    assert not modules_after(f"import {module}") & {"torch", "onnx", "transformers"}


def test_importing_loads_no_second_copy_under_a_bare_name() -> None:
    assert not modules_after("import dllm_export.tools, dllm_export.exporter, dllm_export.runtime") & set(FOLDERS)


def test_no_module_has_a_name_that_says_nothing() -> None:
    named = [path for folder in (*FOLDERS, "src") for path in (ROOT / folder).rglob("*")]
    assert not [str(path.relative_to(ROOT)) for path in named if path.stem in NAMES_THAT_SAY_NOTHING]


def imported_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def unsafe_torch_loads(tree: ast.AST) -> Iterator[int]:
    """Lines that call torch.load without weights_only=True."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = {ast.unparse(word.value) for word in node.keywords if word.arg == "weights_only"}
            if safe != {"True"}:
                yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "torch" and "load" in {n.name for n in node.names}:
            yield node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_can_run_code_from_a_checkpoint(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not set(imported_names(tree)) & UNSAFE_LOADERS
    assert not list(unsafe_torch_loads(tree)), "torch.load needs weights_only=True"


@pytest.mark.parametrize(
    ("source", "unsafe"),
    [
        ("import torch\ntorch.load(path)", True),
        ("import torch\ntorch.load(path, weights_only=False)", True),
        ("import torch\ntorch.load(path, weights_only=True)", False),
        ("from torch import load", True),
    ],
)
def test_unsafe_torch_load_is_seen(source: str, unsafe: bool) -> None:
    assert bool(list(unsafe_torch_loads(ast.parse(source)))) is unsafe
