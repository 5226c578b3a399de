"""config.json and tensor names in the layout of Hugging Face's Llama and Qwen -> ModelConfig."""

from __future__ import annotations

from typing import Any

import pytest

from dllm_export.errors import CheckpointError
from dllm_export.graphs import ModelShape
from dllm_export.graphs.families import LAYER_SLOTS, ModelConfig, Source, SpecialTokens, detect_family, layer_slots
from dllm_export.graphs.families.huggingface import NAMES

ILLADA: dict[str, Any] = {
    "architectures": ["ILLaDAForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "illada",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 155136,
}


def stored(*slots: str, head: bool = True) -> frozenset[str]:
    """Names of the tensors of a one-layer checkpoint that has these slots beside the usual ones."""
    names = {NAMES.in_layer(slot, 0) for slot in (*LAYER_SLOTS, *slots)} | {NAMES.embedding, NAMES.norm}
    return frozenset(names | ({NAMES.head} if head else set()))


def read(
    *without: str, tensors: frozenset[str] = stored(), mask_id: int | None = None, **changes: object
) -> ModelConfig:
    """The configuration without some keys and with others changed, as the detected family reads it."""
    raw = {key: value for key, value in {**ILLADA, **changes}.items() if key not in without}
    source = Source(config=raw, tensors=tensors, mask_id=mask_id)
    return detect_family(source).read_config(source)


def test_a_published_configuration_becomes_the_published_model() -> None:
    config = read()
    assert config.shape == ModelShape(
        layers=32,
        hidden=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp=14336,
        vocab=155136,
        max_length=8192,
        norm_eps=1e-5,
        rope_theta=500000.0,
        rope_float32=False,
        tied_head=True,
    )
    assert config.tokens == SpecialTokens(mask=5, eos=2, pad=1)
    assert config.assumed == ("mask_token_id 5: not in config.json, taken from the released iLLaDA",)
    assert config.shape.weight_count == 7_615_025_152


def test_optional_weights_are_those_that_the_checkpoint_holds() -> None:
    shape = read(tensors=stored("q_bias", "k_bias", "v_bias", "q_norm", "k_norm")).shape
    assert (shape.qkv_bias, shape.qk_norm) == (True, True)
    assert len(layer_slots(shape)) == 14


@pytest.mark.parametrize(("key", "slot"), [("attention_bias", "q_bias"), ("qk_norm", "q_norm")])
def test_a_configuration_that_denies_its_tensors_is_said(key: str, slot: str) -> None:
    there, missing = read(tensors=stored(slot), **{key: False}), read(**{key: True})
    assert f"though config.json says '{key}' False" in there.assumed[0]
    assert missing.assumed[0].endswith(f"no tensors of them, though config.json says '{key}' True")


@pytest.mark.parametrize(
    ("tied", "head", "expected", "said"),
    [(True, True, True, False), (True, False, True, False), (False, True, False, False), (False, False, True, True)],
)
def test_the_configuration_ties_the_head_and_so_does_a_missing_one(
    tied: bool, head: bool, expected: bool, said: bool
) -> None:
    config = read(tensors=stored(head=head), tie_word_embeddings=tied)
    assert config.shape.tied_head is expected
    assert ("tied head: the checkpoint has no 'lm_head.weight'" in config.assumed) is said


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 7e5},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 7e5}},
        {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 7e5}},
        {"rope_theta": 7e5, "rope_scaling": {"type": "default"}},
    ],
    ids=str,
)
def test_the_base_of_the_rotation_is_read_in_the_old_and_the_new_spelling(changes: dict[str, object]) -> None:
    assert read(**changes).shape.rope_theta == 7e5


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "value", [{"rope_type": "yarn", "factor": 4.0}, {"type": "linear", "factor": 2.0}, [1]], ids=str
)
def test_a_scaled_rotation_is_refused_by_key(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"'{key}' is .*scaled rotary embeddings are not supported"):
        read(**{key: value})


def test_the_width_of_a_head_may_differ_from_the_share_of_the_hidden_width() -> None:
    shape = read(hidden_size=2560, head_dim=128).shape
    assert (shape.hidden, shape.query_width) == (2560, 4096)
    assert read("head_dim", hidden_size=2048).shape.head_dim == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu', expected 'silu'"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
        ({"use_sliding_window": True}, "'use_sliding_window' is true"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "'layer_types' has 'sliding_attention'"),
        ({"layer_norm_eps": 1e-5}, "'layer_norm_eps' means LayerNorm"),
        ({"num_key_value_heads": 5}, "num_attention_heads 32 is not a multiple of num_key_value_heads 5"),
        ({"num_key_value_heads": 0}, "not a multiple of num_key_value_heads 0"),
        ({"hidden_size": 4097}, "hidden_size 4097 is not a multiple of num_attention_heads 32"),
        ({"head_dim": 127}, "'head_dim' is 127, expected an even number"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' is 0"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"rope_theta": None}, "no 'rope_theta'"),
        ({"vocab_size": "x"}, "'vocab_size' is 'x', expected int"),
    ],
    ids=str,
)
def test_what_is_not_this_layer_is_refused_by_key(changes: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(**changes)


@pytest.mark.parametrize("name", ["self_attn.o_proj.bias", "mlp.down_proj.bias"])
def test_other_biases_are_refused_by_tensor(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"'{name}' tensors: biases are supported on q, k and v only"):
        read(tensors=stored() | {f"model.layers.3.{name}"})


# -- special tokens
def test_the_first_of_several_ends_is_taken_and_said() -> None:
    config = read(eos_token_id=[2, 7])
    assert config.tokens.eos == 2
    assert config.assumed[-1] == "eos_token_id 2: config.json lists [2, 7]; text is cut at the first of them only"
    assert read(eos_token_id=[9]).tokens.eos == 9


def test_tokens_that_the_configuration_does_not_state_come_from_the_tokenizer_before_the_table() -> None:
    asked = []

    def find(kind: str, texts: tuple[str, ...]) -> int | None:
        asked.append((kind, texts))
        return {"mask": 11, "eos": 12, "pad": None}[kind]

    raw = {key: value for key, value in ILLADA.items() if key not in ("eos_token_id", "pad_token_id")}
    source = Source(config=raw, tensors=stored(), find_token=find)
    config = detect_family(source).read_config(source)
    assert config.tokens == SpecialTokens(mask=11, eos=12, pad=1)
    assert asked == [("mask", ("<[MASK]>",)), ("eos", ()), ("pad", ())]
    assert "mask_token_id 11: not in config.json, taken from the tokenizer's files" in config.assumed


def test_another_vocabulary_asks_for_the_mask() -> None:
    with pytest.raises(CheckpointError, match=r"no mask_token_id and the vocabulary is not iLLaDA's; pass --mask-id"):
        read(vocab_size=155000)
    assert read(vocab_size=155000, mask_id=4).tokens.mask == 4
