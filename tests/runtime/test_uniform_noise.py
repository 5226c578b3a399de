"""SEDD over the uniform graph, from checkpoint to samples: against plain loops, and in distribution against enumeration."""

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
from dllm_export.exporter.verify import verify
from dllm_export.graphs import ModelShape
from dllm_export.graphs.drawing import group_width
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import CachePolicy, DllmCache, DualCache, NoCache, SpaCache, WindowCache
from dllm_export.runtime.transfers import Ddpm, Quota, Sedd, SeddUniform, Transfer
from dllm_export.tools.eager_dit import EagerDit, load_eager_dit
from dllm_export.tools.random_checkpoint import write_random_checkpoint

Array = NDArray[Any]
OpenModel = Callable[[str, str], DiffusionLM]

SHAPE = ModelShape(
    layers=2,
    hidden=16,
    heads=2,
    kv_heads=2,
    head_dim=8,
    mlp=64,
    vocab=41,
    max_length=64,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_float32=False,
    norm="layer",
    mlp_kind="gelu",
    mlp_bias=True,
    head_bias=True,
    uniform_noise=True,
)
HOLE = SHAPE.vocab
"""Marks places to fill; no state of the model."""
PROMPTS = ([3, 1, 4, 1, 5], [9, 2, 6])
OPTIONS = GenerationOptions(gen_length=10, steps=7, seed=5)
SYMBOLS = 4
UNIFORM = 2**23
PREDICTORS = ("euler", "analytic")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, and one of four symbols. Heads are weak, so that no outcome is too rare to be counted."""
    root = tmp_path_factory.mktemp("uniform")
    written = {}
    for name, shape in (("many", SHAPE), ("few", replace(SHAPE, vocab=SYMBOLS))):
        written[name] = write_random_checkpoint(root / name, shape, family="sedd", seed=3)
        file = written[name] / "model.safetensors"
        save_file({key: value * (0.35 if "linear" in key else 1) for key, value in load_file(file).items()}, file)
    return written


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
) -> list[tuple[int, ...]]:
    results = model.run(model.continuation(prompts, options), options, policy, transfer)
    return [result.tokens for result in results]


# -- the published formulas, by matrices
def total_noise(time: float) -> float:
    return -math.log(1 - (1 - 1e-3) * time)


def rates(states: int) -> Array:
    """The uniform graph: a token leaves for each of the n tokens at rate 1/n."""
    matrix: Array = np.full((states, states), 1 / states) - np.eye(states)
    return matrix


def flow(noise: float, states: int) -> Array:
    """exp(noise Q): where tokens are after so much noise."""
    moved: Array = torch.matrix_exp(torch.from_numpy(rates(states) * noise)).numpy()
    return moved


def euler(score: Array, token: int, time: float, dt: float) -> Array:
    noise_rate = (1 - 1e-3) / (1 - (1 - 1e-3) * time)
    rate = dt * noise_rate * rates(len(score)).T[token] * score
    rate[token] = 0.0
    rate[token] = -rate.sum()
    weights: Array = np.eye(len(score))[token] + rate
    return np.maximum(weights, 0)


def analytic(score: Array, token: int, time: float, dt: float) -> Array:
    """Tweedie's formula: the score, run back through the noise, times the chance to have come from there."""
    change = total_noise(time) - (total_noise(time - dt) if dt < time else 0.0)
    back, forth = flow(-change, len(score)), flow(change, len(score))
    weights: Array = (back @ score) * forth[token]
    return np.maximum(weights, 0)


def weigh(score: Array, token: int, step: int, steps: int, predictor: str) -> Array:
    """Weights of a row's next token; the step after the last takes all noise away."""
    dt = (1 - 1e-5) / steps
    time = 1 - step * dt
    if step == steps:
        return analytic(score, token, time, time)
    return (euler if predictor == "euler" else analytic)(score, token, time, dt)


def read_score(output: Array, token: int) -> Array:
    """Ratios [V] of one row: unscaled over this graph, 1 for the present token."""
    log = output.copy()
    log[token] = 0.0
    score: Array = np.exp(log)
    return score


def look(model: EagerDit, canvas: Array, step: int, steps: int) -> Array:
    """The network's output for one sequence [T, V]."""
    sigma = torch.tensor([total_noise(1 - step * (1 - 1e-5) / steps)], dtype=torch.float64)
    out: Array = model.forward(torch.from_numpy(canvas)[None], sigma)[0].numpy()
    return out


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


def sample(
    model: EagerDit, prompt: list[int], length: int, steps: int, seed: int, predictor: str
) -> tuple[tuple[int, ...], int]:
    """The published loop; (tokens, moves): the start is uniform, all rows move at once, and one step more denoises."""
    rng, vocab, moves = np.random.default_rng(seed), model.tensors["output_layer.linear.bias"].shape[0], 0
    canvas = np.array([*prompt, *rng.integers(0, vocab, length)])
    for step in range(steps + 1):
        output, before = look(model, canvas, step, steps), canvas.copy()
        for place in range(len(prompt), len(canvas)):
            token = before[place]
            weights = weigh(read_score(output[place], token), token, step, steps, predictor)
            canvas[place] = draw_token(weights, rng)
        moves += int((canvas != before).sum())
    return tuple(canvas[len(prompt) :].tolist()), moves


@pytest.mark.parametrize("provider", ["float64", "onnxruntime"])
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_it_samples_what_the_published_loop_samples(
    predictor: Any, provider: str, checkpoints: dict[str, Path], open_model: OpenModel
) -> None:
    eager = load_eager_dit(checkpoints["many"])
    found = run(open_model("many", provider), SeddUniform(predictor=predictor))
    for row, prompt in enumerate(PROMPTS):
        expected, moves = sample(eager, prompt, 10, 7, OPTIONS.seed + row, predictor)
        assert found[row] == expected
        assert moves > 8, "a test in which tokens hardly move would be none"


@pytest.mark.parametrize("states", [2, 5, 40])
@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("step", [1, 4, 6])
def test_four_numbers_say_what_matrices_say(step: int, predictor: Any, states: int) -> None:
    """Weights in closed form are those of the matrix exponential, up to a common factor."""
    steps, rng = 5, np.random.default_rng(step)
    a, b, c, d = SeddUniform(predictor=predictor).move_weights(step, steps, states)
    score, token = np.exp(rng.normal(size=states)), 1
    score[token] = 1.0
    found = a * score - b * score.sum()
    found[token] = c - d * score.sum()
    expected = weigh(score, token, step - 1, steps, predictor)
    found = np.maximum(found, 0)
    np.testing.assert_allclose(found / found.sum(), expected / expected.sum(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("step", [1, 3, 6])
def test_with_the_true_ratios_of_one_token_an_analytic_step_goes_back_exactly(step: int) -> None:
    """p(t) = exp(sigma Q) p(0) is known; a step from it must arrive at p of the next time, and the last at p(0)."""
    steps, start = 5, np.array([0.6, 0.3, 0.08, 0.02])
    times = [1 - (1 - 1e-5) * place / steps for place in (step - 1, step)]
    now = flow(total_noise(times[0]), 4) @ start
    after = flow(total_noise(times[1]), 4) @ start if step <= steps else start
    arrived = np.zeros(4)
    for token, chance in enumerate(now):
        a, b, c, d = SeddUniform(predictor="analytic").move_weights(step, steps, 4)
        score = now / chance
        weights = a * score - b * score.sum()
        weights[token] = c - d * score.sum()
        assert weights.min() > -1e-15
        arrived += chance * weights / weights.sum()
    np.testing.assert_allclose(arrived, after, rtol=0, atol=1e-12)


# -- distributions
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_samples_are_distributed_as_enumeration_says(
    predictor: Any, checkpoints: dict[str, Path], open_model: OpenModel
) -> None:
    """Two tokens of four symbols, few steps, so that both often move together and what that costs is in the law."""
    steps, prompt, count, runs = 3, [2], 1000, 7
    eager, pairs = load_eager_dit(checkpoints["few"]), list(itertools.product(range(SYMBOLS), repeat=2))
    law = dict.fromkeys(pairs, 1 / SYMBOLS**2)
    for step in range(steps + 1):
        after = dict.fromkeys(pairs, 0.0)
        for state, chance in law.items():
            output = look(eager, np.array([*prompt, *state]), step, steps)
            moves = [
                weigh(read_score(output[row + 1], state[row]), state[row], step, steps, predictor) for row in (0, 1)
            ]
            first, second = (weights / weights.sum() for weights in moves)
            for pair in pairs:
                after[pair] += chance * first[pair[0]] * second[pair[1]]
        law = after
    expected = np.array([law[pair] for pair in pairs])
    np.testing.assert_allclose(expected.sum(), 1, rtol=0, atol=1e-12)
    model, counts = open_model("few", "onnxruntime"), np.zeros(SYMBOLS**2)
    for block in range(runs):
        options = GenerationOptions(gen_length=2, steps=steps, seed=block * count)
        tokens = np.array(run(model, SeddUniform(predictor=predictor), options=options, prompts=[prompt] * count))
        counts += np.bincount(tokens[:, 0] * SYMBOLS + tokens[:, 1], minlength=SYMBOLS**2)
    total = count * runs
    assert (expected * total).min() > 5, "too few of some outcome for chi-square"
    # 15 degrees of freedom: a right sampler exceeds 37.70 with one seed in 1000.
    assert ((counts - expected * total) ** 2 / (expected * total)).sum() < 37.70
    # And the test can tell: independent rows with the same marginals are another law.
    grid = expected.reshape(SYMBOLS, SYMBOLS)
    other = np.outer(grid.sum(1), grid.sum(0)).ravel() * total
    assert ((counts - other) ** 2 / other).sum() > 60, (counts, other)


# -- one answer everywhere
def test_providers_sample_the_same_tokens_and_a_batch_what_its_sequences_sample(open_model: OpenModel) -> None:
    runs = [run(open_model("many", provider)) for provider in ("torch", "onnxruntime", "float64")]
    assert runs[0] == runs[1] == runs[2]
    assert max(itertools.chain(*runs[0])) < SHAPE.vocab
    model = open_model("many", "onnxruntime")
    assert run(model, options=replace(OPTIONS, seed=OPTIONS.seed + 1), prompts=PROMPTS[1:]) == runs[0][1:]


@pytest.mark.parametrize(
    "policy",
    [DllmCache(prompt_interval=1, response_interval=1), WindowCache(before=64, after=64)],
    ids=["dllm-cache", "window"],
)
def test_policies_that_refresh_everything_sample_what_no_cache_samples(
    policy: CachePolicy, open_model: OpenModel
) -> None:
    model = open_model("many", "onnxruntime")
    assert run(model, policy=policy) == run(model)


@pytest.mark.parametrize(
    "policy",
    [DllmCache(prompt_interval=5, response_interval=2), SpaCache(), DualCache()],
    ids=lambda policy: policy.name,
)
def test_caches_give_the_same_samples_on_both_providers(policy: CachePolicy, open_model: OpenModel) -> None:
    assert run(open_model("many", "onnxruntime"), policy=policy) == run(open_model("many", "torch"), policy=policy)


def test_an_export_verifies(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["many"]
    report = verify(bundle)
    assert report.passed
    assert report.agreement == 1.0
    assert "graph head_moved" in {check.name for check in report.checks}
    manifest = bundle.manifest
    assert (manifest.sampler.transfer, manifest.tokens.mask) == ("sedd-uniform", HOLE)


# -- rows
def test_given_rows_never_move_and_every_other_may_until_the_end(open_model: OpenModel) -> None:
    model, given = open_model("many", "onnxruntime"), [7, HOLE, HOLE, 8, HOLE, 2, HOLE, HOLE, HOLE, 11]
    options = GenerationOptions(steps=5)
    frames = list(model.stream(model.infilling([given], options), options))
    asked = np.array(given)[1:] == HOLE
    for frame in frames:
        assert frame.drafts is not None
        assert frame.drafts.max() < SHAPE.vocab
        assert np.array_equal(frame.drafts[0][~asked], np.array(given)[1:][~asked])
        assert (frame.tokens[0] == HOLE).tolist() == (asked & (frame is not frames[-1])).tolist()
    assert np.array_equal(frames[-1].committed[0], asked)
    assert len(np.unique([frame.drafts[0] for frame in frames], axis=0)) > 3, "they moved"
    assert np.isfinite(frames[-1].confidence[0][asked]).all()


def test_an_end_that_is_never_chosen_is_not_in_the_noise_either(open_model: OpenModel) -> None:
    model = open_model("few", "onnxruntime")
    end, options = model.bundle.manifest.tokens.eos, GenerationOptions(gen_length=40, steps=2, seed=1)
    assert end in run(model, options=options, prompts=[[1]])[0]
    assert end not in run(model, options=replace(options, logits_eos_inf=True), prompts=[[1]])[0]


# -- what does not go together
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.5}, "--temperature is 0.5, but --transfer sedd-uniform draws by ratios"),
        ({"block_length": 5, "steps": None}, "--block-length does not go with --transfer sedd-uniform"),
        ({"cfg_scale": 1.5}, "--cfg-scale does not go with --transfer sedd-uniform"),
        ({"early_stop": True}, "--early-stop has no effect with --transfer sedd-uniform"),
        ({"confidence_eos_eot_inf": True}, "--confidence-eos-eot-inf has no effect"),
        ({"top_k": 4}, "--top-p and --top-k have no effect"),
        ({"remasking": "random"}, "--remasking random has no effect"),
    ],
)
def test_options_that_mean_nothing_are_refused(changes: dict[str, Any], message: str, open_model: OpenModel) -> None:
    with pytest.raises(UsageError, match=message):
        run(open_model("many", "onnxruntime"), options=replace(OPTIONS, **changes))


@pytest.mark.parametrize("rule", [Quota(), Ddpm()], ids=lambda rule: rule.name)
def test_a_rule_without_a_noise_level_is_refused(rule: Transfer, open_model: OpenModel) -> None:
    with pytest.raises(UsageError, match=f"--transfer {rule.name} does not have: take --transfer sedd-uniform"):
        run(open_model("many", "onnxruntime"), rule, options=GenerationOptions(gen_length=4))


def test_the_rule_for_masks_is_refused(open_model: OpenModel) -> None:
    with pytest.raises(
        UsageError, match="for the other kind of noise: this model's is any token, take --transfer sedd-uniform"
    ):
        run(open_model("many", "onnxruntime"), Sedd())


def test_ids_behind_the_vocabulary_are_refused_in_a_prompt(open_model: OpenModel) -> None:
    for token in (HOLE, HOLE + 1, -1):
        with pytest.raises(UsageError, match=r"holds the mask token|outside 0..40"):
            run(open_model("many", "onnxruntime"), prompts=[[1, token]])
