"""config.json -> ModelConfig: what the published LLaDA files say, what missing keys mean, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from dllm_export.errors import CheckpointError
from dllm_export.graphs import ModelShape
from dllm_export.graphs.families import (
    BIAS_SLOTS,
    FAMILIES,
    LAYER_SLOTS,
    ModelConfig,
    SamplerDefaults,
    Source,
    SpecialTokens,
    detect_family,
)

# GSAI-ML/LLaDA-8B-Base, -Instruct and LLaDA-1.5 share this file, key for key.
RELEASED: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_dropout": 0.0,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "torch_dtype": "bfloat16",
    "use_cache": False,
    "vocab_size": 126464,
    "weight_tying": False,
}


def read(*without: str, mask_id: int | None = None, **changes: object) -> ModelConfig:
    """The released configuration without some keys and with others changed, as the detected family reads it."""
    raw = {key: value for key, value in {**RELEASED, **changes}.items() if key not in without}
    source = Source(config=raw, mask_id=mask_id)
    return detect_family(source).read_config(source)


def test_the_released_configuration_is_the_published_8b_model() -> None:
    config = read()
    assert config.shape == ModelShape(
        layers=32,
        hidden=4096,
        heads=32,
        kv_heads=32,
        head_dim=128,
        mlp=12288,
        vocab=126464,
        max_length=4096,
        norm_eps=1e-5,
        rope_theta=500000.0,
        rope_float32=True,
        qkv_bias=False,
        tied_head=False,
        embedding_scale=1.0,
        logits_scale=1.0,
    )
    assert config.tokens == SpecialTokens(mask=126336, eos=126081, pad=126081)
    assert config.sampler == SamplerDefaults(gen_length=128, block_length=128)
    assert (config.family, config.end_of_turn, config.assumed) == ("llada", "<|eot_id|>", ())
    assert config.shape.weight_count == 8_015_581_184


@pytest.mark.parametrize(
    ("key", "field", "value"),
    [
        ("d_model", "hidden", 768),
        ("n_layers", "layers", 12),
        ("n_heads", "heads", 12),
        ("mlp_hidden_size", "mlp", 4 * 4096),
        ("max_sequence_length", "max_length", 1024),
        ("rms_norm_eps", "norm_eps", 1e-5),
        ("rope_theta", "rope_theta", 1e4),
        ("rope_full_precision", "rope_float32", True),
        ("include_qkv_bias", "qkv_bias", False),
        ("weight_tying", "tied_head", True),
        ("input_emb_norm", "embedding_scale", 1.0),
        ("scale_logits", "logits_scale", 1.0),
    ],
)
def test_a_missing_key_means_the_default_of_the_published_class(key: str, field: str, value: object) -> None:
    changes = {"d_model": {"n_heads": 12, "n_kv_heads": 12}, "n_heads": {"d_model": 768, "n_kv_heads": 12}}
    assert getattr(read(key, **changes.get(key, {})).shape, field) == value
    assert getattr(read(**{key: None}, **changes.get(key, {})).shape, field) == value


def test_a_missing_mlp_size_follows_the_ratio() -> None:
    assert read("mlp_hidden_size", mlp_ratio=3).shape.mlp == 3 * 4096


def test_the_embedding_has_vocab_size_rows_when_embedding_size_is_missing() -> None:
    assert read("embedding_size", vocab_size=126400).shape.vocab == 126400
    assert read(vocab_size=126400).shape.vocab == 126464


@pytest.mark.parametrize(
    ("key", "default"),
    [("rope", "False"), ("block_type", "sequential"), ("layer_norm_type", "default"), ("activation_type", "swiglu")],
)
def test_a_missing_key_whose_default_is_another_architecture_is_refused(key: str, default: str) -> None:
    with pytest.raises(CheckpointError, match=rf"'{key}' is .*missing, which means .*{default}.*expected"):
        read(key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope", False),
        ("block_type", "sequential"),
        ("layer_norm_type", "low_precision"),
        ("activation_type", "gelu"),
        ("alibi", True),
        ("include_bias", True),
        ("attention_layer_norm", True),
    ],
)
def test_an_architecture_that_no_released_checkpoint_has_is_refused_by_key(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"'{key}' is .*no released LLaDA"):
        read(**{key: value})


def test_embedding_norm_and_logit_scale_become_factors() -> None:
    shape = read(input_emb_norm=True, scale_logits=True).shape
    assert (shape.embedding_scale, shape.logits_scale) == (64.0, 1 / 64)


# -- key/value heads
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"n_kv_heads": None}, 32),
        ({"n_kv_heads": None, "multi_query_attention": False}, 32),
        ({"n_kv_heads": 8}, 8),
        ({"n_kv_heads": 1, "multi_query_attention": True}, 1),
        ({"n_kv_heads": 32, "multi_query_attention": False}, 32),
    ],
)
def test_key_value_heads_follow_the_published_rules(changes: dict[str, object], expected: int) -> None:
    assert read(**changes).shape.kv_heads == expected


def test_multi_query_attention_alone_is_refused() -> None:
    with pytest.raises(CheckpointError, match="multi_query_attention"):
        read(n_kv_heads=None, multi_query_attention=True)


def test_multi_query_attention_that_contradicts_the_head_count_is_refused() -> None:
    with pytest.raises(CheckpointError, match="multi_query_attention"):
        read(n_kv_heads=8, multi_query_attention=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_heads": 0},
        {"n_heads": -32},
        {"n_heads": 31},
        {"n_kv_heads": 0},
        {"n_kv_heads": -4},
        {"n_kv_heads": 5},
        {"n_kv_heads": 64},
    ],
    ids=str,
)
def test_head_counts_that_do_not_divide_are_refused_with_the_rule(changes: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=r"d_model must be a multiple of n_heads and n_heads of n_kv_heads"):
        read(**changes)


def test_heads_of_odd_width_are_refused_since_rotation_needs_pairs() -> None:
    with pytest.raises(CheckpointError, match="d_model"):
        read(d_model=96, n_heads=32, n_kv_heads=32)


@pytest.mark.parametrize("key", ["n_layers", "mlp_hidden_size", "max_sequence_length", "d_model"])
@pytest.mark.parametrize("value", [0, -1, 10**8])
def test_sizes_that_no_model_has_are_refused_by_key(key: str, value: int) -> None:
    with pytest.raises(CheckpointError, match=key):
        read(**{key: value})


# -- types of values
@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("d_model", 4096.0, "int"),
        ("n_layers", "32", "int"),
        ("n_heads", [32], "int"),
        ("n_layers", True, "int"),
        ("rope_theta", "500000", "float"),
        ("rms_norm_eps", True, "float"),
        ("weight_tying", 0, "bool"),
        ("include_qkv_bias", "false", "bool"),
        ("mask_token_id", 126336.0, "int"),
    ],
)
def test_a_value_of_another_type_is_refused_with_key_and_type(key: str, value: object, expected: str) -> None:
    with pytest.raises(CheckpointError, match=rf"'{key}' is .*, expected {expected}"):
        read(**{key: value})


def test_an_integer_is_a_number_where_a_float_is_expected() -> None:
    assert read(rope_theta=500000).shape.rope_theta == 500000.0


# -- tensor names
def test_tensor_names_are_those_of_the_released_checkpoints() -> None:
    names = read().names
    assert (names.embedding, names.norm, names.head) == (
        "model.transformer.wte.weight",
        "model.transformer.ln_f.weight",
        "model.transformer.ff_out.weight",
    )
    assert {slot: names.in_layer(slot, 31) for slot in LAYER_SLOTS} == {
        "norm1": "model.transformer.blocks.31.attn_norm.weight",
        "q": "model.transformer.blocks.31.q_proj.weight",
        "k": "model.transformer.blocks.31.k_proj.weight",
        "v": "model.transformer.blocks.31.v_proj.weight",
        "out": "model.transformer.blocks.31.attn_out.weight",
        "norm2": "model.transformer.blocks.31.ff_norm.weight",
        "gate": "model.transformer.blocks.31.ff_proj.weight",
        "up": "model.transformer.blocks.31.up_proj.weight",
        "down": "model.transformer.blocks.31.ff_out.weight",
    }
    assert names.in_layer(BIAS_SLOTS[1], 0) == "model.transformer.blocks.0.k_proj.bias"


def test_block_groups_change_the_tensor_names() -> None:
    names = read(block_group_size=4).names
    assert names.in_layer("q", 0) == "model.transformer.block_groups.0.0.q_proj.weight"
    assert names.in_layer("q", 7) == "model.transformer.block_groups.1.3.q_proj.weight"


@pytest.mark.parametrize("size", [0, -1])
def test_a_block_group_size_below_one_is_refused(size: int) -> None:
    with pytest.raises(CheckpointError, match="block_group_size"):
        read(block_group_size=size)


# -- special tokens
def test_missing_ids_of_the_released_vocabulary_are_assumed_and_said() -> None:
    config = read("mask_token_id", "eos_token_id", "pad_token_id")
    assert config.tokens == SpecialTokens(mask=126336, eos=126081, pad=126081)
    assert [sentence.split(":")[0] for sentence in config.assumed] == [
        "mask_token_id 126336",
        "eos_token_id 126081",
        "pad_token_id 126081",
    ]
    assert all("not in config.json, taken from the released LLaDA" in sentence for sentence in config.assumed)


def test_a_missing_mask_id_of_another_vocabulary_asks_for_the_option() -> None:
    with pytest.raises(CheckpointError, match=r"mask_token_id.*pass --mask-id"):
        read("mask_token_id", embedding_size=126400)


@pytest.mark.parametrize("key", ["eos_token_id", "pad_token_id"])
def test_another_missing_id_of_another_vocabulary_asks_for_the_key(key: str) -> None:
    with pytest.raises(CheckpointError, match=f"no {key}.*add it to config.json"):
        read(key, embedding_size=126400)


def test_a_mask_id_given_by_the_user_fills_the_gap_without_an_assumption() -> None:
    config = read("mask_token_id", embedding_size=126400, mask_id=7)
    assert (config.tokens.mask, config.assumed) == (7, ())
    assert read(mask_id=126336).tokens.mask == 126336


def test_a_mask_id_given_by_the_user_may_not_contradict_the_configuration() -> None:
    with pytest.raises(CheckpointError, match=r"--mask-id 5 contradicts .*126336; drop one"):
        read(mask_id=5)


@pytest.mark.parametrize(("key", "value"), [("mask_token_id", 126464), ("eos_token_id", -1), ("pad_token_id", 10**12)])
def test_an_id_outside_the_embedding_table_is_refused(key: str, value: int) -> None:
    with pytest.raises(CheckpointError, match=f"{value} is outside the embedding table of 126464 rows"):
        read(**{key: value})


def test_a_mask_id_given_by_the_user_must_lie_in_the_table() -> None:
    with pytest.raises(CheckpointError, match="126464 is outside the embedding table"):
        read("mask_token_id", mask_id=126464)


def test_a_mask_that_is_also_the_pad_is_refused() -> None:
    with pytest.raises(CheckpointError, match="mask"):
        read(pad_token_id=126336)


# -- which family
def test_a_configuration_without_architectures_is_recognised_by_its_model_type() -> None:
    assert read("architectures") == read()


@pytest.mark.parametrize(
    "raw",
    [
        {"model_type": "llada", "hidden_size": 2048},
        {"architectures": ["BertForMaskedLM"], "model_type": "bert"},
        {"architectures": "LLaDAModelLM"},
        {"architectures": [None]},
        {"architectures": {"0": "LLaDAModelLM"}},
        {},
    ],
    ids=str,
)
def test_another_architecture_is_refused_with_the_supported_ones(raw: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=r"no supported family.*Supported: llada \(LLaDA-8B") as refused:
        detect_family(Source(config=raw))
    assert repr(raw.get("architectures")) in str(refused.value)


def test_every_family_is_listed_under_its_own_name() -> None:
    assert all(name == family.name for name, family in FAMILIES.items())
