"""docs/adding-a-family.md runs as printed, from its first block to its last, and what it points to is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dllm_export.graphs import ModelShape

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "adding-a-family.md").read_text(encoding="utf-8")


def test_the_walk_through_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/adding-a-family.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "assumed mask_token_id 60: not in config.json, taken from the released Meadow" in printed
    assert "1.0 of the generated tokens are the reference's" in printed


def test_the_flags_it_names_are_those_of_a_shape() -> None:
    table = TEXT.split("| question | flag |")[1].split("\n\n")[0]
    flags = {flag for row in table.splitlines()[2:] for flag in re.findall(r"`(\w+)`", row.split("|")[2])}
    assert len(flags) > 10
    assert flags <= set(ModelShape.__dataclass_fields__)


@pytest.mark.parametrize(("file", "line"), re.findall(r"^\| `(tests/[\w/]+\.py)` \| `(\w+)` \|", TEXT, re.MULTILINE))
def test_the_lines_to_add_to_are_there(file: str, line: str) -> None:
    assert re.search(rf"^{line}\b.* = ", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:graphs|tests)/[\w/]+(?:\.py|/))`", TEXT))))
def test_the_files_it_names_are_there(path: str) -> None:
    if path != "graphs/families/meadow.py":
        assert (ROOT / path).exists()
