"""A2D (Tiny-A2D): stock Qwen and Llama layers, trained to denoise; full attention and no shift in the mdlm checkpoints."""

from __future__ import annotations

from dllm_export.graphs.families.family import Family, Marks, SamplerDefaults
from dllm_export.graphs.families.huggingface import HuggingFaceLayout
from dllm_export.graphs.families.special_tokens import ReleasedTokens


def make_family(
    base: str, title: str, released: ReleasedTokens, *, tied_head: bool, sizes: tuple[str, ...] = ()
) -> Family:
    """The family of checkpoints that were converted from this base."""
    name = f"a2d-{base.lower()}"
    layout = HuggingFaceLayout(
        family=name,
        sampler=SamplerDefaults(gen_length=128, block_length=32),
        released=released,
        end_of_turn="<|im_end|>" if base.startswith("Qwen") else "<|eot_id|>",
        tied_head=tied_head,
    )
    marks = Marks(architectures=(f"A2D{base}LMHeadModel",), model_types=(name,))
    return layout.make_family(
        title, marks, sizes=sizes, limits="not those trained by blocks (bd3lm), which look the same"
    )


A2D = (
    make_family(
        "Qwen3",
        "A2D Qwen3-0.6B",
        ReleasedTokens(
            title="A2D Qwen3", vocab=151936, mask=151669, eos=151645, pad=151643, texts=("<|mask|>", "<|MASK|>")
        ),
        tied_head=True,
        sizes=("0.60 B",),
    ),
    make_family(
        "Qwen2",
        "A2D Qwen2.5-Coder-0.5B",
        ReleasedTokens(title="A2D Qwen2", vocab=151936, eos=151645, pad=151643, texts=("<|mask|>",)),
        tied_head=True,
        sizes=("0.49 B",),
    ),
    make_family(
        "Llama", "A2D of Llama models", ReleasedTokens(title="A2D Llama", vocab=0, texts=("<|mask|>",)), tied_head=False
    ),
)
