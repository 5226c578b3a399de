"""Tokenizer files of a checkpoint: merged into one, checked against the model, or refused with the remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer

from dllm_export.errors import CheckpointError
from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pipeline import export
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.session import SessionOptions
from dllm_export.runtime.tokenizer import Tokenizer

Refuse = Callable[..., str]
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content | trim }}<|eot_id|>{% endfor %}"


@pytest.fixture
def model(write_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A directory to change."""
    return write_checkpoint(tmp_path / "model")


def settings(model: Path, **values: object) -> Path:
    """Write tokenizer_config.json."""
    (model / "tokenizer_config.json").write_text(json.dumps(values))
    return model


def tokenizer_of(bundle: Bundle) -> Tokenizer:
    record = bundle.manifest.tokenizer
    assert record is not None
    return Tokenizer(bundle.file(record.file), record.chat_template, record.bos)


# -- what is kept
def test_the_bundle_encodes_like_the_checkpoint(bundle: Bundle, checkpoint: Path) -> None:
    original = FastTokenizer.from_file(str(checkpoint / "tokenizer.json"))
    text = "Café, naïve 12+34 — <|mdm_mask|> 𝄞\n"
    ids = tokenizer_of(bundle).encode(text)
    assert ids == original.encode(text, add_special_tokens=False).ids
    assert tokenizer_of(bundle).decode(ids) == text.replace("<|mdm_mask|>", "")


def test_the_end_of_turn_id_comes_from_the_tokenizer(bundle: Bundle) -> None:
    assert bundle.manifest.tokens.end_of_turn == 261


def test_without_a_tokenizer_the_bundle_has_none(checkpoint: Path, tmp_path: Path) -> None:
    bundle = export(checkpoint, tmp_path / "bundle", ExportOptions(no_tokenizer=True))
    assert bundle.manifest.tokenizer is None
    assert bundle.manifest.tokens.end_of_turn is None
    assert not (bundle.path / "tokenizer").exists()


def test_tokens_that_only_the_settings_list_are_merged(model: Path, tmp_path: Path) -> None:
    added = {
        "262": {"content": "<|tool|>", "special": True, "normalized": False},
        "263": {"content": "<word>", "special": False},
        "257": {"content": "<|endoftext|>", "special": True},
    }
    tokenizer = tokenizer_of(export(settings(model, added_tokens_decoder=added), tmp_path / "bundle"))
    assert tokenizer.encode("a<|tool|>b<word>") == [97, 262, 98, 263]
    assert tokenizer.decode([97, 262, 98, 263]) == "ab<word>"


@pytest.mark.parametrize("bos", ["<|startoftext|>", {"content": "<|startoftext|>", "lstrip": False}])
@pytest.mark.parametrize("form", ["text", "list", "file"])
def test_a_chat_template_is_found_wherever_it_is_kept(form: str, bos: object, model: Path, tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "other"}, {"name": "default", "template": TEMPLATE}]
    settings(model, bos_token=bos, chat_template={"text": TEMPLATE, "list": named, "file": "other"}[form])
    if form == "file":
        (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    tokenizer = tokenizer_of(export(model, tmp_path / "bundle"))
    assert tokenizer.chat(" hi ") == "<|startoftext|>hi<|eot_id|>"


@pytest.mark.parametrize("template", [None, [], [{"name": "tool_use", "template": "x"}], 7])
def test_a_checkpoint_without_a_default_template_has_none(template: object, model: Path, tmp_path: Path) -> None:
    bundle = export(settings(model, chat_template=template, bos_token=None), tmp_path / "bundle")
    assert bundle.manifest.tokenizer is not None
    assert (bundle.manifest.tokenizer.chat_template, bundle.manifest.tokenizer.bos) == (None, "")


def test_a_chat_reaches_the_model_through_the_template(model: Path, tmp_path: Path) -> None:
    settings(model, bos_token="<|startoftext|>", chat_template=TEMPLATE)
    export(model, tmp_path / "bundle")
    with DiffusionLM.from_pretrained(tmp_path / "bundle", SessionOptions(threads=1)) as lm:
        assert lm.encode("hi", chat=True) == [256, 104, 105, 261]


# -- what is refused
def test_a_missing_tokenizer_is_refused_with_the_option_that_works_without(model: Path, refuse: Refuse) -> None:
    (model / "tokenizer.json").unlink()
    assert "--no-tokenizer" in refuse(model, CheckpointError)


@pytest.mark.parametrize("content", [b"", b"{}", b"no json", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_a_tokenizer_that_cannot_be_read_is_refused(content: bytes, model: Path, refuse: Refuse) -> None:
    (model / "tokenizer.json").write_bytes(content)
    assert "tokenizer.json cannot be read" in refuse(model, CheckpointError)


def test_more_tokens_than_embedding_rows_are_refused_with_both_numbers(model: Path, refuse: Refuse) -> None:
    fast = FastTokenizer.from_file(str(model / "tokenizer.json"))
    fast.add_tokens([f"<extra {number}>" for number in range(3)])
    fast.save(str(model / "tokenizer.json"))
    message = refuse(model, CheckpointError)
    assert "tokenizer.json has 265 tokens, the embedding table 264 rows; it belongs to another model" in message


def test_a_token_id_beyond_the_embedding_table_is_refused(model: Path, refuse: Refuse) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["vocab"]["far away"] = 5000  # 263 tokens in all, but not numbered one by one
    (model / "tokenizer.json").write_text(json.dumps(content))
    assert "tokenizer.json" in refuse(model, CheckpointError)


def test_a_mask_token_with_another_id_is_refused(model: Path, refuse: Refuse) -> None:
    message = refuse(settings(model, mask_token="<|eot_id|>"), CheckpointError)
    assert "the tokenizer's mask token '<|eot_id|>' is 261, config.json says 258; correct one of them" in message


@pytest.mark.parametrize("mask", ["<|mdm_mask|>", {"content": "<|mdm_mask|>"}, None, "<not in the vocabulary>"])
def test_a_mask_token_that_agrees_or_says_nothing_is_accepted(mask: object, model: Path, tmp_path: Path) -> None:
    assert export(settings(model, mask_token=mask), tmp_path / "bundle").manifest.tokens.mask == 258


def test_added_tokens_with_contradicting_ids_are_refused(model: Path, refuse: Refuse) -> None:
    added = {"263": {"content": "<|endoftext|>", "special": True}}
    message = refuse(settings(model, added_tokens_decoder=added), CheckpointError)
    assert "gives '<|endoftext|>' the id 263, tokenizer.json 257" in message


@pytest.mark.parametrize("added", [["a"], "text", 7, {"not a number": "x"}, {"262": None}, {"262": {"content": ""}}])
def test_added_tokens_that_are_no_table_are_refused(added: object, model: Path, refuse: Refuse) -> None:
    assert "tokenizer_config.json" in refuse(settings(model, added_tokens_decoder=added), CheckpointError)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe"])
def test_settings_that_are_no_object_are_refused(content: bytes, model: Path, refuse: Refuse) -> None:
    (model / "tokenizer_config.json").write_bytes(content)
    assert "tokenizer_config.json" in refuse(model, CheckpointError)


def test_a_template_file_that_is_no_text_is_refused(model: Path, refuse: Refuse) -> None:
    (model / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
    assert "chat_template.jinja" in refuse(model, CheckpointError)
