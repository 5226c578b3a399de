"""The configuration file of a checkpoint in the layout of Hugging Face's Llama and Qwen, for seeded checkpoints."""

from __future__ import annotations

from dllm_export.graphs import ModelShape
from dllm_export.graphs.families import FAMILIES, KNOWN_FAMILIES
from dllm_export.tools.expert_config import expert_config


def huggingface_config(family: str, shape: ModelShape, *, mask: int, end: int) -> dict[str, object]:
    """config.json with the keys that such files have, and the sizes and flags of this shape."""
    marks = (FAMILIES[family] if family in FAMILIES else KNOWN_FAMILIES[family]).marks
    return {
        "architectures": [marks.architectures[0]],
        "attention_bias": shape.qkv_bias,
        "attention_dropout": 0.0,
        "bos_token_id": end,
        "eos_token_id": end,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.mlp,
        "mask_token_id": mask,
        "max_position_embeddings": shape.max_length,
        "model_type": marks.model_types[0],
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": end,
        "rms_norm_eps": shape.norm_eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tied_head,
        "torch_dtype": "bfloat16",
        "use_cache": False,
        "use_sliding_window": False,
        "vocab_size": shape.vocab,
        # Families with experts leave it to the code that runs them.
        **(
            {"bd_size" if family == "fast-dllm-v2" else "block_size": shape.block}
            if shape.block and shape.experts is None
            else {}
        ),
        **expert_config(family, shape),
    }
