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

    def uncached(self, *, compiled: bool, captured: bool) -> Forward:
        """The whole model on every row; `captured` makes it one CUDA graph."""
        forward, context = self.model.forward, self.context
        if compiled:
            forward = torch.compile(forward)
        return CapturedForward(forward, context) if captured else lambda tokens, _: forward(tokens, context)

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


class CapturedForward:
    """A model's forward pass as one CUDA graph, recorded at the first call; logits are valid until the next one."""

    def __init__(self, forward: Callable[[Tensor, Context], Tensor], context: Context) -> None:
        self._forward, self._context = forward, context
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, tokens: Tensor, step: int) -> Tensor:
        if self._graph is None:
            self._tokens, self._graph = tokens.clone(), torch.cuda.CUDAGraph()
            beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):  # what is compiled or set up at a first run must not be recorded
                self._forward(self._tokens, self._context)
            torch.cuda.current_stream().wait_stream(beside)
            with torch.cuda.graph(self._graph):
                self._logits = self._forward(self._tokens, self._context)
        self._tokens.copy_(tokens)
        self._graph.replay()
        return self._logits


def decide(logits: Tensor, response: Tensor, mask_token: int, count: int) -> None:
    """Commit the `count` most confident masked rows of each sequence of [B, R] in place; ties go to the leftmost row."""
    logits = logits.float()
    logits[:, :, mask_token] = -torch.inf
    confidence, tokens = logits.softmax(-1).max(-1)
    masked = confidence.where(response == mask_token, -torch.inf)
    rows = masked.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    response.scatter_(1, rows, tokens.gather(1, rows))
