"""Plaid from its four files to text: against the formulas in float64, and its sampler against exact Gaussian posteriors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from dllm_export.errors import CheckpointError, DllmExportError, IntegrityError, UsageError
from dllm_export.exporter.build_options import BuildOptions
from dllm_export.exporter.checkpoint import expected_tensors, open_checkpoint
from dllm_export.exporter.onnx_graph import build_onnx
from dllm_export.exporter.options import ExportOptions, ExportType
from dllm_export.exporter.pipeline import export
from dllm_export.exporter.plans import build_plan
from dllm_export.exporter.ranges import make_profiles
from dllm_export.exporter.verify import run_graph, verify
from dllm_export.graphs import ModelShape, graph_specs
from dllm_export.graphs.families import FAMILIES, Source
from dllm_export.runtime.bundle import Bundle, open_bundle
from dllm_export.runtime.latent import level_table
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.noise_schedule import NoiseSchedule, open_schedule
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import POLICIES, NoCache
from dllm_export.runtime.rope import rotary_tables
from dllm_export.runtime.session import SessionOptions, open_session
from dllm_export.runtime.sessions.torch import TorchSession
from dllm_export.runtime.tensorrt.library import load_tensorrt
from dllm_export.runtime.transfers import TRANSFERS, Ancestral, Quota
from dllm_export.runtime.transfers.ancestral import draw_before, scales
from dllm_export.tools import cli
from dllm_export.tools.random_checkpoint import write_random_checkpoint

Array = NDArray[Any]
OpenModel = Callable[[str], DiffusionLM]

SHAPE = ModelShape(
    layers=3,
    hidden=32,
    heads=4,
    kv_heads=4,
    head_dim=8,
    mlp=128,
    vocab=61,
    max_length=1024,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_float32=False,
    mlp_kind="gelu",
    head_bias=True,
    latent=16,
)
FILES = ("model.pt", "embedding_matrix.pt", "noise_schedule.pt", "gamma_bounds.pt")
OPTIONS = GenerationOptions(gen_length=9, steps=12, seed=4)
NO_TOKENIZER = ExportOptions(no_tokenizer=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four files; not to be written to."""
    return write_random_checkpoint(tmp_path_factory.mktemp("plaid") / "model", SHAPE, family="plaid", seed=2)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(checkpoint, tmp_path_factory.mktemp("plaid") / "bundle", NO_TOKENIZER)


@pytest.fixture(scope="module")
def open_plaid(bundle: Bundle) -> Iterator[OpenModel]:
    with ExitStack() as stack:

        def open_one(provider: str) -> DiffusionLM:
            options = SessionOptions(provider="torch" if provider == "float64" else provider, threads=1)
            if provider == "float64":
                return stack.enter_context(DiffusionLM(bundle, TorchSession(bundle, options, dtype="float64")))
            return stack.enter_context(DiffusionLM(bundle, open_session(bundle, options)))

        yield open_one


# -- the published formulas, slowly and in float64
class Reference:
    """The network and the schedule over the tensors of the four files."""

    def __init__(self, directory: Path) -> None:
        parts = {name: torch.load(directory / name, weights_only=True) for name in FILES}
        self.parts = {name: {key: value.double() for key, value in part.items()} for name, part in parts.items()}
        self.model = self.parts["model.pt"]
        table = self.parts["embedding_matrix.pt"]["matrix"]
        self.latents = table / (table.norm(dim=1, keepdim=True) + 1e-8)

    def gamma(self, time: float) -> float:
        schedule, bounds = self.parts["noise_schedule.pt"], self.parts["gamma_bounds.pt"]
        units = [schedule[name].flatten().tolist() for name in ("W1", "b1", "W2")]

        def rise(time: float) -> float:
            total = 0.0
            for rate, bias, share in zip(*units, strict=True):
                positive, weight = math.log1p(math.exp(rate)), 0.01 * math.log1p(math.exp(share))
                total += weight * math.tanh((time - 0.5) * positive + bias)
            return total

        first, last = bounds["gamma_0"].item(), bounds["gamma_1"].item()
        return first + (last - first) * (rise(time) - rise(0.0)) / (rise(1.0) - rise(0.0))

    def forward(self, z: Tensor, gamma: float, estimate: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [T, V], estimate of the clean vectors [T, w]) of one sequence."""
        alpha, sigma = math.sqrt(1 / (1 + math.exp(gamma))), math.sqrt(1 / (1 + math.exp(-gamma)))
        width, length = z.shape[1], len(z)
        x = (z / math.sqrt(alpha**2 / width + sigma**2)) @ self.model["input_linear.weight"].T
        x = x + (estimate * math.sqrt(width)) @ self.model["selfcond_linear.weight"].T
        angles = torch.tensor([math.exp(-5 + 10 * place / 31) * gamma for place in range(32)], dtype=torch.float64)
        x = x + torch.cat((angles.sin(), angles.cos())) @ self.model["gamma_linear.weight"].T
        heads, head_dim = SHAPE.heads, SHAPE.head_dim
        for layer in range(SHAPE.layers):
            block = {key.split(".", 2)[2]: value for key, value in self.model.items() if f"blocks.{layer}." in key}
            packed = self.rms(x, block["rmsnorm1.weight"]) @ block["attn_qkv.weight"].T
            query, key, value = packed.view(length, 3, heads, head_dim).permute(1, 2, 0, 3)
            scores = turn(query) @ turn(key).transpose(1, 2) / math.sqrt(head_dim)
            mixed = (scores.softmax(-1) @ value).transpose(0, 1).reshape(length, -1)
            x = x + mixed @ block["attn_out.weight"].T / math.sqrt(SHAPE.layers)
            inner = gelu(self.rms(x, block["rmsnorm2.weight"]) @ block["mlp.fc1.weight"].T, approximate="tanh")
            x = x + inner @ block["mlp.fc2.weight"].T / math.sqrt(SHAPE.layers)
        out = layer_norm(x, x.shape[-1:]) * self.model["output_norm.weight"] / (x.shape[-1] / 256)
        logits = out @ self.model["output_linear.weight"].T + self.model["output_linear.bias"]
        logits = logits + alpha / sigma**2 * z @ self.latents.T
        return logits, logits.softmax(-1) @ self.latents

    @staticmethod
    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def turn(x: Tensor) -> Tensor:  # [heads, T, d]
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None] * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    low, high = x[..., :half], x[..., half:]
    return torch.cat((low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()), -1)


def sample(model: Reference, length: int, steps: int, seed: int, temperature: float) -> tuple[int, ...]:
    """The published loop."""
    rng = np.random.default_rng(seed)
    z = torch.from_numpy(rng.standard_normal((length, SHAPE.latent)))
    estimate = torch.zeros_like(z)
    for t in np.linspace(1, 0, steps).tolist():
        gamma, gamma_s = model.gamma(t), model.gamma(t - 1 / steps) if t > 0 else 0.0
        _, estimate = model.forward(z, gamma, estimate)
        alpha, sigma = math.sqrt(1 / (1 + math.exp(gamma))), math.sqrt(1 / (1 + math.exp(-gamma)))
        noise = (z - alpha * estimate) / sigma / temperature
        clean = (z - sigma * noise) / alpha
        if t > 0:
            c, alpha_s = -math.expm1(gamma_s - gamma), math.sqrt(1 / (1 + math.exp(gamma_s)))
            z = z * (1 - c) * alpha_s / alpha + c * alpha_s * clean
            z = z + math.sqrt(c * (1 - alpha_s**2)) * torch.from_numpy(rng.standard_normal((length, SHAPE.latent)))
    logits, _ = model.forward(z, gamma, estimate)
    return tuple(logits.argmax(-1).tolist())


def test_a_step_gives_what_the_published_formulas_give(bundle: Bundle, checkpoint: Path) -> None:
    """The graphs in float64. Folded weights were rounded to float32, and rotary angles and noise levels are float32 as
    published: 1e-7 of each; a term that is left out is seen from 1e-2 on."""
    model, rng = Reference(checkpoint), np.random.default_rng(0)
    latent, estimate = rng.standard_normal((2, 2, 7, SHAPE.latent))
    cos, sin = rotary_tables(SHAPE, np.tile(np.arange(7), (2, 1)))
    for gamma in (-3.0, 0.25, 6.0):
        alpha, sigma = scales(gamma)
        entering = {
            "latent": latent,
            "estimate": estimate,
            "level": np.tile(level_table(gamma), (2, 1)),
            "latent_scale": np.array([(alpha**2 / 16 + sigma**2) ** -0.5]),
        }
        with TorchSession(bundle, SessionOptions(provider="torch"), dtype="float64") as session:
            hidden = run_graph(bundle, session, "embed_latent", None, entering)["hidden_out"]
            for layer in range(SHAPE.layers):
                feeds = {"hidden": hidden, "cos": cos, "sin": sin, "mask": np.ones((2, 7), np.bool_)}
                hidden = run_graph(bundle, session, "layer_full", layer, feeds)["hidden_out"]
            leaving = {"hidden": hidden, "latent": latent, "pull": np.array([alpha / sigma**2])}
            found = run_graph(bundle, session, "head_latent", None, leaving)
        for row in range(2):
            logits, expected = model.forward(torch.from_numpy(latent[row]), gamma, torch.from_numpy(estimate[row]))
            np.testing.assert_allclose(found["estimate_out"][row], expected, rtol=0, atol=2e-5)
            assert found["token"][row].tolist() == logits.argmax(-1).tolist()
            np.testing.assert_allclose(found["confidence"][row], logits.softmax(-1).amax(-1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("provider", ["float64", "onnxruntime", "torch"])
def test_it_samples_what_the_published_loop_samples(provider: str, checkpoint: Path, open_plaid: OpenModel) -> None:
    lm, model = open_plaid(provider), Reference(checkpoint)
    results = lm.run(lm.unconditional(2, OPTIONS), OPTIONS)
    for row, result in enumerate(results):
        assert result.tokens == sample(model, 9, 12, OPTIONS.seed + row, 0.9)
        assert result.passes == 13
        assert min(result.confidence) > 0
    assert results[0].tokens != results[1].tokens
    plain = Ancestral(score_temperature=1.0)
    (sharp,) = lm.run(lm.unconditional(1, OPTIONS), OPTIONS, transfer=plain)
    assert sharp.tokens == sample(model, 9, 12, OPTIONS.seed, 1.0)


def test_vectors_change_in_every_step_and_tokens_are_decided_in_the_last(open_plaid: OpenModel) -> None:
    lm = open_plaid("onnxruntime")
    frames = list(lm.stream(lm.unconditional(1, OPTIONS), OPTIONS))
    assert [frame.step for frame in frames] == list(range(1, 14))
    assert all((frame.tokens == SHAPE.vocab).all() and not frame.committed.any() for frame in frames[:-1])
    last = frames[-1]
    assert last.drafts is not None
    assert np.array_equal(last.tokens, last.drafts)
    assert last.committed.all()
    assert len({tuple(frame.drafts[0].tolist()) for frame in frames if frame.drafts is not None}) > 3


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_export_verifies(dtype: ExportType, checkpoint: Path, tmp_path: Path) -> None:
    bundle = export(checkpoint, tmp_path / "bundle", ExportOptions(dtype=dtype, no_tokenizer=True))
    report = verify(bundle)
    names = {check.name for check in report.checks}
    assert {"graph embed_latent", "graph layer_full layer 2", "graph head_latent", "generation none"} < names
    failed = [check for check in report.checks if not check.passed]
    # In half precision the tokens of a chain of drawn vectors part early, and need not agree.
    assert not [check for check in failed if dtype == "float32" or not check.name.startswith("generation")], failed


@pytest.mark.parametrize(
    "tensor", ["rmsnorm2.weight", "attn_out.weight", "output_linear.bias", "selfcond_linear.weight", "matrix"]
)
def test_the_probe_tells_a_bundle_of_other_tensors(
    tensor: str, checkpoint: Path, bundle: Bundle, tmp_path: Path
) -> None:
    """The weights of one export beside the probe of another whose checkpoint differs in one tensor."""
    for name in FILES:
        part = torch.load(checkpoint / name, weights_only=True)
        part = {key: value.flip(0) * 1.3 if key.endswith(tensor) else value for key, value in part.items()}
        torch.save(part, tmp_path / name)
    other = export(tmp_path, tmp_path / "other", NO_TOKENIZER)
    (other.path / "probe.safetensors").write_bytes(bundle.file("probe.safetensors").read_bytes())
    assert not verify(other).passed


def test_tensorrt_builds_every_graph() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX has wheels for Linux on x86-64 only")
    library, options = load_tensorrt("tensorrt-rtx"), BuildOptions(flavour="tensorrt-rtx", sm="8.9")
    specs = graph_specs(SHAPE)
    assert list(specs) == ["embed_latent", "layer_full", "head_latent"]
    for name, spec in specs.items():
        graph = build_onnx(spec, SHAPE, "float16").SerializeToString()
        profiles = make_profiles("tensorrt-rtx", spec, SHAPE.max_length, options)
        assert build_plan(library, graph, spec, "float16", profiles, ("8.9",))[0], name


# -- the sampler on distributions that are known
def test_a_step_draws_from_the_exact_posterior() -> None:
    """Of two jointly normal numbers: z_s = alpha_s x + sigma_s e, and z_t is z_s, shrunk and with more noise."""
    rng = np.random.default_rng(3)
    for gamma, before in ((6.0, 5.5), (0.3, -1.0), (-2.9, -3.0)):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = scales(gamma), scales(before)
        x, z = rng.normal(size=2)
        shrink = alpha_t / alpha_s
        added = sigma_t**2 - shrink**2 * sigma_s**2
        precision = 1 / sigma_s**2 + shrink**2 / added
        mean = (alpha_s * x / sigma_s**2 + shrink * z / added) / precision
        found = [draw_before(np.array([z]), np.array([x]), gamma, before, np.array([noise]))[0] for noise in (0.0, 1.0)]
        np.testing.assert_allclose(found[0], mean, rtol=0, atol=1e-12)
        np.testing.assert_allclose((found[1] - found[0]) ** 2, 1 / precision, rtol=1e-10)


def test_all_steps_together_arrive_at_the_law_of_the_data(bundle: Bundle) -> None:
    """Clean numbers of variance v have a linear posterior mean: so is every step, and the variance can be followed exactly."""
    schedule, rule = open_schedule(bundle), Ancestral(score_temperature=1.0)

    def arrive(steps: int, variance: float) -> float:
        spread = 1.0
        for step in range(1, steps):
            time = rule.time(step, steps)
            gamma, before = schedule.gamma(time), schedule.gamma(time - 1 / steps)
            alpha, sigma = scales(gamma)
            one, nothing = np.ones(1), np.zeros(1)
            estimate = one * alpha * variance / (alpha**2 * variance + sigma**2)
            factor = draw_before(one, rule.sharpen(one, estimate, gamma), gamma, before, nothing)[0]
            noise = draw_before(nothing, nothing, gamma, before, one)[0]
            spread = factor**2 * spread + noise**2
        return float(spread)

    for variance in (0.2, 1.0):
        alpha, sigma = scales(schedule.gamma(0.0))
        wanted = alpha**2 * variance + sigma**2
        errors = [abs(arrive(steps, variance) / wanted - 1) for steps in (50, 400)]
        # A step takes the mean of the clean numbers for their value: an error of the first order.
        assert errors[1] < 0.02
        assert errors[1] < errors[0] / 3


def test_a_score_temperature_divides_the_estimated_noise() -> None:
    rng = np.random.default_rng(1)
    latent, estimate = rng.normal(size=(2, 1, 3, 4))
    alpha, sigma = scales(0.7)
    for temperature in (1.0, 0.9):
        clean = Ancestral(score_temperature=temperature).sharpen(latent, estimate, 0.7)
        expected = (latent - alpha * estimate) / sigma / temperature
        np.testing.assert_allclose((latent - alpha * clean) / sigma, expected, rtol=0, atol=1e-12)


def test_the_schedule_is_the_published_network(bundle: Bundle, checkpoint: Path) -> None:
    schedule, model = open_schedule(bundle), Reference(checkpoint)
    times = np.linspace(0, 1, 21)
    found = np.array([schedule.gamma(time) for time in times])
    np.testing.assert_allclose(found, [model.gamma(time) for time in times.tolist()], rtol=0, atol=1e-12)
    assert (found[0], found[-1]) == (-3.0, 6.0)
    assert (np.diff(found) > 0).all()
    assert isinstance(schedule, NoiseSchedule)


# -- the files
def test_the_released_sizes_are_the_published_parameters() -> None:
    config = FAMILIES["plaid"].read_config(
        Source(config={"vocab_size": 32768, "embed_dim": 16, "dim": 2048, "n_blocks": 24})
    )
    assert (config.shape.heads, config.shape.head_dim, config.shape.mlp) == (32, 64, 8192)
    schedule = 3 * 1024 + 2  # its tensors and the bounds, which the published number leaves out
    assert sum(math.prod(shape) for shape in expected_tensors(config).values()) == 1_275_922_432 + schedule
    assert config.shape.weight_count == pytest.approx(1_275_922_432, rel=2e-4)
    assert (config.branch_scale, config.head_scale) == (24**-0.5, 0.125)
    assert len(config.assumed) == 2


def change(
    folder: Path, checkpoint: Path, file: str, changed: Callable[[dict[str, Tensor]], Mapping[str, Any]]
) -> Path:
    """A copy of the checkpoint with one file changed."""
    folder.mkdir()
    for name in FILES:
        part = torch.load(checkpoint / name, weights_only=True)
        torch.save(dict(changed(part)) if name == file else part, folder / name)
    return folder


BROKEN: dict[str, tuple[str, Callable[[dict[str, Tensor]], Mapping[str, Any]], str]] = {
    "no embedding": ("embedding_matrix.pt", lambda part: {}, "embedding_matrix.pt has no tensor 'matrix'"),
    "flat": ("embedding_matrix.pt", lambda part: {"matrix": part["matrix"][0]}, "'matrix' has shape (16,), expected 2"),
    "no layer": ("model.pt", lambda part: {k: v for k, v in part.items() if "blocks" not in k}, "'n_blocks' is 0"),
    "a tensor less": (
        "model.pt",
        lambda part: {k: v for k, v in part.items() if "fc2" not in k},
        "lacks 'model.blocks.0.mlp.fc2",
    ),
    "a tensor more": ("model.pt", lambda part: {**part, "spare": torch.ones(2)}, "holds 'model.spare', which"),
    "other heads": (
        "model.pt",
        lambda part: {**part, "rotary_emb.inv_freq": torch.ones(5)},
        "cannot be cut into heads of 10",
    ),
    "falling": (
        "gamma_bounds.pt",
        lambda part: {"gamma_0": torch.tensor(6.0), "gamma_1": torch.tensor(-3.0)},
        "noise must rise",
    ),
    "not a number": ("noise_schedule.pt", lambda part: {**part, "b1": part["b1"] * math.nan}, "holds NaN or infinity"),
    "whole numbers": ("noise_schedule.pt", lambda part: {**part, "b1": part["b1"].int()}, "expected plain floats"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_checkpoint_is_refused_in_one_sentence(case: str, checkpoint: Path, tmp_path: Path) -> None:
    file, changed, message = BROKEN[case]
    folder = change(tmp_path / "broken", checkpoint, file, changed)
    with pytest.raises(CheckpointError, match=re.escape(message)) as refused:
        export(folder, tmp_path / "bundle", NO_TOKENIZER)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("missing", FILES)
def test_a_missing_file_is_named(missing: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = change(tmp_path / "part", checkpoint, "", dict)
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=f"shard {missing} is missing"):
        export(folder, tmp_path / "bundle", NO_TOKENIZER)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def test_nothing_in_a_file_is_executed(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = change(tmp_path / "evil", checkpoint, "model.pt", lambda part: {**part, "more": Payload()})
    with pytest.raises(IntegrityError, match=r"model\.pt is damaged or holds more than tensors"):
        export(folder, tmp_path / "bundle", NO_TOKENIZER)
    assert not (tmp_path / "executed").exists()


def test_files_without_a_rotary_buffer_have_heads_of_the_released_width(checkpoint: Path, tmp_path: Path) -> None:
    folder = change(
        tmp_path / "plain", checkpoint, "model.pt", lambda part: {k: v for k, v in part.items() if "rotary" not in k}
    )
    with pytest.raises(CheckpointError, match="a width of 32 cannot be cut into heads of 64 dimensions"):
        open_checkpoint(folder)


def test_pt_files_of_no_known_family_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"never opened")
    with pytest.raises(DllmExportError, match=r"config\.json"):
        open_checkpoint(tmp_path)


def test_a_mask_id_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--mask-id 3 is for models with a mask"):
        export(checkpoint, tmp_path / "bundle", ExportOptions(no_tokenizer=True, mask_id=3))


def test_a_bundle_reads_back_as_it_was_written(bundle: Bundle) -> None:
    assert open_bundle(bundle.path).manifest == bundle.manifest
    assert bundle.manifest.shape == SHAPE
    assert (bundle.manifest.schedule, bundle.manifest.sampler.transfer) == ("schedule.safetensors", "ancestral")


# -- what does not go together
def test_no_cache_policy_applies(open_plaid: OpenModel) -> None:
    """Nor is there a graph that one could run."""
    lm = open_plaid("onnxruntime")
    assert {"layer_partial", "layer_adaptive"}.isdisjoint(lm.bundle.specs)
    for name in POLICIES.keys() - {NoCache.name}:
        with pytest.raises(UsageError, match=f"--policy {name} does not apply: this model denoises vectors"):
            lm.run(lm.unconditional(1, OPTIONS), OPTIONS, POLICIES[name]())


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"temperature": 0.5}, "--temperature"),
        ({"top_p": 0.5}, "--top-p"),
        ({"top_k": 3}, "--top-k"),
        ({"block_length": 3}, "--block-length"),
        ({"cfg_scale": 1.0}, "--cfg-scale"),
        ({"remasking": "random"}, "--remasking"),
        ({"logits_eos_inf": True}, "--logits-eos-inf"),
        ({"early_stop": True}, "--early-stop"),
        ({"steps": 1}, "--steps is 1"),
        ({"gen_length": 1025}, "--gen-length is 1025, but the model was trained for 1024"),
    ],
)
def test_options_that_choose_tokens_are_refused(changes: dict[str, Any], flag: str, open_plaid: OpenModel) -> None:
    lm, options = open_plaid("onnxruntime"), GenerationOptions(**{"gen_length": 9, **changes})
    with pytest.raises(UsageError, match=flag):
        lm.run(lm.unconditional(1, options), options)


def test_rules_that_choose_rows_are_refused_here_and_this_one_elsewhere(
    open_plaid: OpenModel, open_model: OpenModel
) -> None:
    lm, options = open_plaid("onnxruntime"), GenerationOptions(gen_length=4)
    for rule in (Quota(), TRANSFERS["sedd"](), TRANSFERS["sedd-uniform"]()):
        with pytest.raises(UsageError, match="this model denoises vectors: take --transfer ancestral"):
            lm.run(lm.unconditional(1, options), options, transfer=rule)
    other = open_model("onnxruntime")
    with pytest.raises(UsageError, match="denoises vectors, and this model has tokens alone"):
        other.run(other.continuation([[1, 2]], options), options, transfer=Ancestral())
    with pytest.raises(UsageError, match="only continuous models sample without"):
        other.unconditional(1, options)


def test_it_takes_no_prompt_and_no_infilling(open_plaid: OpenModel) -> None:
    lm = open_plaid("onnxruntime")
    for make in (lm.continuation, lm.infilling):
        with pytest.raises(UsageError, match="samples unconditionally and takes no prompt"):
            make([[1, 2, 3]], OPTIONS)
    with pytest.raises(UsageError, match="0 texts were asked for"):
        lm.unconditional(0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_score_temperature_is_a_positive_number(temperature: float) -> None:
    with pytest.raises(UsageError, match="--score-temperature is"):
        Ancestral(score_temperature=temperature)


# -- the command line
def test_the_command_line_samples_without_a_prompt_and_says_so_of_one(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["generate", str(bundle.path), "--threads", "1", "--gen-length", "9", "--steps", "12", "--seed", "4"]
    assert cli.run([*line, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert len(first["tokens"]) == 9
    assert first["settings"]["transfer"] == {"name": "ancestral", "score_temperature": 0.9}
    assert cli.run([*line, "--score-temperature", "0.5", "--transfer", "ancestral", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] != first["tokens"]
    assert cli.run([*line, "--watch"]) == 0
    capsys.readouterr()
    refused = (["--prompt-ids", "1 2"], ["--prompt", "a"], ["--infill", "a"], ["--chat"])
    for more, message in (*((flags, "takes no prompt") for flags in refused), (["--policy", "spa"], "does not apply")):
        assert cli.run([*line, *more]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n") <= 2) == ("", True)
        assert message in err
    assert cli.run(["inspect", str(bundle.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "plaid"
