"""A2D (Tiny-A2D): stock Qwen and Llama layers, trained to denoise, without a shift.

Rows see all others in the mdlm checkpoints, and by blocks in the bd3lm ones, whose files look the same: the user names those.
"""

from __future__ import annotations

from dllm_export.graphs.families.family import Family, Marks, SamplerDefaults, confirm_always, confirm_never
from dllm_export.graphs.families.huggingface import HuggingFaceLayout
from dllm_export.graphs.families.special_tokens import ReleasedTokens


def make_family(
    base: str,
    title: str,
    released: ReleasedTokens,
    *,
    tied_head: bool,
    sizes: tuple[str, ...] = (),
    by_blocks: bool = False,
) -> Family:
    """The family of checkpoints that were converted from this base; those that attend by blocks are one of their own."""
    kind = f"a2d-{base.lower()}"
    name = f"{kind}-bd3lm" if by_blocks else kind
    layout = HuggingFaceLayout(
        family=name,
        sampler=SamplerDefaults(gen_length=128, block_length=32),
        released=released,
        end_of_turn="<|im_end|>" if base.startswith("Qwen") else "<|eot_id|>",
        tied_head=tied_head,
        block=BLOCK if by_blocks else 0,
        block_anchor="response" if by_blocks else "prompt",
    )
    confirm = confirm_never if by_blocks else confirm_always
    marks = Marks(architectures=(f"A2D{base}LMHeadModel",), model_types=(kind,), confirm=confirm)
    if by_blocks:
        return layout.make_family(f"{title} (with --family {name})", marks, sizes=sizes)
    other = f": name those with `--family {name}-bd3lm`" if base.startswith("Qwen") else ""
    return layout.make_family(
        title, marks, sizes=sizes, limits=f"not those trained by blocks (bd3lm), which look the same{other}"
    )


BLOCK = 32
"""Rows of a block in the released bd3lm checkpoints."""
QWEN3 = ReleasedTokens(
    title="A2D Qwen3", vocab=151936, mask=151669, eos=151645, pad=151643, texts=("<|mask|>", "<|MASK|>")
)
QWEN2 = ReleasedTokens(title="A2D Qwen2", vocab=151936, eos=151645, pad=151643, texts=("<|mask|>",))
A2D = (
    make_family("Qwen3", "A2D Qwen3-0.6B", QWEN3, tied_head=True, sizes=("0.60 B",)),
    make_family("Qwen2", "A2D Qwen2.5-Coder-0.5B", QWEN2, tied_head=True, sizes=("0.49 B",)),
    make_family("Qwen3", "A2D Qwen3-0.6B bd3lm", QWEN3, tied_head=True, sizes=("0.60 B",), by_blocks=True),
    make_family("Qwen2", "A2D Qwen2.5-Coder-0.5B bd3lm", QWEN2, tied_head=True, sizes=("0.49 B",), by_blocks=True),
    make_family(
        "Llama", "A2D of Llama models", ReleasedTokens(title="A2D Llama", vocab=0, texts=("<|mask|>",)), tied_head=False
    ),
)
