"""Dream-v0, Dream-Coder, DiffuCoder (arXiv 2508.15487): Qwen2 without a causal mask; a row predicts the next token."""

from __future__ import annotations

from dllm_export.graphs.families.family import Family, Marks, SamplerDefaults, Source
from dllm_export.graphs.families.huggingface import HuggingFaceLayout
from dllm_export.graphs.families.special_tokens import ReleasedTokens

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML with the default system turn."""

LAYOUT = HuggingFaceLayout(
    family="dream",
    sampler=SamplerDefaults(
        gen_length=256, block_length=256, temperature=0.2, top_p=0.95, remasking="entropy", transfer="dream"
    ),
    released=ReleasedTokens(title="Dream", vocab=152064, mask=151666, eos=151643, pad=151643, texts=("<|mask|>",)),
    end_of_turn="<|im_end|>",
    chat_template=CHAT_TEMPLATE,
    shift=True,
    trained_length=2048,
)


def has_biases(source: Source) -> bool:
    """DreamReasoner shares names with Dream, and has query and key norms in place of biases."""
    return source.has("self_attn.q_proj.bias") and not source.has("self_attn.q_norm.weight")


DREAM = Family(
    name="dream",
    title="Dream-v0, Dream-Coder, DiffuCoder",
    marks=Marks(architectures=("DreamModel", "DreamForCausalLM"), model_types=("Dream", "dream"), confirm=has_biases),
    read_config=LAYOUT.read_config,
    sizes=("7.62 B",),
    layout=LAYOUT.title,
    sampler=LAYOUT.sampler,
)
