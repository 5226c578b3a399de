"""Models with experts, from tiny seeded checkpoints in the published layouts, against independent implementations."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from dllm_export.errors import CheckpointError
from dllm_export.exporter.checkpoint import open_checkpoint
from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pipeline import export
from dllm_export.exporter.verify import TOLERANCES, relative_error, run_graph, verify
from dllm_export.graphs import DType, Experts, ModelShape, layer_graph
from dllm_export.runtime.blocks import number_blocks
from dllm_export.runtime.bundle import Bundle, open_bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import BlockCache, CachePolicy, DllmCache, DualCache, NoCache
from dllm_export.runtime.rope import rotary_tables
from dllm_export.runtime.session import Session, SessionOptions, open_session
from dllm_export.runtime.sessions.torch import TorchSession
from dllm_export.tools.random_checkpoint import write_random_checkpoint

BASE = ModelShape(
    layers=3,
    hidden=32,
    heads=4,
    kv_heads=2,
    head_dim=16,
    mlp=40,
    vocab=61,
    max_length=128,
    norm_eps=1e-6,
    rope_theta=1e4,
    rope_float32=False,
    qk_norm=True,
)
GROUPED = Experts(
    count=8,
    per_token=3,
    mlp=12,
    router="sigmoid",
    renormalise=True,
    scale=2.5,
    bias=True,
    groups=4,
    groups_kept=2,
    shared=24,
    dense_layers=1,
)
SHAPES: Mapping[str, ModelShape] = {
    "llada-moe": replace(BASE, experts=Experts(count=8, per_token=3, mlp=12)),
    "sdar-moe": replace(BASE, block=4, experts=Experts(count=8, per_token=3, mlp=12, renormalise=True)),
    "llada2": replace(BASE, block=32, rope_fraction=0.5, experts=GROUPED),
}
EXACT = 1e-9
"""float64 through three layers; sums are taken in another order."""

TOKENS = np.random.default_rng(4).integers(0, 59, (2, 23)).astype(np.int32)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: write_random_checkpoint(root / name, shape, family=name, shards=3) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def bundles(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    root, options = tmp_path_factory.mktemp("bundles"), ExportOptions(no_tokenizer=True)
    return {name: export(path, root / name, options) for name, path in checkpoints.items()}


@pytest.fixture(scope="module")
def moe_open(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A model whose first layer is dense and whose rows all see all, so that it generates: LLaDA-MoE's flags with one."""
    shape = replace(BASE, layers=4, experts=Experts(count=8, per_token=3, mlp=12, dense_layers=1))
    root = tmp_path_factory.mktemp("mixed")
    model = write_random_checkpoint(root / "model", shape, family="llada-moe")
    return export(model, root / "bundle", ExportOptions(no_tokenizer=True))


def our_logits(bundle: Bundle, tokens: NDArray[np.int32], dtype: DType = "float64") -> NDArray[np.float64]:
    """Logits [B, T, V] of the bundle's graphs and weights."""
    session: Session = TorchSession(bundle, SessionOptions(provider="torch", threads=1), dtype=dtype)
    shape, (batch, rows) = bundle.manifest.shape, tokens.shape
    position = np.tile(np.arange(rows), (batch, 1))
    cos, sin = rotary_tables(shape, position)
    mask = np.ones((batch, rows), np.bool_)
    context = {"cos": cos, "sin": sin, "mask": mask, "block": number_blocks(mask, shape.block or rows)}
    context = {name: value for name, value in context.items() if shape.block or name != "block"}
    hidden = run_graph(bundle, session, "embed", None, {"tokens": tokens})["hidden_out"]
    for layer in range(shape.layers):
        graph = layer_graph(shape, "layer_full", layer)
        hidden = run_graph(bundle, session, graph, layer, {"hidden": hidden, **context})["hidden_out"]
    index, unguided = position.astype(np.int32), {"guidance": np.zeros_like(hidden), "cfg_scale": np.zeros(1)}
    feeds = {"hidden": hidden, "index": index, "given": index, "bias": np.zeros(shape.vocab), **unguided}
    head = run_graph(bundle, session, "head", None, feeds)
    logits = np.zeros((batch, rows, shape.vocab))
    np.put_along_axis(logits, head["top_tokens"].astype(np.int64), head["top_logits"], axis=2)
    return logits


def read_tensors(checkpoint: Path) -> dict[str, Tensor]:
    return {
        name: tensor.double() for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()
    }


# -- transformers
def test_logits_are_those_of_qwen3_moe_by_blocks(checkpoints: dict[str, Path], bundles: dict[str, Bundle]) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = SHAPES["sdar-moe"]
    assert shape.experts is not None
    config = Qwen3MoeConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        num_experts=shape.experts.count,
        num_experts_per_tok=shape.experts.per_token,
        moe_intermediate_size=shape.experts.mlp,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = Qwen3MoeForCausalLM.from_pretrained(checkpoints["sdar-moe"], config=config, dtype=torch.float64).eval()
    blocks = torch.arange(TOKENS.shape[1]) // shape.block
    hidden = torch.where(blocks[None, :] > blocks[:, None], -torch.inf, 0.0).double()
    visible = hidden.expand(len(TOKENS), 1, *hidden.shape)
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(TOKENS).long(), attention_mask=visible).logits
    found = our_logits(bundles["sdar-moe"], TOKENS)
    assert expected.abs().max() > 1
    # transformers takes norms, rotary tables, softmax and router in float32: 2^-24 of their numbers, a few times over.
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=2e-5)


# -- plain loops
def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * weight


def swiglu(x: Tensor, weights: Mapping[str, Tensor], prefix: str) -> Tensor:
    gate = weights[f"{prefix}gate_proj.weight"] @ x
    return weights[f"{prefix}down_proj.weight"] @ (
        gate * torch.sigmoid(gate) * (weights[f"{prefix}up_proj.weight"] @ x)
    )


def llada_moe_block(x: Tensor, weights: Mapping[str, Tensor], prefix: str, experts: Experts) -> Tensor:
    """softmax over all experts, the best ones as they are."""
    scores = torch.softmax(weights[f"{prefix}gate.weight"] @ x, dim=0)
    best = sorted(range(experts.count), key=lambda expert: -float(scores[expert]))[: experts.per_token]
    parts = [scores[expert] * swiglu(x, weights, f"{prefix}experts.{expert}.") for expert in best]
    return torch.stack(parts).sum(0)


def llada2_block(x: Tensor, weights: Mapping[str, Tensor], prefix: str, experts: Experts) -> Tensor:
    """Sigmoid scores; bias and groups choose; shares are scaled to a sum of 2.5; one more expert for everybody."""
    scores = torch.sigmoid(weights[f"{prefix}gate.weight"] @ x)
    biased, size = scores + weights[f"{prefix}gate.expert_bias"], experts.count // experts.groups
    worth = [float(biased[group * size : (group + 1) * size].topk(2).values.sum()) for group in range(experts.groups)]
    kept = sorted(range(experts.groups), key=lambda group: -worth[group])[: experts.groups_kept]
    allowed = [expert for expert in range(experts.count) if expert // size in kept]
    best = sorted(allowed, key=lambda expert: -float(biased[expert]))[: experts.per_token]
    total = sum(scores[expert] for expert in best) + 1e-20
    parts = [scores[expert] / total * 2.5 * swiglu(x, weights, f"{prefix}experts.{expert}.") for expert in best]
    return torch.stack(parts).sum(0) + swiglu(x, weights, f"{prefix}shared_experts.")


def plain_logits(checkpoint: Path, family: str, tokens: list[int]) -> Tensor:  # -> [T, V]
    """A model token by token and head by head, from the published names and formulas."""
    shape, weights = SHAPES[family], read_tensors(checkpoint)
    experts, d = shape.experts, shape.head_dim
    assert experts is not None
    second = family == "llada2"
    attention = "attention." if second else "self_attn."
    turned = d // 2 if second else d

    def rotate(x: Tensor, position: int) -> Tensor:
        result = x.clone()
        for j in range(turned // 2):
            # Tables are float32 everywhere, so the angle is rounded as in the published code.
            angle = np.float64(
                np.float32(position) * np.float32(1 / np.float32(shape.rope_theta) ** np.float32(2 * j / turned))
            )
            low, high = x[j], x[j + turned // 2]
            result[j] = low * np.cos(angle) - high * np.sin(angle)
            result[j + turned // 2] = high * np.cos(angle) + low * np.sin(angle)
        return result

    table = "model.word_embeddings.weight" if second else "model.embed_tokens.weight"
    rows = [weights[table][token] for token in tokens]
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        queries, keys, values = [], [], []
        for position, row in enumerate(rows):
            inner = normed(row, weights[f"{prefix}input_layernorm.weight"], shape.norm_eps)
            if second:
                fused = weights[f"{prefix}attention.query_key_value.weight"] @ inner
                q, k, v = fused.split([shape.heads * d, shape.kv_heads * d, shape.kv_heads * d])
            else:
                q, k, v = (weights[f"{prefix}self_attn.{name}_proj.weight"] @ inner for name in "qkv")
            names = ("query_layernorm", "key_layernorm") if second else ("q_norm", "k_norm")
            q_norm, k_norm = (weights[f"{prefix}{attention}{name}.weight"] for name in names)
            queries.append([rotate(normed(head, q_norm, shape.norm_eps), position) for head in q.split(d)])
            keys.append([rotate(normed(head, k_norm, shape.norm_eps), position) for head in k.split(d)])
            values.append(v.split(d))
        for position, row in enumerate(rows):
            mixed = []
            for head in range(shape.heads):
                group = head // (shape.heads // shape.kv_heads)
                scores = torch.stack([queries[position][head] @ key[group] for key in keys]) / d**0.5
                mixed.append(torch.softmax(scores, 0) @ torch.stack([value[group] for value in values]))
            out = weights[f"{prefix}{attention}{'dense' if second else 'o_proj'}.weight"]
            row = row + out @ torch.cat(mixed)
            inner = normed(row, weights[f"{prefix}post_attention_layernorm.weight"], shape.norm_eps)
            if layer < experts.dense_layers:
                rows[position] = row + swiglu(inner, weights, f"{prefix}mlp.")
            else:
                block = llada2_block if second else llada_moe_block
                rows[position] = row + block(inner, weights, f"{prefix}mlp.", experts)
    final = weights["model.norm.weight"]
    return torch.stack([weights["lm_head.weight"] @ normed(row, final, shape.norm_eps) for row in rows])


@pytest.mark.parametrize("family", ["llada-moe", "llada2"])
def test_logits_are_those_of_the_formulas_token_by_token(
    family: str, checkpoints: dict[str, Path], bundles: dict[str, Bundle]
) -> None:
    expected = plain_logits(checkpoints[family], family, TOKENS[0].tolist())
    assert expected.abs().max() > 1
    # The frequencies' float32 power differs in its last bit between libraries.
    np.testing.assert_allclose(our_logits(bundles[family], TOKENS[:1])[0], expected.numpy(), rtol=0, atol=EXACT)


@pytest.mark.parametrize("family", SHAPES)
def test_a_checkpoint_is_read_back_as_the_model_it_is(family: str, bundles: dict[str, Bundle]) -> None:
    manifest = bundles[family].manifest
    assert manifest.family == family
    assert replace(manifest.shape, indicator_rank=0) == SHAPES[family]


# -- bundles
@pytest.mark.parametrize("prepack", ["on", "off"])
@pytest.mark.parametrize("family", SHAPES)
def test_onnxruntime_is_verified_against_torch_and_the_checkpoint(
    family: str, prepack: str, bundles: dict[str, Bundle]
) -> None:
    report = verify(bundles[family], SessionOptions(threads=1, prepack=prepack))  # type: ignore[arg-type]
    assert report.passed, [check for check in report.checks if not check.passed]
    graphs = {check.name.split()[1] for check in report.checks if check.name.startswith("graph ")}
    assert ("layer_full_dense" in graphs) is (family == "llada2")


@pytest.mark.parametrize("family", ["sdar-moe", "llada2"])
def test_a_model_that_attends_by_blocks_generates_the_same_with_blocks_cached_on_every_provider(
    family: str, bundles: dict[str, Bundle]
) -> None:
    bundle, options = bundles[family], GenerationOptions(gen_length=14, block_length=8)
    sessions: list[Session] = [
        open_session(bundle, SessionOptions(threads=1, prepack="on")),
        TorchSession(bundle, SessionOptions(provider="torch", threads=1), dtype="float64"),
    ]
    texts = []
    for session, policy in product(sessions, (NoCache(), BlockCache(), DualCache())):
        lm = DiffusionLM(bundle, session)
        request = lm.continuation([TOKENS[0, :17].tolist(), TOKENS[1, :5].tolist()], options)
        texts.append([result.tokens for result in lm.run(request, options, policy)])
    assert all(text == texts[0] for text in texts)
    assert len(set(texts[0][0])) > 3
    for session in sessions:
        session.close()


POLICIES: Mapping[str, CachePolicy] = {
    "none": NoCache(),
    "refresh-all": DllmCache(prompt_interval=1, response_interval=1),
    "update-all": DllmCache(prompt_interval=5, response_interval=1, update_ratio=1.0),
    "short": DllmCache(prompt_interval=5, response_interval=3),
    "dual": DualCache(),
}


def generate(bundle: Bundle, policy: str, session: Session) -> list[tuple[int, ...]]:
    with DiffusionLM(bundle, session) as lm:
        options = GenerationOptions(gen_length=16, block_length=8)
        prompts = [TOKENS[0, :17].tolist(), TOKENS[1, :9].tolist()]
        return [result.tokens for result in lm.run(lm.continuation(prompts, options), options, POLICIES[policy])]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["all experts", "first layer dense"])
def test_providers_generate_the_same_tokens(
    kind: str, policy: str, bundles: dict[str, Bundle], moe_open: Bundle
) -> None:
    bundle = bundles["llada-moe"] if kind == "all experts" else moe_open
    sessions = [
        SessionOptions(threads=1, prepack="on"),
        SessionOptions(threads=1, prepack="off"),
        SessionOptions(provider="torch", threads=1),
    ]
    texts = [generate(bundle, policy, open_session(bundle, options)) for options in sessions]
    assert texts[0] == texts[1] == texts[2]


def test_a_cache_that_refreshes_everything_generates_what_no_cache_does(
    bundles: dict[str, Bundle], moe_open: Bundle
) -> None:
    for bundle in (bundles["llada-moe"], moe_open):
        texts = [
            generate(bundle, policy, TorchSession(bundle, SessionOptions(provider="torch", threads=1), dtype="float64"))
            for policy in ("none", "refresh-all")
        ]
        assert texts[0] == texts[1]


def test_routers_are_stored_in_float32_and_experts_in_the_exports_type(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    bundle = export(checkpoints["llada2"], tmp_path / "b", ExportOptions(no_tokenizer=True, dtype="float16"))
    bindings = bundle.manifest.layer_bindings[1]
    types = {name: bundle.stored(bindings[name]).dtype for name in ("router", "router_bias", "expert_gate_up", "v")}
    assert types == {"router": "F32", "router_bias": "F32", "expert_gate_up": "F16", "v": "F16"}
    tensors = read_tensors(checkpoints["llada2"])
    stacked = np.asarray(bundle.weight(bindings["expert_gate_up"]), np.float64)
    for row, slot in enumerate(("gate", "up")):
        weight = tensors[f"model.layers.1.mlp.experts.5.{slot}_proj.weight"].half().double()
        np.testing.assert_array_equal(stacked[5, row::2], weight.numpy())
    assert verify(bundle, SessionOptions(threads=1)).passed


def test_a_few_rows_may_go_to_other_experts_in_half_types_and_in_float32_none() -> None:
    expected = np.random.default_rng(0).normal(size=(2, 10, 8))
    result = expected.copy()
    result[0, 3], result[1, 7] = 5.0, -5.0
    allowed = {dtype: relative_error(result, expected, limits.rerouted) for dtype, limits in TOLERANCES.items()}
    assert allowed["float32"] > 1
    assert allowed["float16"] == allowed["bfloat16"] == 0
    result[0, :7] = 5.0
    assert all(relative_error(result, expected, limits.rerouted) > 1 for limits in TOLERANCES.values())


def test_the_first_dense_layers_alone_are_a_model_without_experts(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    bundle = export(checkpoints["llada2"], tmp_path / "b", ExportOptions(no_tokenizer=True, num_layers=1))
    assert bundle.manifest.shape.experts is None
    assert not [name for name in bundle.manifest.graphs if name.endswith("_dense")]
    assert verify(bundle, SessionOptions(threads=1)).passed


def test_graphs_with_weights_inside_hold_those_of_their_layer(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    options = ExportOptions(no_tokenizer=True, weights="embedded")
    embedded = open_bundle(export(checkpoints["llada2"], tmp_path / "b", options).path).manifest.embedded
    assert [Path(file).name for file in embedded["layer_full"]] == ["layer_full.001.onnx", "layer_full.002.onnx"]
    assert [Path(file).name for file in embedded["layer_full_dense"]] == ["layer_full_dense.000.onnx"]


# -- checkpoints
@pytest.fixture
def change(checkpoints: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a checkpoint in one file, with tensors dropped, added or replaced."""

    def write(family: str, *drop: str, **add: Tensor) -> Path:
        tensors = {name: tensor.float() for name, tensor in read_tensors(checkpoints[family]).items()}
        kept = {name: tensor for name, tensor in tensors.items() if name not in drop}
        save_file(
            kept | {name.replace("__", "."): tensor for name, tensor in add.items()}, tmp_path / "model.safetensors"
        )
        (tmp_path / "config.json").write_text((checkpoints[family] / "config.json").read_text())
        return tmp_path

    return write


def test_every_experts_tensors_must_be_there_and_no_others(change: Callable[..., Path]) -> None:
    missing = "model.layers.1.mlp.experts.7.up_proj.weight"
    with pytest.raises(CheckpointError, match=f"lacks '{missing}'"):
        open_checkpoint(change("llada-moe", missing))
    extra = {"model__layers__1__mlp__experts__8__up_proj__weight": torch.zeros(12, 32)}
    with pytest.raises(CheckpointError, match=r"holds 'model.layers.1.mlp.experts.8.up_proj.weight'"):
        open_checkpoint(change("llada-moe", **extra))
    fused = {"model__layers__1__mlp__experts__gate_up_proj": torch.zeros(8, 24, 32)}
    with pytest.raises(CheckpointError, match=r"holds 'model.layers.1.mlp.experts.gate_up_proj'"):
        open_checkpoint(change("llada-moe", **fused))


def test_an_experts_tensor_of_another_shape_is_refused(change: Callable[..., Path]) -> None:
    turned = {"model__layers__2__mlp__experts__0__down_proj__weight": torch.zeros(12, 32)}
    with pytest.raises(CheckpointError, match=r"experts.0.down_proj.weight' is \(12, 32\), expected \(32, 12\)"):
        open_checkpoint(change("llada2", **turned))


def test_the_configuration_says_how_shares_are_made(change: Callable[..., Path]) -> None:
    """Without norm_topk_prob the same tensors are another model: what a dropped renormalisation would do."""
    path = change("sdar-moe")
    raw = json.loads((path / "config.json").read_text())
    shape = open_checkpoint(path).config.shape
    (path / "config.json").write_text(json.dumps({**raw, "norm_topk_prob": False}))
    other = open_checkpoint(path).config.shape
    assert shape.experts is not None
    assert other == replace(shape, experts=replace(shape.experts, renormalise=False))
