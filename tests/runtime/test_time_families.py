"""MDLM and SEDD from checkpoint to samples: token for token against plain loops, and in distribution against enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from dllm_export.errors import UsageError
from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pipeline import export
from dllm_export.graphs import ModelShape
from dllm_export.graphs.drawing import group_width
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import (
    BlockCache,
    CachePolicy,
    DllmCache,
    DualCache,
    DynamicDllm,
    NoCache,
    PrefixCache,
    SharedPrefix,
    SpaCache,
    SparseCache,
    WindowCache,
)
from dllm_export.runtime.prefix_profile import measure_profile
from dllm_export.runtime.transfers import Ddpm, DdpmCache, Quota, Sedd, Threshold, Transfer
from dllm_export.tools.eager_dit import EagerDit, load_eager_dit
from dllm_export.tools.random_checkpoint import write_random_checkpoint

Array = NDArray[Any]
OpenModel = Callable[[str, str], DiffusionLM]

SHAPE = ModelShape(
    layers=2,
    hidden=32,
    heads=4,
    kv_heads=4,
    head_dim=8,
    mlp=128,
    vocab=97,
    max_length=64,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_float32=False,
    norm="layer",
    mlp_kind="gelu",
    mlp_bias=True,
    head_bias=True,
)
MASK = 96
PROMPTS = ([3, 1, 4, 1, 5], [9, 2, 6])
OPTIONS = GenerationOptions(gen_length=12, steps=30, seed=5)
FAMILIES = ("mdlm", "sedd")
SYMBOLS = 4
"""Tokens of the models whose samples are counted; the mask is the next state."""
UNIFORM = 2**23


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each family, and one of four symbols."""
    root = tmp_path_factory.mktemp("time")
    few = replace(SHAPE, vocab=SYMBOLS + 1, hidden=16, heads=2, kv_heads=2, mlp=64)
    by_blocks = replace(SHAPE, block=4)
    shapes = {"mdlm": SHAPE, "sedd": SHAPE, "bd3lm": by_blocks, "mdlm few": few, "sedd few": few}
    written = {
        name: write_random_checkpoint(root / name, shape, family=name.split()[0], seed=3)
        for name, shape in shapes.items()
    }
    for name in ("sedd", "mdlm few", "sedd few"):
        flatten(written[name] / "model.safetensors")
    return written


def flatten(file: Path) -> None:
    """Weaken the head, so that no outcome is too rare to be counted, and ratios do not reveal everything at once."""
    tensors = load_file(file)
    save_file({name: tensor * (0.35 if "linear" in name else 1) for name, tensor in tensors.items()}, file)


@pytest.fixture(scope="module")
def bundles(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    root, options = tmp_path_factory.mktemp("bundles"), ExportOptions(no_tokenizer=True)
    return {name: export(path, root / name, options) for name, path in checkpoints.items()}


@pytest.fixture(scope="module")
def open_model(bundles: dict[str, Bundle], open_anywhere: Callable[[Bundle, str], DiffusionLM]) -> OpenModel:
    return lambda name, provider: open_anywhere(bundles[name], provider)


def run(
    model: DiffusionLM,
    transfer: Transfer | None = None,
    policy: CachePolicy = NoCache(),
    options: GenerationOptions = OPTIONS,
    prompts: Any = PROMPTS,
) -> tuple[list[tuple[int, ...]], int]:
    """Tokens of every sequence, and forward passes."""
    results = model.run(model.continuation(prompts, options), options, policy, transfer)
    return [result.tokens for result in results], results[0].passes


# -- plain loops
def draw_token(weights: Array, rng: np.random.Generator) -> int:
    """The draw of graphs/drawing.py, on the host."""
    first, second = rng.integers(0, UNIFORM, 2) / UNIFORM
    width = group_width(len(weights))
    totals = np.array([weights[start : start + width].sum() for start in range(0, len(weights), width)])
    group = pick(totals, first)
    return group * width + pick(weights[group * width : (group + 1) * width], second)


def pick(weights: Array, uniform: float) -> int:
    reached = np.cumsum(weights)
    return int(np.flatnonzero((reached > uniform * reached[-1]) & (weights > 0))[0])


def softmax_without_mask(logits: Array) -> Array:
    """SUBS: the mask is never predicted."""
    weights = np.exp(logits - logits.max())
    weights[-1] = 0.0
    shares: Array = weights / weights.sum()
    return shares


def look(model: EagerDit, canvas: Array, sigma: float) -> Array:
    """The network's output for one sequence [T, V]."""
    out: Array = model.forward(torch.from_numpy(canvas)[None], torch.tensor([sigma], dtype=torch.float64))[0].numpy()
    return out


def sample_mdlm(model: EagerDit, prompt: list[int], length: int, steps: int, seed: int) -> tuple[int, ...]:
    """The published loop: move chances t and t - dt; then the likeliest token of what is left."""
    rng, mask = np.random.default_rng(seed), model.tensors["output_layer.linear.bias"].shape[0] - 1
    canvas, dt = np.array([*prompt, *[mask] * length]), (1 - 1e-5) / steps
    for step in range(steps):
        t = 1 - step * dt
        masked = np.flatnonzero(canvas == mask)
        before = rng.random(len(masked))
        # Of the weights p(x)(t - s) and, for the mask, s, this many are the tokens' together.
        revealed = masked[before < (t - (t - dt)) / t]
        logits = look(model, canvas, 0.0)
        for place in revealed:
            canvas[place] = draw_token(softmax_without_mask(logits[place]), rng)
    logits = look(model, canvas, 0.0)
    for place in np.flatnonzero(canvas == mask):
        canvas[place] = softmax_without_mask(logits[place]).argmax()
    return tuple(canvas[len(prompt) :].tolist())


def total_noise(time: float) -> float:
    return -math.log(1 - (1 - 1e-3) * time)


def read_score(output: Array, token: int, sigma: float) -> Array:
    """SEDD's ratios [V] of one row: scaled by noise and number of states, that of the present token is 1."""
    log = output - math.log(math.exp(sigma) - 1) - math.log(len(output) - 1)
    log[token] = 0.0
    score: Array = np.exp(log)
    return score


def euler(score: Array, token: int, time: float, dt: float) -> Array:
    """Weights of the next state: reverse rate times step, on top of the present state."""
    mask = len(score) - 1
    noise_rate = (1 - 1e-3) / (1 - (1 - 1e-3) * time)
    rate = dt * noise_rate * score * (1.0 if token == mask else 0.0)
    rate[token] = 0.0
    rate[token] = -rate.sum()
    present = np.eye(len(score))[token]
    weights: Array = present + rate
    return weights


def analytic(score: Array, token: int, time: float, dt: float) -> Array:
    """Weights of the next state by Tweedie's formula over an absorbing graph."""
    mask, change = len(score) - 1, total_noise(time) - (total_noise(time - dt) if dt < time else 0.0)
    staggered = score * math.exp(change)
    staggered[mask] += (1 - math.exp(change)) * score.sum()
    reach = math.exp(-change) * np.eye(len(score))[token]
    if token == mask:
        reach = reach + (1 - math.exp(-change))
    weights: Array = staggered * reach
    return weights


PREDICTORS = {"euler": euler, "analytic": analytic}


def sample_sedd(
    model: EagerDit, prompt: list[int], length: int, steps: int, seed: int, predictor: str
) -> tuple[int, ...]:
    """The published loop over rows in order; a last step draws without the mask. Draws as the product spends its numbers."""
    rng, mask = np.random.default_rng(seed), model.tensors["output_layer.linear.bias"].shape[0] - 1
    canvas, dt = np.array([*prompt, *[mask] * length]), (1 - 1e-5) / steps
    for step in range(steps + 1):
        time = 1 - step * dt
        masked = np.flatnonzero(canvas == mask)
        chances = rng.random(len(masked))
        output = look(model, canvas, total_noise(time))
        scores = [read_score(output[place], mask, total_noise(time)) for place in masked]
        if step == steps:
            weights = [analytic(score, mask, time, time) for score in scores]
        else:
            weights = [PREDICTORS[predictor](score, mask, time, dt) for score in scores]
        tokens = [draw_token(np.append(weight[:-1], 0.0), rng) for weight in weights]
        for place, weight, chance, token in zip(masked, weights, chances, tokens, strict=True):
            stays = max(weight[-1], 0.0) if step < steps else 0.0
            if chance * (weight[:-1].sum() + stays) < weight[:-1].sum():
                canvas[place] = token
    return tuple(canvas[len(prompt) :].tolist())


@pytest.mark.parametrize("provider", ["float64", "onnxruntime"])
@pytest.mark.parametrize("steps", [6, 30])
def test_mdlm_samples_what_the_published_loop_samples(
    steps: int, provider: str, checkpoints: dict[str, Path], open_model: OpenModel
) -> None:
    eager = load_eager_dit(checkpoints["mdlm"])
    found, _ = run(open_model("mdlm", provider), options=replace(OPTIONS, steps=steps))
    for row, prompt in enumerate(PROMPTS):
        assert found[row] == sample_mdlm(eager, prompt, 12, steps, OPTIONS.seed + row)


@pytest.mark.parametrize("provider", ["float64", "onnxruntime"])
@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("steps", [6, 30])
def test_sedd_samples_what_the_published_loop_samples(
    steps: int, predictor: Any, provider: str, checkpoints: dict[str, Path], open_model: OpenModel
) -> None:
    eager = load_eager_dit(checkpoints["sedd"])
    found, passes = run(open_model("sedd", provider), Sedd(predictor=predictor), options=replace(OPTIONS, steps=steps))
    assert passes == steps + 1, "another noise level is another network: no step can be left out"
    if steps == 30:
        request = open_model("sedd", provider).continuation(PROMPTS, OPTIONS)
        frames = open_model("sedd", provider).stream(request, OPTIONS, transfer=Sedd(predictor=predictor))
        assert sum(bool(frame.committed.any()) for frame in frames) > 8, "a test of one step would be none"
    for row, prompt in enumerate(PROMPTS):
        assert found[row] == sample_sedd(eager, prompt, 12, steps, OPTIONS.seed + row, predictor)


# -- blocks
def sample_bd3lm(model: EagerDit, prompt: list[int], length: int, seed: int) -> tuple[tuple[int, ...], int]:
    """The published loop: in a block one mask after the other falls, each with the same chance. (tokens, passes)."""
    rng, mask, passes = np.random.default_rng(seed), model.tensors["output_layer.linear.bias"].shape[0] - 1, 0
    total = -(-(len(prompt) + length) // model.block) * model.block
    canvas = np.array([*prompt, *[mask] * (total - len(prompt))])
    for start in range(len(prompt) // model.block * model.block, total, model.block):
        end = start + model.block
        while (masked := start + np.flatnonzero(canvas[start:end] == mask)).size:
            place = masked[rng.random(len(masked)).argmax()]
            logits = look(model, canvas[:end], 0.0)[place]
            canvas[place] = draw_token(softmax_without_mask(logits), rng)
            passes += 1
    return tuple(canvas[len(prompt) : len(prompt) + length].tolist()), passes


@pytest.mark.parametrize("provider", ["float64", "onnxruntime"])
@pytest.mark.parametrize("policy", [NoCache(), BlockCache(), DualCache()], ids=lambda policy: policy.name)
def test_bd3lm_samples_what_the_published_loop_samples(
    policy: CachePolicy, provider: str, checkpoints: dict[str, Path], open_model: OpenModel
) -> None:
    eager, options = load_eager_dit(checkpoints["bd3lm"]), GenerationOptions(gen_length=14, seed=5)
    model = open_model("bd3lm", provider)
    assert model.bundle.manifest.sampler.transfer == "first-hitting"
    for prompt in ([7], PROMPTS[0], [*PROMPTS[0], *PROMPTS[1]]):
        found, passes = run(model, None, policy, options, [prompt])
        assert (found[0], passes) == sample_bd3lm(eager, prompt, 14, 5)
    found, _ = run(model, None, policy, options, PROMPTS)
    assert found[0] == sample_bd3lm(eager, PROMPTS[0], 14, 5)[0], "others of a batch change nothing"


# -- skipping
def test_ddpm_cache_samples_what_ddpm_samples_and_skips_every_step_that_reveals_nothing(open_model: OpenModel) -> None:
    model = open_model("mdlm", "onnxruntime")
    options = replace(OPTIONS, steps=200)
    every, cached = (
        list(model.stream(model.continuation(PROMPTS, options), options, transfer=rule))
        for rule in (Ddpm(), DdpmCache())
    )
    assert np.array_equal(every[-1].tokens, cached[-1].tokens)
    assert [frame.step for frame in every] == list(range(1, 202))
    assert every[-1].passes == 201
    revealing = [frame for frame in every if frame.committed.any()]
    assert [frame.step for frame in cached] == [frame.step for frame in revealing]
    assert cached[-1].passes == len(revealing) < 26
    for one, other in zip(revealing, cached, strict=True):
        assert np.array_equal(one.tokens, other.tokens)


def test_ddpm_cache_is_the_rule_of_the_family(open_model: OpenModel) -> None:
    model = open_model("mdlm", "onnxruntime")
    assert run(model) == run(model, DdpmCache())
    assert model.bundle.manifest.sampler.transfer == "ddpm-cache"


# -- one answer everywhere
@pytest.mark.parametrize("family", FAMILIES)
def test_providers_sample_the_same_tokens(family: str, open_model: OpenModel) -> None:
    runs = [run(open_model(family, provider)) for provider in ("torch", "onnxruntime", "float64")]
    assert runs[0] == runs[1] == runs[2]
    assert MASK not in {token for tokens in runs[0][0] for token in tokens}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_samples_what_its_sequences_sample_alone(family: str, open_model: OpenModel) -> None:
    model = open_model(family, "onnxruntime")
    together, _ = run(model)
    for row, prompt in enumerate(PROMPTS):
        assert run(model, options=replace(OPTIONS, seed=OPTIONS.seed + row), prompts=[prompt])[0] == [together[row]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "policy",
    [
        DllmCache(prompt_interval=1, response_interval=1),
        DllmCache(prompt_interval=1, response_interval=3, update_ratio=1.0),
        WindowCache(before=64, after=64),
    ],
    ids=["dllm-cache", "dllm-cache ratio 1", "window"],
)
def test_policies_that_refresh_everything_sample_what_no_cache_samples(
    policy: CachePolicy, family: str, open_model: OpenModel
) -> None:
    model = open_model(family, "onnxruntime")
    assert run(model, policy=policy)[0] == run(model)[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "policy",
    [
        DllmCache(prompt_interval=5, response_interval=2),
        DynamicDllm(),
        SpaCache(),
        PrefixCache(),
        DualCache(),
        SparseCache(),
    ],
    ids=lambda policy: policy.name,
)
def test_every_kind_of_graph_gives_the_same_samples_on_both_providers(
    policy: CachePolicy, family: str, open_model: OpenModel
) -> None:
    options = replace(OPTIONS, block_length=6)
    found, expected = (
        run(open_model(family, provider), policy=policy, options=options) for provider in ("onnxruntime", "torch")
    )
    assert found == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_guidance_samples_the_same_tokens_on_both_providers(family: str, open_model: OpenModel) -> None:
    options = replace(OPTIONS, cfg_scale=1.5)
    found, expected = (run(open_model(family, provider), options=options) for provider in ("onnxruntime", "torch"))
    assert found == expected
    assert found != run(open_model(family, "onnxruntime"))


# -- decided rows
@pytest.mark.parametrize("family", FAMILIES)
def test_a_canvas_of_masks_alone_is_sampled_without_a_prompt(family: str, open_model: OpenModel) -> None:
    options = GenerationOptions(steps=8)
    for policy in (NoCache(), DllmCache(prompt_interval=3, response_interval=2)):
        found, expected = (
            model.run(model.infilling([[MASK] * 10], options), options, policy)[0].tokens
            for model in (open_model(family, provider) for provider in ("onnxruntime", "torch"))
        )
        assert found == expected
        assert MASK not in found


@pytest.mark.parametrize("family", FAMILIES)
def test_decided_rows_never_move(family: str, open_model: OpenModel) -> None:
    model = open_model(family, "onnxruntime")
    given = [7, MASK, MASK, 8, MASK, 2, MASK, MASK, MASK, 11]
    options = GenerationOptions(steps=20)
    before = np.array(given)[1:]
    for frame in model.stream(model.infilling([given], options), options):
        decided = before != MASK
        assert np.array_equal(frame.tokens[0][decided], before[decided])
        before = frame.tokens[0]
    assert MASK not in before


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_decided_rows_keep_their_token_under_seds_updates_of_mdlms_distribution(predictor: str) -> None:
    """SUBS scores, kappa = 1 / (e^sigma - 1): 1 for a decided token, 1 / kappa for its mask; p(x) kappa of a masked row."""
    rng, time, dt = np.random.default_rng(0), 0.6, 0.1
    kappa = 1 / (math.exp(total_noise(time)) - 1)
    decided = np.zeros(9)
    decided[[3, 8]] = 1.0, 1 / kappa
    weights = PREDICTORS[predictor](decided, 3, time, dt)
    assert np.flatnonzero(np.abs(weights) > 1e-12).tolist() == [3]
    share = rng.dirichlet(np.ones(8))
    masked = PREDICTORS[predictor](np.append(share * kappa, 1.0), 8, time, dt)
    np.testing.assert_allclose(masked[:-1] / masked[:-1].sum(), share, rtol=0, atol=1e-12)
    if predictor == "analytic":
        # MDLM's own chance, with the factor of its noise that ddpm-cache leaves out: it cancels.
        np.testing.assert_allclose(masked[:-1].sum(), dt / time, rtol=0, atol=1e-12)


# -- distributions
def states(symbols: int) -> list[tuple[int, int]]:
    return list(itertools.product(range(symbols + 1), repeat=2))


def enumerate_samples(step_weights: Callable[[int, tuple[int, int], int], Array], steps: int) -> Array:
    """Exact probabilities [4, 4] of two tokens: the law of the canvas, step by step, rows independent within a step."""
    mask = SYMBOLS
    law = {state: 1.0 if state == (mask, mask) else 0.0 for state in states(SYMBOLS)}
    for step in range(steps + 1):
        after = dict.fromkeys(law, 0.0)
        for state, chance in law.items():
            if chance == 0:
                continue
            moves = [step_weights(step, state, row) for row in (0, 1)]
            for first, second in itertools.product(range(SYMBOLS + 1), repeat=2):
                after[first, second] += chance * moves[0][first] * moves[1][second]
        law = after
    return np.array([[law[first, second] for second in range(SYMBOLS)] for first in range(SYMBOLS)])


def mdlm_weights(model: EagerDit, prompt: list[int], steps: int) -> Callable[[int, tuple[int, int], int], Array]:
    """Weights of one row's next state: q of the published sampler; the likeliest token in the step after the last."""
    dt = (1 - 1e-5) / steps

    def weigh(step: int, state: tuple[int, int], row: int) -> Array:
        if state[row] != SYMBOLS:
            present: Array = np.eye(SYMBOLS + 1)[state[row]]
            return present
        shares = softmax_without_mask(look(model, np.array([*prompt, *state]), 0.0)[len(prompt) + row])
        if step == steps:
            likeliest: Array = np.eye(SYMBOLS + 1)[shares.argmax()]
            return likeliest
        now, after = (1 - 1e-3) * (1 - step * dt), (1 - 1e-3) * (1 - (step + 1) * dt)
        q = shares * (now - after)
        q[SYMBOLS] = after
        weights: Array = q / q.sum()
        return weights

    return weigh


def sedd_weights(
    model: EagerDit, prompt: list[int], steps: int, predictor: str
) -> Callable[[int, tuple[int, int], int], Array]:
    dt = (1 - 1e-5) / steps

    def weigh(step: int, state: tuple[int, int], row: int) -> Array:
        time, token = 1 - step * dt, state[row]
        output = look(model, np.array([*prompt, *state]), total_noise(time))[len(prompt) + row]
        score = read_score(output, token, total_noise(time))
        if step == steps:
            weights = analytic(score, token, time, time)
            weights[SYMBOLS] = 0.0
        else:
            weights = PREDICTORS[predictor](score, token, time, dt)
        weights = np.maximum(weights, 0.0)
        normal: Array = weights / weights.sum()
        return normal

    return weigh


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("mdlm few", Ddpm()),
        ("mdlm few", DdpmCache()),
        ("sedd few", Sedd(predictor="euler")),
        ("sedd few", Sedd(predictor="analytic")),
    ],
    ids=["ddpm", "ddpm-cache", "euler", "analytic"],
)
def test_samples_are_distributed_as_enumeration_says(
    name: str, rule: Transfer, checkpoints: dict[str, Path], open_model: OpenModel
) -> None:
    """Two tokens of four symbols, few steps, so that rows are often revealed together and what that costs is in the law."""
    steps, prompt, count, runs = 3, [2], 1000, 8
    eager = load_eager_dit(checkpoints[name])
    weights = (
        sedd_weights(eager, prompt, steps, rule.predictor)
        if isinstance(rule, Sedd)
        else mdlm_weights(eager, prompt, steps)
    )
    expected = enumerate_samples(weights, steps).ravel()
    np.testing.assert_allclose(expected.sum(), 1, rtol=0, atol=1e-12)
    model, counts = open_model(name, "onnxruntime"), np.zeros(SYMBOLS**2)
    for block in range(runs):
        options = GenerationOptions(gen_length=2, steps=steps, seed=block * count)
        tokens = np.array(run(model, rule, options=options, prompts=[prompt] * count)[0])
        counts += np.bincount(tokens[:, 0] * SYMBOLS + tokens[:, 1], minlength=SYMBOLS**2)
    total = count * runs
    assert (expected * total).min() > 5, "too few of some outcome for chi-square"
    # 15 degrees of freedom: a right sampler exceeds 37.70 with one seed in 1000.
    assert ((counts - expected * total) ** 2 / (expected * total)).sum() < 37.70
    # And the test can tell: independent rows with the same marginals are another law.
    grid = expected.reshape(SYMBOLS, SYMBOLS)
    other = np.outer(grid.sum(1), grid.sum(0)).ravel() * total
    assert ((counts - other) ** 2 / other).sum() > 100


# -- what does not go together
def test_a_model_that_sees_the_noise_level_takes_a_rule_that_states_it(open_model: OpenModel) -> None:
    model = open_model("sedd", "onnxruntime")
    for rule in (Quota(), Threshold(), DdpmCache()):
        with pytest.raises(UsageError, match=f"--transfer {rule.name} does not have: take --transfer sedd"):
            run(model, rule, options=GenerationOptions(gen_length=4))
    with pytest.raises(UsageError, match="--transfer sedd reads a model's ratios"):
        run(open_model("mdlm", "onnxruntime"), Sedd())


def test_a_prefix_is_not_shared_where_the_noise_level_changes_it(open_model: OpenModel) -> None:
    model = open_model("sedd", "onnxruntime")
    request = model.share(model.continuation(PROMPTS[:1], OPTIONS), PROMPTS[0][:3], depth=1)
    with pytest.raises(UsageError, match="a shared prefix does not go with a model that sees the noise level"):
        model.run(request, OPTIONS, SharedPrefix())
    with pytest.raises(UsageError, match="features of a prefix cannot be shared"):
        measure_profile(model.session, model.bundle.manifest, [3, 1], [[3, 1, 4]], 0.9)


def test_options_that_a_random_order_ignores_are_refused(open_model: OpenModel) -> None:
    with pytest.raises(UsageError, match="--confidence-eos-eot-inf has no effect with --transfer ddpm-cache"):
        run(open_model("mdlm", "onnxruntime"), options=replace(OPTIONS, confidence_eos_eot_inf=True))


@pytest.mark.parametrize("changes", [{"eps": 0.0}, {"eps": 1.0}, {"predictor": "ddim"}])
def test_settings_of_sedd_are_checked(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(changes))):
        Sedd(**changes)
