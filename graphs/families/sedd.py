"""SEDD (arXiv 2310.16834): a network that sees the noise level and gives ratios of probabilities; absorbing states only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from dllm_export.errors import CheckpointError
from dllm_export.graphs.families.dit import LAYOUT, TOKENIZER, read_shape, tensor_names
from dllm_export.graphs.families.family import (
    Family,
    Marks,
    ModelConfig,
    SamplerDefaults,
    Source,
    read_size,
)
from dllm_export.graphs.families.special_tokens import ReleasedTokens, read_tokens

RELEASED = ReleasedTokens(title="SEDD", vocab=50258, mask=50257, eos=50256, pad=50256)
SAMPLER = SamplerDefaults(gen_length=128, block_length=128, temperature=1.0, transfer="sedd")
KEYS = {"width": "hidden_size", "layers": "n_blocks", "heads": "n_heads", "length": "length"}
REQUIRED = (
    # part, key, required value, what another one would need
    ("graph", "type", "absorb", "every token may change in every step, and nothing is ever decided"),
    ("noise", "type", "loglinear", "no released SEDD has another schedule"),
    ("model", "scale_by_sigma", True, "no released SEDD is without"),
)


def is_nested(source: Source) -> bool:
    """Its configuration names neither architecture nor model type, and has parts of its own."""
    return all(isinstance(source.config.get(part), Mapping) for part in ("graph", "noise", "model"))


def read_config(source: Source) -> ModelConfig:
    """config.json -> ModelConfig. The mask is a state of its own behind the tokens."""
    raw = source.config
    parts = {part: value if isinstance(value := raw.get(part), Mapping) else {} for part in ("graph", "noise", "model")}
    for part, key, required, why in REQUIRED:
        if parts[part].get(key) != required:
            raise CheckpointError(
                f"config.json: '{part}.{key}' is {parts[part].get(key)!r}, expected {required!r}: {why}"
            )
    model, tokens = parts["model"], read_size(raw, "tokens")
    shape = read_shape(model, KEYS, tokens + 1)
    width = read_size(model, "cond_dim")
    ids, assumed = read_tokens(replace(source, config={**raw, "mask_token_id": tokens}), shape.vocab, RELEASED)
    return ModelConfig(
        family="sedd",
        shape=replace(shape, conditioning=width),
        tokens=ids,
        sampler=SAMPLER,
        names=tensor_names(""),
        conditioning=width,
        # The ratios are scaled by the number of other states, and by the noise level, which is the sampler's to do.
        logit_offset=-math.log(tokens),
        tokenizer=TOKENIZER,
        assumed=assumed,
    )


SEDD = Family(
    name="sedd",
    title="SEDD small/medium",
    marks=Marks(model_types=("",), confirm=is_nested),
    read_config=read_config,
    sizes=("0.17 B", "0.42 B"),
    layout=LAYOUT,
    sampler=SAMPLER,
    limits="features follow the noise level, so that requests cannot share those of a prefix",
)
