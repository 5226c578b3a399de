"""Families in the layout of Hugging Face against its own classes, made bidirectional: an implementation that is not ours.

A checkpoint is written by transformers, so that its names and keys are the published ones, and exported; or it is written by
this project and read by transformers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from dllm_export.errors import CheckpointError
from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pipeline import export
from dllm_export.exporter.verify import verify
from dllm_export.graphs import ModelShape
from dllm_export.graphs.families import FAMILIES
from dllm_export.graphs.torch_ops import TorchOps
from dllm_export.runtime.blocks import number_blocks
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import BlockCache, DualCache, NoCache
from dllm_export.runtime.rope import rotary_tables
from dllm_export.runtime.session import SessionOptions, open_session
from dllm_export.runtime.transfers import Dynamic, Quota, SubBlocks, Transfer
from dllm_export.tools.random_checkpoint import write_random_checkpoint

transformers = pytest.importorskip("transformers", reason="transformers needs Python 3.11")

Array = NDArray[Any]

VOCABULARY, MASK, END = 61, 60, 59
"""Fewer tokens than the head returns candidates, so that these are all logits."""

CLOSE = 2e-5
"""transformers takes norms and rotary tables in float32 whatever the type of the model; logits here reach 20, and one wrong
tensor moves them by more than 0.1 (test_a_wrong_weight_would_be_seen)."""


@dataclass(frozen=True, slots=True)
class Model:
    """How transformers makes a checkpoint of a family."""

    base: str
    """The class in transformers, without its ending."""
    settings: dict[str, object] = field(default_factory=dict)


MODELS = {
    "illada": Model("Llama", {"tie_word_embeddings": True}),
    "a2d-qwen3": Model("Qwen3", {"tie_word_embeddings": True, "head_dim": 20}),
    "a2d-qwen2": Model("Qwen2", {"tie_word_embeddings": True}),
    "a2d-llama": Model("Llama", {"tie_word_embeddings": False}),
    "dream": Model("Qwen2", {"tie_word_embeddings": False}),
    "open-dcoder": Model("Qwen2", {"tie_word_embeddings": True}),
    "diffullama": Model("Llama", {"tie_word_embeddings": False}),
    "sdar": Model("Qwen3", {"tie_word_embeddings": False, "head_dim": 20}),
    "dream-reasoner": Model("Qwen3", {"tie_word_embeddings": False, "head_dim": 12}),
    "stable-diffcoder": Model("Llama", {"tie_word_embeddings": False}),
    "fast-dllm-v2": Model("Qwen2", {"tie_word_embeddings": True}),
}
BY_BLOCKS = ("sdar", "dream-reasoner", "stable-diffcoder", "fast-dllm-v2")
BLOCK = 4
"""Rows of a block in the checkpoints of these; Stable-DiffCoder's do not say, and it is what the released ones have."""
NAMED = ("open-dcoder", "diffullama")
"""Families whose checkpoints look like those of an autoregressive model."""
SHIFTED = ("dream", "fast-dllm-v2", *NAMED)
every_family = pytest.mark.parametrize("family", MODELS)
every_full_family = pytest.mark.parametrize("family", [family for family in MODELS if family not in BY_BLOCKS])
every_block_family = pytest.mark.parametrize("family", [family for family in BY_BLOCKS if family not in SHIFTED])
SHAPE = ModelShape(
    layers=3, hidden=48, heads=4, kv_heads=2, head_dim=12, mlp=80, vocab=VOCABULARY, max_length=64, norm_eps=1e-6,
    rope_theta=1e4, rope_float32=False,
)  # fmt: skip


def write_published(directory: Path, family: str, shard_size: str = "5GB") -> Path:
    """A seeded checkpoint as transformers saves it, with the architecture and the ids of the family."""
    model, (architecture, *_), (kind, *_) = (
        MODELS[family], FAMILIES[family].marks.architectures, FAMILIES[family].marks.model_types,
    )  # fmt: skip
    config = getattr(transformers, f"{model.base}Config")(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rope_theta=2e4, rms_norm_eps=1e-5, **model.settings,
    )  # fmt: skip
    torch.manual_seed(7)
    network = getattr(transformers, f"{model.base}ForCausalLM")(config)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            gain = 1.5 * weight.shape[-1] ** -0.5
            weight.copy_(torch.randn_like(weight) * gain if weight.ndim == 2 else 1 + 0.1 * torch.randn_like(weight))
            if name.endswith("bias"):
                weight.sub_(1.0)
    network.save_pretrained(directory, max_shard_size=shard_size)
    raw = json.loads((directory / "config.json").read_text())
    raw |= {
        "architectures": [architecture],
        "model_type": kind,
        "mask_token_id": MASK,
        "eos_token_id": END,
        "pad_token_id": END,
        **({"bd_size" if family == "fast-dllm-v2" else "block_size": BLOCK} if family in BY_BLOCKS else {}),
    }
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def open_network(directory: Path, family: str) -> Any:
    """The checkpoint in its class of transformers, in double precision."""
    base = MODELS[family].base
    config = getattr(transformers, f"{base}Config").from_dict(json.loads((directory / "config.json").read_text()))
    return getattr(transformers, f"{base}ForCausalLM").from_pretrained(
        directory, config=config, dtype=torch.float64, attn_implementation="eager"
    )


def open_published(directory: Path, family: str) -> Callable[[Array], Array]:
    """Logits [B, T, V] by transformers, every row seeing every other, or its block and those before."""
    network = open_network(directory, family)

    def forward(tokens: Array) -> Array:
        batch, length = tokens.shape
        blocks = torch.arange(length) // (BLOCK if family in BY_BLOCKS else length)
        hidden = torch.where(blocks[None, :] > blocks[:, None], -torch.inf, 0.0).double()
        visible = hidden.expand(batch, 1, length, length)
        with torch.no_grad():
            return np.asarray(network(torch.from_numpy(tokens), attention_mask=visible, use_cache=False).logits)

    return forward


def logits_of(bundle: Bundle, tokens: Array) -> Array:  # [B, T] -> [B, T, V]
    """Our graphs in float64, nothing cached."""
    shape, (batch, length) = bundle.manifest.shape, tokens.shape

    def run(graph: str, layer: int | None = None, **inputs: Array) -> dict[str, Array]:
        feeds = {**inputs, **bundle.graph_weights(graph, layer)}
        wide = {
            name: torch.from_numpy(np.array(x, np.float64 if x.dtype == np.float32 else x.dtype))
            for name, x in feeds.items()
        }
        return {name: x.numpy() for name, x in bundle.specs[graph].function(TorchOps(), shape, wide).items()}

    cos, sin = rotary_tables(shape, np.tile(np.arange(length), (batch, 1)))
    hidden = run("embed", tokens=tokens.astype(np.int32))["hidden_out"]
    for layer in range(shape.layers):
        mask = np.ones((batch, length), np.bool_)
        blocks = {"block": number_blocks(mask, shape.block)} if shape.block else {}
        hidden = run("layer_full", layer, hidden=hidden, cos=cos, sin=sin, mask=mask, **blocks)["hidden_out"]
    index = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    nothing = {"bias": np.zeros(shape.vocab, np.float32), "guidance": np.zeros_like(hidden), "cfg_scale": np.zeros(1)}
    out = run("head", hidden=hidden, index=index, given=np.zeros_like(index), **nothing)
    logits = np.empty((batch, length, shape.vocab))
    np.put_along_axis(logits, out["top_tokens"].astype(np.int64), out["top_logits"], axis=-1)
    return logits


def draw_tokens(seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (2, 11))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("published")
    return {family: write_published(root / family, family) for family in MODELS}


@pytest.fixture(scope="module")
def bundles(published: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    root = tmp_path_factory.mktemp("exported")
    return {family: export(path, root / family, options_of(family)) for family, path in published.items()}


def options_of(family: str) -> ExportOptions:
    """As a user exports a checkpoint of it."""
    return ExportOptions(no_tokenizer=True, indicator_rank=5, family=family if family in NAMED else None)


@every_family
def test_logits_of_a_published_checkpoint_equal_those_of_transformers(
    family: str, published: dict[str, Path], bundles: dict[str, Bundle]
) -> None:
    manifest = bundles[family].manifest
    assert (manifest.family, manifest.assumed) == (family, ())
    expected = open_published(published[family], family)(draw_tokens())
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits_of(bundles[family], draw_tokens()), expected, rtol=0, atol=CLOSE)


@every_family
def test_logits_of_a_checkpoint_written_here_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    shape = replace(
        SHAPE,
        qk_norm=MODELS[family].base == "Qwen3",
        block=BLOCK if family in BY_BLOCKS else 0,
        qkv_bias=MODELS[family].base == "Qwen2",
        tied_head=bool(MODELS[family].settings["tie_word_embeddings"]),
        shift=family in SHIFTED,
        indicator_rank=5,
    )
    model = write_random_checkpoint(tmp_path / "model", shape, family=family, shards=3)
    bundle = export(model, tmp_path / "bundle", options_of(family))
    assert bundle.manifest.shape == shape
    expected = open_published(model, family)(draw_tokens())
    np.testing.assert_allclose(logits_of(bundle, draw_tokens()), expected, rtol=0, atol=CLOSE)


def test_a_published_checkpoint_in_shards_is_the_same_model(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    model = write_published(tmp_path / "model", "a2d-qwen3", shard_size="40KB")
    assert len(list(model.glob("*.safetensors"))) > 2
    bundle = export(model, tmp_path / "bundle", ExportOptions(no_tokenizer=True))
    tokens = draw_tokens()
    np.testing.assert_array_equal(logits_of(bundle, tokens), logits_of(bundles["a2d-qwen3"], tokens))


@pytest.mark.parametrize("slot", ["q_norm", "k_norm"])
def test_a_wrong_weight_would_be_seen(slot: str, published: dict[str, Path], tmp_path: Path) -> None:
    family, name = "a2d-qwen3", f"model.layers.1.self_attn.{slot}.weight"
    tensors = load_file(published[family] / "model.safetensors")
    changed = tmp_path / "model"
    write_published(changed, family)
    save_file({**tensors, name: tensors[name].flip(0)}, changed / "model.safetensors", metadata={"format": "pt"})
    bundle = export(changed, tmp_path / "bundle", ExportOptions(no_tokenizer=True))
    expected = open_published(published[family], family)(draw_tokens())
    assert np.abs(logits_of(bundle, draw_tokens()) - expected).max() > 0.1


# -- a whole generation
def plain_generation(
    forward: Callable[[Array], Array], prompt: list[int], length: int, block: int, *, shift: bool
) -> list[int]:
    """LLaDA's loop: in every step the candidate of the block that the model is surest of.

    With a shift the logits of a token are those of the row before it.
    """
    canvas = np.array([*prompt, *[MASK] * length])
    for start in range(len(prompt), len(canvas), block):
        rows, undecided = np.arange(start, start + block), np.ones(block, np.bool_)
        while undecided.any():
            logits = forward(canvas[None])[0, rows - 1 if shift else rows]
            logits[:, MASK] = -np.inf  # never proposed here (docs/decisions.md)
            probability = np.exp(logits - logits.max(-1, keepdims=True))
            sure = probability.max(-1) / probability.sum(-1)
            best = int(np.where(undecided, sure, -1).argmax())
            canvas[rows[best]], undecided[best] = logits[best].argmax(), False
    return [int(token) for token in canvas[len(prompt) :]]


@contextmanager
def open_model(bundle: Bundle, provider: str) -> Iterator[DiffusionLM]:
    with DiffusionLM(bundle, open_session(bundle, SessionOptions(provider=provider, threads=1))) as model:
        yield model


@every_full_family
def test_a_generation_is_that_of_transformers_token_for_token_on_every_provider(
    family: str, published: dict[str, Path], bundles: dict[str, Bundle]
) -> None:
    prompts = [[int(token) for token in draw_tokens(seed)[0] if token < END] for seed in range(3)]
    forward = open_published(published[family], family)
    expected = [plain_generation(forward, prompt, 16, 8, shift=family in SHIFTED) for prompt in prompts]
    assert len({token for tokens in expected for token in tokens}) > 5
    options = GenerationOptions(
        gen_length=16, block_length=8, steps=16, temperature=0.0, top_p=1.0, remasking="low_confidence"
    )
    for provider in ("torch", "onnxruntime"):
        with open_model(bundles[family], provider) as model:
            results = model.run(model.continuation(prompts, options), options, NoCache(), Quota())
        assert [list(result.tokens) for result in results] == expected, provider


@dataclass(frozen=True)
class Static:
    """Of SDAR's strategies the even one: as many of the surest rows in every step."""

    def choose(self, sure: Array, due: int) -> int:
        return due


@dataclass(frozen=True)
class Confident(Static):
    """`low_confidence_dynamic`: all above the threshold where they are enough, else as many as are due."""

    threshold: float

    def choose(self, sure: Array, due: int) -> int:
        above = int((sure > self.threshold).sum())
        return above if above >= due else due


def plain_blocks(
    forward: Callable[[Array], Array], prompt: list[int], length: int, steps: int, strategy: Static
) -> tuple[list[int], int]:
    """SDAR's loop over blocks that are counted from the prompt's first token: (tokens, steps that ran)."""
    total, ran = -(-(len(prompt) + length) // BLOCK) * BLOCK, 0
    canvas = np.array([*prompt, *[MASK] * (total - len(prompt))])
    for start in range(len(prompt) // BLOCK * BLOCK, total, BLOCK):
        rows = np.arange(start, start + BLOCK)
        for step in range(steps):
            undecided = canvas[rows] == MASK
            if not undecided.any():
                break
            logits = forward(canvas[None, : start + BLOCK])[0, rows]
            logits[:, MASK] = -np.inf
            probability = np.exp(logits - logits.max(-1, keepdims=True))
            sure = np.where(undecided, probability.max(-1) / probability.sum(-1), -1)
            due = BLOCK // steps + (step < BLOCK % steps)
            count = min(strategy.choose(sure, due), int(undecided.sum()))
            chosen = np.argsort(-sure, kind="stable")[:count]
            canvas[rows[chosen]] = logits[chosen].argmax(-1)
            ran += 1
    return [int(token) for token in canvas[len(prompt) : len(prompt) + length]], ran


PROMPTS = [
    [int(token) for token in draw_tokens(seed)[0] if token < END][:cut] for seed, cut in enumerate((3, 8, 10, 7))
]
"""Shorter than a block, whole blocks, and ends within one."""


@every_block_family
@pytest.mark.parametrize("steps", [4, 2])
@pytest.mark.parametrize("threshold", [None, 0.3])
def test_a_generation_by_blocks_is_the_published_loop_token_for_token_with_every_policy_that_is_exact(
    family: str, steps: int, threshold: float | None, published: dict[str, Path], bundles: dict[str, Bundle]
) -> None:
    forward, length = open_published(published[family], family), 14
    strategy, rule = (Static(), Quota()) if threshold is None else (Confident(threshold), Dynamic(threshold=threshold))
    plain = [plain_blocks(forward, prompt, length, steps, strategy) for prompt in PROMPTS]
    expected = [tokens for tokens, _ in plain]
    assert len({token for tokens in expected for token in tokens}) > 5
    options = GenerationOptions(gen_length=length, steps=steps * 4, temperature=0.0, top_p=1.0)
    for provider in ("torch", "onnxruntime"):
        with open_model(bundles[family], provider) as model:
            for policy in (NoCache(), BlockCache(), DualCache()):
                for prompt, (tokens, ran) in zip(PROMPTS, plain, strict=True):
                    (alone,) = model.run(model.continuation([prompt], options), options, policy, rule)
                    assert (list(alone.tokens), alone.passes) == (tokens, ran), (provider, policy.name)
                together = model.run(model.continuation(PROMPTS, options), options, policy, rule)
                assert [list(result.tokens) for result in together] == expected, (provider, policy.name)


def plain_sub_blocks(
    forward: Callable[[Array], Array], prompt: list[int], length: int, part: int, threshold: float
) -> tuple[list[int], int]:
    """Fast-dLLM v2's loop: a finished block's last row decides the next token, then parts of the block go by a threshold.

    Row j of the block is read from row j - 1. (tokens, passes); the pass that ends a block is counted with the next one.
    """
    total, passes = -(-(len(prompt) + length) // BLOCK) * BLOCK, 0
    canvas = np.array([*prompt, *[MASK] * (total - len(prompt))])

    def look(rows: Array, end: int) -> tuple[Array, Array]:
        logits = forward(canvas[None, :end])[0, rows]
        logits[:, MASK] = -np.inf
        probability = np.exp(logits - logits.max(-1, keepdims=True))
        return logits.argmax(-1), probability.max(-1) / probability.sum(-1)

    for start in range(len(prompt) // BLOCK * BLOCK, total, BLOCK):
        if canvas[start] == MASK:
            canvas[start], passes = look(np.array([start - 1]), start)[0][0], passes + 1
        for first in range(start, start + BLOCK, part):
            rows = np.arange(first, first + part)
            while (undecided := canvas[rows] == MASK).any():
                places = rows[undecided]
                tokens, sure = look(places - 1, start + BLOCK)
                chosen = (sure > threshold) | (np.arange(len(sure)) == sure.argmax())
                canvas[places[chosen]] = tokens[chosen]
                passes += 1
    return [int(token) for token in canvas[len(prompt) : len(prompt) + length]], passes


@pytest.mark.parametrize("part", [4, 2])
@pytest.mark.parametrize("threshold", [0.9, 0.3])
def test_a_generation_of_fast_dllm_v2_is_the_published_loop_token_for_token(
    part: int, threshold: float, published: dict[str, Path], bundles: dict[str, Bundle]
) -> None:
    forward, bundle, length = open_published(published["fast-dllm-v2"], "fast-dllm-v2"), bundles["fast-dllm-v2"], 14
    plain = [plain_sub_blocks(forward, prompt, length, part, threshold) for prompt in PROMPTS]
    assert len({token for tokens, _ in plain for token in tokens}) > 5
    assert bundle.manifest.sampler.transfer == "sub-blocks"
    rule, options = SubBlocks(threshold=threshold, sub_block=part), GenerationOptions(gen_length=length)
    for provider, policy in product(("torch", "onnxruntime"), (NoCache(), BlockCache(), DualCache())):
        with open_model(bundle, provider) as model:
            for prompt, (tokens, passes) in zip(PROMPTS, plain, strict=True):
                (alone,) = model.run(model.continuation([prompt], options), options, policy, rule)
                assert (list(alone.tokens), alone.passes) == (tokens, passes), (provider, policy.name)
            together = model.run(model.continuation(PROMPTS, options), options, policy, rule)
        assert [list(result.tokens) for result in together] == [tokens for tokens, _ in plain], (provider, policy.name)


@dataclass
class PlainDualCache:
    """Fast-dLLM v2's loop with keys and values kept within the block, as its code keeps them, on transformers' own cache.

    A finished block is run once more and kept for good. Within a block a pass runs a part alone, against the others as they
    were when they were last run, unless the part's first token is masked or nothing of the block was run yet.
    """

    network: Any
    passes: int = 0
    narrow: int = 0
    """Passes that ran a part alone."""

    def run(self, tokens: Array, first: int, kept: list[tuple[Any, Any]]) -> tuple[Array, list[tuple[Any, Any]]]:
        """Logits [n, V] of tokens at `first` and after, which see all of each other and of what is kept; their keys, values."""
        cache, rows = transformers.DynamicCache(), len(tokens)
        for layer, (key, value) in enumerate(kept):
            cache.update(key, value, layer)
        before = kept[0][0].shape[2] if kept else 0
        with torch.no_grad():
            logits = self.network(
                torch.from_numpy(tokens)[None], position_ids=torch.arange(first, first + rows)[None], cache=cache,
                attention_mask=torch.zeros(1, 1, rows, before + rows).double(), use_cache=True,
            ).logits[0].numpy()  # fmt: skip
        logits[:, MASK] = -np.inf
        made = [(layer.keys[:, :, before:], layer.values[:, :, before:]) for layer in cache.layers]
        return logits, made

    def decode(self, prompt: list[int], length: int, block: int, part: int, threshold: float) -> list[int]:
        total, finished = -(-(len(prompt) + length) // block) * block, list[tuple[Any, Any]]()
        canvas, logits = np.array([*prompt, *[MASK] * (total - len(prompt))]), np.zeros((0, 0))
        for start in range(0, total, block):
            span = canvas[start : start + block]  # a view
            if span[0] == MASK:
                span[0], self.passes = logits[-1].argmax(), self.passes + 1
            own = list[tuple[Any, Any]]()
            for first in range(0, block, part):
                end = min(first + part, block)
                while (span[first:end] == MASK).any():
                    self.passes += 1
                    if not own or span[first] == MASK:
                        logits, own = self.run(span, start, finished)
                        logits = logits[max(first - 1, 0) : end - 1]
                        rows = np.arange(max(first, 1), end)
                    else:
                        self.narrow += 1
                        others = [tuple(join(x[:, :, :first], x[:, :, end:]) for x in layer) for layer in own]
                        seen = join_layers(finished, others)
                        logits, made = self.run(span[first:end], start + first, seen)
                        own = [
                            tuple(join(old[:, :, :first], new, old[:, :, end:]) for old, new in zip(*pair, strict=True))
                            for pair in zip(own, made, strict=True)
                        ]
                        logits, rows = logits[:-1], np.arange(first + 1, end)
                    chances = np.exp(logits - logits.max(-1, keepdims=True))
                    sure = np.where(span[rows] == MASK, chances.max(-1) / chances.sum(-1), -1)
                    chosen = (sure > threshold) | (np.arange(len(sure)) == sure.argmax())
                    span[rows[chosen]] = logits[chosen].argmax(-1)
            logits, made = self.run(span, start, finished)
            finished = join_layers(finished, made)
        return [int(token) for token in canvas[len(prompt) : len(prompt) + length]]


def join(*parts: Any) -> Any:
    return torch.cat(parts, dim=2)


def join_layers(before: list[tuple[Any, Any]], after: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    pairs = zip(before, after, strict=True)
    return [(join(a[0], b[0]), join(a[1], b[1])) for a, b in pairs] if before else after


@pytest.mark.parametrize(("block", "part", "threshold"), [(8, 4, 0.9), (8, 3, 0.3), (4, 2, 0.9)])
def test_a_generation_of_fast_dllm_v2_with_its_dual_cache_is_the_published_loop_token_for_token(
    block: int, part: int, threshold: float, published: dict[str, Path], bundles: dict[str, Bundle]
) -> None:
    network, bundle, length = open_network(published["fast-dllm-v2"], "fast-dllm-v2"), bundles["fast-dllm-v2"], 22
    loops = [PlainDualCache(network) for _ in PROMPTS]
    expected = [
        loop.decode(prompt, length, block, part, threshold) for loop, prompt in zip(loops, PROMPTS, strict=True)
    ]
    assert sum(loop.narrow for loop in loops) > 9
    rule = SubBlocks(threshold=threshold, sub_block=part)
    options, policy = GenerationOptions(gen_length=length, block_length=block), BlockCache(sub_block_cache=part)
    for provider in ("torch", "onnxruntime"):
        with open_model(bundle, provider) as model:
            for prompt, tokens, loop in zip(PROMPTS, expected, loops, strict=True):
                (alone,) = model.run(model.continuation([prompt], options), options, policy, rule)
                assert (list(alone.tokens), alone.passes) == (tokens, loop.passes), provider
            together = model.run(model.continuation(PROMPTS, options), options, policy, rule)
            fresh = model.run(model.continuation(PROMPTS, options), options, BlockCache(), rule)
        assert [list(result.tokens) for result in together] == expected, provider
        assert [list(result.tokens) for result in fresh] != expected, "what is kept within a block is never stale"


@pytest.mark.parametrize("rule", [Quota(), Dynamic(threshold=0.3), SubBlocks(sub_block=2)], ids=lambda rule: rule.name)
def test_kept_blocks_are_exact_for_a_model_that_predicts_the_next_token_with_every_rule(
    rule: Transfer, bundles: dict[str, Bundle]
) -> None:
    options = GenerationOptions(gen_length=14)
    with open_model(bundles["fast-dllm-v2"], "torch") as model:
        texts = [
            [result.tokens for result in model.run(model.continuation(PROMPTS, options), options, policy, rule)]
            for policy in (NoCache(), BlockCache())
        ]
    assert texts[0] == texts[1]


def plain_padded_blocks(network: Any, prompt: list[int], length: int, block: int, steps: int) -> tuple[list[int], int]:
    """A2D's loop for its bd3lm checkpoints: the prompt is padded on the left to whole blocks, which are counted with the pads.

    Positions count tokens alone. Pads see only themselves, so that their rows are numbers; nobody sees them.
    """
    pads, passes = -len(prompt) % block, 0
    canvas = np.array([*[END] * pads, *prompt, *[MASK] * length])
    number, real = np.arange(len(canvas)) // block, np.arange(len(canvas)) >= pads
    seen = (number[None, :] <= number[:, None]) & real[None, :] & real[:, None] | np.eye(len(canvas), dtype=bool)
    for start in range(pads + len(prompt), len(canvas), block):
        rows, end = np.arange(start, start + block), start + block
        for step in range(steps):
            with torch.no_grad():
                logits = network(
                    torch.from_numpy(canvas[None, :end]), use_cache=False,
                    position_ids=torch.from_numpy(np.maximum(np.arange(end) - pads, 0))[None],
                    attention_mask=torch.from_numpy(np.where(seen[:end, :end], 0.0, -np.inf))[None, None],
                ).logits[0].numpy()[rows]  # fmt: skip
            logits[:, MASK] = -np.inf
            chances = np.exp(logits - logits.max(-1, keepdims=True))
            sure = np.where(canvas[rows] == MASK, chances.max(-1) / chances.sum(-1), -1)
            chosen = np.argsort(-sure, kind="stable")[: block // steps + (step < block % steps)]
            canvas[rows[chosen]], passes = logits[chosen].argmax(-1), passes + 1
    return [int(token) for token in canvas[pads + len(prompt) :]], passes


@pytest.mark.parametrize("base", ["a2d-qwen3", "a2d-qwen2"])
def test_a_generation_of_a2d_by_blocks_is_the_published_loop_token_for_token(
    base: str, published: dict[str, Path], tmp_path: Path
) -> None:
    family, length, block = f"{base}-bd3lm", 12, 4
    bundle = export(published[base], tmp_path / "bundle", ExportOptions(no_tokenizer=True, family=family))
    shape, sampler = bundle.manifest.shape, bundle.manifest.sampler
    assert (bundle.manifest.family, shape.block, shape.block_anchor, sampler.transfer) == (
        family,
        32,
        "response",
        "quota",
    )
    tokens = draw_tokens()[:, : shape.block]
    np.testing.assert_allclose(
        logits_of(bundle, tokens), open_published(published[base], base)(tokens), rtol=0, atol=CLOSE
    )
    network = open_network(published[base], base)
    for steps in (4, 3):
        plain = [plain_padded_blocks(network, prompt, length, block, steps) for prompt in PROMPTS]
        expected = [tokens for tokens, _ in plain]
        assert len({token for tokens in expected for token in tokens}) > 5
        options = GenerationOptions(gen_length=length, block_length=block, steps=steps * 3)
        for provider, policy in product(("torch", "onnxruntime"), (NoCache(), BlockCache(), DualCache())):
            with open_model(bundle, provider) as model:
                for prompt, (tokens_alone, passes) in zip(PROMPTS, plain, strict=True):
                    (alone,) = model.run(model.continuation([prompt], options), options, policy, Quota())
                    assert (list(alone.tokens), alone.passes) == (tokens_alone, passes), (provider, policy.name)
                together = model.run(model.continuation(PROMPTS, options), options, policy, Quota())
            assert [list(result.tokens) for result in together] == expected, (provider, policy.name)
    longer = GenerationOptions(gen_length=length - 1, block_length=block)
    with open_model(bundle, "torch") as model:
        results = model.run(model.continuation(PROMPTS, longer), longer, BlockCache(), Quota())
    assert {len(result.tokens) for result in results} == {length - 1}


def test_a2d_by_blocks_is_exported_and_its_graphs_verify(published: dict[str, Path], tmp_path: Path) -> None:
    bundle = export(
        published["a2d-qwen3"], tmp_path / "bundle", ExportOptions(no_tokenizer=True, family="a2d-qwen3-bd3lm")
    )
    assert verify(bundle, SessionOptions(provider="onnxruntime", threads=1)).passed


def test_blocks_that_are_counted_from_the_prompt_would_be_other_tokens(
    published: dict[str, Path], tmp_path: Path
) -> None:
    """What the test above would see if the anchor were the other one."""
    options = ExportOptions(no_tokenizer=True, family="a2d-qwen3-bd3lm")
    bundle, settings = (
        export(published["a2d-qwen3"], tmp_path / "bundle", options),
        GenerationOptions(gen_length=12, block_length=4),
    )
    shape = replace(bundle.manifest.shape, block_anchor="prompt")
    moved = replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, shape=shape))
    texts = []
    for one in (bundle, moved):
        with open_model(one, "torch") as model:
            texts.append(
                [result.tokens for result in model.run(model.continuation(PROMPTS, settings), settings, NoCache())]
            )
    assert texts[0][1] == texts[1][1], "a prompt of whole blocks is the same either way"
    assert texts[0] != texts[1]


@every_block_family
def test_a_generation_without_blocks_would_be_another(
    family: str, published: dict[str, Path], bundles: dict[str, Bundle]
) -> None:
    """What the tests above would see if rows saw all: else they would show nothing."""
    options = GenerationOptions(gen_length=14, temperature=0.0)
    with open_model(bundles[family], "torch") as model:
        results = [
            [result.tokens for result in model.run(model.continuation(PROMPTS, settings), settings, NoCache(), Quota())]
            for settings in (options, replace(options, block_length=2))
        ]
    assert results[0] != results[1]


@every_family
def test_an_export_verifies_with_every_policy_of_the_check(family: str, bundles: dict[str, Bundle]) -> None:
    report = verify(bundles[family], SessionOptions(provider="onnxruntime", threads=1))
    assert report.passed
    assert report.agreement == 1.0


# -- a head beside a tied one
@pytest.mark.parametrize("changed", [False, True])
def test_a_head_that_illada_stores_beside_its_tied_one_is_left_out_and_said_where_it_differs(
    changed: bool, published: dict[str, Path], bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    model = shutil.copytree(published["illada"], tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[0, 0] += float(changed)
    save_file({**tensors, "lm_head.weight": head}, model / "model.safetensors", metadata={"format": "pt"})
    bundle = export(model, tmp_path / "bundle", ExportOptions(no_tokenizer=True))
    said = "tied head: config.json says so, though 'lm_head.weight' is there and differs from the embedding"
    assert bundle.manifest.assumed == ((said,) if changed else ())
    assert set(bundle.manifest.model_bindings) == {"embedding", "norm"}
    np.testing.assert_array_equal(logits_of(bundle, draw_tokens()), logits_of(bundles["illada"], draw_tokens()))


# -- another wrapping of the same tensors
def test_a_diffullama_as_its_training_code_stores_it_is_recognised_and_the_same_model(
    published: dict[str, Path], bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    model = shutil.copytree(published["diffullama"], tmp_path / "model")
    wrapped = {
        name.replace("model.", "" if "embed_tokens" in name else "denoise_model.", 1): tensor
        for name, tensor in load_file(model / "model.safetensors").items()
    }
    assert {"embed_tokens.weight", "denoise_model.layers.0.mlp.up_proj.weight", "lm_head.weight"} < wrapped.keys()
    save_file(wrapped, model / "model.safetensors", metadata={"format": "pt"})
    bundle = export(model, tmp_path / "bundle", ExportOptions(no_tokenizer=True))
    assert bundle.manifest.family == "diffullama"
    np.testing.assert_array_equal(logits_of(bundle, draw_tokens()), logits_of(bundles["diffullama"], draw_tokens()))


@pytest.mark.parametrize("family", NAMED)
def test_a_checkpoint_that_looks_autoregressive_is_refused_until_its_family_is_named(
    family: str, published: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"autoregressive .*--family"):
        export(published[family], tmp_path / "bundle", ExportOptions(no_tokenizer=True))
