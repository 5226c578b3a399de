"""The request step by step on a session, with the work of every step counted from the calls that it made."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import cast

import numpy as np

from dllm_export.graphs.counting_ops import Product
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.plugins import find_transfer
from dllm_export.runtime.policies import CachePolicy
from dllm_export.runtime.transfers import Quota, Transfer
from dllm_export.tools.bench.metering import Meter, MeteredSession, OutlineSession
from dllm_export.tools.bench.ranges import NamedSteps, NoRanges, Ranges
from dllm_export.tools.bench.records import Settings
from dllm_export.tools.bench.roofline import Model, Work
from dllm_export.tools.bench.step import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRequest:
    """Prompts of equal length, their responses decoded by one rule in one block."""

    prompts: tuple[tuple[int, ...], ...]
    response: int
    rule: Transfer = Quota()
    tokens_per_step: int = 1
    """Of each sequence, under a rule that keeps to a schedule."""

    @property
    def steps(self) -> int:
        """Steps of the whole generation; under a rule that keeps to no schedule the most there can be."""
        return -(-self.response // self.tokens_per_step) if self.rule.keeps_schedule else self.response

    @property
    def options(self) -> GenerationOptions:
        """The same as a generation has it."""
        steps = self.steps if self.rule.keeps_schedule else None
        return GenerationOptions(gen_length=self.response, steps=steps, block_length=self.response)


def to_request(prompts: tuple[tuple[int, ...], ...], settings: Settings) -> SessionRequest:
    """What a column's process runs."""
    rule = find_transfer(settings.transfer.name)(**settings.transfer.settings)
    return SessionRequest(
        prompts=prompts, response=settings.response, rule=rule, tokens_per_step=settings.tokens_per_step
    )


def session_steps(
    lm: DiffusionLM, meter: Meter, request: SessionRequest, policy: CachePolicy, ranges: Ranges
) -> Iterator[Step]:
    """The steps of a generation; whatever is done before the first step counts for that step."""
    # A generation that was not run to its end may have left work queued: it is waited for.
    lm.session.mark().seconds_until(lm.session.mark())
    start = time.perf_counter()
    meter.take()
    options = request.options
    named = cast("CachePolicy", NamedSteps(policy, ranges))  # its name is the other's, and so no class variable
    for frame in lm.stream(lm.continuation(request.prompts, options), options, named, request.rule):
        seconds = time.perf_counter() - start
        ranges.end()
        work = meter.take(ahead=frame.ahead)
        yield Step(frame.kind, seconds, frame.engine_seconds, frame.tokens.ravel().astype(np.int64), work)
        start = time.perf_counter()


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a policy's steps will compute and read, and what they take, known without computing any of it."""

    work: tuple[Work, ...]
    products: Counter[Product]
    buffer_bytes: int
    graphs: frozenset[str]
    """Graphs that the steps run."""

    @property
    def layer_graphs(self) -> int:
        """How many of the graphs are of layers."""
        return sum(graph.startswith("layer_") for graph in self.graphs)


def foresee(bundle: Bundle, request: SessionRequest, steps: int, policy: CachePolicy) -> Outlook:
    """The outlook of a policy; one that goes by what the steps computed is told that nothing changed.

    What a rule without a schedule will decide is not known before: the outlook is then that of one token a step.
    """
    manifest = bundle.manifest
    if not request.rule.keeps_schedule:
        request = replace(request, rule=Quota())
    outline = OutlineSession(manifest.dtype)
    session = MeteredSession(outline, Model(bundle.specs, manifest.shape, manifest.dtype))
    with DiffusionLM(bundle, session) as lm:
        made = list(islice(session_steps(lm, session.meter, request, policy, NoRanges()), steps))
    work = tuple(step.work for step in made)
    return Outlook(work, session.meter.products, outline.buffer_bytes, frozenset(session.meter.graphs))
