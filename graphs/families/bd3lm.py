"""BD3-LM (arXiv 2503.09573): MDLM's network over blocks, each of which sees itself and what lies before it."""

from __future__ import annotations

from dataclasses import replace

from dllm_export.errors import CheckpointError
from dllm_export.graphs.families import mdlm
from dllm_export.graphs.families.dit import LAYOUT
from dllm_export.graphs.families.family import Family, Marks, ModelConfig, Source, read_size

SAMPLER = replace(mdlm.SAMPLER, transfer="first-hitting", block_length=16)
REQUIRED = (("adaln", True), ("cross_attn", True), ("causal", False))


def read_config(source: Source) -> ModelConfig:
    """config.json -> ModelConfig."""
    for key, required in REQUIRED:
        if source.config.get(key, required) != required:
            raise CheckpointError(
                f"config.json: '{key}' is {source.config[key]!r}, expected {required!r}: no released BD3-LM differs"
            )
    config = mdlm.read_config(source)
    shape = replace(config.shape, block=read_size(source.config, "block_size"))
    return replace(config, family="bd3lm", shape=shape, sampler=replace(SAMPLER, block_length=shape.block))


BD3LM = Family(
    name="bd3lm",
    title="BD3-LM-owt, blocks of 4, 8 or 16",
    marks=Marks(architectures=("BD3LM",), model_types=("bd3lm",)),
    read_config=read_config,
    sizes=("0.17 B",),
    layout=LAYOUT,
    sampler=SAMPLER,
    by_blocks=True,
    limits="no more than its window of 1024 tokens: the cache does not shift",
)
