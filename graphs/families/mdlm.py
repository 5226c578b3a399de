"""MDLM (arXiv 2406.07524): masked diffusion whose network sees no time, sampled by revealing rows at random."""

from __future__ import annotations

from dllm_export.errors import CheckpointError
from dllm_export.graphs.families.dit import LAYOUT, TOKENIZER, read_shape, tensor_names
from dllm_export.graphs.families.family import (
    Family,
    Marks,
    ModelConfig,
    SamplerDefaults,
    Source,
    read,
    read_size,
)
from dllm_export.graphs.families.special_tokens import ReleasedTokens, read_tokens

RELEASED = ReleasedTokens(title="MDLM", vocab=50258, mask=50257, eos=50256, pad=50256)
SAMPLER = SamplerDefaults(gen_length=128, block_length=128, temperature=1.0, transfer="ddpm-cache")
KEYS = {"width": "hidden_dim", "layers": "n_blocks", "heads": "n_heads", "length": "model_length"}
CONDITIONING = 129
"""Default of the published configuration class; released files state 128."""


def read_config(source: Source) -> ModelConfig:
    """config.json -> ModelConfig."""
    raw = source.config
    if read(raw, "time_conditioning", bool, False):
        raise CheckpointError(
            "config.json: 'time_conditioning' is true: the noise level would change every layer in every step; only models "
            "that do not see it are supported (none that was released does)"
        )
    shape = read_shape(raw, KEYS, read_size(raw, "vocab_size"))
    tokens, assumed = read_tokens(source, shape.vocab, RELEASED)
    return ModelConfig(
        family="mdlm",
        shape=shape,
        tokens=tokens,
        sampler=SAMPLER,
        names=tensor_names("backbone."),
        conditioning=read_size(raw, "cond_dim", CONDITIONING),
        tokenizer=TOKENIZER,
        assumed=assumed,
    )


MDLM = Family(
    name="mdlm",
    title="MDLM-owt",
    marks=Marks(architectures=("MDLM",), model_types=("mdlm",)),
    read_config=read_config,
    sizes=("0.17 B",),
    layout=LAYOUT,
    sampler=SAMPLER,
)
