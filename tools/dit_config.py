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


def special_ids(shape: ModelShape, mask: int, end: int) -> dict[str, object]:
    """Ids that no released file states, because all have the same."""
    if shape.vocab == 50258:
        return {}
    return {"mask_token_id": mask, "eos_token_id": end, "pad_token_id": end}
