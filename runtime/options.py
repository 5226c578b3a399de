"""Every option of a generation, declared once: the CLI makes its flags from these fields."""

from __future__ import annotations

import types
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from dllm_export.errors import UsageError
from dllm_export.graphs import TOP_TOKENS
from dllm_export.graphs.families import Remasking, SamplerDefaults

OPTION_TYPES: tuple[type, ...] = (int, float, str, bool, Path)
"""Types that an option can have, beside a Literal of texts; each may also be None."""

COMMAND_FLAGS = frozenset(
    {
        *("prompt", "prompt_file", "infill", "prompt_ids", "chat", "policy", "transfer", "rule"),
        *("prefix_file", "prefix_depth", "prefix_profile", "prefix_budget"),
        *("bundle", "graph", "output", "layer", "step", "watch", "report", "json", "as_json", "debug", "help"),
    }
)
"""Flags and arguments of the commands that generate which are no option of a dataclass: no option can be called so."""


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field that is also a command-line flag."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """How to denoise. What is None is left to the bundle's family; `settle` fills it in."""

    steps: int | None = option(None, "denoising steps over all blocks; default: one token per step")
    gen_length: int | None = option(None, "tokens to generate")
    block_length: int | None = option(None, "semi-autoregressive block; must divide gen-length; default: gen-length")
    temperature: float | None = option(
        None, "0 takes the most likely token; above 0 samples (seeded); default: the family's own"
    )
    top_p: float | None = option(
        None, "sample among the likeliest tokens that have this probability together; 1: all; default: the family's own"
    )
    top_k: int | None = option(None, "sample among this many likeliest tokens")
    cfg_scale: float = option(0.0, "classifier-free guidance scale; above 0 runs a second, unconditional pass")
    cfg_interval: int = option(1, "steps between refreshes of the guidance residual (always fresh in steps 1 to 5)")
    remasking: Remasking | None = option(  # noqa: RUF009 (a field declaration; the rule knows it only from other files)
        None,
        "which candidates go first: the surest, any, those furthest ahead of their second token, or of least entropy; "
        "default: the family's own",
        choices=get_args(Remasking),
    )
    logits_eos_inf: bool = option(False, "never choose the end-of-text token")
    confidence_eos_eot_inf: bool = option(False, "commit end-of-text and end-of-turn tokens last")
    early_stop: bool = option(
        False, "once a sequence has decided an end-of-text or end-of-turn token, what is masked after it is end-of-text"
    )
    seed: int = option(0, "sequence i of a batch draws from seed + i")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "steps", "gen_length", "block_length", "cfg_interval", "top_k")
        for name in ("temperature", "cfg_scale"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < float("inf"):
                raise UsageError(f"{flag(name)} is {value}, expected a number from 0 up")
        if self.seed < 0:
            raise UsageError(f"--seed is {self.seed}, expected 0 or more")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise UsageError(f"--top-p is {self.top_p}, expected a probability above 0 and up to 1")
        if self.top_k is not None and self.top_k > TOP_TOKENS:
            raise UsageError(f"--top-k is {self.top_k}, expected at most {TOP_TOKENS}, the tokens that a head returns")
        if self.remasking not in (None, *get_args(Remasking)):
            raise UsageError(f"--remasking is {self.remasking!r}, expected one of: {', '.join(get_args(Remasking))}")

    def settle(self, sampler: SamplerDefaults, *, ranks: bool, filters: bool) -> SettledOptions:
        """The same with the family's defaults filled in, but not those that a rule would ignore which does not rank rows, or
        does not filter tokens."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        filled = {
            "temperature": sampler.temperature if self.temperature is None else self.temperature,
            "top_p": self.top_p or (sampler.top_p if filters else 1.0),
            "remasking": self.remasking or (sampler.remasking if ranks else "low_confidence"),
        }
        return SettledOptions(**{**values, **filled})


@dataclass(frozen=True, slots=True, kw_only=True)
class SettledOptions(GenerationOptions):
    """Options with every default of the family filled in."""

    temperature: float
    top_p: float
    remasking: Remasking


def require_at_least(options: object, least: int, *names: str) -> None:
    """Refuse fields below a number by the names of their flags; None stands for a default."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise UsageError(f"{flag(name)} is {value}, expected at least {least}")


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def plain_type(hint: object) -> object:
    """The hint without `None`: `int | None` -> int."""
    if get_origin(hint) in (Union, types.UnionType):
        members = [member for member in get_args(hint) if member is not type(None)]
        return members[0] if len(members) == 1 else hint
    return hint
