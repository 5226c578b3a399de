"""What a model family is: how it is recognised and read, and the names of its tensors. Data, not layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from dllm_export.errors import CheckpointError
from dllm_export.graphs.shape import ModelShape

Remasking = Literal["low_confidence", "random", "margin", "entropy"]

LAYER_SLOTS = ("norm1", "q", "k", "v", "out", "norm2", "gate", "up", "down")
BIAS_SLOTS = ("q_bias", "k_bias", "v_bias")
QK_NORM_SLOTS = ("q_norm", "k_norm")
MODULATED_SLOTS = (
    *("norm1", "qkv", "out", "norm2", "up", "up_bias", "down", "down_bias", "modulation", "modulation_bias"),
)
"""Tensors of a layer whose norms are modulated by the time, as its checkpoints store them."""


MLP_SLOTS = ("gate", "up", "down")
SHARED_SLOTS = tuple(f"shared_{slot}" for slot in MLP_SLOTS)
"""An expert that every row goes through. The tensors of the others are not slots of a layer: TensorNames.expert."""
FUSED_SLOTS = {"q": "qkv", "k": "qkv", "v": "qkv"}
"""Where a checkpoint may keep several slots as one tensor, row by row."""


def layer_slots(shape: ModelShape, layer: int = -1) -> tuple[str, ...]:
    """Every tensor of a layer, the last where none is named, by canonical slot; experts aside."""
    biases, norms = BIAS_SLOTS if shape.qkv_bias else (), QK_NORM_SLOTS if shape.qk_norm else ()
    if shape.mlp_kind == "gelu":
        return (*(slot for slot in LAYER_SLOTS if slot != "gate"), *biases, *norms)
    if shape.experts is None or not shape.has_experts(layer % shape.layers):
        return (*LAYER_SLOTS, *biases, *norms)
    attention = tuple(slot for slot in LAYER_SLOTS if slot not in MLP_SLOTS)
    router = ("router", *(("router_bias",) if shape.experts.bias else ()))
    return (*attention, *biases, *norms, *router, *(SHARED_SLOTS if shape.experts.shared else ()))


def find_no_token(kind: str, texts: tuple[str, ...]) -> int | None:
    """The answer of a checkpoint without tokenizer files."""
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What the files of a checkpoint say before a weight is read: all that a family is recognised and read by."""

    config: Mapping[str, object]
    """config.json."""
    tensors: frozenset[str] = frozenset()
    """Names of the stored tensors. They, and not the configuration, say which optional weights a layer has."""
    mask_id: int | None = None
    """Mask id given by the user."""
    find_token: Callable[[str, tuple[str, ...]], int | None] = find_no_token
    """(mask, eos or pad; texts) -> the token that the tokenizer files call so, or the first of the texts that they have."""

    @property
    def architecture(self) -> str:
        """architectures[0], or nothing."""
        architectures = self.config.get("architectures")
        return str(architectures[0]) if isinstance(architectures, list) and architectures else ""

    @property
    def model_type(self) -> str:
        """model_type, or nothing."""
        return str(self.config.get("model_type") or "")

    def has(self, ending: str) -> bool:
        """Whether a tensor's name ends so."""
        return any(name.endswith(ending) for name in self.tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """Token ids with a meaning of their own."""

    mask: int
    """The id behind the vocabulary where noise is other tokens (ModelShape.uniform_noise): it then marks places to fill, and no
    graph sees it."""
    eos: int
    pad: int
    end_of_turn: int | None = None

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a text."""
        return frozenset(token for token in (self.eos, self.end_of_turn) if token is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerDefaults:
    """The family's own sampling defaults, for whoever does not say otherwise."""

    gen_length: int
    block_length: int
    temperature: float = 0.0
    top_p: float = 1.0
    remasking: Remasking = "low_confidence"
    """The ranking of rules that rank."""
    transfer: str = "quota"
    """Name of the decoding rule, which then has its own default settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """Names in the checkpoint of every canonical slot. Linear weights are [out, in] there."""

    embedding: str
    norm: str
    head: str
    layer: Mapping[str, str]
    """Slot -> name with the placeholders {layer}, {group} and {member}; qkv in place of q, k and v where they are one."""
    group_size: int = 1
    others: Mapping[str, str] = field(default_factory=dict)
    """Slot -> name of tensors outside the layers that only some models have."""
    expert: Mapping[str, str] = field(default_factory=dict)
    """gate, up and down of an expert -> name with the placeholders {layer} and {expert}."""

    def stored(self, slot: str) -> str:
        """The slot itself, or the one that it is a part of."""
        return slot if slot in self.layer else FUSED_SLOTS[slot]

    def of_expert(self, slot: str, layer: int, expert: int) -> str:
        """The name of an expert's tensor."""
        return self.expert[slot].format(layer=layer, expert=expert)

    def in_layer(self, slot: str, layer: int) -> str:
        """The name of a layer's tensor."""
        return self.layer[slot].format(layer=layer, group=layer // self.group_size, member=layer % self.group_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything that a config.json says, read once."""

    family: str
    shape: ModelShape
    tokens: SpecialTokens
    sampler: SamplerDefaults
    names: TensorNames
    end_of_turn: str | None = None
    """Text of the end-of-turn token; its id comes from the tokenizer."""
    conditioning: int = 0
    """Width of what the time conditions the norms by; 0 where no norm is modulated."""
    logit_offset: float = 0.0
    """Added to all logits: a constant of what a model's output means."""
    branch_scale: float = 1.0
    """What a layer's attention and MLP are multiplied with before they are added to its input."""
    head_scale: float = 1.0
    """What the head's matrix is multiplied with."""
    chat_template: str | None = None
    """The family's own, where the checkpoint ships none."""
    tokenizer: str = ""
    """Whose tokenizer it is, where checkpoints of the family are published without one."""
    assumed: tuple[str, ...] = field(default=())
    """Values that came from the family's table because the checkpoint does not state them, as sentences."""

    def stored_slots(self, layer: int) -> tuple[str, ...]:
        """Every tensor of a layer that the checkpoint stores, by slot, each once; experts aside."""
        if self.conditioning:
            return MODULATED_SLOTS
        return tuple(dict.fromkeys(map(self.names.stored, layer_slots(self.shape, layer))))


def confirm_always(source: Source) -> bool:
    """For architectures and model types that no other family has."""
    return True


def confirm_never(source: Source) -> bool:
    """For families whose files look like another's, so that the user names them."""
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """How a checkpoint shows its family. The architecture counts before the model type."""

    architectures: tuple[str, ...] = ()
    """Patterns of architectures[0]; the first one is a name in full."""
    model_types: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    """Files of a checkpoint without a config.json."""
    confirm: Callable[[Source], bool] = confirm_always
    """Tells apart families that share an architecture or a model type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One line of checkpoints."""

    name: str
    title: str
    """The released checkpoints."""
    marks: Marks
    read_config: Callable[[Source], ModelConfig]
    sizes: tuple[str, ...] = ()
    """Parameters of the released checkpoints, each size once."""
    layout: str = ""
    """Whose tensor names they have."""
    sampler: SamplerDefaults | None = None
    by_blocks: bool = False
    """Whether a row sees its own block and those before it, instead of all rows."""
    continuous: bool = False
    """Whether it denoises vectors instead of tokens."""
    limits: str = ""
    """What does not work with them, as a sentence; nothing where all does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownFamily:
    """A line of checkpoints that is recognised and refused, with the reason."""

    name: str
    title: str
    marks: Marks
    reason: str
    """What an export would need, or what is possible instead, as the end of a sentence."""


V = TypeVar("V", int, float, bool, str)


SIZE_LIMIT = 10_000_000
LAYER_LIMIT = 10_000


def read_size(raw: Mapping[str, object], key: str, default: int | None = None, most: int = SIZE_LIMIT) -> int:
    """raw[key] as a number from 1 to `most`, so that a damaged file cannot ask for all memory."""
    value = read(raw, key, int, default)
    if not 1 <= value <= most:
        raise CheckpointError(f"config.json: '{key}' is {value}, expected 1 to {most}")
    return value


def read(raw: Mapping[str, object], key: str, kind: type[V], default: V | None = None) -> V:
    """raw[key] as `kind`; a missing or null key gives the default, or an error that names the key."""
    value = raw.get(key)
    if value is None:
        if default is None:
            raise CheckpointError(f"config.json has no '{key}'; the checkpoint cannot be read without it")
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise CheckpointError(f"config.json: '{key}' is {value!r}, expected {kind.__name__}")
    return value
