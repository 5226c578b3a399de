"""The diffusion transformer of MDLM, BD3-LM and SEDD: LayerNorms that the time modulates, a GELU MLP, biases.

Released MDLM and BD3-LM feed it noise level 0 always, so that an export folds the modulation into plain constants.
"""

from __future__ import annotations

from collections.abc import Mapping

from dllm_export.errors import CheckpointError
from dllm_export.graphs.families.family import LAYER_LIMIT, TensorNames, read_size
from dllm_export.graphs.shape import ModelShape

LAYOUT = "diffusion transformer"
TOKENIZER = "GPT-2's (openai-community/gpt2)"
"""None of these checkpoints is published with a tokenizer."""

IN_LAYER = {
    "norm1": "norm1.weight",
    "qkv": "attn_qkv.weight",
    "out": "attn_out.weight",
    "norm2": "norm2.weight",
    "up": "mlp.0.weight",
    "up_bias": "mlp.0.bias",
    "down": "mlp.2.weight",
    "down_bias": "mlp.2.bias",
    "modulation": "adaLN_modulation.weight",
    "modulation_bias": "adaLN_modulation.bias",
}
IN_MODEL = {
    "head_bias": "output_layer.linear.bias",
    "norm_modulation": "output_layer.adaLN_modulation.weight",
    "norm_modulation_bias": "output_layer.adaLN_modulation.bias",
    "time1": "sigma_map.mlp.0.weight",
    "time1_bias": "sigma_map.mlp.0.bias",
    "time2": "sigma_map.mlp.2.weight",
    "time2_bias": "sigma_map.mlp.2.bias",
}


def tensor_names(prefix: str) -> TensorNames:
    """Names of a checkpoint whose every tensor begins with `prefix`."""
    return TensorNames(
        embedding=f"{prefix}vocab_embed.embedding",
        norm=f"{prefix}output_layer.norm_final.weight",
        head=f"{prefix}output_layer.linear.weight",
        layer={slot: f"{prefix}blocks.{{layer}}.{name}" for slot, name in IN_LAYER.items()},
        others={slot: prefix + name for slot, name in IN_MODEL.items()},
    )


def read_shape(raw: Mapping[str, object], keys: Mapping[str, str], vocab: int) -> ModelShape:
    """Sizes from config.json; `keys` says what it calls width, layers, heads and length."""
    width, heads = read_size(raw, keys["width"]), read_size(raw, keys["heads"])
    if width % heads or width // heads % 2:
        raise CheckpointError(
            f"config.json: {keys['width']} {width} and {keys['heads']} {heads} do not fit: the width must be a multiple of "
            f"the heads, and a head of even width"
        )
    return ModelShape(
        layers=read_size(raw, keys["layers"], most=LAYER_LIMIT),
        hidden=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp=4 * width,
        vocab=vocab,
        max_length=read_size(raw, keys["length"]),
        norm_eps=1e-5,
        rope_theta=1e4,
        rope_float32=False,
        norm="layer",
        mlp_kind="gelu",
        mlp_bias=True,
        head_bias=True,
    )
