"""Plaid (arXiv 2305.18619): diffusion of vectors that stand for tokens; unconditional sampling.

The release is four PyTorch files without a configuration, so that sizes are read off the tensors (exporter/plaid_files.py
makes a configuration of them), and what no tensor shows is the released model's: sequences of 1024 tokens, heads of 64
dimensions where the rotary buffer is not stored. No file names an end of text or a pad, and the vocabulary has no mask: all
three ids are the one behind the vocabulary, which only marks places to fill.
"""

from __future__ import annotations

from dllm_export.errors import CheckpointError
from dllm_export.graphs.families.family import (
    LAYER_LIMIT,
    Family,
    Marks,
    ModelConfig,
    SamplerDefaults,
    Source,
    SpecialTokens,
    TensorNames,
    read_size,
)
from dllm_export.graphs.shape import ModelShape

FILES = ("model.pt", "embedding_matrix.pt", "noise_schedule.pt", "gamma_bounds.pt")
SAMPLER = SamplerDefaults(gen_length=256, block_length=256, transfer="ancestral")
LENGTH = 1024
HEAD_DIM = 64
SCHEDULE_WIDTH = 1024
"""Units of the network that is the noise schedule."""
BASE_WIDTH = 256
"""Width at which the head's output counts as it is (maximal update parametrisation)."""

NAMES = TensorNames(
    embedding="embedding_matrix.matrix",
    norm="model.output_norm.weight",
    head="model.output_linear.weight",
    layer={
        "norm1": "model.blocks.{layer}.rmsnorm1.weight",
        "qkv": "model.blocks.{layer}.attn_qkv.weight",
        "out": "model.blocks.{layer}.attn_out.weight",
        "norm2": "model.blocks.{layer}.rmsnorm2.weight",
        "up": "model.blocks.{layer}.mlp.fc1.weight",
        "down": "model.blocks.{layer}.mlp.fc2.weight",
    },
    others={
        "head_bias": "model.output_linear.bias",
        "latent_in": "model.input_linear.weight",
        "estimate_in": "model.selfcond_linear.weight",
        "level_in": "model.gamma_linear.weight",
        "schedule_in": "noise_schedule.W1",
        "schedule_bias": "noise_schedule.b1",
        "schedule_out": "noise_schedule.W2",
        "gamma_first": "gamma_bounds.gamma_0",
        "gamma_last": "gamma_bounds.gamma_1",
    },
)
"""A tensor is called by its file and its name in it."""


def read_config(source: Source) -> ModelConfig:
    """Sizes that were read off the tensors -> ModelConfig."""
    raw = source.config
    if source.mask_id is not None:
        raise CheckpointError(
            f"--mask-id {source.mask_id} is for models with a mask, and Plaid denoises vectors: leave it out"
        )
    width, layers = read_size(raw, "dim"), read_size(raw, "n_blocks", most=LAYER_LIMIT)
    head_dim = read_size(raw, "head_dim", HEAD_DIM)
    if width % head_dim or head_dim % 2:
        raise CheckpointError(
            f"model.pt: a width of {width} cannot be cut into heads of {head_dim} dimensions, which must be even and divide it"
        )
    vocab = read_size(raw, "vocab_size")
    assumed = [f"max_length {LENGTH}: no file states it, taken from the released Plaid-1B"]
    if "head_dim" not in raw:
        assumed.append(f"head_dim {HEAD_DIM}: model.pt has no rotary buffer, taken from the released Plaid-1B")
    return ModelConfig(
        family="plaid",
        shape=ModelShape(
            layers=layers,
            hidden=width,
            heads=width // head_dim,
            kv_heads=width // head_dim,
            head_dim=head_dim,
            mlp=4 * width,
            vocab=vocab,
            max_length=LENGTH,
            norm_eps=1e-5,
            rope_theta=1e4,
            rope_float32=False,
            mlp_kind="gelu",
            head_bias=True,
            latent=read_size(raw, "embed_dim"),
        ),
        tokens=SpecialTokens(mask=vocab, eos=vocab, pad=vocab),
        sampler=SAMPLER,
        names=NAMES,
        branch_scale=layers**-0.5,
        head_scale=BASE_WIDTH / width,
        tokenizer="misc/owt2_tokenizer.json of igul222/plaid under the name tokenizer.json",
        assumed=tuple(assumed),
    )


PLAID = Family(
    name="plaid",
    title="Plaid-1B",
    marks=Marks(files=FILES),
    read_config=read_config,
    sizes=("1.28 B",),
    layout="four PyTorch files",
    sampler=SAMPLER,
    continuous=True,
    limits="samples without a prompt and cannot fill in; no cache applies, as every row changes in every step",
)
