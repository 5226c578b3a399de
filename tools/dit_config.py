"""config.json of MDLM, BD3-LM and SEDD checkpoints, key for key as published."""

from __future__ import annotations

from dllm_export.graphs import ModelShape


def mdlm_config(shape: ModelShape, *, conditioning: int, mask: int, end: int) -> dict[str, object]:
    """MDLM's; special ids are stated where the vocabulary is not the released one."""
    return {
        "architectures": ["MDLM"],
        "auto_map": {"AutoConfig": "configuration_mdlm.MDLMConfig", "AutoModelForMaskedLM": "modeling_mdlm.MDLM"},
        "cond_dim": conditioning,
        "dropout": 0.1,
        "hidden_dim": shape.hidden,
        "model_length": shape.max_length,
        "model_type": "mdlm",
        "n_blocks": shape.layers,
        "n_heads": shape.heads,
        "return_dict": False,
        "time_conditioning": False,
        "torch_dtype": "float32",
        "vocab_size": shape.vocab,
        **special_ids(shape, mask, end),
    }


def bd3lm_config(shape: ModelShape, *, conditioning: int, mask: int, end: int) -> dict[str, object]:
    """BD3-LM's."""
    own = {
        "adaln": True,
        "architectures": ["BD3LM"],
        "attn_backend": "flex",
        "auto_map": {"AutoConfig": "configuration_bd3lm.BD3LMConfig", "AutoModelForMaskedLM": "modeling_bd3lm.BD3LM"},
        "block_size": shape.block,
        "causal": False,
        "cross_attn": True,
        "model_type": "bd3lm",
        "sampling_eps_max": 0.999,
        "sampling_eps_min": 0.001,
        "var_min": True,
    }
    return {**mdlm_config(shape, conditioning=conditioning, mask=mask, end=end), **own}


def sedd_config(shape: ModelShape, *, conditioning: int, end: int) -> dict[str, object]:
    """SEDD's: of the absorbing graph the mask is the state behind the tokens, of the uniform one there is none."""
    model = {
        "cond_dim": conditioning,
        "dropout": 0.1,
        "hidden_size": shape.hidden,
        "length": shape.max_length,
        "n_blocks": shape.layers,
        "n_heads": shape.heads,
        "name": "small",
        "scale_by_sigma": not shape.uniform_noise,
        "type": "ddit",
    }
    tokens = shape.vocab - (not shape.uniform_noise)
    ids: dict[str, object] = {} if tokens == 50257 else {"eos_token_id": end, "pad_token_id": end}
    return {
        "graph": {"file": "data", "report_all": False, "type": "uniform" if shape.uniform_noise else "absorb"},
        "model": model,
        "ngpus": 8,
        "noise": {"sigma_max": 20, "sigma_min": 0.0001, "type": "loglinear"},
        "sampling": {"noise_removal": True, "predictor": "euler", "steps": 128},
        "tokens": tokens,
        **ids,
    }


def special_ids(shape: ModelShape, mask: int, end: int) -> dict[str, object]:
    """Ids that no released file states, because all have the same."""
    if shape.vocab == 50258:
        return {}
    return {"mask_token_id": mask, "eos_token_id": end, "pad_token_id": end}
