"""Special token ids of a checkpoint: from its files, or from the released ones of its family, and then it is said."""

from __future__ import annotations

from dataclasses import dataclass

from dllm_export.errors import CheckpointError
from dllm_export.graphs.families.family import Source, SpecialTokens, read


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleasedTokens:
    """Ids of the released checkpoints of a family; they hold for a vocabulary of that size and for no other."""

    title: str
    vocab: int
    mask: int | None = None
    eos: int | None = None
    pad: int | None = None
    texts: tuple[str, ...] = ()
    """Texts of the mask, for tokenizers that have it and do not say so."""


def read_tokens(source: Source, vocab: int, released: ReleasedTokens) -> tuple[SpecialTokens, tuple[str, ...]]:
    """(ids, sentences on those that config.json does not state).

    Config first, then what the tokenizer calls mask, eos or pad, then the family's text of the mask, then the released id.
    """
    stated = source.config.get("mask_token_id")
    if source.mask_id is not None and stated is not None and source.mask_id != stated:
        raise CheckpointError(
            f"--mask-id {source.mask_id} contradicts config.json's mask_token_id {stated}; drop one of them"
        )
    assumed: list[str] = []
    ids: dict[str, int] = {}
    for kind in ("mask", "eos", "pad"):
        token = source.mask_id if kind == "mask" else None
        token = _stated(source, kind, assumed) if token is None else token
        token = _found(source, kind, released, assumed) if token is None else token
        token = _released(kind, vocab, released, assumed) if token is None else token
        if not 0 <= token < vocab:
            raise CheckpointError(f"{kind} token id {token} is outside the embedding table of {vocab} rows")
        ids[kind] = token
    for kind in ("eos", "pad"):
        if ids[kind] == ids["mask"]:
            raise CheckpointError(
                f"config.json: mask and {kind} are both token {ids['mask']}; the mask needs an id of its own"
            )
    return SpecialTokens(**ids), tuple(assumed)


def _stated(source: Source, kind: str, assumed: list[str]) -> int | None:
    """The id of config.json; of several that end a text, the first."""
    key = f"{kind}_token_id"
    value = source.config.get(key)
    if value is None:
        return None
    if kind == "eos" and isinstance(value, list) and value:
        if len(value) > 1:
            assumed.append(f"{key} {value[0]}: config.json lists {value}; text is cut at the first of them only")
        return read({key: value[0]}, key, int)
    return read(source.config, key, int)


def _found(source: Source, kind: str, released: ReleasedTokens, assumed: list[str]) -> int | None:
    """The id of the tokenizer's files."""
    token = source.find_token(kind, released.texts if kind == "mask" else ())
    if token is not None:
        assumed.append(f"{kind}_token_id {token}: not in config.json, taken from the tokenizer's files")
    return token


def _released(kind: str, vocab: int, released: ReleasedTokens, assumed: list[str]) -> int:
    """The id of the released checkpoints, if this may be one of them."""
    token = {"mask": released.mask, "eos": released.eos, "pad": released.pad}[kind]
    if token is None or vocab != released.vocab:
        remedy = "pass --mask-id" if kind == "mask" else "add it to config.json"
        raise CheckpointError(
            f"config.json has no {kind}_token_id and the vocabulary is not {released.title}'s; {remedy}"
        )
    assumed.append(f"{kind}_token_id {token}: not in config.json, taken from the released {released.title}")
    return token
