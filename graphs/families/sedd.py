"""SEDD (arXiv 2310.16834): a network that sees the noise level and gives ratios of probabilities.

Noise turns a token into the mask (graph "absorb") or into any other token ("uniform"), and then the vocabulary has no mask:
the id behind its last token only marks places to fill.
"""

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
NOISES = {"absorb": SAMPLER, "uniform": replace(SAMPLER, transfer="sedd-uniform")}
PARTS = ("graph", "noise", "model")
KEYS = {"width": "hidden_size", "layers": "n_blocks", "heads": "n_heads", "length": "length"}


def is_nested(source: Source) -> bool:
    """Its configuration names neither architecture nor model type, and has parts of its own."""
    return all(isinstance(source.config.get(part), Mapping) for part in PARTS)


def read_config(source: Source) -> ModelConfig:
    """config.json -> ModelConfig. The mask is a state of its own behind the tokens, or none."""
    raw = source.config
    graph, noise, model = (value if isinstance(value := raw.get(part), Mapping) else {} for part in PARTS)
    kind, tokens = graph.get("type"), read_size(raw, "tokens")
    absorbs = kind == "absorb"
    for key, value, allowed, why in (
        ("graph.type", kind, tuple(NOISES), "SEDD knows these two"),
        ("noise.type", noise.get("type"), ("loglinear",), "no released SEDD has another schedule"),
        ("model.scale_by_sigma", model.get("scale_by_sigma"), (absorbs,), f"so it is where the graph is {kind!r}"),
    ):
        if value not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise CheckpointError(f"config.json: '{key}' is {value!r}, expected {expected}: {why}")
    if not absorbs and source.mask_id is not None:
        raise CheckpointError(
            f"--mask-id {source.mask_id} is for models with a mask, and this one's noise is any token ('graph.type' is "
            f"'uniform'): leave it out"
        )
    shape = read_shape(model, KEYS, tokens + absorbs)
    width = read_size(model, "cond_dim")
    # Without a mask the id behind the vocabulary marks places to fill; end and pad are read as where there is one.
    named = replace(source, config={**raw, "mask_token_id": tokens})
    ids, assumed = read_tokens(named, tokens + 1, RELEASED)
    return ModelConfig(
        family="sedd",
        shape=replace(shape, conditioning=width, uniform_noise=not absorbs),
        tokens=ids,
        sampler=NOISES[str(kind)],
        names=tensor_names(""),
        conditioning=width,
        # Absorbing ratios are scaled by the number of other states, and by the noise level, which is the sampler's to do.
        logit_offset=-math.log(tokens) if absorbs else 0.0,
        tokenizer=TOKENIZER,
        assumed=assumed,
    )


SEDD = Family(
    name="sedd",
    title="SEDD small/medium, absorbing or uniform",
    marks=Marks(model_types=("",), confirm=is_nested),
    read_config=read_config,
    sizes=("0.17 B", "0.42 B"),
    layout=LAYOUT,
    sampler=SAMPLER,
    limits="features follow the noise level, so that requests cannot share those of a prefix",
)
