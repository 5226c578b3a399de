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
"""(tokens [1, T], step counted from 1) -> logits [1, T, V]."""


@dataclass(frozen=True, slots=True)
class EagerRequest:
    """One prompt, its response decoded one token a step."""

    model: EagerModel
    prompt: tuple[int, ...]
    response: int

    def uncached(self, *, compiled: bool, captured: bool) -> Forward:
        """The whole model on every row; `captured` makes it one CUDA graph."""
        forward, context = self.model.forward, self.model.context([0], len(self.prompt) + self.response)
        if compiled:
            forward = torch.compile(forward)
        return CapturedForward(forward, context) if captured else lambda tokens, _: forward(tokens, context)

    def four_feature(self, policy: DllmCache) -> Forward:
        """dLLM-Cache as published."""
        context = self.model.context([0], len(self.prompt) + self.response)
        return FourFeatureCache(self.model, context, len(self.prompt), policy).forward

    def kind(self, policy: CachePolicy, step: int) -> str:
        """What a policy does in a step."""
        rows = {"prompt_rows": len(self.prompt), "response_rows": self.response}
        state = StepState.first(layers=len(self.model.layers), **rows)
        return policy.plan(replace(state, step=step, block_step=step)).kind

    def steps(self, forward: Forward, policy: CachePolicy) -> Iterator[Step]:
        """LLaDA's sampler at temperature 0."""
        model, canvas = self.model, [*self.prompt, *[self.model.mask_token] * self.response]
        tokens = torch.tensor([canvas], device=model.device)
        response = tokens[:, len(self.prompt) :]
        for step in range(1, self.response + 1):
            start = time.perf_counter()
            with torch.inference_mode():
                decide_one(forward(tokens, step)[:, len(self.prompt) :], response, model.mask_token)
            after = response[0].cpu().numpy().copy()  # on a GPU this waits for the step
            seconds = time.perf_counter() - start
            yield Step(self.kind(policy, step), seconds, None, after)


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


def decide_one(logits: Tensor, response: Tensor, mask_token: int) -> None:
    """Commit the most confident masked row of [1, R] in place."""
    logits = logits.float()
    logits[:, :, mask_token] = -torch.inf
    confidence, tokens = logits.softmax(-1).max(-1)
    row = confidence.where(response == mask_token, -torch.inf).argmax(-1, keepdim=True)
    response.scatter_(1, row, tokens.gather(1, row))
