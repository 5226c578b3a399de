"""Does a bundle compute what its checkpoint computes? Three comparisons, coarse to fine (docs/verification.md).

1. Probe: the checkpoint's own float32 activations, recorded at export, against the bundle's layers and head.
2. Graphs: every graph of the provider against the torch reference, output by output.
3. Generation: token for token against the reference, with and without the feature cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from math import ceil

import msgspec
import numpy as np
from numpy.typing import NDArray

from dllm_export.errors import IntegrityError, OverflowedError
from dllm_export.exporter.feeds import Feeds, make_feeds
from dllm_export.graphs import DType, graph_layers, has_experts, layer_graph
from dllm_export.runtime.blocks import number_blocks
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import BlockCache, CachePolicy, DllmCache, NoCache
from dllm_export.runtime.rope import rotary_tables
from dllm_export.runtime.safetensors_file import SafetensorsFile
from dllm_export.runtime.session import GraphCall, Session, SessionOptions, open_session

Array = NDArray[np.generic]

POLICIES: tuple[CachePolicy, ...] = (NoCache(), DllmCache(prompt_interval=5, response_interval=3))
"""Generations to compare: without a cache, and with intervals that make every kind of step occur. A model that attends by
blocks is compared with the policy for those as well."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest relative error of an output: max |difference| over its own root mean square, against the reference."""

    graph: float
    probe: float
    choices: float
    """Largest share of ids in an integer output (top tokens, picked rows) that the expected row does not hold."""
    agreement: float
    """Least share of equal tokens in the generation check."""
    rerouted: float
    """Share of rows that a router may send to other experts, where two are about as good: their results are others."""


# float32: reduction order alone, about 1e-6 on one layer; a wrong weight is 1e-1 or more. Half types: rounding of one layer
# (2^-11 and 2^-8) times a few operations for a graph; the probe also crosses the types of the checkpoint.
TOLERANCES: Mapping[DType, Tolerance] = {
    "float32": Tolerance(graph=2e-3, probe=2e-3, choices=0.0, agreement=1.0, rerouted=0.0),
    "float16": Tolerance(graph=5e-2, probe=5e-2, choices=0.5, agreement=0.9, rerouted=0.15),
    "bfloat16": Tolerance(graph=3e-1, probe=3e-1, choices=0.5, agreement=0.7, rerouted=0.3),
}


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One comparison: its worst error and the bound."""

    name: str
    passed: bool
    worst: float
    tolerance: float
    detail: str = ""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All comparisons of a bundle on one provider."""

    provider: str
    device: str
    dtype: str
    passed: bool
    checks: tuple[Check, ...]
    agreement: float
    """Share of equal tokens over all generation checks."""
    first_difference: int | None
    """First denoising step in which a committed token differs, if any."""


def verify(
    bundle: Bundle,
    options: SessionOptions = SessionOptions(),
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Compare the provider with the checkpoint's probe and with the torch reference."""
    report = progress or (lambda what, step, steps: None)
    policies = (*POLICIES, BlockCache()) if bundle.manifest.shape.block else POLICIES
    if bundle.manifest.shape.latent:
        policies = (NoCache(),)
    steps = len(bundle.specs) + len(policies) + 1
    with (
        closing(open_session(bundle, SessionOptions(provider="torch", threads=options.threads))) as reference,
        closing(open_session(bundle, options)) as candidate,
    ):
        checks: list[Check] = []
        report("probe", 0, steps)
        tolerance = TOLERANCES[bundle.manifest.dtype]
        spared = tolerance.rerouted if bundle.manifest.shape.experts else 0.0
        for label, session in (("reference", reference), (candidate.provider, candidate)):
            checks.extend(check_probe(bundle, session, label, tolerance.probe, spared))
        for number, name in enumerate(bundle.specs, 1):
            report(f"graph {name}", number, steps)
            checks.extend(check_graph(bundle, reference, candidate, name, tolerance))
        differences: list[int | None] = []
        for number, policy in enumerate(policies, len(bundle.specs) + 1):
            report(f"generation with {policy.name}", number, steps)
            check, step = check_generation(bundle, reference, candidate, policy, tolerance.agreement)
            checks.append(check)
            differences.append(step)
        report("done", steps, steps)
    return Report(
        provider=options.provider,
        device=options.place,
        dtype=bundle.manifest.dtype,
        passed=all(check.passed for check in checks),
        checks=tuple(checks),
        agreement=float(np.mean([1 - check.worst for check in checks[-len(policies) :]])),
        first_difference=min((step for step in differences if step is not None), default=None),
    )


# -- 1. probe
def check_probe(bundle: Bundle, session: Session, label: str, tolerance: float, spared: float = 0.0) -> Iterator[Check]:
    """Embedding, each layer and the head of a session, each fed with the checkpoint's own activations."""
    probe = SafetensorsFile(bundle.file(bundle.manifest.probe))
    tokens, states = probe.view("tokens"), probe.view("hidden").astype(np.float64)
    shape, rows = bundle.manifest.shape, len(tokens)
    if states.shape != (shape.layers + 1, rows, shape.hidden):
        raise IntegrityError(f"{bundle.manifest.probe} does not fit the model's shape; export again")
    run = partial(run_graph, bundle, session)
    if shape.latent:
        entering = {name: probe.view(name)[None] for name in ("latent", "estimate", "level")}
        scale, pull = {"latent_scale": probe.view("latent_scale")}, {"pull": probe.view("pull")}
        embedded = run("embed_latent", None, {**entering, **scale})["hidden_out"]
    else:
        embedded = run("embed", None, {"tokens": tokens[None]})["hidden_out"]
    yield _compare(f"probe {label}: embedding", {"hidden_out": embedded}, {"hidden_out": states[None, 0]}, tolerance)
    cos, sin = rotary_tables(shape, np.arange(rows)[None])
    timed: dict[str, Array] = {}
    if shape.conditioning:
        timed["condition"] = run("condition", None, {"time": probe.view("time")[None]})["condition_out"]
    visible = np.ones((1, rows), np.bool_)
    context = {"cos": cos, "sin": sin, "mask": visible, **timed}
    if shape.block:
        context["block"] = number_blocks(visible, shape.block)
    results, expected = {}, {}
    for layer in range(shape.layers):
        hidden = states[None, layer]
        results[f"layer {layer}"] = run(layer_graph(shape, "layer_full", layer), layer, {"hidden": hidden, **context})[
            "delta_out"
        ]
        expected[f"layer {layer}"] = states[None, layer + 1] - hidden
    yield _compare(f"probe {label}: layers", results, expected, tolerance, spared=spared)
    if shape.latent:
        found = run("head_latent", None, {"hidden": states[None, -1], "latent": entering["latent"], **pull})
        wanted = {"estimate_out": probe.view("estimate_out")[None], "token": probe.view("top_tokens")[None, :, :1]}
        found = {"estimate_out": found["estimate_out"], "token": found["token"][..., None]}
        yield _compare(f"probe {label}: head", found, wanted, tolerance, TOLERANCES[bundle.manifest.dtype].choices)
        return
    index = np.arange(rows, dtype=np.int32)[None]
    hidden = states[None, -1]
    unguided: dict[str, Array] = {"guidance": np.zeros_like(hidden), "cfg_scale": np.zeros(1)}
    asked: dict[str, Array] = {"index": index, "given": np.zeros_like(index), "bias": np.zeros(shape.vocab)}
    head = run("head", None, {"hidden": hidden, **asked, **unguided, **timed})
    count = probe.view("top_logits").shape[1]
    logits = {"logits": head["top_logits"][..., :count]}
    yield _compare(f"probe {label}: head", logits, {"logits": probe.view("top_logits")[None]}, tolerance)


# -- 2. graphs
def check_graph(
    bundle: Bundle, reference: Session, candidate: Session, name: str, tolerance: Tolerance
) -> Iterator[Check]:
    """A graph on realistic feeds: the first, middle and last layer for layer graphs."""
    layers = graph_layers(bundle.manifest.shape, name)
    chosen: list[int] | list[None] = [None]
    if layers is not None and bundle.specs[name].weights:
        chosen = sorted({layers[0], layers[(len(layers) - 1) // 2], layers[-1]})
    for layer in chosen:
        feeds = make_feeds(bundle, name)
        expected = run_graph(bundle, reference, name, layer, feeds)
        results = run_graph(bundle, candidate, name, layer, feeds)
        where = name if layer is None else f"{name} layer {layer}"
        spared = tolerance.rerouted if has_experts(bundle.specs[name]) else 0.0
        yield _compare(f"graph {where}", results, expected, tolerance.graph, tolerance.choices, spared)


def run_graph(bundle: Bundle, session: Session, graph: str, layer: int | None, feeds: Feeds) -> dict[str, Array]:
    """Outputs of one run by name; dims of the outputs follow from the feeds."""
    spec = bundle.specs[graph]
    sizes: dict[str | int, int] = {}
    for tensor in spec.inputs:
        sizes.update(zip(tensor.dims, feeds[tensor.name].shape, strict=True))
    if "budget" in feeds:
        sizes["Q"] = int(feeds["budget"][0])
    buffers = {}
    for tensor in (*spec.inputs, *spec.outputs):
        dims = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in tensor.dims)
        buffers[tensor.name] = session.allocate(dims, tensor.type)
        if tensor.name in feeds:
            buffers[tensor.name].write(feeds[tensor.name])
    session.prepare([GraphCall(graph, layer, buffers)])()
    return {tensor.name: buffers[tensor.name].read() for tensor in spec.outputs}


# -- 3. generation
def check_generation(
    bundle: Bundle, reference: Session, candidate: Session, policy: CachePolicy, least: float
) -> tuple[Check, int | None]:
    """A short generation token for token, and the first step with a different commit."""
    try:
        share, step = compare_generation(bundle, reference, candidate, policy)
        detail = "every token equal" if step is None else f"first difference in step {step}"
    except OverflowedError as error:
        share, step, detail = 0.0, 1, str(error)
    name = f"generation {policy.name}"
    return Check(name=name, passed=share >= least, worst=1 - share, tolerance=1 - least, detail=detail), step


def compare_generation(
    bundle: Bundle, reference: Session, candidate: Session, policy: CachePolicy
) -> tuple[float, int | None]:
    """(share of equal tokens, first step with a different commit) of a short generation, batch 2, two blocks."""
    shape, tokens = bundle.manifest.shape, bundle.manifest.tokens
    rng = np.random.default_rng(1)
    usable = np.setdiff1d(np.arange(min(shape.vocab, 50_000)), [tokens.mask, tokens.eos, tokens.pad])
    longest = min(24, shape.max_length - 16)
    if longest < 8:
        raise IntegrityError(f"the model takes {shape.max_length} tokens, too few for a trial generation of 24")
    prompts = [rng.choice(usable, length).tolist() for length in (longest, longest - 7)]
    options = GenerationOptions(gen_length=16, block_length=8, temperature=0.0)
    if shape.uniform_noise:
        options = GenerationOptions(gen_length=16)  # drawn, as its rule knows no other way
    if shape.latent:
        options = GenerationOptions(gen_length=16, steps=8)
    runs = []
    for session in (reference, candidate):
        model = DiffusionLM(bundle, session)
        request = model.unconditional(2, options) if shape.latent else model.continuation(prompts, options)
        frames = model.stream(request, options, policy)
        runs.append([frame.tokens if frame.drafts is None else frame.drafts for frame in frames])
    step = next((n + 1 for n, (a, b) in enumerate(zip(*runs, strict=True)) if not np.array_equal(a, b)), None)
    return float(np.mean(runs[0][-1] == runs[1][-1])), step


def _compare(
    name: str,
    results: Mapping[str, Array],
    expected: Mapping[str, Array],
    tolerance: float,
    choices: float = 0.0,
    spared: float = 0.0,
) -> Check:
    """The output that uses most of what it is allowed: `tolerance` for numbers, `choices` for ids."""
    limits = {key: choices if expected[key].dtype.kind in "iub" else tolerance for key in results}
    errors = {key: relative_error(results[key], expected[key], spared) for key in results}
    worst = max(errors, key=lambda key: errors[key] / max(limits[key], 1e-12))
    passed = errors[worst] <= limits[worst]
    return Check(name=name, passed=passed, worst=errors[worst], tolerance=limits[worst], detail=f"worst: {worst}")


def relative_error(result: Array, expected: Array, spared: float = 0.0) -> float:
    """Largest |difference| over the root mean square of the expected; infinite where a number is not finite.

    The worst rows, this share of them, are left out. Of ids, the share in a row that the expected row does not hold:
    near-ties of half types swap places.
    """
    if result.dtype.kind in "iub" and expected.dtype.kind in "iub":
        rows = zip(result.reshape(-1, result.shape[-1]), expected.reshape(-1, expected.shape[-1]), strict=True)
        return float(np.mean([1 - np.isin(row, known).mean() for row, known in rows]))
    difference = np.abs(result.astype(np.float64) - expected.astype(np.float64))
    if not np.isfinite(difference).all():
        return float("inf")
    scale = float(np.sqrt(np.mean(expected.astype(np.float64) ** 2)))
    worst = np.sort(difference.reshape(-1, difference.shape[-1]).max(axis=1))
    return float(worst[len(worst) - 1 - ceil(spared * len(worst))]) / max(scale, 1e-6)
