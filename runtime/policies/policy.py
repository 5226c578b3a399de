"""What a cache policy says about a step. Plans are values: a policy never touches a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

LayerGraph = Literal["layer_full", "layer_partial", "layer_adaptive", "layer_skip"]
Alive = Literal["sequence", "response"]
StepKind = Literal["full", "refresh_prompt", "refresh_response", "partial"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepState:
    """What a policy may look at. Rows before `prompt_rows` are given text; the response is the rest."""

    step: int
    """1-based and counted over the whole request, across blocks."""
    layers: int
    prompt_rows: int
    response_rows: int


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Which graph runs a layer, and for `layer_adaptive` how many rows it may pick per sequence."""

    graph: LayerGraph
    budget: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step. Equal plans run the same calls, so that a provider prepares (or captures) each only once."""

    kind: StepKind
    alive: Alive
    """Rows that travel through the layers."""
    layers: tuple[LayerPlan, ...]
    keep_delta: bool = True
    """Whether the deltas of the response are cached for later steps."""
    force_prompt: bool = False
    """`layer_adaptive` must pick every prompt row."""
    write_response_values: bool = True
    """`layer_adaptive` stores the projected values of all alive rows, not of the prompt rows alone."""


class CachePolicy(Protocol):
    """A named, frozen set of parameters with one pure method."""

    @property
    def name(self) -> str:
        """The name under which the command line knows the policy."""
        ...

    def plan(self, state: StepState) -> StepPlan:
        """The plan of a step; the same state always gives the same plan."""
        ...
