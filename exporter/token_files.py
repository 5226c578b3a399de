"""Ids of special tokens in a checkpoint's tokenizer files, for configurations that do not state them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dllm_export.exporter.json_file import read_json

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")


def find_token(directory: Path, kind: str, texts: tuple[str, ...]) -> int | None:
    """The token that the tokenizer files call `kind` (mask, eos, pad), or else the first of `texts` that they have."""
    named = [token_text(read_optional(directory / file).get(f"{kind}_token")) for file in SETTINGS]
    wanted = [text for text in (*named, *texts) if text]
    if not wanted:
        return None
    vocabulary = read_vocabulary(directory)
    return next((vocabulary[text] for text in wanted if text in vocabulary), None)


def read_vocabulary(directory: Path) -> dict[str, int]:
    """Text -> id of every token that the files list, added ones included."""
    file = read_optional(directory / "tokenizer.json")
    model = file.get("model")
    tokens: Any = model.get("vocab") if isinstance(model, dict) else read_optional(directory / "vocab.json")
    vocabulary = (
        {text: number for text, number in tokens.items() if isinstance(number, int)} if isinstance(tokens, dict) else {}
    )
    for entry in file.get("added_tokens") or []:
        if isinstance(entry, dict) and isinstance(entry.get("id"), int):
            vocabulary[token_text(entry)] = entry["id"]
    older = read_optional(directory / "added_tokens.json")
    vocabulary |= {text: number for text, number in older.items() if isinstance(number, int)}
    added = read_optional(directory / "tokenizer_config.json").get("added_tokens_decoder")
    for number, entry in added.items() if isinstance(added, dict) else ():
        if number.isdecimal():
            vocabulary[token_text(entry)] = int(number)
    return vocabulary


def read_optional(path: Path) -> dict[str, Any]:
    """A JSON object, empty where the file is missing."""
    return read_json(path) if path.is_file() else {}


def token_text(token: Any) -> str:
    """Special tokens are strings or objects with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
