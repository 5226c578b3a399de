"""Families that are recognised and not supported: what a checkpoint shows, and what an export of it would need."""

from __future__ import annotations

from dllm_export.graphs.families.block_diffusion import has_block_length, names_diffcoder
from dllm_export.graphs.families.converted import wraps_denoiser
from dllm_export.graphs.families.family import KnownFamily, Marks, Source

STOCK = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel", "MistralForCausalLM")
STOCK_TYPES = ("llama", "qwen2", "qwen3", "gpt2", "mistral")


def shows_no_diffusion(source: Source) -> bool:
    """An ordinary model, as far as its files say."""
    return not (names_diffcoder(source) or has_block_length(source) or wraps_denoiser(source))


KNOWN = (
    KnownFamily(
        name="autoregressive",
        title="autoregressive Llama, Qwen, GPT-2",
        marks=Marks(architectures=STOCK, model_types=STOCK_TYPES, confirm=shows_no_diffusion),
        reason="it decodes from left to right; a diffusion model that was saved under such a class needs its --family named",
    ),
    KnownFamily(
        name="rnd1",
        title="RND1-Base-30B-A3B",
        marks=Marks(architectures=("RND1*",), model_types=("rnd1",)),
        reason="its layers are those of sdar-moe without blocks, but no configuration of it has been read yet",
    ),
    KnownFamily(
        name="diffugpt",
        title="DiffuGPT small and medium",
        marks=Marks(architectures=("GPT2LMHeadModel",), model_types=("gpt2",), confirm=wraps_denoiser),
        reason="its layers are GPT-2's, whose positions are learned instead of rotated",
    ),
    KnownFamily(
        name="wedlm",
        title="WeDLM 7B and 8B",
        marks=Marks(architectures=("WeDLMForCausalLM",), model_types=("wedlm",)),
        reason="it attends causally over tokens in another order than their positions, decided ones first: its layers could be "
        "exported, but keys of decided tokens are exact, so that the caches here have nothing to add and its loop is missing",
    ),
    KnownFamily(
        name="nemotron-labs-diffusion",
        title="Nemotron-Labs-Diffusion 3B, 8B, 14B",
        marks=Marks(
            architectures=("NemotronLabsDiffusionModel", "NemotronLabsDiffusion*"),
            model_types=("nemotron_labs_diffusion",),
        ),
        reason="it rotates by a scaled rule (YaRN), scales queries by position and reads blocks against a causal prefix; "
        "NVIDIA's TensorRT-Model-Connect runs this family in TensorRT",
    ),
    KnownFamily(
        name="diffusion-gemma",
        title="DiffusionGemma-26B-A4B",
        marks=Marks(
            architectures=("DiffusionGemmaForBlockDiffusion", "DiffusionGemma*"), model_types=("diffusion_gemma",)
        ),
        reason="it has no mask token: all tokens of a canvas change in every step, fed by the last step's distribution; its "
        "layers (window attention, experts beside a dense MLP, values without a projection) are other ones throughout",
    ),
    KnownFamily(
        name="bert-chat",
        title="BERT-Chat base and large",
        marks=Marks(architectures=("ModernBertForMaskedLM",), model_types=("modernbert",)),
        reason="its layers are ModernBERT's, some of which attend to a window only",
    ),
    KnownFamily(
        name="mercury",
        title="Mercury, Mercury 2, Mercury Edit 2",
        marks=Marks(),
        reason="it is closed: an API gives neither weights nor logits nor steps, so that it can only be compared with",
    ),
)
