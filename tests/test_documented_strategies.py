"""The policy and the rule that docs/policies.md shows how to write, run as printed: in Python, and as a package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_export.errors import UsageError
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import CachePolicy, DualCache, NoCache
from dllm_export.tools.eager import EagerModel

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "policies.md").read_text()
PROMPTS = [[3, 14, 15, 92, 6, 53, 58], [27, 18, 28, 18]]
MASK, EOS = 96, 95
OpenModel = Callable[[str], DiffusionLM]


def block(language: str, word: str) -> str:
    """The one code block of the page that holds the word."""
    (code,) = (code for code in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if word in code)
    return str(code)


@pytest.fixture(scope="module")
def documented() -> dict[str, Any]:
    """The names that the page's code defines."""
    names: dict[str, Any] = {"__name__": "documented"}
    for word in ("class LeftContext", "class LeftToRight"):
        exec(compile(block("python", word), word, "exec", dont_inherit=True), names)
    return names


def responses(lm: DiffusionLM, policy: CachePolicy, block_length: int) -> list[list[int]]:
    options = GenerationOptions(gen_length=24, block_length=block_length)
    request = lm.continuation(PROMPTS, options)
    return [list(one.tokens) for one in lm.run(request, options, policy)]


def plain_loop(
    model: EagerModel, prompts: Sequence[Sequence[int]], length: int, block: int, context: int
) -> list[list[int]]:
    """What the page says in words: all rows first, then those from `context` left of the block to its end."""
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    rows = [[EOS] * pad + [*prompt] + [MASK] * length for pad, prompt in zip(padding, prompts, strict=True)]
    canvas, fixed = torch.tensor(rows), model.context(padding, width + length)
    keys, values = ([torch.empty(0)] * len(model.layers) for _ in range(2))
    for start in range(width, width + length, block):
        for step in range(block):
            first, last = (0, width + length) if step == 0 else (max(0, start - context), start + block)
            alive = torch.arange(first, last)
            x = model.embed(canvas[:, alive])
            for number, layer in enumerate(model.layers):
                inner = model.norm(x, layer["attn_norm.weight"])
                query, key, value = (model.project(layer, name, inner) for name in ("q_proj", "k_proj", "v_proj"))
                if step == 0:
                    keys[number], values[number] = key.clone(), value.clone()
                keys[number][:, alive], values[number][:, alive] = key, value
                at = fixed.at(alive.expand(len(rows), -1))
                x = x + model.attend(layer, query, keys[number], values[number], at, fixed)
                x = x + model.mlp(layer, x)
            logits = model.classify(x)[:, start - first : start - first + block]
            logits[:, :, MASK] = -torch.inf
            sure, token = logits.softmax(-1).max(-1)
            sure[canvas[:, start : start + block] != MASK] = -1
            place = sure.argmax(1)
            for sequence, row in enumerate(place.tolist()):
                canvas[sequence, start + row] = token[sequence, row]
    return [row[width:] for row in canvas.tolist()]


@pytest.mark.parametrize("context", [0, 3, 10, 100])
def test_the_policy_does_what_the_page_says(
    context: int, documented: dict[str, Any], tiny_eager: dict[str, EagerModel], open_model: OpenModel
) -> None:
    """Float64, token for token, a padded batch, three blocks: the context reaches into padding and past the start."""
    expected = plain_loop(tiny_eager["plain"], PROMPTS, 24, 8, context)
    assert responses(open_model("float64"), documented["LeftContext"](context=context), 8) == expected


def test_its_limits_are_the_dual_cache_and_no_cache(documented: dict[str, Any], open_model: OpenModel) -> None:
    lm, policy = open_model("float64"), documented["LeftContext"]
    assert responses(lm, policy(context=0), 8) == responses(lm, DualCache(), 8)
    assert responses(lm, policy(context=100), 24) == responses(lm, NoCache(), 24)
    assert responses(lm, policy(context=0), 24) != responses(lm, NoCache(), 24), "these tokens can tell"


def test_its_option_is_checked(documented: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--context is -1, expected 0 or more"):
        documented["LeftContext"](context=-1)


def test_the_rule_goes_from_left_to_right(documented: dict[str, Any], open_model: OpenModel) -> None:
    lm, options = open_model("onnxruntime"), GenerationOptions(gen_length=8)
    request = lm.continuation([[1, 2, 3]], options)
    frames = list(lm.stream(request, options, NoCache(), documented["LeftToRight"]()))
    assert [frame.committed[0].nonzero()[0].tolist() for frame in frames] == [[row] for row in range(8)]


def test_the_package_of_the_page_has_both(
    documented: dict[str, Any], open_model: OpenModel, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    """Installed as pip would install the page's pyproject.toml, from the command line, with the page's flags."""
    code = "".join(block("python", word) for word in ("class LeftContext", "class LeftToRight"))
    (tmp_path / "left_context.py").write_text(code)
    groups = re.sub(r'\[project\.entry-points\."(.*?)"\]', r"[\1]", block("toml", "entry-points")).replace('"', "")
    record = tmp_path / "left_context-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: left-context\nVersion: 1.0\n")
    (record / "entry_points.txt").write_text(groups)
    (flags,) = re.findall(r"`(--policy left-context .*?)`", PAGE)
    command = ["generate", str(tiny_bundle.path), "--prompt-ids", "3 14 15", "--gen-length", "8", "--threads", "1"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "dllm_export.tools.cli",
            *command,
            *flags.split(),
            "--transfer",
            "left-to-right",
            "--json",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["settings"]["policy"] == {"name": "left-context", "context": 4}
    lm, options = open_model("onnxruntime"), GenerationOptions(gen_length=8)
    policy, rule = documented["LeftContext"](context=4), documented["LeftToRight"]()
    expected = lm.run(lm.continuation([[3, 14, 15]], options), options, policy, rule)[0]
    assert tuple(result["tokens"]) == expected.tokens
