"""Tokenizer files of a checkpoint -> one tokenizer.json with its special tokens and chat template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from dllm_export.errors import CheckpointError
from dllm_export.exporter.qwen_tokenizer import build_qwen_tokenizer, has_qwen_files
from dllm_export.exporter.token_files import read_optional, token_text
from dllm_export.graphs.families import ModelConfig
from dllm_export.runtime.manifest import TokenizerRecord

FILE = "tokenizer/tokenizer.json"
SOURCES = (
    *("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
)
"""Files of a checkpoint that its tokenizer is made of."""


@dataclass(frozen=True, slots=True)
class WrittenTokenizer:
    """What the bundle's manifest says of its tokenizer."""

    record: TokenizerRecord
    end_of_turn: int | None
    """Its id, if there is one."""
    assumed: tuple[str, ...] = ()
    """What the checkpoint's files do not say, as sentences."""


def write_tokenizer(source: Path, config: ModelConfig, root: Path) -> WrittenTokenizer:
    """Merge, check and write the tokenizer."""
    settings = read_optional(source / "tokenizer_config.json")
    tokenizer = open_tokenizer(source, config, settings)
    _merge_added_tokens(tokenizer, read_added_tokens(source, settings))
    _check_mask(tokenizer, settings, config)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= config.shape.vocab:
        raise CheckpointError(
            f"tokenizer.json has {largest + 1} tokens, the embedding table {config.shape.vocab} rows; it belongs to "
            f"another model"
        )
    (root / FILE).parent.mkdir()
    tokenizer.save(str(root / FILE))
    template, assumed = _chat_template(source, settings), []
    if template is None and config.chat_template is not None:
        template = config.chat_template
        assumed.append(f"chat template: not in the tokenizer's files, taken from family {config.family}")
    record = TokenizerRecord(file=FILE, chat_template=template, bos=token_text(settings.get("bos_token")))
    end_of_turn = tokenizer.token_to_id(config.end_of_turn) if config.end_of_turn else None
    return WrittenTokenizer(record, end_of_turn, tuple(assumed))


def open_tokenizer(source: Path, config: ModelConfig, settings: dict[str, Any]) -> Tokenizer:
    """The checkpoint's tokenizer.json, or what its older files make one of."""
    if not (source / "tokenizer.json").is_file():
        if has_qwen_files(source):
            return build_qwen_tokenizer(source, settings.get("tokenizer_class"))
        remedy = "add it, or export"
        if config.tokenizer:
            remedy = (
                f"checkpoints of family {config.family} are published without one and use {config.tokenizer}: pass its "
                f"directory as --tokenizer, or export"
            )
        raise CheckpointError(
            f"tokenizer.json is missing in {source}: {remedy} with --no-tokenizer and work with token ids"
        )
    try:
        return Tokenizer.from_file(str(source / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"tokenizer.json cannot be read: {error}") from None


def read_added_tokens(source: Path, settings: dict[str, Any]) -> dict[int, tuple[str, bool]]:
    """Id -> (text, whether it is special) of the tokens that stand beside the vocabulary.

    added_tokens_decoder of tokenizer_config.json says both; the older added_tokens.json says the ids, and what is special then
    is what the settings or special_tokens_map.json name.
    """
    added = settings.get("added_tokens_decoder") or {}
    if not isinstance(added, dict) or not all(number.isdecimal() for number in added):
        raise CheckpointError("tokenizer_config.json: added_tokens_decoder is not a table from ids to tokens")
    older = read_optional(source / "added_tokens.json")
    if not all(isinstance(number, int) for number in older.values()):
        raise CheckpointError("added_tokens.json is not a table from tokens to ids")
    named = {**settings, **read_optional(source / "special_tokens_map.json")}
    others = named.pop("additional_special_tokens", None) or []
    special = {token_text(value) for name, value in named.items() if name.endswith("_token")} | set(
        map(token_text, others)
    )
    tokens = {number: (text, text in special) for text, number in older.items()}
    for number, entry in added.items():
        tokens[int(number)] = (token_text(entry), bool(isinstance(entry, dict) and entry.get("special")))
    return tokens


def _merge_added_tokens(tokenizer: Tokenizer, tokens: dict[int, tuple[str, bool]]) -> None:
    """Tokens that only the files beside the tokenizer list."""
    for number, (content, special) in sorted(tokens.items()):
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([AddedToken(content, special=special, normalized=False)])
        if tokenizer.token_to_id(content) != number:
            raise CheckpointError(
                f"tokenizer_config.json gives '{content}' the id {number}, tokenizer.json {tokenizer.token_to_id(content)}"
            )


def _check_mask(tokenizer: Tokenizer, settings: dict[str, Any], config: ModelConfig) -> None:
    text = token_text(settings.get("mask_token"))
    found = tokenizer.token_to_id(text) if text else None
    if found is not None and found != config.tokens.mask:
        raise CheckpointError(
            f"the tokenizer's mask token '{text}' is {found}, config.json says {config.tokens.mask}; correct one of them"
        )


def _chat_template(source: Path, settings: dict[str, Any]) -> str | None:
    if (source / "chat_template.jinja").is_file():
        try:
            return (source / "chat_template.jinja").read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise CheckpointError("chat_template.jinja is not UTF-8 text; save it as UTF-8 or remove it") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
