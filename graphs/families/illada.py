"""iLLaDA-8B Base and Instruct (arXiv 2606.25331): LLaDA's diffusion in the layout of Llama, with grouped heads, tied."""

from __future__ import annotations

from dllm_export.graphs.families.family import Family, Marks, SamplerDefaults
from dllm_export.graphs.families.huggingface import HuggingFaceLayout
from dllm_export.graphs.families.special_tokens import ReleasedTokens

LAYOUT = HuggingFaceLayout(
    family="illada",
    sampler=SamplerDefaults(gen_length=128, block_length=32),
    released=ReleasedTokens(title="iLLaDA", vocab=155136, mask=5, eos=2, pad=1, texts=("<[MASK]>",)),
    tied_head=True,
)
ILLADA = Family(
    name="illada",
    title="iLLaDA-8B Base/Instruct",
    marks=Marks(architectures=("ILLaDAForCausalLM",), model_types=("illada",)),
    read_config=LAYOUT.read_config,
    sizes=("7.62 B",),
    layout=LAYOUT.title,
    sampler=LAYOUT.sampler,
)
