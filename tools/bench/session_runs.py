"""The request step by step on a session, with the work of every step counted from the calls that it made."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import cast

import numpy as np

from dllm_export.graphs.counting_ops import Product
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import CachePolicy
from dllm_export.tools.bench.metering import Meter, MeteredSession, OutlineSession
from dllm_export.tools.bench.ranges import NamedSteps, NoRanges, Ranges
from dllm_export.tools.bench.roofline import Model, Work
from dllm_export.tools.bench.step import Step


def session_steps(
    lm: DiffusionLM, meter: Meter, prompt: Sequence[int], response: int, policy: CachePolicy, ranges: Ranges
) -> Iterator[Step]:
    """One token a step, one block; whatever is done before the first step counts for that step."""
    start = time.perf_counter()
    meter.take()
    options = GenerationOptions(gen_length=response, steps=response, block_length=response)
    named = cast("CachePolicy", NamedSteps(policy, ranges))  # its name is the other's, and so no class variable
    for frame in lm.stream(lm.continuation([prompt], options), options, named):
        seconds = time.perf_counter() - start
        ranges.end()
        yield Step(frame.kind, seconds, frame.engine_seconds, frame.tokens[0].astype(np.int64), meter.take())
        start = time.perf_counter()


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a policy's steps will compute and read, and what they take, known without computing any of it."""

    work: tuple[Work, ...]
    products: Counter[Product]
    buffer_bytes: int
    layer_graphs: int
    """Layer graphs that the steps run."""


def foresee(bundle: Bundle, prompt: Sequence[int], response: int, steps: int, policy: CachePolicy) -> Outlook:
    """The outlook of a policy; one that goes by what the steps computed is told that nothing changed."""
    manifest = bundle.manifest
    outline = OutlineSession(manifest.dtype)
    session = MeteredSession(outline, Model(bundle.specs, manifest.shape, manifest.dtype))
    with DiffusionLM(bundle, session) as lm:
        made = list(islice(session_steps(lm, session.meter, prompt, response, policy, NoRanges()), steps))
    graphs = {graph for graph in session.meter.graphs if graph.startswith("layer_")}
    work = tuple(step.work for step in made)
    return Outlook(work, session.meter.products, outline.buffer_bytes, len(graphs))
