"""Dream's published configurations -> ModelConfig, and how they are told from those of other families."""

from __future__ import annotations

from typing import Any

import pytest

from dllm_export.errors import CheckpointError
from dllm_export.graphs import ModelShape
from dllm_export.graphs.families import (
    BIAS_SLOTS,
    LAYER_SLOTS,
    QK_NORM_SLOTS,
    ModelConfig,
    SamplerDefaults,
    Source,
    SpecialTokens,
    detect_family,
)
from dllm_export.graphs.families.huggingface import NAMES

DREAM: dict[str, Any] = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "mask_token_id": 151666,
    "max_position_embeddings": 131072,
    "model_type": "Dream",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pad_token_id": 151643,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}
"""Dream-v0-Instruct-7B."""


def stored(*slots: str) -> frozenset[str]:
    """Names of the tensors of a one-layer checkpoint that has these slots beside the usual ones."""
    names = {NAMES.in_layer(slot, 0) for slot in (*LAYER_SLOTS, *slots)}
    return frozenset(names | {NAMES.embedding, NAMES.norm, NAMES.head})


BIASES = stored(*BIAS_SLOTS)


def read(*without: str, tensors: frozenset[str] = BIASES, **changes: object) -> ModelConfig:
    raw = {key: value for key, value in {**DREAM, **changes}.items() if key not in without}
    source = Source(config=raw, tensors=tensors)
    return detect_family(source).read_config(source)


def test_the_released_configuration_is_the_published_7b_model() -> None:
    config = read()
    assert config.shape == ModelShape(
        layers=28,
        hidden=3584,
        heads=28,
        kv_heads=4,
        head_dim=128,
        mlp=18944,
        vocab=152064,
        max_length=2048,  # as trained; the configuration says what its base was trained for
        norm_eps=1e-6,
        rope_theta=1e6,
        rope_float32=False,
        qkv_bias=True,
        shift=True,
    )
    biases = 28 * (3584 + 2 * 512)
    assert config.shape.weight_count + biases == 7_615_616_512
    assert config.tokens == SpecialTokens(mask=151666, eos=151643, pad=151643)
    assert (config.family, config.end_of_turn, config.assumed) == ("dream", "<|im_end|>", ())
    assert config.sampler == SamplerDefaults(
        gen_length=256, block_length=256, temperature=0.2, top_p=0.95, remasking="entropy", transfer="dream"
    )


@pytest.mark.parametrize(
    "key",
    ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size", "rope_theta"],
)
def test_a_size_whose_class_default_is_another_models_is_not_guessed(key: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json has no '{key}'"):
        read(key)


def test_ids_that_are_not_stated_come_from_the_released_dream_and_are_said() -> None:
    config = read("mask_token_id", "pad_token_id")
    assert config.tokens == SpecialTokens(mask=151666, eos=151643, pad=151643)
    assert len(config.assumed) == 2
    with pytest.raises(CheckpointError, match=r"the vocabulary is not Dream's; pass --mask-id"):
        read("mask_token_id", vocab_size=152000)


def test_dream_and_dream_reasoner_are_told_apart_by_their_tensors() -> None:
    """Exports of third parties give Dream's weights the other's architecture."""
    assert read(architectures=["DreamForCausalLM"]).family == "dream"
    reasoner = read(architectures=["DreamForCausalLM"], tensors=stored(*QK_NORM_SLOTS))
    assert (reasoner.family, reasoner.shape.shift, reasoner.shape.block) == ("dream-reasoner", False, 32)
    with pytest.raises(CheckpointError, match="describes no supported family"):
        read(tensors=stored())


def test_a_configuration_without_architectures_is_recognised_by_its_model_type() -> None:
    assert read("architectures").family == "dream"
    assert read("architectures", model_type="dream").family == "dream"
