"""config.json of the families with experts -> ModelConfig."""

from __future__ import annotations

from typing import Any

import pytest

from dllm_export.errors import CheckpointError
from dllm_export.graphs import Experts
from dllm_export.graphs.families import ModelConfig, Source, detect_family, layer_slots, llada2
from dllm_export.graphs.families.huggingface import MOE_NAMES

LLADA_MOE: dict[str, Any] = {
    "architectures": ["LLaDAMoEModelLM"],
    "attention_bias": False,
    "clip_qkv": None,
    "dense_intermediate_size": 8192,
    "expert_intermediate_size": 1024,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "max_position_embeddings": 8192,
    "model_type": "llada",
    "moe_layer_freq": [1] * 16,
    "moe_router_enable_expert_bias": False,
    "norm_topk_prob": None,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "pad_token_id": 156892,
    "eos_token_id": 156892,
    "partial_rotary_factor": 1,
    "qk_layernorm": True,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 50000,
    "shared_expert_intermediate_size": None,
    "tie_word_embeddings": False,
    "vocab_size": 157184,
}
LLADA2_MINI: dict[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"],
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "max_position_embeddings": 32768,
    "model_type": "llada2_moe",
    "moe_intermediate_size": 512,
    "moe_router_enable_expert_bias": True,
    "n_group": 8,
    "norm_head": False,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 20,
    "num_key_value_heads": 4,
    "num_shared_experts": 1,
    "pad_token_id": 156892,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 600000,
    "rotary_dim": 64,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "use_bias": False,
    "use_qkv_bias": False,
    "vocab_size": 157184,
}
LLADA2_FLASH = LLADA2_MINI | {
    "hidden_size": 4096,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
}
SDAR_MOE: dict[str, Any] = {
    "architectures": ["SDARMoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "eos_token_id": 151643,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 32768,
    "mlp_only_layers": [],
    "model_type": "sdar_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
CONFIGS = {"llada-moe": LLADA_MOE, "llada2": LLADA2_MINI, "llada2 flash": LLADA2_FLASH, "sdar-moe": SDAR_MOE}


def read(name: str, **changes: object) -> ModelConfig:
    """The configuration with some keys changed, as the detected family reads it."""
    names = llada2.NAMES if name.startswith("llada2") else MOE_NAMES
    tensors = frozenset({names.in_layer("q_norm", 0), names.head})
    source = Source(config={**CONFIGS[name], **changes}, tensors=tensors)
    return detect_family(source).read_config(source)


@pytest.mark.parametrize(
    ("name", "experts"),
    [
        ("llada-moe", Experts(count=64, per_token=8, mlp=1024)),
        (
            "llada2",
            Experts(
                count=256,
                per_token=8,
                mlp=512,
                router="sigmoid",
                renormalise=True,
                scale=2.5,
                bias=True,
                groups=8,
                groups_kept=4,
                shared=512,
                dense_layers=1,
            ),
        ),
        ("sdar-moe", Experts(count=128, per_token=8, mlp=768, renormalise=True)),
    ],
)
def test_a_published_configuration_becomes_the_published_experts(name: str, experts: Experts) -> None:
    config = read(name)
    assert config.family == name
    assert config.shape.experts == experts
    assert config.shape.qk_norm
    assert not config.shape.rope_float32


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llada-moe", 7_356_880_896),
        ("llada2", 16_255_643_392),
        ("llada2 flash", 102_889_705_216),
        ("sdar-moe", 30_532_122_624),
    ],
)
def test_sizes_add_up_to_the_published_number_of_parameters(name: str, parameters: int) -> None:
    shape = read(name).shape
    assert shape.experts is not None
    norms = 2 * shape.layers * shape.head_dim
    biases = (shape.layers - shape.experts.dense_layers) * shape.experts.count if shape.experts.bias else 0
    assert shape.weight_count + norms + biases == parameters


def test_llada2_rotates_half_of_a_head_and_attends_by_blocks_of_32() -> None:
    config = read("llada2")
    assert (config.shape.rotary_width, config.shape.block) == (64, 32)
    assert "block_size 32: not in config.json, taken from the released LLaDA2" in config.assumed
    assert read("sdar-moe", block_size=8).shape.block == 8
    assert (read("llada-moe").shape.block, read("llada-moe").shape.rotary_width) == (0, 128)


def test_special_tokens_come_from_the_table_where_the_checkpoint_states_none() -> None:
    assert [read(name).tokens.mask for name in CONFIGS] == [156895, 156895, 156895, 151669]


def test_a_dense_layer_has_other_tensors_than_one_with_experts() -> None:
    shape = read("llada2").shape
    dense, mixed = (set(layer_slots(shape, layer)) for layer in (0, 1))
    assert dense - mixed == {"gate", "up", "down"}
    assert mixed - dense == {"router", "router_bias", "shared_gate", "shared_up", "shared_down"}
    assert {llada2.NAMES.stored(slot) for slot in ("q", "k", "v", "out")} == {"qkv", "out"}


@pytest.mark.parametrize("architecture", ["LLaDAMoEModel", "LLaDAMoEModelLM", None])
def test_llada_moe_is_told_from_llada_by_its_experts(architecture: str | None) -> None:
    marks = {"architectures": [architecture] if architecture else None}
    assert read("llada-moe", **marks).family == "llada-moe"


@pytest.mark.parametrize("model_type", ["llada2_moe", "llada21_moe", "llada2_moe_veomni"])
def test_llada2_is_known_by_every_model_type_it_is_published_with(model_type: str) -> None:
    assert read("llada2", architectures=None, model_type=model_type).family == "llada2"


def test_the_first_layers_may_be_dense_and_all_of_them_too() -> None:
    some = read("llada-moe", moe_layer_freq=[0, 0] + [1] * 14).shape
    assert some.experts is not None
    assert [some.has_experts(layer) for layer in (0, 1, 2, 15)] == [False, False, True, True]
    assert read("llada-moe", moe_layer_freq=[0] * 16).shape.experts is None


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llada-moe", {"moe_router_enable_expert_bias": True}, "'moe_router_enable_expert_bias' is True"),
        ("llada-moe", {"shared_expert_intermediate_size": 512}, "'shared_expert_intermediate_size' is 512"),
        ("llada-moe", {"clip_qkv": 8.0}, "'clip_qkv' is 8.0"),
        ("llada-moe", {"moe_layer_freq": [1, 0, 1]}, "'moe_layer_freq' is"),
        ("llada-moe", {"moe_layer_freq": 1}, "'moe_layer_freq' is 1"),
        ("llada-moe", {"num_experts": None}, "no 'num_experts'"),
        ("llada-moe", {"num_experts_per_tok": 65}, "num_experts_per_tok 65 is more than num_experts 64"),
        ("llada-moe", {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
        ("llada2", {"partial_rotary_factor": 1.5}, "'partial_rotary_factor' is 1.5"),
        ("llada2", {"partial_rotary_factor": 0.001}, "'partial_rotary_factor' is 0.001"),
        ("llada2", {"score_function": "softmax"}, "'score_function' is 'softmax'"),
        ("llada2", {"use_bias": None}, "'use_bias' is None"),
        ("llada2", {"use_qkv_bias": True}, "'use_qkv_bias' is True"),
        ("llada2", {"norm_head": True}, "'norm_head' is True"),
        ("llada2", {"n_group": 7}, "n_group 7, topk_group 4"),
        ("llada2", {"n_group": 256}, "n_group 256, topk_group 4"),
        ("llada2", {"topk_group": 9}, "topk_group 9"),
        ("llada2", {"n_group": 128, "topk_group": 3}, "topk_group 3, num_experts_per_tok 8 do not fit"),
        ("sdar-moe", {"mlp_only_layers": [3]}, r"'mlp_only_layers' is \[3\]"),
        ("sdar-moe", {"decoder_sparse_step": 2}, "'decoder_sparse_step' is 2"),
    ],
    ids=str,
)
def test_experts_that_work_in_another_way_are_refused_by_key(
    name: str, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(name, **changes)
