"""Training in the layouts of Dream and SDAR: what is masked and seen, where weights come from, and what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from dllm_export.errors import UsageError
from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pipeline import export
from dllm_export.graphs.torch_ops import TorchOps
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.session import SessionOptions, open_session
from dllm_export.runtime.transfers import Quota
from dllm_export.tools.demo_checkpoint import load_weights, save_checkpoint
from dllm_export.tools.demo_conversion import convert_weights
from dllm_export.tools.demo_layouts import END, LAYOUTS, MASK
from dllm_export.tools.demo_loss import mask_answers, mask_blocks, masked_loss
from dllm_export.tools.demo_model import (
    SharedKeys,
    Weights,
    decode,
    draw_weights,
    layer_runner,
    run_layers,
    view_rows,
)
from dllm_export.tools.train import TrainOptions, train
from dllm_export.tools.worksheets import draw_sheets, held_out, training_stream

TINY = TrainOptions(
    layers=2, hidden=32, heads=4, mlp=48, batch=2, steps=8, problems=6, least=0.5, rate=2e-2, warmup=2, eval_sheets=1
)
TWINS = ("dream", "sdar")


def draw(layout: str, seed: int = 0) -> Weights:
    weights = draw_weights(replace(TINY, layout=layout).shape, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    # Biases and norms that say something.
    return {
        name: weight + 0.2 * torch.randn(weight.shape, generator=generator) if weight.dim() == 1 else weight
        for name, weight in weights.items()
    }


@pytest.fixture(scope="module")
def llada(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of LLaDA's layout to start from."""
    directory = tmp_path_factory.mktemp("llada") / "model"
    save_checkpoint(directory, TINY.shape, draw_weights(TINY.shape, torch.Generator().manual_seed(3)), {})
    return directory


@pytest.fixture(scope="module", params=TWINS)
def twin(request: pytest.FixtureRequest, llada: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that a short run has made of it."""
    directory = tmp_path_factory.mktemp("twin") / str(request.param)
    options = replace(TINY, layout=request.param, source=llada, output=directory, state=False)
    train(options, torch.device("cpu"))
    return directory


# -- what is written
def test_training_starts_from_another_layout_and_lowers_the_loss(twin: Path) -> None:
    report = json.loads((twin / "training.json").read_text())
    assert report["losses"]["8"] < 0.8 * report["losses"]["1"]
    assert f"--layout {twin.name} --from model --no-state" in report["command"]
    tensors = sum(weight.numel() for weight in load_weights(twin)[1].values())
    assert report["parameters"] == tensors
    names = ["config.json", "merges.txt", "model.safetensors", "tokenizer_config.json", "training.json", "vocab.json"]
    assert sorted(path.name for path in twin.iterdir()) == names


def test_a_checkpoint_holds_the_layouts_own_names_and_flags(twin: Path) -> None:
    options = replace(TINY, layout=twin.name)
    shape, weights = load_weights(twin)
    assert shape == options.shape
    assert (shape.kv_heads, shape.shift, shape.qkv_bias, shape.qk_norm, shape.block) == {
        "dream": (2, True, True, False, 0),
        "sdar": (2, False, False, True, 16),
    }[twin.name]
    save_checkpoint(twin.parent / "again", shape, weights, {}, LAYOUTS[twin.name])
    again = (twin.parent / "again" / "model.safetensors").read_bytes()
    assert again == (twin / "model.safetensors").read_bytes()


def test_an_export_of_it_decodes_as_training_does(twin: Path, tmp_path: Path) -> None:
    bundle = export(twin, tmp_path / "bundle", ExportOptions())
    assert bundle.manifest.assumed == (
        ("chat template: not in the tokenizer's files, taken from family dream",) if twin.name == "dream" else ()
    )
    shape, weights = load_weights(twin)
    sheets = held_out(2, 5, problems=6)
    prompts = [sheet.prompt.encode() for sheet in sheets]
    expected = decode(shape, weights, prompts, 24, 24, torch.float32)
    options = GenerationOptions(gen_length=24, temperature=0.0, top_p=1.0, remasking="low_confidence")
    with DiffusionLM(bundle, open_session(bundle, SessionOptions(provider="torch", threads=1))) as model:
        assert model.tokenizer is not None
        for sheet, prompt, answer in zip(sheets, prompts, expected, strict=True):
            ids = model.tokenizer.encode(sheet.prompt)
            assert ids == list(prompt)
            found = model.generate([sheet.prompt], options, transfer=Quota())[0].tokens
            assert [token if token < 256 else 0 for token in found] == list(answer)


# -- what is masked and seen
def test_a_shifted_row_is_asked_for_the_next_token() -> None:
    shape, weights = replace(TINY, layout="dream").shape, draw("dream")
    sheets = draw_sheets(training_stream(0), 3, 6).cut(320)
    run = partial(masked_loss, sheets=sheets, layer=layer_runner(shape), dtype=torch.float32)
    loss = run(shape, weights, generator=torch.Generator().manual_seed(0))
    noisy = mask_answers(shape, sheets, torch.Generator().manual_seed(0), 0.0)
    hidden = run_layers(shape, weights, noisy.tokens, noisy.view, layer=layer_runner(shape), dtype=torch.float32)
    rows = torch.nn.functional.rms_norm(hidden, (shape.hidden,), weights["norm"], shape.norm_eps) @ weights["head"]
    expected = torch.tensor(0.0)
    for sheet, column in torch.nonzero(noisy.tokens == MASK).tolist():
        place = column - (320 - 48)
        log_share = torch.log_softmax(rows[sheet, column - 1], 0)[int(sheets.tokens[sheet, column])]
        expected -= log_share * noisy.shares[sheet, place]
    torch.testing.assert_close(loss, expected)


def test_noisy_blocks_in_one_pass_are_what_each_is_when_it_is_decided() -> None:
    shape, weights, block = replace(TINY, layout="sdar").shape, draw("sdar"), 16
    sheets = draw_sheets(training_stream(1), 3, 7).cut(320)
    noisy = mask_blocks(shape, sheets, torch.Generator().manual_seed(0), 0.0)
    run = partial(run_layers, shape, weights, layer=layer_runner(shape), dtype=torch.float32)
    hidden = run(noisy.tokens, noisy.view)
    columns, copied = 320, noisy.answers.shape[1]
    seen = 0
    for row in range(3):
        text = bytes(sheets.tokens[row, sheets.start[row] :])
        tail = -len(text) % block
        whole = [*text, *[END] * tail]
        assert noisy.tokens[row, columns - len(whole) : columns].tolist() == whole
        decided = len(text) - sheets.answer_length
        for begin in range(decided // block * block, len(whole), block):
            place = columns + copied - len(whole) + begin  # of this block in the noisy copy
            current = noisy.tokens[row, place : place + block].tolist()
            kept = [a for a, b in zip(current, whole[begin : begin + block], strict=True) if a != MASK and a != b]
            assert not kept
            assert MASK not in current[: max(decided - begin, 0)]
            canvas = torch.tensor([whole[:begin] + current], dtype=torch.int32)
            alone = run(canvas, view_rows(shape, torch.tensor([0]), canvas.shape[1]))[0, begin:]
            torch.testing.assert_close(hidden[row, place : place + block], alone)
            seen += current.count(MASK)
    assert seen == int((noisy.shares > 0).sum()) > 50


def test_shares_of_masked_tokens_add_up_to_one_on_average() -> None:
    sheets = draw_sheets(training_stream(2), 64, 6).cut(320)
    for layout, mask in (("dream", mask_answers), ("sdar", mask_blocks)):
        shape = replace(TINY, layout=layout).shape
        sums = [mask(shape, sheets, torch.Generator().manual_seed(seed), 0.1).shares.sum() for seed in range(20)]
        # 20 batches of about 3,500 tokens, each 1 / p with p >= 0.1 where it is masked: a deviation below 0.01.
        assert torch.stack(sums).mean().item() == pytest.approx(1.0, abs=0.03)


def test_keys_that_are_repeated_mix_as_shared_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 5, heads, 8, generator=generator) for heads in (4, 2, 2))
    mask = torch.tensor([[True] * 5, [False] * 2 + [True] * 3])
    torch.testing.assert_close(
        SharedKeys().attention(query, key, value, mask), TorchOps().attention(query, key, value, mask)
    )


# -- where weights come from
def test_heads_that_agree_become_one_without_a_change() -> None:
    """Keys and values of heads 1 and 3 are those of 0 and 2, so that sharing loses nothing."""
    old, new = TINY.shape, replace(TINY, layout="dream").shape
    weights = draw("llada")
    width = old.head_dim
    for layer in range(old.layers):
        qk, value = weights[f"layers.{layer}.qk"], weights[f"layers.{layer}.v"]
        for matrix in (qk[:, old.query_width :], value):
            for head in (1, 3):
                matrix[:, head * width : (head + 1) * width] = matrix[:, (head - 1) * width : head * width]
    converted = convert_weights(old, weights, new)
    tokens = torch.randint(0, 256, (1, 20), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    results = [
        run_layers(
            replace(shape, rope_float32=True),
            of,
            tokens,
            view_rows(shape, torch.tensor([0]), 20),
            layer=layer_runner(shape),
            dtype=torch.float32,
        )
        for shape, of in ((old, weights), (new, converted))
    ]
    torch.testing.assert_close(*results)


def test_query_norms_start_at_the_size_that_queries_have() -> None:
    old, new = TINY.shape, replace(TINY, layout="sdar").shape
    weights = draw("llada")
    converted = convert_weights(old, weights, new)
    rows = torch.randn(8000, old.hidden, generator=torch.Generator().manual_seed(2)) * weights["layers.0.norm1"]
    for name, matrix in zip(("q_norm", "k_norm"), torch.split(converted["layers.0.qk"], [32, 16], dim=1), strict=True):
        found = converted[f"layers.0.{name}"]
        # Of 8,000 rows in 16 directions at least, with a deviation of half a percent.
        torch.testing.assert_close(found, (rows @ matrix).square().mean().sqrt().expand(8), rtol=0.02, atol=0)


@pytest.mark.parametrize("change", [{"mlp": 64}, {"hidden": 64}, {"layers": 1}, {"heads": 2}])
def test_other_sizes_are_not_converted(change: dict[str, int], llada: Path, tmp_path: Path) -> None:
    options = replace(TINY, layout="dream", source=llada, output=tmp_path / "x", **change)
    with pytest.raises(UsageError, match="which does not become"):
        train(options, torch.device("cpu"))


def test_a_run_is_not_resumed_in_another_layout(llada: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--resume holds a model of shape"):
        train(replace(TINY, layout="sdar", resume=llada, output=tmp_path / "x"), torch.device("cpu"))
