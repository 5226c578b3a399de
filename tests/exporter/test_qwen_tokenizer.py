"""vocab.json and merges.txt against transformers' own tokenizer of Qwen2, and what is made of the files beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers, trainers

from dllm_export.errors import CheckpointError
from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pipeline import export
from dllm_export.exporter.qwen_tokenizer import PIECES, build_qwen_tokenizer, read_merges
from dllm_export.graphs import ModelShape
from dllm_export.graphs.families.dream import CHAT_TEMPLATE
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.tokenizer import Tokenizer
from dllm_export.tools.random_checkpoint import write_random_checkpoint

Refuse = Callable[..., str]

CORPUS = [
    "The quick brown fox jumps over the lazy dog, doesn't it? I'll say we've, they're and he'd.",
    "def add(left, right):\n    return left + right\n\n\nprint(add(12, 345))\n",
    "Größe, naïve Café, Привет мир, 你好世界, مرحبا, 𝄞 and 🙂🙂.",
    "<|im_start|>user\nHow many are 1234567890?<|im_end|>\n",
] * 3
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>")
PLAIN = ("<tool_call>", "</tool_call>")
TEXTS = [
    "",
    " ",
    "Hello world",
    "  two  spaces   three",
    "I'm, you're, HE'LL, we'VE, 'tis, don't 'd",
    "1 12 123 1234567890 3.14 ½ ² ١٢٣",
    "tabs\tand\r\nlines\n\n\n  indented\n ",
    "Café Cafe\u0301 ﬁ Å",
    "Привет, 你好。🙂👩‍👩‍👧 \u200b\u00a0x",
    "<|im_start|>user\nhi<|im_end|>\n<|mask|><|mask|> <tool_call>{}</tool_call><|endoftext|>",
    "<|im_start|> <|im_sta rt|>",
    "!!!??? --- ...\n\n== a_b-c",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trained vocabulary in the files that Dream is published with."""
    directory = tmp_path_factory.mktemp("qwen")
    trained = FastTokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    trained.model.save(str(directory))
    count = trained.get_vocab_size()
    added = {
        str(count + place): {"content": text, "special": text in SPECIAL, "normalized": False}
        for place, text in enumerate((*SPECIAL, *PLAIN))
    }
    settings = {
        "tokenizer_class": "DreamTokenizer",
        "added_tokens_decoder": added,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def token_ids(files: Path) -> dict[str, int]:
    added = json.loads((files / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    return {entry["content"]: int(number) for number, entry in added.items()}


def write_dream(directory: Path, files: Path, *, drop: tuple[str, ...] = (), **settings: Any) -> Path:
    """A tiny checkpoint of Dream in its published layout, with these settings in tokenizer_config.json changed."""
    ids = token_ids(files)
    vocab = max(ids.values()) + 3
    shape = ModelShape(
        layers=1, hidden=16, heads=2, kv_heads=1, head_dim=8, mlp=16, vocab=vocab, max_length=64, norm_eps=1e-6,
        rope_theta=1e4, rope_float32=False, qkv_bias=True, shift=True,
    )  # fmt: skip
    write_random_checkpoint(directory, shape, family="dream")
    raw = json.loads((directory / "config.json").read_text())
    raw |= {
        "mask_token_id": ids["<|mask|>"],
        "eos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    (directory / "config.json").write_text(json.dumps(raw))
    for name in ("vocab.json", "merges.txt"):
        (directory / name).write_bytes((files / name).read_bytes())
    changed = {**json.loads((files / "tokenizer_config.json").read_text()), **settings}
    changed = {key: value for key, value in changed.items() if key not in drop}
    (directory / "tokenizer_config.json").write_text(json.dumps(changed))
    return directory


def tokenizer_of(bundle: Bundle) -> Tokenizer:
    record = bundle.manifest.tokenizer
    assert record is not None
    return Tokenizer(bundle.file(record.file), record.chat_template, record.bos)


@pytest.fixture(scope="module")
def ours(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    root = tmp_path_factory.mktemp("dream")
    return tokenizer_of(export(write_dream(root / "model", files), root / "bundle"))


@pytest.fixture(scope="module")
def theirs(files: Path) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers needs Python 3.11")
    vocabulary = json.loads((files / "vocab.json").read_text())
    merges = [tuple(line.split(" ")) for line in (files / "merges.txt").read_text().splitlines()[1:]]
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=merges, additional_special_tokens=list(SPECIAL))
    tokenizer.add_tokens(list(PLAIN))
    return tokenizer


# -- against transformers
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_gets_the_ids_of_transformers(text: str, ours: Tokenizer, theirs: Any, files: Path) -> None:
    assert theirs.convert_tokens_to_ids(list(SPECIAL)) == [token_ids(files)[token] for token in SPECIAL]
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_any_text_gets_the_ids_of_transformers(ours: Tokenizer, theirs: Any, text: str) -> None:
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_the_pieces_are_those_of_transformers(theirs: Any) -> None:
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert PIECES == PRETOKENIZE_REGEX


# -- what is read beside them
def test_a_bundle_of_dream_has_its_tokens_and_the_familys_chat_template(files: Path, tmp_path: Path) -> None:
    bundle = export(write_dream(tmp_path / "model", files), tmp_path / "bundle")
    manifest, ids = bundle.manifest, token_ids(files)
    assert (manifest.family, manifest.shape.shift) == ("dream", True)
    assert (manifest.tokens.mask, manifest.tokens.end_of_turn) == (ids["<|mask|>"], ids["<|im_end|>"])
    assert manifest.assumed == ("chat template: not in the tokenizer's files, taken from family dream",)
    expected = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer_of(bundle).chat("Hi!") == expected
    assert "vocab.json" in manifest.source
    assert "merges.txt" in manifest.source


def test_the_checkpoints_own_chat_template_comes_first(files: Path, tmp_path: Path) -> None:
    model = write_dream(tmp_path / "model", files, chat_template="<{{ messages[0]['content'] }}>")
    bundle = export(model, tmp_path / "bundle")
    assert tokenizer_of(bundle).chat("a") == "<a>"
    assert bundle.manifest.assumed == ()


def test_the_template_of_the_family_lets_a_system_turn_stand() -> None:
    jinja2 = pytest.importorskip("jinja2")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = jinja2.Environment().from_string(CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=False)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"


def test_older_files_of_added_tokens_are_read(files: Path, ours: Tokenizer, tmp_path: Path) -> None:
    ids = token_ids(files)
    model = write_dream(tmp_path / "model", files, drop=("added_tokens_decoder", "mask_token"))
    (model / "added_tokens.json").write_text(json.dumps(ids))
    names = {"mask_token": "<|mask|>", "additional_special_tokens": [{"content": "<|im_start|>"}, "<|im_end|>"]}
    (model / "special_tokens_map.json").write_text(json.dumps(names))
    found = tokenizer_of(export(model, tmp_path / "bundle"))
    for text in TEXTS:
        assert found.encode(text) == ours.encode(text)
        assert found.decode(found.encode(text)) == ours.decode(ours.encode(text))


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", None])
def test_files_of_another_tokenizer_are_not_taken_for_qwens(
    kind: str | None, files: Path, tmp_path: Path, refuse: Refuse
) -> None:
    model = write_dream(tmp_path / "model", files, tokenizer_class=kind)
    message = refuse(model, CheckpointError)
    assert "can be made only where tokenizer_config.json names the tokenizer_class" in message
    assert repr(kind) in message


def test_a_wrong_id_of_an_added_token_is_refused(files: Path, tmp_path: Path, refuse: Refuse) -> None:
    ids = token_ids(files)
    added = {str(number + 1): {"content": text, "special": True} for text, number in ids.items()}
    message = refuse(write_dream(tmp_path / "model", files, added_tokens_decoder=added), CheckpointError)
    assert f"gives '<|endoftext|>' the id {ids['<|endoftext|>'] + 1}" in message


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("merges.txt", "#version: 0.2\na b c\n", "merges.txt, line 2: 'a b c' is not a pair of tokens"),
        ("merges.txt", "#version: 0.2\nabc\n", "merges.txt, line 2: 'abc' is not a pair of tokens"),
        ("merges.txt", "zq xj\n", "vocab.json and merges.txt do not fit together"),
        ("vocab.json", '{"a": "b"}', "vocab.json is not a table from tokens to ids"),
        ("added_tokens.json", '{"a": "b"}', "added_tokens.json is not a table from tokens to ids"),
    ],
)
def test_damaged_files_are_refused(
    name: str, text: str, sentence: str, files: Path, tmp_path: Path, refuse: Refuse
) -> None:
    model = write_dream(tmp_path / "model", files)
    (model / name).write_text(text)
    assert sentence in refuse(model, CheckpointError)


def test_line_ends_of_other_systems_do_not_matter(files: Path, tmp_path: Path) -> None:
    (tmp_path / "merges.txt").write_bytes((files / "merges.txt").read_bytes().replace(b"\n", b"\r\n"))
    assert read_merges(tmp_path / "merges.txt") == read_merges(files / "merges.txt")


def test_without_a_tokenizer_these_files_are_not_looked_at(files: Path, tmp_path: Path) -> None:
    model = write_dream(tmp_path / "model", files, tokenizer_class="Other")
    assert export(model, tmp_path / "bundle", ExportOptions(no_tokenizer=True)).manifest.tokenizer is None


def test_a_tokenizer_is_built_without_its_added_tokens(files: Path) -> None:
    built = build_qwen_tokenizer(files, "Qwen2Tokenizer")
    assert built.get_vocab_size(with_added_tokens=True) == len(json.loads((files / "vocab.json").read_text()))
