"""LLaDA-8B Base and Instruct, LLaDA-1.5 (arXiv 2502.09992): Llama-like, full attention, no shift, float32 RoPE."""

from __future__ import annotations

from dllm_export.errors import CheckpointError
from dllm_export.graphs.families.family import (
    LAYER_LIMIT,
    Family,
    Marks,
    ModelConfig,
    SamplerDefaults,
    Source,
    TensorNames,
    read,
    read_size,
)
from dllm_export.graphs.families.special_tokens import ReleasedTokens, read_tokens
from dllm_export.graphs.shape import ModelShape

SAMPLER = SamplerDefaults(gen_length=128, block_length=128)
RELEASED = ReleasedTokens(title="LLaDA", vocab=126464, mask=126336, eos=126081, pad=126081)

UNSUPPORTED = (
    ("alibi", True, "alibi positions"),
    ("include_bias", True, "biases on every linear layer"),
    ("attention_layer_norm", True, "query/key norms over the full width"),
)
REQUIRED = (
    # key, required value, class default when the key is missing
    ("rope", True, False),
    ("block_type", "llama", "sequential"),
    ("layer_norm_type", "rms", "default"),
    ("activation_type", "silu", "swiglu"),
)


def confirm(source: Source) -> bool:
    """`model_type` llada alone is shared with LLaDA-MoE, which has num_experts."""
    return bool(source.architecture) or ("d_model" in source.config and "num_experts" not in source.config)


def read_config(source: Source) -> ModelConfig:
    """config.json -> ModelConfig, with the class defaults of the published configuration for missing keys."""
    raw = source.config
    for key, value, what in UNSUPPORTED:
        if raw.get(key) == value:
            raise CheckpointError(
                f"config.json: '{key}' is {value}: {what} are not supported (no released LLaDA has them)"
            )
    for key, required, default in REQUIRED:
        if raw.get(key, default) != required:
            got = raw.get(key, f"missing, which means {default!r}")
            raise CheckpointError(f"config.json: '{key}' is {got!r}, expected {required!r}: no released LLaDA differs")
    width, heads = read_size(raw, "d_model", 768), read(raw, "n_heads", int, 12)
    kv_heads = read(raw, "n_kv_heads", int, heads)
    if raw.get("multi_query_attention") and raw.get("n_kv_heads") != 1:
        raise CheckpointError(
            "config.json: multi_query_attention means one key head, but n_kv_heads is not 1; set it to 1"
        )
    if heads < 1 or width % heads or kv_heads < 1 or heads % kv_heads or width // heads % 2:
        raise CheckpointError(
            f"config.json: d_model {width}, n_heads {heads}, n_kv_heads {kv_heads} do not fit: d_model must be a multiple "
            f"of n_heads and n_heads of n_kv_heads, and a head of even width"
        )
    vocab = read(raw, "embedding_size", int, read(raw, "vocab_size", int, 50257))
    shape = ModelShape(
        layers=read_size(raw, "n_layers", 12, LAYER_LIMIT),
        hidden=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads,
        mlp=read_size(raw, "mlp_hidden_size", width * read(raw, "mlp_ratio", int, 4)),
        vocab=vocab,
        max_length=read_size(raw, "max_sequence_length", 1024),
        norm_eps=read(raw, "rms_norm_eps", float, 1e-5),
        rope_theta=read(raw, "rope_theta", float, 1e4),
        rope_float32=read(raw, "rope_full_precision", bool, True),
        qkv_bias=read(raw, "include_qkv_bias", bool, False),
        tied_head=read(raw, "weight_tying", bool, True),
        embedding_scale=width**0.5 if raw.get("input_emb_norm") else 1.0,
        logits_scale=width**-0.5 if raw.get("scale_logits") else 1.0,
    )
    tokens, assumed = read_tokens(source, vocab, RELEASED)
    return ModelConfig(
        family="llada",
        shape=shape,
        tokens=tokens,
        sampler=SAMPLER,
        names=tensor_names(read_size(raw, "block_group_size", 1)),
        end_of_turn="<|eot_id|>",
        assumed=assumed,
    )


def tensor_names(group_size: int) -> TensorNames:
    """`ff_out` names both the MLP's down projection (in a block) and the head (outside)."""
    prefix = (
        "model.transformer.blocks.{layer}." if group_size == 1 else "model.transformer.block_groups.{group}.{member}."
    )
    slots = {
        "norm1": "attn_norm.weight",
        "q": "q_proj.weight",
        "k": "k_proj.weight",
        "v": "v_proj.weight",
        "q_bias": "q_proj.bias",
        "k_bias": "k_proj.bias",
        "v_bias": "v_proj.bias",
        "out": "attn_out.weight",
        "norm2": "ff_norm.weight",
        "gate": "ff_proj.weight",
        "up": "up_proj.weight",
        "down": "ff_out.weight",
    }
    return TensorNames(
        embedding="model.transformer.wte.weight",
        norm="model.transformer.ln_f.weight",
        head="model.transformer.ff_out.weight",
        layer={slot: prefix + name for slot, name in slots.items()},
        group_size=group_size,
    )


LLADA = Family(
    name="llada",
    title="LLaDA-8B Base/Instruct, LLaDA-1.5",
    marks=Marks(architectures=("LLaDAModelLM",), model_types=("llada",), confirm=confirm),
    read_config=read_config,
    sizes=("8.02 B",),
    layout="LLaDA",
    sampler=SAMPLER,
)
