"""Model directories in the layout of Llama and Qwen: where special ids are found, and what is refused by key and file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from dllm_export.errors import CheckpointError
from dllm_export.exporter.checkpoint import open_checkpoint
from dllm_export.exporter.options import ExportOptions
from dllm_export.graphs import ModelShape
from dllm_export.tools.random_checkpoint import write_random_checkpoint

Refuse = Callable[..., str]

SHAPE = ModelShape(
    layers=2, hidden=32, heads=4, kv_heads=2, head_dim=12, mlp=48, vocab=61, max_length=64, norm_eps=1e-6, rope_theta=1e4,
    rope_float32=False, qk_norm=True, qkv_bias=True,
)  # fmt: skip
LAYER = "model.layers.1.self_attn"
NO_TOKENIZER = ExportOptions(no_tokenizer=True)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory to change: an iLLaDA with every optional weight, in one file."""
    return write_random_checkpoint(tmp_path / "model", SHAPE, family="illada")


def edit_config(model: Path, *drop: str, **changes: object) -> Path:
    raw = {**json.loads((model / "config.json").read_text()), **changes}
    (model / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if key not in drop}))
    return model


def edit_tensors(model: Path, *drop: str, **changes: torch.Tensor) -> Path:
    tensors = {**load_file(model / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if name not in drop}
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})
    return model


def write_json(model: Path, file: str, value: object) -> None:
    (model / file).write_text(json.dumps(value))


# -- special ids
def save_vocabulary(model: Path) -> None:
    """tokenizer.json of 61 words, of which 5 is iLLaDA's mask."""
    words = {f"w{number}": number for number in range(61)} | {"<[MASK]>": 5}
    words.pop("w5")
    Tokenizer(models.WordLevel(words, unk_token="w3")).save(str(model / "tokenizer.json"))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 5),
        ({"tokenizer_config.json": {"mask_token": "w7"}}, 7),
        ({"tokenizer_config.json": {"mask_token": {"content": "w8"}}}, 8),
        ({"special_tokens_map.json": {"mask_token": "w9"}}, 9),
        (
            {
                "tokenizer_config.json": {
                    "mask_token": "<m>",
                    "added_tokens_decoder": {"60": {"content": "<m>", "special": True}},
                }
            },
            60,
        ),
        ({"added_tokens.json": {"<m>": 58}, "special_tokens_map.json": {"mask_token": "<m>"}}, 58),
    ],
    ids=str,
)
def test_a_mask_that_the_configuration_leaves_out_is_found_in_the_tokenizers_files(
    files: dict[str, object], expected: int, model: Path
) -> None:
    save_vocabulary(model)
    for file, content in files.items():
        write_json(model, file, content)
    config = open_checkpoint(edit_config(model, "mask_token_id")).config
    assert config.tokens.mask == expected
    assert config.assumed == (f"mask_token_id {expected}: not in config.json, taken from the tokenizer's files",)


def test_a_mask_is_found_in_a_vocabulary_of_its_own_file(model: Path) -> None:
    write_json(model, "vocab.json", {"<[MASK]>": 5})
    assert open_checkpoint(edit_config(model, "mask_token_id")).config.tokens.mask == 5


def test_a_mask_that_nothing_states_asks_for_the_option(model: Path, refuse: Refuse) -> None:
    message = refuse(edit_config(model, "mask_token_id"), CheckpointError, NO_TOKENIZER)
    assert message == "config.json has no mask_token_id and the vocabulary is not iLLaDA's; pass --mask-id"
    assert open_checkpoint(model, mask_id=4).config.tokens.mask == 4


@pytest.mark.parametrize("kind", ["eos", "pad"])
def test_another_id_that_nothing_states_asks_for_its_key(kind: str, model: Path, refuse: Refuse) -> None:
    message = refuse(edit_config(model, f"{kind}_token_id"), CheckpointError, NO_TOKENIZER)
    assert message.endswith("the vocabulary is not iLLaDA's; add it to config.json")
    assert f"{kind}_token_id" in message


def test_a_tokenizer_that_contradicts_the_configuration_is_refused(model: Path, refuse: Refuse) -> None:
    save_vocabulary(model)
    write_json(model, "tokenizer_config.json", {"mask_token": "w7"})
    assert "the tokenizer's mask token 'w7' is 7, config.json says 60" in refuse(model, CheckpointError)


def test_a_directory_without_tokenizer_files_says_so_and_how_to_go_on(model: Path, refuse: Refuse) -> None:
    message = refuse(model, CheckpointError)
    assert message.startswith(f"tokenizer.json is missing in {model}: ")
    assert "--no-tokenizer" in message


# -- tensors that do not fit the configuration
@pytest.mark.parametrize(
    ("changes", "tensor", "found"),
    [
        ({"num_attention_heads": 2}, "model.layers.0.self_attn.q_proj.weight", "(48, 32), expected (24, 32)"),
        ({"num_key_value_heads": 4}, "model.layers.0.self_attn.k_proj.weight", "(24, 32), expected (48, 32)"),
        ({"head_dim": 8}, "model.layers.0.self_attn.q_proj.weight", "(48, 32), expected (32, 32)"),
        ({"intermediate_size": 50}, "model.layers.0.mlp.gate_proj.weight", "(48, 32), expected (50, 32)"),
        ({"vocab_size": 62}, "model.embed_tokens.weight", "(61, 32), expected (62, 32)"),
    ],
    ids=str,
)
def test_sizes_that_the_tensors_do_not_have_are_refused_by_tensor(
    changes: dict[str, object], tensor: str, found: str, model: Path, refuse: Refuse
) -> None:
    message = refuse(edit_config(model, **changes), CheckpointError, NO_TOKENIZER)
    assert message == f"tensor '{tensor}' is {found} from config.json"


@pytest.mark.parametrize("tensor", [f"{LAYER}.q_proj.bias", f"{LAYER}.k_norm.weight", "model.norm.weight"])
def test_a_layer_without_a_tensor_that_others_have_is_refused_by_name(tensor: str, model: Path, refuse: Refuse) -> None:
    message = refuse(edit_tensors(model, tensor), CheckpointError, NO_TOKENIZER)
    assert message == f"the checkpoint lacks '{tensor}'; a shard is missing or config.json is another model's"


def test_a_layer_too_many_is_refused_by_name(model: Path, refuse: Refuse) -> None:
    message = refuse(edit_config(model, num_hidden_layers=1), CheckpointError, NO_TOKENIZER)
    assert message.startswith("the checkpoint holds 'model.layers.1.")


def test_a_bias_on_another_projection_is_refused_by_name(model: Path, refuse: Refuse) -> None:
    changed = edit_tensors(model, **{f"{LAYER}.o_proj.bias": torch.zeros(32)})
    message = refuse(changed, CheckpointError, NO_TOKENIZER)
    assert "'self_attn.o_proj.bias' tensors: biases are supported on q, k and v only" in message


def test_an_untied_head_that_is_missing_means_a_tied_one_and_is_said(model: Path) -> None:
    config = open_checkpoint(edit_tensors(model, "lm_head.weight")).config
    assert config.shape.tied_head
    assert config.assumed == ("tied head: the checkpoint has no 'lm_head.weight'",)


# -- shards
def test_a_shard_that_is_missing_is_refused_by_file(tmp_path: Path, refuse: Refuse) -> None:
    model = write_random_checkpoint(tmp_path / "model", SHAPE, family="illada", shards=3)
    (model / "model-00002-of-00003.safetensors").unlink()
    message = refuse(model, CheckpointError, NO_TOKENIZER)
    assert message == f"shard model-00002-of-00003.safetensors is missing in {model}; download it again"


def test_a_head_in_a_shard_that_is_missing_is_no_tied_head(tmp_path: Path, refuse: Refuse) -> None:
    model = write_random_checkpoint(tmp_path / "model", SHAPE, family="illada", shards=2)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    (model / index["weight_map"]["lm_head.weight"]).unlink()
    assert "is missing" in refuse(model, CheckpointError, NO_TOKENIZER)
