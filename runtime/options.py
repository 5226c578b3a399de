"""Every option of a generation, declared once: the CLI makes its flags from these fields."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args

from dllm_export.errors import UsageError
from dllm_export.graphs.families import Remasking

Kind = TypeVar("Kind")


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field that is also a command-line flag."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """How to denoise. gen_length and block_length default to what the bundle's family records."""

    steps: int | None = option(None, "denoising steps over all blocks; default: one token per step")
    gen_length: int | None = option(None, "tokens to generate")
    block_length: int | None = option(None, "semi-autoregressive block; must divide gen-length; default: gen-length")
    temperature: float = option(0.0, "0 takes the most likely token; above 0 samples (seeded)")
    cfg_scale: float = option(0.0, "classifier-free guidance scale; above 0 runs a second, unconditional pass")
    cfg_interval: int = option(1, "steps between refreshes of the guidance residual (always fresh in steps 1 to 5)")
    remasking: Remasking = option(  # noqa: RUF009 (a field declaration; the rule knows it only from other files)
        "low_confidence",
        "which candidates go first: the surest, any, those furthest ahead of their second token, or of least entropy",
        choices=get_args(Remasking),
    )
    logits_eos_inf: bool = option(False, "never choose the end-of-text token")
    confidence_eos_eot_inf: bool = option(False, "commit end-of-text and end-of-turn tokens last")
    early_stop: bool = option(
        False, "once a sequence has decided an end-of-text or end-of-turn token, what is masked after it is end-of-text"
    )
    seed: int = option(0, "sequence i of a batch draws from seed + i")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "steps", "gen_length", "block_length", "cfg_interval")
        for name in ("temperature", "cfg_scale"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise UsageError(f"{flag(name)} is {value}, expected a number from 0 up")
        if self.seed < 0:
            raise UsageError(f"--seed is {self.seed}, expected 0 or more")
        if self.remasking not in get_args(Remasking):
            raise UsageError(f"--remasking is {self.remasking!r}, expected one of: {', '.join(get_args(Remasking))}")


def require_at_least(options: object, least: int, *names: str) -> None:
    """Refuse fields below a number by the names of their flags; None stands for a default."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise UsageError(f"{flag(name)} is {value}, expected at least {least}")


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def find_strategy(kinds: Mapping[str, Kind], name: str, noun: str) -> Kind:
    """The policy or rule of this name, or an error that lists the names."""
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"no {noun} is called {name!r}; there are: {', '.join(kinds)}{hint}")
    return kinds[name]
