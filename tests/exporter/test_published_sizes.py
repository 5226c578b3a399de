"""The released configurations of the Hugging Face layout add up to the published numbers of parameters."""

from __future__ import annotations

from math import prod

import pytest

from dllm_export.exporter.checkpoint import expected_tensors
from dllm_export.graphs.families import FAMILIES, LAYER_SLOTS, Source
from dllm_export.graphs.families.huggingface import NAMES

KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)
BIASES, NORMS = ("q_bias", "k_bias", "v_bias"), ("q_norm", "k_norm")

RELEASED = [
    # family, KEYS, head width, whether the head is tied, optional tensors, parameters
    ("illada", (32, 4096, 32, 8, 14336, 155136), 128, True, (), 7_615_025_152),
    ("dream", (28, 3584, 28, 4, 18944, 152064), 128, False, BIASES, 7_615_616_512),
    ("a2d-qwen3", (28, 1024, 16, 8, 3072, 151936), 128, True, NORMS, 596_049_920),
    ("a2d-qwen2", (24, 896, 14, 2, 4864, 151936), 64, True, BIASES, 494_032_768),
    ("open-dcoder", (24, 896, 14, 2, 4864, 151936), 64, True, BIASES, 494_032_768),
    ("diffullama", (32, 4096, 32, 32, 11008, 32000), 128, False, (), 6_738_415_616),
]


@pytest.mark.parametrize(
    ("family", "sizes", "width", "tied", "optional", "parameters"), RELEASED, ids=lambda x: str(x)[:12]
)
def test_a_released_model_has_the_published_number_of_parameters(
    family: str, sizes: tuple[int, ...], width: int, tied: bool, optional: tuple[str, ...], parameters: int
) -> None:
    config = dict(zip(KEYS, sizes, strict=True)) | {
        "head_dim": width, "tie_word_embeddings": tied, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "max_position_embeddings": 32768, "mask_token_id": 5, "eos_token_id": 2, "pad_token_id": 1,
    }  # fmt: skip
    names = {NAMES.in_layer(slot, 0) for slot in (*LAYER_SLOTS, *optional)} | {NAMES.embedding, NAMES.norm, NAMES.head}
    model = FAMILIES[family].read_config(Source(config=config, tensors=frozenset(names)))
    assert sum(map(prod, expected_tensors(model).values())) == parameters
    assert FAMILIES[family].sizes == (f"{parameters / 1e9:.2f} B",)
