"""The configuration file of a LLaDA checkpoint, for the checkpoints that this project writes itself."""

from __future__ import annotations

from dllm_export.graphs import ModelShape


def llada_config(shape: ModelShape, *, mask: int, end: int) -> dict[str, object]:
    """config.json: every key that GSAI-ML/LLaDA-8B-Base has, with the sizes and flags of this shape."""
    return {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": shape.hidden,
        "embedding_dropout": 0.0,
        "embedding_size": shape.vocab,
        "eos_token_id": end,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": shape.qkv_bias,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": mask,
        "max_sequence_length": shape.max_length,
        "mlp_hidden_size": shape.mlp,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": shape.heads,
        "n_kv_heads": shape.kv_heads,
        "n_layers": shape.layers,
        "pad_token_id": end,
        "residual_dropout": 0.0,
        "rms_norm_eps": shape.norm_eps,
        "rope": True,
        "rope_full_precision": shape.rope_float32,
        "rope_theta": shape.rope_theta,
        "scale_logits": False,
        "torch_dtype": "float16",
        "use_cache": False,
        "vocab_size": shape.vocab,
        "weight_tying": shape.tied_head,
    }
