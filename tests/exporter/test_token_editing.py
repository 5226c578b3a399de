"""LLaDA2.1's token editing: whole generations against its loop, on a model that is computed from the published formulas."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from dllm_export.exporter.checkpoint import open_checkpoint
from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pipeline import export
from dllm_export.graphs import Experts, ModelShape
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import BlockCache, DkvDecode, DualCache, NoCache
from dllm_export.runtime.session import SessionOptions, open_session
from dllm_export.runtime.transfers import TokenEditing
from dllm_export.tools.random_checkpoint import write_random_checkpoint

EXPERTS = Experts(
    count=4, per_token=2, mlp=12, router="sigmoid", renormalise=True, scale=2.5, bias=True, groups=2, groups_kept=1,
    shared=12, dense_layers=1,
)  # fmt: skip
SHAPE = ModelShape(
    layers=2, hidden=32, heads=4, kv_heads=2, head_dim=16, mlp=40, vocab=61, max_length=128, norm_eps=1e-6,
    rope_theta=1e4, rope_float32=False, qk_norm=True, block=6, rope_fraction=0.5, experts=EXPERTS,
)  # fmt: skip
MASK, END, BLOCK, LENGTH = 60, 59, 6, 15
PROMPTS = [np.random.default_rng(seed).integers(0, 59, length).tolist() for seed, length in enumerate((8, 12, 3))]
"""Ends within a block, at the end of one, and within the first."""

Forward = Callable[[list[int]], NDArray[np.float64]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaDA2 that says it is 2.1."""
    path = write_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", SHAPE, family="llada2")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "llada21_moe", "block_size": BLOCK}))
    return path


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(checkpoint, tmp_path_factory.mktemp("bundle") / "b", ExportOptions(no_tokenizer=True))


@pytest.fixture(scope="module")
def forward(checkpoint: Path) -> Forward:
    """Logits [T, V] by the formulas, all rows at once and every expert on every row."""
    weights = {name: value.double() for name, value in load_file(checkpoint / "model.safetensors").items()}
    d, turned = SHAPE.head_dim, SHAPE.head_dim // 2

    def normed(x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + SHAPE.norm_eps) * weights[name]

    def rotate(x: Tensor) -> Tensor:  # [T, heads, d]; tables are float32 everywhere
        rates = np.float32(1) / np.float32(SHAPE.rope_theta) ** (np.arange(0, turned, 2, dtype=np.float32) / turned)
        angles = torch.from_numpy(np.float32(np.arange(len(x)))[:, None] * rates).double()[:, None]
        low, high = x[..., : turned // 2], x[..., turned // 2 : turned]
        cos, sin = torch.cos(angles), torch.sin(angles)
        return torch.cat([low * cos - high * sin, high * cos + low * sin, x[..., turned:]], -1)

    def swiglu(x: Tensor, prefix: str) -> Tensor:
        gate, up, down = (weights[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def mix(x: Tensor, prefix: str) -> Tensor:
        scores = torch.sigmoid(x @ weights[f"{prefix}gate.weight"].T)
        biased = (scores + weights[f"{prefix}gate.expert_bias"]).unflatten(1, (EXPERTS.groups, -1))
        group = biased.topk(2, dim=-1).values.sum(-1).argmax(-1)  # one group is kept
        others = torch.arange(EXPERTS.groups)[None, :, None] != group[:, None, None]
        best = biased.masked_fill(others, -torch.inf).flatten(1).topk(EXPERTS.per_token).indices
        shares = torch.zeros_like(scores).scatter(1, best, scores.gather(1, best))
        shares = shares / shares.sum(-1, keepdim=True) * EXPERTS.scale
        parts = [shares[:, n, None] * swiglu(x, f"{prefix}experts.{n}.") for n in range(EXPERTS.count)]
        return torch.stack(parts).sum(0) + swiglu(x, f"{prefix}shared_experts.")

    def logits(tokens: list[int]) -> NDArray[np.float64]:
        x = weights["model.word_embeddings.weight"][tokens]
        blocks = torch.arange(len(tokens)) // BLOCK
        unseen = blocks[None, :] > blocks[:, None]
        for layer in range(SHAPE.layers):
            prefix = f"model.layers.{layer}."
            fused = (
                normed(x, f"{prefix}input_layernorm.weight") @ weights[f"{prefix}attention.query_key_value.weight"].T
            )
            q, k, v = fused.unflatten(1, (-1, d)).split([SHAPE.heads, SHAPE.kv_heads, SHAPE.kv_heads], dim=1)
            q = rotate(normed(q, f"{prefix}attention.query_layernorm.weight"))
            k = rotate(normed(k, f"{prefix}attention.key_layernorm.weight"))
            k, v = (part.repeat_interleave(SHAPE.heads // SHAPE.kv_heads, dim=1) for part in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) / d**0.5
            seen = torch.softmax(scores.masked_fill(unseen, -torch.inf), -1)
            mixed = torch.einsum("hqk,khd->qhd", seen, v).flatten(1)
            x = x + mixed @ weights[f"{prefix}attention.dense.weight"].T
            inner = normed(x, f"{prefix}post_attention_layernorm.weight")
            x = x + (swiglu if layer < EXPERTS.dense_layers else mix)(inner, f"{prefix}mlp.")
        return np.asarray(normed(x, "model.norm.weight") @ weights["lm_head.weight"].T)

    return logits


class Plain:
    """The loop over one prompt, with every row of every block before and no cache: tokens, and what it did."""

    def __init__(self, forward: Forward, prompt: list[int], rule: TokenEditing) -> None:
        self.passes: list[int] = []
        """Of every block that has something to generate."""
        self.edits = 0
        self.reviewed = self.cut_off = 0  # blocks that were edited in a review, and such that ended with an edit
        total = -(-(len(prompt) + LENGTH) // BLOCK) * BLOCK
        canvas = prompt + [MASK] * (total - len(prompt))
        for start in range(len(prompt) // BLOCK * BLOCK, total, BLOCK):
            passes = reviews = 0
            edited = edited_in_review = False
            while True:
                rows = range(max(start, len(prompt)), start + BLOCK)
                masked = [row for row in rows if canvas[row] == MASK]
                if not masked and reviews == rule.max_post_steps:
                    self.cut_off += edited
                    break
                reviews += not masked
                logits = forward(canvas[: start + BLOCK])
                logits[:, MASK] = -np.inf
                logits -= logits.max(1, keepdims=True)
                chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
                best = {row: int(chances[row].argmax()) for row in rows}
                sure = [row for row in masked if chances[row].max() > rule.threshold]
                if masked and not sure:
                    sure = [max(masked, key=lambda row: chances[row].max())]
                other = [row for row in rows if row not in masked and best[row] != canvas[row]]
                edit = [row for row in other if chances[row].max() > rule.editing_threshold]
                for row in sure + edit:
                    canvas[row] = best[row]
                passes, edited = passes + 1, len(edit) > 0
                self.edits += len(edit)
                edited_in_review |= edited and not masked
                if not masked and not edit:
                    break
            self.passes.append(passes)
            self.reviewed += edited_in_review
        self.tokens = tuple(canvas[len(prompt) : len(prompt) + LENGTH])


RULES = {
    "reviews until nothing is edited": TokenEditing(threshold=0.15, editing_threshold=0.2),
    "whatever is likelier": TokenEditing(threshold=0.12, editing_threshold=0.0, max_post_steps=3),
    "one review": TokenEditing(threshold=0.12, editing_threshold=0.15, max_post_steps=1),
    "no review": TokenEditing(threshold=0.12, editing_threshold=0.12, max_post_steps=0),
}


@pytest.fixture(scope="module")
def loops(forward: Forward) -> dict[str, list[Plain]]:
    """What the loop makes of every prompt by every rule."""
    return {name: [Plain(forward, prompt, rule) for prompt in PROMPTS] for name, rule in RULES.items()}


@pytest.mark.parametrize("name", RULES)
def test_a_generation_is_the_loop_token_for_token_and_pass_for_pass(
    name: str, loops: dict[str, list[Plain]], bundle: Bundle
) -> None:
    rule, options = RULES[name], GenerationOptions(gen_length=LENGTH)
    plain = loops[name]
    assert sum(one.edits for one in plain) > 7, "without edits the rule is another one"
    for provider in ("torch", "onnxruntime"):
        with DiffusionLM(bundle, open_session(bundle, SessionOptions(provider=provider, threads=1))) as lm:
            for policy in (NoCache(), BlockCache(), DualCache()):
                for prompt, one in zip(PROMPTS, plain, strict=True):
                    (alone,) = lm.run(lm.continuation([prompt], options), options, policy, rule)
                    assert (alone.tokens, alone.passes) == (one.tokens, sum(one.passes)), (provider, policy.name)
                together = lm.run(lm.continuation(PROMPTS, options), options, policy, rule)
                assert [result.tokens for result in together] == [one.tokens for one in plain], (provider, policy.name)
                slowest = np.array([one.passes for one in plain]).max(0)
                assert together[0].passes == slowest.sum(), "a block of a batch ends with its last sequence"


def test_the_loop_ends_blocks_in_every_way(loops: dict[str, list[Plain]]) -> None:
    """What the tests above would miss if the settings were others: reviews that edit, that edit nothing, that are too many."""
    counts = {name: (sum(p.reviewed for p in plain), sum(p.cut_off for p in plain)) for name, plain in loops.items()}
    assert counts["reviews until nothing is edited"][0] > 2
    assert counts["whatever is likelier"][1] > 5
    assert counts["one review"][1] > 5
    assert counts["no review"] == (0, 3)


def test_the_configuration_says_whether_it_is_the_default(checkpoint: Path, bundle: Bundle, tmp_path: Path) -> None:
    assert bundle.manifest.sampler.transfer == "token-editing"
    raw = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"model_type": "llada2_moe"}))
    (tmp_path / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
    assert open_checkpoint(tmp_path).config.sampler.transfer == "dynamic"


def test_frames_say_which_tokens_were_replaced(bundle: Bundle) -> None:
    options = GenerationOptions(gen_length=LENGTH)
    with DiffusionLM(bundle, open_session(bundle, SessionOptions(provider="torch", threads=1))) as lm:
        request = lm.continuation(PROMPTS, options)
        before, edits = request.canvas[:, request.shape.prompt_rows :], 0
        for frame in lm.stream(request, options, BlockCache(), RULES["whatever is likelier"]):
            changed = frame.tokens != before
            assert np.array_equal(frame.committed, changed & (before == MASK))
            assert np.array_equal(frame.edited, changed & (before != MASK))
            assert (frame.confidence[frame.edited] > 0).all()
            assert frame.step <= frame.steps
            before, edits = frame.tokens, edits + int(frame.edited.sum())
    assert edits > 7


def test_an_end_counts_once_its_block_is_finished(bundle: Bundle) -> None:
    """--early-stop: the blocks up to the one with the first end are as without it, and everything after is end of text."""
    rule, ends = RULES["whatever is likelier"], 0
    options, policy = GenerationOptions(gen_length=48, early_stop=True), BlockCache()
    with DiffusionLM(bundle, open_session(bundle, SessionOptions(provider="torch", threads=1))) as lm:
        results = lm.run(lm.continuation(PROMPTS, options), options, policy, rule)
        whole = lm.run(lm.continuation(PROMPTS, options), replace(options, early_stop=False), policy, rule)
    for prompt, stopped, full in zip(PROMPTS, results, whole, strict=True):
        end = full.tokens.index(END) if END in full.tokens else len(full.tokens)
        kept = min((len(prompt) + end) // BLOCK * BLOCK + BLOCK - len(prompt), len(full.tokens))
        assert stopped.tokens == full.tokens[:kept] + (END,) * (len(full.tokens) - kept)
        ends += kept < len(full.tokens)
    assert ends > 1


def test_every_policy_that_goes_by_rows_runs_the_rows_that_may_be_replaced(bundle: Bundle) -> None:
    options = GenerationOptions(gen_length=LENGTH)
    policy = DkvDecode(refresh_interval=0, bucket=1)
    with DiffusionLM(bundle, open_session(bundle, SessionOptions(provider="torch", threads=1))) as lm:
        results = lm.run(lm.continuation(PROMPTS, options), options, policy, RULES["whatever is likelier"])
    assert all(MASK not in result.tokens for result in results)
