"""Flags that name a shared prefix, for every command that generates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dllm_export.errors import UsageError
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import option
from dllm_export.runtime.policies import CachePolicy, SharedPrefix
from dllm_export.runtime.prefix_profile import PrefixProfile, read_profile
from dllm_export.runtime.prefix_store import PREFIX_BUDGET
from dllm_export.runtime.request import Request
from dllm_export.tools.prompts import read_prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixOptions:
    """Which text requests share, and how much of its features."""

    prefix_file: Path | None = option(None, "UTF-8 text that every prompt starts with; --policy shared-prefix keeps it")
    prefix_depth: int | None = option(None, "layers that share its features; default: what --prefix-profile says")
    prefix_profile: Path | None = option(None, "what profile-prefix wrote for this model")
    prefix_budget: int = option(PREFIX_BUDGET, "tokens of prefixes kept at most")

    @property
    def given(self) -> bool:
        """Whether a depth is named in either way."""
        return self.prefix_depth is not None or self.prefix_profile is not None

    def check(self, policy: CachePolicy) -> None:
        """Refuse flags that would have no effect, and a policy that would have none."""
        if isinstance(policy, SharedPrefix) != (self.prefix_file is not None):
            if self.prefix_file is None:
                raise UsageError(f"--policy {policy.name} needs --prefix-file, the text that all prompts start with")
            raise UsageError(
                f"--prefix-file has no effect with --policy {policy.name}: use --policy {SharedPrefix.name} --base "
                f"{policy.name}, or leave it out"
            )
        if self.given and self.prefix_file is None:
            name = "--prefix-profile" if self.prefix_depth is None else "--prefix-depth"
            raise UsageError(f"{name} needs --prefix-file, the text that all prompts start with")

    def read_profile(self) -> PrefixProfile | None:
        """The profile, where one is given and no depth overrides it."""
        return None if self.prefix_profile is None else read_profile(self.prefix_profile)

    def share(self, lm: DiffusionLM, request: Request, text: str | None = None) -> Request:
        """The request with its prefix named: this text or that of the file, if there is one."""
        if text is None and self.prefix_file is not None:
            text = read_prompt(self.prefix_file)
        if text is None:
            return request
        return lm.share(request, lm.encode(text), depth=self.prefix_depth, profile=self.read_profile())
