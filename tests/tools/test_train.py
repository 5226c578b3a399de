"""The training script on a tiny model: it learns, and what it writes is a LLaDA checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from dllm_export.tools.demo_checkpoint import load_weights
from dllm_export.tools.demo_layouts import LLADA, MASK, byte_tokenizer
from dllm_export.tools.demo_model import decode, draw_weights, layer_runner, run_layers, view_rows
from dllm_export.tools.train import Trainer, TrainOptions, learning_rate, parse_options, train
from dllm_export.tools.worksheets import held_out

TINY = TrainOptions(
    layers=2, hidden=64, heads=2, mlp=96, batch=4, steps=30, problems=6, least=0.5, rate=5e-3, warmup=5, eval_sheets=1
)
CONFIG_KEYS = """
activation_type alibi alibi_bias_max architectures attention_dropout attention_layer_norm
attention_layer_norm_with_affine auto_map bias_for_layer_norm block_group_size block_type d_model embedding_dropout
embedding_size eos_token_id flash_attention include_bias include_qkv_bias init_cutoff_factor init_device init_fn
init_std input_emb_norm layer_norm_type layer_norm_with_affine mask_token_id max_sequence_length mlp_hidden_size
mlp_ratio model_type multi_query_attention n_heads n_kv_heads n_layers pad_token_id residual_dropout rms_norm_eps
rope rope_full_precision rope_theta scale_logits torch_dtype use_cache vocab_size weight_tying
"""
LAYER_SIZES = {
    "attn_norm": [64],
    "ff_norm": [64],
    "q_proj": [64, 64],
    "k_proj": [64, 64],
    "v_proj": [64, 64],
    "attn_out": [64, 64],
    "ff_proj": [96, 64],
    "up_proj": [96, 64],
    "ff_out": [64, 96],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine several threads wait for one another at every operation
    directory = tmp_path_factory.mktemp("tiny") / "model"
    train(replace(TINY, output=directory), torch.device("cpu"))
    yield directory
    torch.set_num_threads(threads)


def test_training_lowers_the_loss_and_reports_it(checkpoint: Path) -> None:
    report = json.loads((checkpoint / "training.json").read_text())
    assert report["losses"]["30"] < 0.6 * report["losses"]["1"]
    assert (report["steps"], report["seed"]) == (30, 0)
    assert report["command"].startswith("python -m dllm_export.tools.train --steps 30 --batch 4")
    assert "output" not in report["command"]
    assert all("all" in shares for shares in report["accuracy"].values())


def test_the_config_has_exactly_the_keys_of_llada(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    assert sorted(config) == CONFIG_KEYS.split()
    assert config["architectures"] == ["LLaDAModelLM"]
    assert (config["d_model"], config["n_layers"], config["n_heads"], config["n_kv_heads"]) == (64, 2, 2, 2)
    assert (config["embedding_size"], config["mask_token_id"], config["eos_token_id"]) == (264, 258, 257)


def test_the_tensors_have_the_names_and_sizes_of_llada(checkpoint: Path) -> None:
    expected = {f"model.transformer.{name}.weight": [264, 64] for name in ("wte", "ff_out")}
    expected["model.transformer.ln_f.weight"] = [64]
    for layer in range(2):
        expected |= {f"model.transformer.blocks.{layer}.{name}.weight": size for name, size in LAYER_SIZES.items()}
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        assert {name: tensor.get_shape() for name, tensor in found.items()} == expected
        assert {tensor.get_dtype() for tensor in found.values()} == {"F16"}


def test_reading_a_checkpoint_gives_the_weights_that_were_saved(checkpoint: Path) -> None:
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    shape, loaded = load_weights(checkpoint)
    assert shape == TINY.shape
    assert loaded.keys() == state["weights"].keys()
    assert all(torch.equal(loaded[name], weight.half().float()) for name, weight in state["weights"].items())


def test_a_resumed_run_starts_from_the_saved_weights(checkpoint: Path) -> None:
    losses = json.loads((checkpoint / "training.json").read_text())["losses"]
    resumed = Trainer(replace(TINY, resume=checkpoint, seed=1), torch.device("cpu"))
    assert resumed.step(rate=0.0).item() < 0.8 * losses["1"]
    assert resumed.optimizer.state_dict()["state"][0]["step"].item() == TINY.steps + 1


def test_the_published_sizes_fit_in_eight_million_bytes() -> None:
    assert TrainOptions().shape.weight_count == 3_923_200


def test_the_tokenizer_gives_every_byte_its_own_id(checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    text = "".join(map(chr, range(128))) + " äé€𝄞 \n\n end"
    assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert [tokenizer.token_to_id(token) for token in LLADA.special_tokens] == list(range(256, 262))
    assert tokenizer.encode("a<|mdm_mask|>b").ids == [97, MASK, 98]
    assert byte_tokenizer().get_vocab_size() == 262


def test_padding_at_the_left_does_not_change_a_row() -> None:
    shape = TINY.shape
    weights = draw_weights(shape, torch.Generator().manual_seed(0))
    tokens = torch.randint(0, 256, (1, 20), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    padded = torch.cat((torch.zeros((1, 12), dtype=torch.int32), tokens), dim=1)
    layer = layer_runner(shape)
    run = partial(run_layers, shape, weights, layer=layer, dtype=torch.float32)
    plain = run(tokens, view_rows(shape, torch.tensor([0]), 20))
    shifted = run(padded, view_rows(shape, torch.tensor([12]), 32))
    torch.testing.assert_close(shifted[:, 12:], plain)


def test_decoding_a_batch_equals_decoding_each_prompt_alone() -> None:
    weights = draw_weights(TINY.shape, torch.Generator().manual_seed(2))
    prompts = [sheet.prompt.encode() for sheet in held_out(3, seed=0)]
    together = decode(TINY.shape, weights, prompts, 12, 5, torch.float32)
    alone = [decode(TINY.shape, weights, [prompt], 12, 5, torch.float32)[0] for prompt in prompts]
    assert together == alone
    assert {len(answer) for answer in together} == {12}


def test_the_learning_rate_rises_then_falls_to_its_floor() -> None:
    options = TrainOptions(rate=1.0, warmup=10, floor=0.1)
    assert learning_rate(options, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(options, 50, 0.5) == pytest.approx(0.55)
    assert learning_rate(options, 99, 1.0) == pytest.approx(0.1)


def test_flags_are_the_fields_of_the_options() -> None:
    options = parse_options(["--output", "x", "--minutes", "2.5", "--from", "y", "--no-state", "--eval-sheets", "3"])
    assert options == TrainOptions(output=Path("x"), minutes=2.5, source=Path("y"), state=False, eval_sheets=3)
    with pytest.raises(SystemExit):
        parse_options(["--no-such-flag", "1"])
