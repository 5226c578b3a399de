"""The request step by step in plain PyTorch: nothing of the runtime, the graphs or the exporter runs here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dllm_export.runtime.policies import CachePolicy, DllmCache, StepState
from dllm_export.tools.bench.step import Step
from dllm_export.tools.eager import Context, EagerModel
from dllm_export.tools.four_feature import FourFeatureCache

Forward = Callable[[Tensor, int], Tensor]
"""(tokens [B, T], step counted from 1) -> logits [B, T, V]."""


@dataclass(frozen=True, slots=True)
class EagerRequest:
    """Prompts of equal length, and how many tokens of each response a step decides."""

    model: EagerModel
    prompts: tuple[tuple[int, ...], ...]
    response: int
    counts: tuple[int, ...]

    @property
    def context(self) -> Context:
        """What stays fixed in all steps."""
        return self.model.context([0] * len(self.prompts), len(self.prompts[0]) + self.response)

    def uncached(self, *, compiled: bool) -> Forward:
        """The whole model on every row."""
        forward, context = self.model.forward, self.context
        if compiled:
            forward = torch.compile(forward)
        return lambda tokens, _: forward(tokens, context)

    def four_feature(self, policy: DllmCache) -> Forward:
        """dLLM-Cache as published."""
        return FourFeatureCache(self.model, self.context, len(self.prompts[0]), policy).forward

    def kind(self, policy: CachePolicy, step: int) -> str:
        """What a policy does in a step."""
        rows = {"prompt_rows": len(self.prompts[0]), "response_rows": self.response}
        state = StepState.first(layers=len(self.model.layers), **rows)
        return policy.plan(replace(state, step=step, block_step=step)).kind

    def steps(self, forward: Forward, policy: CachePolicy) -> Iterator[Step]:
        """LLaDA's sampler at temperature 0."""
        model, masks = self.model, [self.model.mask_token] * self.response
        tokens = torch.tensor([[*prompt, *masks] for prompt in self.prompts], device=model.device)
        response = tokens[:, -self.response :]
        for step, count in enumerate(self.counts, 1):
            start = time.perf_counter()
            with torch.inference_mode():
                decide(forward(tokens, step)[:, -self.response :], response, model.mask_token, count)
            after = response.cpu().numpy().ravel()  # on a GPU this waits for the step
            seconds = time.perf_counter() - start
            yield Step(self.kind(policy, step), seconds, None, after.copy())


def decide(logits: Tensor, response: Tensor, mask_token: int, count: int) -> None:
    """Commit the `count` most confident masked rows of each sequence of [B, R] in place; ties go to the leftmost row."""
    logits = logits.float()
    logits[:, :, mask_token] = -torch.inf
    confidence, tokens = logits.softmax(-1).max(-1)
    masked = confidence.where(response == mask_token, -torch.inf)
    rows = masked.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    response.scatter_(1, rows, tokens.gather(1, rows))
