"""Open-dCoder and DiffuLLaMA (arXiv 2410.17891): stock Qwen2 and Llama made to see all rows; a row predicts the next token.

Their files are those of the autoregressive models that they were made from, so that the user names the family. DiffuLLaMA
is stored so too, or as its authors' training code wraps it.
"""

from __future__ import annotations

from dataclasses import replace

from dllm_export.graphs.families.family import (
    Family,
    Marks,
    ModelConfig,
    SamplerDefaults,
    Source,
    TensorNames,
    confirm_never,
)
from dllm_export.graphs.families.huggingface import NAMES, HuggingFaceLayout
from dllm_export.graphs.families.special_tokens import ReleasedTokens

OPEN_DCODER_LAYOUT = HuggingFaceLayout(
    family="open-dcoder",
    sampler=SamplerDefaults(gen_length=128, block_length=128, remasking="entropy", transfer="dream"),
    released=ReleasedTokens(title="Open-dCoder", vocab=151936, eos=151643, pad=151643, texts=("<M>", "[MASK]")),
    tied_head=True,
    shift=True,
)


OPEN_DCODER = Family(
    name="open-dcoder",
    title="Open-dCoder-0.5B (with --family open-dcoder)",
    marks=Marks(architectures=("Qwen2ForCausalLM",), model_types=("qwen2",), confirm=confirm_never),
    read_config=OPEN_DCODER_LAYOUT.read_config,
    sizes=("0.49 B",),
    layout=OPEN_DCODER_LAYOUT.title,
    sampler=OPEN_DCODER_LAYOUT.sampler,
    limits="rule p2 of its demo, which masks decided tokens again, is not here",
)

PREFIX = "denoise_model."


def wraps_denoiser(source: Source) -> bool:
    """Whether the trunk's tensors have the prefix of the authors' training code."""
    return any(name.startswith(PREFIX) for name in source.tensors)


def wrap_names(names: TensorNames) -> TensorNames:
    """The same tensors in that wrapping: the trunk under a prefix, the embedding outside of it."""
    return replace(
        names,
        embedding=names.embedding.removeprefix("model."),
        norm=names.norm.replace("model.", PREFIX, 1),
        layer={slot: name.replace("model.", PREFIX, 1) for slot, name in names.layer.items()},
    )


DIFFULLAMA_LAYOUT = HuggingFaceLayout(
    family="diffullama",
    sampler=SamplerDefaults(gen_length=128, block_length=128, temperature=0.9, top_p=0.9, transfer="origin"),
    released=ReleasedTokens(title="DiffuLLaMA", vocab=0),
    rope_theta=1e4,
    shift=True,
)


def read_diffullama(source: Source) -> ModelConfig:
    """Either way of storing it."""
    layout = replace(DIFFULLAMA_LAYOUT, names=wrap_names(NAMES)) if wraps_denoiser(source) else DIFFULLAMA_LAYOUT
    return layout.read_config(source)


DIFFULLAMA = Family(
    name="diffullama",
    title="DiffuLLaMA-7B (with --family diffullama)",
    marks=Marks(architectures=("LlamaForCausalLM",), model_types=("llama",), confirm=wraps_denoiser),
    read_config=read_diffullama,
    sizes=("6.74 B",),
    layout=DIFFULLAMA_LAYOUT.title,
    sampler=DIFFULLAMA_LAYOUT.sampler,
)
