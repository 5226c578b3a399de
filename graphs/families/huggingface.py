"""Checkpoints in the layout of Hugging Face's Llama, Qwen2 and Qwen3: one reader for every family that has it.

Biases and query/key norms are read from the names of the stored tensors: published configurations leave their keys out, and
the defaults of their classes disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from dllm_export.errors import CheckpointError
from dllm_export.graphs.families.family import (
    LAYER_LIMIT,
    MLP_SLOTS,
    Family,
    Marks,
    ModelConfig,
    SamplerDefaults,
    Source,
    TensorNames,
    read,
    read_size,
)
from dllm_export.graphs.families.special_tokens import ReleasedTokens, read_tokens
from dllm_export.graphs.shape import Experts, ModelShape

SLOTS = {
    "norm1": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "out": "self_attn.o_proj.weight",
    "norm2": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
NAMES = TensorNames(
    embedding="model.embed_tokens.weight",
    norm="model.norm.weight",
    head="lm_head.weight",
    layer={slot: f"model.layers.{{layer}}.{name}" for slot, name in SLOTS.items()},
)
EXPERT = {slot: f"model.layers.{{layer}}.mlp.experts.{{expert}}.{slot}_proj.weight" for slot in MLP_SLOTS}
"""Experts as Qwen3-MoE and its relatives call them."""
MOE_NAMES = replace(NAMES, layer={**NAMES.layer, "router": "model.layers.{layer}.mlp.gate.weight"}, expert=EXPERT)
OTHER_BIASES = ("self_attn.o_proj.bias", "mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias")


def read_no_experts(raw: Mapping[str, object]) -> Experts | None:
    """The answer of a family whose layers have one MLP."""
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceLayout:
    """What differs between families of this layout, and what their configurations leave out."""

    title: ClassVar[str] = "Hugging Face Llama, Qwen"
    family: str
    sampler: SamplerDefaults
    released: ReleasedTokens
    end_of_turn: str | None = None
    chat_template: str | None = None
    tied_head: bool = False
    """Whether a configuration without tie_word_embeddings means a tied head."""
    rope_theta: float | None = None
    """Base of the rotation where the configuration states none; None refuses such a configuration."""
    shift: bool = False
    trained_length: int | None = None
    """Longest sequence that was trained, where max_position_embeddings says more."""
    names: TensorNames = NAMES
    read_experts: Callable[[Mapping[str, object]], Experts | None] = read_no_experts
    mlp_key: str = "intermediate_size"
    """Key of the inner width of a SwiGLU that is no expert."""
    block: int = 0
    """Rows of a block where the configuration states none, of families that attend by blocks; 0 for the others."""
    block_key: str = "block_size"
    """Key of the length of a block."""
    block_anchor: Literal["prompt", "response"] = "prompt"
    """Which one a block begins with."""
    rotates_in_part: bool = False
    """Whether partial_rotary_factor is read, and not refused."""

    def make_family(self, checkpoints: str, marks: Marks, *, sizes: tuple[str, ...] = (), limits: str = "") -> Family:
        """The family of these released checkpoints, which are recognised by the marks."""
        return Family(
            name=self.family,
            title=checkpoints,
            marks=marks,
            read_config=self.read_config,
            sizes=sizes,
            layout=self.title,
            sampler=self.sampler,
            by_blocks=self.block > 0,
            limits=limits,
        )

    def read_config(self, source: Source) -> ModelConfig:
        """config.json and tensor names -> ModelConfig."""
        shape, notes = self.read_shape(source)
        tokens, assumed = read_tokens(source, shape.vocab, self.released)
        return ModelConfig(
            family=self.family,
            shape=shape,
            tokens=tokens,
            sampler=self.sampler,
            names=self.names,
            end_of_turn=self.end_of_turn,
            chat_template=self.chat_template,
            assumed=(*notes, *assumed),
        )

    def read_shape(self, source: Source) -> tuple[ModelShape, tuple[str, ...]]:
        """Sizes and flags, and sentences on what config.json does not state."""
        raw, notes = source.config, []
        refuse_other_layers(raw, rotates_in_part=self.rotates_in_part)
        experts, layers = self.read_experts(raw), read_size(raw, "num_hidden_layers", most=LAYER_LIMIT)
        if experts is not None and experts.dense_layers >= layers:
            experts = None
        fraction = read(raw, "partial_rotary_factor", float, 1.0)
        if source.has("layernorm.bias") or "layer_norm_eps" in raw:
            raise CheckpointError("config.json: 'layer_norm_eps' means LayerNorm; only RMSNorm is supported here")
        for name in OTHER_BIASES:
            if source.has(name):
                raise CheckpointError(f"the checkpoint holds '{name}' tensors: biases are supported on q, k and v only")
        width, heads = read_size(raw, "hidden_size"), read_size(raw, "num_attention_heads")
        kv_heads = read(raw, "num_key_value_heads", int, heads)
        if kv_heads < 1 or heads % kv_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        if raw.get("head_dim") is None and width % heads:
            raise CheckpointError(
                f"config.json: hidden_size {width} is not a multiple of num_attention_heads {heads}, and no head_dim is given"
            )
        head_dim = read_size(raw, "head_dim", max(width // heads, 1))
        if head_dim % 2:
            raise CheckpointError(
                f"config.json: 'head_dim' is {head_dim}, expected an even number: rotation needs pairs"
            )
        if not 0 < fraction <= 1 or int(head_dim * fraction) % 2 or int(head_dim * fraction) == 0:
            raise CheckpointError(
                f"config.json: 'partial_rotary_factor' is {fraction}, expected an even share of a head of {head_dim}"
            )
        tied = read(raw, "tie_word_embeddings", bool, self.tied_head)
        if source.tensors and not tied and self.names.head not in source.tensors:
            tied = True
            notes.append(f"tied head: the checkpoint has no '{self.names.head}'")
        length = read_size(raw, "max_position_embeddings")
        if self.block and raw.get(self.block_key) is None:
            notes.append(
                f"{self.block_key} {self.block}: not in config.json, taken from the released {self.released.title}"
            )
        shape = ModelShape(
            layers=layers,
            hidden=width,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            mlp=read_size(raw, self.mlp_key),
            vocab=read_size(raw, "vocab_size"),
            max_length=min(length, self.trained_length or length),
            norm_eps=read(raw, "rms_norm_eps", float, 1e-6),
            rope_theta=read_rope_theta(raw, self.rope_theta),
            rope_float32=False,
            rope_fraction=fraction,
            block=read_size(raw, self.block_key, self.block) if self.block else 0,
            block_anchor=self.block_anchor,
            experts=experts,
            qkv_bias=self._has(source, "q_bias"),
            qk_norm=self._has(source, "q_norm"),
            tied_head=tied,
            shift=self.shift,
        )
        for key, what, found in (
            ("attention_bias", "biases on q, k and v", shape.qkv_bias),
            ("qk_norm", "query and key norms", shape.qk_norm),
        ):
            stated = raw.get(key)
            if isinstance(stated, bool) and stated != found:
                notes.append(
                    f"{what}: {'' if found else 'no '}tensors of them, though config.json says '{key}' {stated}"
                )
        return shape, tuple(notes)

    def _has(self, source: Source, slot: str) -> bool:
        return slot in self.names.layer and source.has(self.names.layer[slot].partition("{layer}")[2])


def read_rope_theta(raw: Mapping[str, object], default: float | None) -> float:
    """The base of the rotation, from `rope_theta` or from the `rope_parameters` of newer files; scaled forms are refused."""
    for key in ("rope_scaling", "rope_parameters"):
        value = raw.get(key)
        if value is None:
            continue
        kind = value.get("rope_type", value.get("type", "default")) if isinstance(value, Mapping) else value
        if not isinstance(value, Mapping) or kind != "default":
            raise CheckpointError(f"config.json: '{key}' is {value!r}: scaled rotary embeddings are not supported")
        if value.get("rope_theta") is not None:
            return read(value, "rope_theta", float)
    return read(raw, "rope_theta", float, default)


def refuse_other_layers(raw: Mapping[str, object], *, rotates_in_part: bool) -> None:
    """Settings under which the same tensors mean another computation."""
    if read(raw, "hidden_act", str, "silu") != "silu":
        raise CheckpointError(f"config.json: 'hidden_act' is {raw['hidden_act']!r}, expected 'silu'")
    if not rotates_in_part and raw.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        raise CheckpointError(
            f"config.json: 'partial_rotary_factor' is {raw['partial_rotary_factor']!r}: heads that rotate in part are not "
            f"supported"
        )
    if raw.get("use_sliding_window"):
        raise CheckpointError("config.json: 'use_sliding_window' is true: attention over a window is not supported")
    kinds = raw.get("layer_types")
    others = [kind for kind in kinds if kind != "full_attention"] if isinstance(kinds, list) else []
    if others:
        raise CheckpointError(f"config.json: 'layer_types' has {others[0]!r}, expected 'full_attention' in every layer")
