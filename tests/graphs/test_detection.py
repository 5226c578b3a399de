"""Which family a checkpoint is taken for, which is refused, and with what reason."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import pytest

from dllm_export.errors import CheckpointError
from dllm_export.graphs.families import FAMILIES, KNOWN_FAMILIES, Family, KnownFamily, Marks, Source, detect_family
from dllm_export.graphs.families.detection import match_family

NORMS = frozenset({"model.layers.0.self_attn.q_norm.weight"})
BIASES = frozenset({"model.layers.0.self_attn.q_proj.bias"})
WRAPPED = frozenset({"denoise_model.layers.0.self_attn.q_proj.weight"})
NESTED = {"graph": {"type": "absorb"}, "noise": {"type": "loglinear"}, "model": {"hidden_size": 768}}

SHOWN: list[tuple[str, Mapping[str, object], frozenset[str]]] = [
    ("llada", {"architectures": ["LLaDAModelLM"], "model_type": "llada"}, frozenset()),
    ("llada", {"model_type": "llada", "d_model": 64}, frozenset()),
    ("llada-moe", {"architectures": ["LLaDAMoEModelLM"], "model_type": "llada"}, frozenset()),
    ("llada-moe", {"architectures": ["LLaDAMoEModel"], "model_type": "llada"}, frozenset()),
    ("llada-moe", {"model_type": "llada", "num_experts": 64, "d_model": 64}, frozenset()),
    ("illada", {"architectures": ["ILLaDAForCausalLM"], "model_type": "illada"}, frozenset()),
    ("illada", {"model_type": "illada"}, frozenset()),
    ("dream", {"architectures": ["DreamModel"], "model_type": "Dream"}, BIASES),
    ("dream", {"architectures": ["DreamForCausalLM"], "model_type": "dream"}, BIASES),
    ("dream-reasoner", {"architectures": ["DreamForCausalLM"], "model_type": "Dream"}, NORMS),
    ("stable-diffcoder", {"architectures": ["StableDiffcoderForCausalLM"], "model_type": "llama"}, frozenset()),
    (
        "stable-diffcoder",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "auto_map": {"AutoModelForCausalLM": "modeling_stable_diffcoder.StableDiffcoderForCausalLM"},
        },
        frozenset(),
    ),
    ("autoregressive", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, frozenset()),
    ("autoregressive", {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, BIASES),
    ("autoregressive", {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, NORMS),
    ("autoregressive", {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, frozenset()),
    ("autoregressive", {"model_type": "qwen2"}, frozenset()),
    ("diffullama", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, WRAPPED),
    ("diffugpt", {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, WRAPPED),
    ("sdar", {"architectures": ["SDARForCausalLM"], "model_type": "sdar"}, NORMS),
    ("fast-dllm-v2", {"architectures": ["Fast_dLLM_QwenForCausalLM"], "model_type": "Fast_dLLM_Qwen"}, BIASES),
    ("fast-dllm-v2", {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "bd_size": 32}, BIASES),
    ("nemotron-labs-diffusion", {"architectures": ["NemotronLabsDiffusionModel"]}, frozenset()),
    ("wedlm", {"model_type": "wedlm"}, frozenset()),
    ("a2d-qwen3", {"architectures": ["A2DQwen3LMHeadModel"], "model_type": "a2d-qwen3"}, NORMS),
    ("a2d-qwen2", {"architectures": ["Unheard"], "model_type": "a2d-qwen2"}, BIASES),
    ("a2d-llama", {"model_type": "a2d-llama"}, frozenset()),
    ("mdlm", {"architectures": ["MDLM"], "model_type": "mdlm"}, frozenset()),
    ("bd3lm", {"architectures": ["BD3LM"], "model_type": "bd3lm"}, frozenset()),
    ("sedd", NESTED, frozenset()),
    ("diffusion-gemma", {"architectures": ["DiffusionGemmaForBlockDiffusion"]}, frozenset()),
    ("llada2", {"architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe"}, frozenset()),
    ("llada2", {"model_type": "llada21_moe"}, frozenset()),
    ("sdar-moe", {"architectures": ["SDARMoeForCausalLM"], "model_type": "sdar_moe"}, NORMS),
    ("rnd1", {"architectures": ["RND1LM"], "model_type": "rnd1"}, frozenset()),
    ("bert-chat", {"architectures": ["ModernBertForMaskedLM"], "model_type": "modernbert"}, frozenset()),
]
EVERY: tuple[Family | KnownFamily, ...] = (*FAMILIES.values(), *KNOWN_FAMILIES.values())


@pytest.mark.parametrize(("name", "config", "tensors"), SHOWN, ids=lambda value: str(value)[:40])
def test_a_checkpoint_is_taken_for_its_family_and_no_other(
    name: str, config: Mapping[str, object], tensors: frozenset[str]
) -> None:
    assert match_family(EVERY, Source(config=config, tensors=tensors)).name == name


def test_every_family_that_files_can_show_is_tried() -> None:
    silent = {family.name for family in EVERY if not (family.marks.architectures or family.marks.model_types)}
    assert {name for name, _, _ in SHOWN} | silent | {"open-dcoder", "a2d-qwen3-bd3lm", "a2d-qwen2-bd3lm"} == {
        family.name for family in EVERY
    }
    assert silent == {"plaid", "mercury"}, "these are shown by other files, or by none"


def test_no_family_is_both_supported_and_refused() -> None:
    assert not FAMILIES.keys() & KNOWN_FAMILIES.keys()
    assert all(name == family.name for families in (FAMILIES, KNOWN_FAMILIES) for name, family in families.items())


def test_a_name_in_full_belongs_to_one_family_unless_a_check_tells_them_apart() -> None:
    for one in EVERY:
        for other in EVERY:
            if one is not other and one.marks.architectures and one.marks.confirm is other.marks.confirm:
                first = one.marks.architectures[0]
                assert not any(fnmatchcase(first, pattern) for pattern in other.marks.architectures), (one, other)


@pytest.mark.parametrize("name", KNOWN_FAMILIES)
def test_a_family_that_is_named_and_not_supported_is_refused_with_its_reason(name: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        detect_family(Source(config={}), name)
    known = KNOWN_FAMILIES[name]
    assert str(refused.value) == f"family {known.title} is recognised but not supported: {known.reason}"
    assert not known.reason.endswith(".")


def test_a_checkpoint_of_a_family_that_is_not_supported_is_refused_with_its_reason() -> None:
    with pytest.raises(
        CheckpointError, match=r"Nemotron-Labs-Diffusion .* is recognised but not supported: it rotates"
    ):
        detect_family(Source(config={"model_type": "nemotron_labs_diffusion"}))


def test_an_ordinary_model_is_never_taken_silently_but_by_name() -> None:
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    with pytest.raises(CheckpointError, match=r"autoregressive .*decodes from left to right; .* --family"):
        detect_family(Source(config=config))
    assert detect_family(Source(config=config), "a2d-qwen3").name == "a2d-qwen3"
    assert detect_family(Source(config={"architectures": ["Qwen2ForCausalLM"]}), "open-dcoder").name == "open-dcoder"


def test_marks_of_two_families_are_refused_with_their_names() -> None:
    twins = tuple(
        KnownFamily(name=name, title=name, marks=Marks(model_types=("twin",)), reason="") for name in ("one", "two")
    )
    with pytest.raises(CheckpointError, match="fits several families: one, two; choose one with --family"):
        match_family(twins, Source(config={"model_type": "twin"}))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_family_says_what_the_list_of_families_shows(family: Family) -> None:
    assert family.sampler is not None
    assert family.layout
    assert family.title
