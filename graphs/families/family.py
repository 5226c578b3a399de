"""What a model family is: a way to read its config.json, and the names of its tensors. Data, not layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from dllm_export.errors import CheckpointError
from dllm_export.graphs.shape import ModelShape

Remasking = Literal["low_confidence", "random", "margin", "entropy"]

LAYER_SLOTS = ("norm1", "q", "k", "v", "out", "norm2", "gate", "up", "down")
BIAS_SLOTS = ("q_bias", "k_bias", "v_bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """Token ids with a meaning of their own."""

    mask: int
    eos: int
    pad: int
    end_of_turn: int | None = None

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a text."""
        return frozenset(token for token in (self.eos, self.end_of_turn) if token is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerDefaults:
    """The family's own sampling defaults."""

    gen_length: int
    block_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """Names in the checkpoint of every canonical slot. Linear weights are [out, in] there."""

    embedding: str
    norm: str
    head: str
    layer: Mapping[str, str]
    """Slot -> name with the placeholders {layer}, {group} and {member}."""
    group_size: int = 1

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
    assumed: tuple[str, ...] = field(default=())
    """Values that came from the family's table because the checkpoint does not state them, as sentences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One line of checkpoints."""

    name: str
    title: str
    detect: Callable[[Mapping[str, object]], bool]
    read_config: Callable[[Mapping[str, object], int | None], ModelConfig]
    """(config.json, mask id given by the user or None) -> ModelConfig."""


V = TypeVar("V", int, float, bool, str)


SIZE_LIMIT = 10_000_000
LAYER_LIMIT = 10_000


def read_size(raw: Mapping[str, object], key: str, default: int, most: int = SIZE_LIMIT) -> int:
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
