"""Tokenizer files of a checkpoint -> one tokenizer.json with its special tokens and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from dllm_export.errors import CheckpointError
from dllm_export.exporter.json_file import read_json
from dllm_export.exporter.token_files import token_text
from dllm_export.graphs.families import ModelConfig
from dllm_export.runtime.manifest import TokenizerRecord

FILE = "tokenizer/tokenizer.json"


def write_tokenizer(source: Path, config: ModelConfig, root: Path) -> tuple[TokenizerRecord, int | None]:
    """Merge, check and write the tokenizer; returns its record and the end-of-turn id, if it has one."""
    if not (source / "tokenizer.json").is_file():
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
        tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"tokenizer.json cannot be read: {error}") from None
    settings = read_json(source / "tokenizer_config.json") if (source / "tokenizer_config.json").is_file() else {}
    _merge_added_tokens(tokenizer, settings)
    _check_mask(tokenizer, settings, config)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= config.shape.vocab:
        raise CheckpointError(
            f"tokenizer.json has {largest + 1} tokens, the embedding table {config.shape.vocab} rows; it belongs to "
            f"another model"
        )
    (root / FILE).parent.mkdir()
    tokenizer.save(str(root / FILE))
    record = TokenizerRecord(
        file=FILE, chat_template=_chat_template(source, settings), bos=token_text(settings.get("bos_token"))
    )
    return record, tokenizer.token_to_id(config.end_of_turn) if config.end_of_turn else None


def _merge_added_tokens(tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
    """Specials that only tokenizer_config.json lists."""
    added = settings.get("added_tokens_decoder") or {}
    if not isinstance(added, dict) or not all(number.isdecimal() for number in added):
        raise CheckpointError("tokenizer_config.json: added_tokens_decoder is not a table from ids to tokens")
    for number, entry in sorted(added.items(), key=lambda item: int(item[0])):
        content, special = token_text(entry), bool(isinstance(entry, dict) and entry.get("special"))
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([AddedToken(content, special=special, normalized=False)])
        if tokenizer.token_to_id(content) != int(number):
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
