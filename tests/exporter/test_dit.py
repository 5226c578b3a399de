"""MDLM's and SEDD's checkpoints: layers that the time modulates, folded where it is always the same, in pieces elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dllm_export.errors import CheckpointError, UsageError
from dllm_export.exporter.build_options import BuildOptions
from dllm_export.exporter.checkpoint import expected_tensors, open_checkpoint
from dllm_export.exporter.folding import condition, fold_layer, fold_norm, split_layer, time_table
from dllm_export.exporter.onnx_graph import build_onnx
from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pipeline import export
from dllm_export.exporter.plans import build_plan
from dllm_export.exporter.ranges import make_profiles
from dllm_export.exporter.verify import Check, check_probe, verify
from dllm_export.exporter.weights import fuse_layer, transpose
from dllm_export.graphs import ModelShape, graph_specs
from dllm_export.graphs.families import Source, SpecialTokens, detect_family
from dllm_export.graphs.torch_ops import TorchOps
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.session import SessionOptions, open_session
from dllm_export.runtime.tensorrt.library import load_tensorrt
from dllm_export.tools.demo_layouts import byte_tokenizer
from dllm_export.tools.eager_dit import EagerDit, load_eager_dit
from dllm_export.tools.random_checkpoint import write_random_checkpoint

# kuleshov-group/mdlm-owt's file.
MDLM: dict[str, Any] = {
    "architectures": ["MDLM"],
    "auto_map": {"AutoConfig": "configuration_mdlm.MDLMConfig", "AutoModelForMaskedLM": "modeling_mdlm.MDLM"},
    "cond_dim": 128,
    "dropout": 0.1,
    "hidden_dim": 768,
    "model_length": 1024,
    "model_type": "mdlm",
    "n_blocks": 12,
    "n_heads": 12,
    "return_dict": False,
    "time_conditioning": False,
    "torch_dtype": "float32",
    "vocab_size": 50258,
}
SHAPE = ModelShape(
    layers=3,
    hidden=32,
    heads=4,
    kv_heads=4,
    head_dim=8,
    mlp=128,
    vocab=264,
    max_length=64,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_float32=False,
    norm="layer",
    mlp_kind="gelu",
    mlp_bias=True,
    head_bias=True,
)
PARAMETERS = 169_627_218


@pytest.fixture(scope="module")
def mdlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights; not to be written to."""
    return write_random_checkpoint(tmp_path_factory.mktemp("mdlm") / "model", SHAPE, family="mdlm")


@pytest.fixture(scope="module")
def sedd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the family that sees the noise level; not to be written to."""
    return write_random_checkpoint(tmp_path_factory.mktemp("sedd") / "model", SHAPE, family="sedd")


@pytest.fixture(scope="module")
def eager(mdlm: Path) -> EagerDit:
    return load_eager_dit(mdlm)


# -- config.json
def read(*without: str, **changes: object) -> Any:
    source = Source(config={key: value for key, value in {**MDLM, **changes}.items() if key not in without})
    return detect_family(source).read_config(source)


def test_the_released_configuration_is_the_published_model() -> None:
    config = read()
    released = replace(SHAPE, layers=12, hidden=768, heads=12, kv_heads=12, head_dim=64, mlp=3072)
    assert config.shape == replace(released, vocab=50258, max_length=1024)
    assert config.tokens == SpecialTokens(mask=50257, eos=50256, pad=50256)
    assert (config.family, config.conditioning) == ("mdlm", 128)
    assert len(config.assumed) == 3


def test_the_tensors_of_the_released_model_are_its_parameters() -> None:
    expected = expected_tensors(read())
    assert sum(int(np.prod(shape)) for shape in expected.values()) == PARAMETERS
    assert expected["backbone.vocab_embed.embedding"] == (50258, 768)
    assert expected["backbone.blocks.11.adaLN_modulation.weight"] == (4608, 128)
    assert expected["backbone.output_layer.linear.bias"] == (50258,)


def test_a_missing_width_of_the_conditioning_is_that_of_the_published_class() -> None:
    assert read("cond_dim").conditioning == 129


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"time_conditioning": True}, "'time_conditioning' is true"),
        ({"n_heads": 7}, "hidden_dim 768 and n_heads 7 do not fit"),
        ({"vocab_size": 50000}, "no mask_token_id"),
        ({"hidden_dim": None}, "no 'hidden_dim'"),
        ({"n_blocks": 0}, "'n_blocks' is 0"),
    ],
)
def test_a_configuration_that_no_release_has_is_refused_by_key(changes: dict[str, object], what: str) -> None:
    with pytest.raises(CheckpointError, match=what):
        read(**changes)


# louaaron/sedd-small's file, without its training settings.
SEDD: dict[str, Any] = {
    "graph": {"file": "data", "report_all": False, "type": "absorb"},
    "model": {
        "cond_dim": 128,
        "dropout": 0.1,
        "hidden_size": 768,
        "length": 1024,
        "n_blocks": 12,
        "n_heads": 12,
        "name": "small",
        "scale_by_sigma": True,
        "type": "ddit",
    },
    "noise": {"sigma_max": 20, "sigma_min": 0.0001, "type": "loglinear"},
    "tokens": 50257,
}


def read_sedd(part: str = "model", **changes: object) -> Any:
    raw = {**SEDD, part: {**SEDD[part], **changes}}
    source = Source(config=raw)
    return detect_family(source).read_config(source)


def test_a_nested_configuration_is_sedd() -> None:
    config = read_sedd()
    assert (config.family, config.conditioning, config.shape.conditioning) == ("sedd", 128, 128)
    assert config.tokens == SpecialTokens(mask=50257, eos=50256, pad=50256)
    expected = expected_tensors(config)
    assert sum(int(np.prod(shape)) for shape in expected.values()) == PARAMETERS
    assert "vocab_embed.embedding" in expected


def test_the_medium_model_is_the_published_one() -> None:
    config = read_sedd(hidden_size=1024, n_blocks=24, n_heads=16, name="medium")
    assert sum(int(np.prod(shape)) for shape in expected_tensors(config).values()) == 424_477_010


@pytest.mark.parametrize(
    ("part", "changes", "what"),
    [
        ("graph", {"type": "gaussian"}, "'graph.type' is 'gaussian', expected 'absorb' or 'uniform'"),
        ("graph", {"type": ["absorb"]}, "'graph.type' is .'absorb'., expected 'absorb' or 'uniform'"),
        ("graph", {"type": "uniform"}, "'model.scale_by_sigma' is True, expected False"),
        ("noise", {"type": "geometric"}, "'noise.type' is 'geometric'"),
        ("model", {"scale_by_sigma": False}, "'model.scale_by_sigma' is False"),
        ("model", {"cond_dim": None}, "no 'cond_dim'"),
    ],
)
def test_a_sedd_that_cannot_be_sampled_is_refused_by_key(part: str, changes: dict[str, object], what: str) -> None:
    with pytest.raises(CheckpointError, match=what):
        read_sedd(part, **changes)


def test_over_the_uniform_graph_the_vocabulary_has_no_mask() -> None:
    raw = {**SEDD, "graph": {**SEDD["graph"], "type": "uniform"}, "model": {**SEDD["model"], "scale_by_sigma": False}}
    config = detect_family(Source(config=raw)).read_config(Source(config=raw))
    assert (config.shape.vocab, config.shape.uniform_noise, config.logit_offset) == (50257, True, 0.0)
    assert config.tokens == SpecialTokens(mask=50257, eos=50256, pad=50256)
    assert config.sampler.transfer == "sedd-uniform"
    # One row fewer in embedding, head and head bias than the absorbing model, whose ratios carry an offset.
    expected = sum(int(np.prod(shape)) for shape in expected_tensors(config).values())
    assert expected == PARAMETERS - 2 * 768 - 1
    assert read_sedd().logit_offset < -10
    with pytest.raises(CheckpointError, match="--mask-id 5 is for models with a mask"):
        detect_family(Source(config=raw)).read_config(Source(config=raw, mask_id=5))


# -- folding
def raw_tensors(path: Path) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Tensors of every layer, and those outside, by slot and in float64."""
    checkpoint = open_checkpoint(path)
    names = checkpoint.config.names
    with checkpoint.reading() as load:
        layers = [
            {slot: load(names.in_layer(slot, layer)).double() for slot in checkpoint.config.stored_slots(layer)}
            for layer in range(SHAPE.layers)
        ]
        others = {slot: load(name).double() for slot, name in names.others.items()}
        others |= {"embedding": load(names.embedding).double(), "norm": load(names.norm).double()}
        others |= {"head": load(names.head).double().T}
    return layers, others


def rotary() -> dict[str, torch.Tensor]:
    """Tables in double precision: the runtime's angles are float32, as the published ones are."""
    angle = torch.arange(11.0).double()[:, None] * 1e4 ** (-torch.arange(0, 8, 2).double() / 8)
    return {"cos": angle.cos().expand(2, -1, -1), "sin": angle.sin().expand(2, -1, -1)}


@pytest.mark.parametrize("sigma", [0.0, 0.75])
def test_folded_layers_equal_the_published_formula_in_double_precision(
    sigma: float, mdlm: Path, eager: EagerDit
) -> None:
    """The whole network over the graphs' functions. Noise level 0 is the released one; another shows that the time counts."""
    layers, others = raw_tensors(mdlm)
    conditioning = condition(others, sigma)
    torch.testing.assert_close(conditioning, eager.condition(torch.tensor([sigma]))[0], rtol=0, atol=1e-14)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, SHAPE.vocab, (2, 11)))
    context = {**rotary(), "mask": torch.ones(2, 11, dtype=torch.bool)}
    specs, ops = graph_specs(SHAPE), TorchOps()
    hidden = specs["embed"].function(ops, SHAPE, {"tokens": tokens, "embedding": others["embedding"]})["hidden_out"]
    for raw in layers:
        weights = fuse_layer(fold_layer(raw, conditioning))
        assert weights.keys() == {weight.name for weight in specs["layer_full"].weights}
        hidden = specs["layer_full"].function(ops, SHAPE, {"hidden": hidden, **context, **weights})["hidden_out"]
    plain = {slot: tensor for slot, tensor in others.items() if "modulation" not in slot}
    top = {**plain, **fold_norm(others, conditioning)}
    index = torch.arange(11).expand(2, 11)
    inputs = {"hidden": hidden, "index": index, "given": index, "bias": torch.zeros(SHAPE.vocab)}
    found = specs["head"].function(ops, SHAPE, {**inputs, **top})
    logits = eager.forward(tokens, torch.full((2,), sigma))
    expected = logits.gather(-1, found["top_tokens"].long())
    torch.testing.assert_close(found["top_logits"], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found["logsumexp"], logits.logsumexp(-1), rtol=0, atol=1e-12)


def test_a_gate_that_was_left_out_would_be_seen(mdlm: Path, eager: EagerDit) -> None:
    layers, others = raw_tensors(mdlm)
    folded = fold_layer(layers[0], condition(others, 0.0))
    assert (folded["out"] - layers[0]["out"]).abs().max() > 0.1
    assert folded["norm1_bias"].abs().max() > 0.1
    other = fold_layer(layers[0], condition(others, 0.7))
    assert (folded["down_bias"] - other["down_bias"]).abs().max() > 1e-3


@pytest.mark.parametrize("sigma", [0.25, 3.0])
def test_layers_that_see_the_noise_level_equal_the_published_formula_in_double_precision(
    sigma: float, sedd: Path
) -> None:
    """The pieces of one layer's modulation, each in its place: every noise level comes out right from the same weights."""
    shape, model = open_checkpoint(sedd).config.shape, load_eager_dit(sedd)
    layers, others = raw_tensors(sedd)
    ops, specs = TorchOps(), graph_specs(shape)
    time = {slot: transpose(tensor) for slot, tensor in others.items() if slot.startswith("time")}
    table = time_table(sigma).expand(2, -1)
    timed = {"condition": specs["condition"].function(ops, shape, {"time": table, **time})["condition_out"]}
    torch.testing.assert_close(timed["condition"], model.condition(torch.full((2,), sigma)), rtol=0, atol=1e-14)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, shape.vocab, (2, 11)))
    hidden = others["embedding"][tokens]
    context = {**rotary(), "mask": torch.ones(2, 11, dtype=torch.bool), **timed}
    for raw in layers:
        weights = fuse_layer(split_layer(raw))
        assert weights.keys() == {weight.name for weight in specs["layer_full"].weights}
        hidden = specs["layer_full"].function(ops, shape, {"hidden": hidden, **context, **weights})["hidden_out"]
    index = torch.arange(11).expand(2, 11)
    inputs = {"hidden": hidden, "index": index, "given": index, "bias": torch.zeros(shape.vocab), **timed}
    top = {**others, "norm_modulation": others["norm_modulation"].T}
    found = specs["head"].function(ops, shape, {**inputs, **top})
    logits = model.forward(tokens, torch.full((2,), sigma))
    torch.testing.assert_close(found["logsumexp"], logits.logsumexp(-1), rtol=0, atol=1e-12)


# -- bundles
@pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, conditioning=16)], ids=["mdlm", "sedd"])
def test_tensorrt_builds_every_graph(shape: ModelShape) -> None:
    """Of the model that sees the noise level those that are not byte for byte the other's."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX has wheels for Linux on x86-64 only")
    library, options = load_tensorrt("tensorrt-rtx"), BuildOptions(flavour="tensorrt-rtx", sm="8.9")
    graphs = write_graphs(replace(shape, indicator_rank=8))
    if shape != SHAPE:
        other = write_graphs(replace(SHAPE, indicator_rank=8))
        graphs = {name: graph for name, graph in graphs.items() if graph != other.get(name)}
    assert {"layer_full", "layer_partial", "layer_adaptive", "layer_indicated"} <= graphs.keys()
    for name, graph in graphs.items():
        spec = graph_specs(replace(shape, indicator_rank=8))[name]
        profiles = make_profiles("tensorrt-rtx", spec, shape.max_length, options)
        assert build_plan(library, graph, spec, "float16", profiles, ("8.9",))[0], name


def write_graphs(shape: ModelShape) -> dict[str, bytes]:
    """Every graph in ONNX."""
    return {name: build_onnx(spec, shape, "float16").SerializeToString() for name, spec in graph_specs(shape).items()}


def test_tensorrt_builds_the_graph_that_moves_tokens() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX has wheels for Linux on x86-64 only")
    library, options = load_tensorrt("tensorrt-rtx"), BuildOptions(flavour="tensorrt-rtx", sm="8.9")
    shape = replace(SHAPE, conditioning=16, uniform_noise=True)
    spec = graph_specs(shape)["head_moved"]
    graph = build_onnx(spec, shape, "float16").SerializeToString()
    profiles = make_profiles("tensorrt-rtx", spec, shape.max_length, options)
    assert build_plan(library, graph, spec, "float16", profiles, ("8.9",))[0]


def test_an_export_that_sees_the_noise_level_verifies(sedd: Path, tmp_path: Path) -> None:
    bundle = export(sedd, tmp_path / "bundle", ExportOptions(no_tokenizer=True))
    report = verify(bundle)
    assert report.passed
    assert {"graph condition", "probe onnxruntime: head"} < {check.name for check in report.checks}
    assert bundle.manifest.architecture == "sedd"


@pytest.mark.parametrize("form", ["embedded", "float16"])
def test_other_forms_of_the_export_verify(form: str, sedd: Path, mdlm: Path, tmp_path: Path) -> None:
    half = form == "float16"
    for name, path in (("mdlm", mdlm), ("sedd", sedd)):
        options = ExportOptions(
            no_tokenizer=True, dtype="float16" if half else "float32", weights="bound" if half else "embedded"
        )
        bundle = export(path, tmp_path / name, options)
        with closing(open_session(bundle, SessionOptions())) as session:
            assert all(check.passed for check in check_probe(bundle, session, "onnxruntime", 5e-2 if half else 2e-3))


def test_an_export_verifies_against_the_unfolded_probe(mdlm: Path, tmp_path: Path) -> None:
    bundle = export(mdlm, tmp_path / "bundle", ExportOptions(no_tokenizer=True))
    report = verify(bundle)
    assert report.passed
    assert report.agreement == 1.0
    assert {check.name for check in report.checks} > {"probe onnxruntime: layers", "graph head_drawn"}
    assert bundle.manifest.architecture == "MDLM"


@pytest.mark.parametrize(
    "tensor",
    [
        "blocks.1.adaLN_modulation.bias",
        "blocks.0.mlp.2.bias",
        "output_layer.adaLN_modulation.weight",
        "output_layer.linear.bias",
        "sigma_map.mlp.0.bias",
    ],
)
def test_the_probe_tells_a_bundle_of_other_constants(tensor: str, mdlm: Path, tmp_path: Path) -> None:
    """The weights of one export beside the probe of another whose checkpoint differs in one tensor."""
    changed = tmp_path / "changed"
    changed.mkdir()
    tensors = load_file(mdlm / "model.safetensors")
    tensors[f"backbone.{tensor}"] = tensors[f"backbone.{tensor}"].flip(0) * 1.3
    save_file(tensors, changed / "model.safetensors")
    (changed / "config.json").write_text((mdlm / "config.json").read_text())
    options = ExportOptions(no_tokenizer=True)
    one, other = export(mdlm, tmp_path / "one", options), export(changed, tmp_path / "other", options)
    probe = other.path / "probe.safetensors"
    probe.write_bytes(one.file("probe.safetensors").read_bytes())
    assert [check.name for check in verify_probe(other) if not check.passed]


def verify_probe(bundle: Bundle) -> list[Check]:
    with closing(open_session(bundle, SessionOptions(provider="torch"))) as session:
        return list(check_probe(bundle, session, "torch", 2e-3))


# -- BD3-LM
@pytest.fixture
def bd3lm(tmp_path: Path) -> Path:
    """A checkpoint with the buffers that its class stores beside the weights."""
    path = write_random_checkpoint(tmp_path / "bd3lm", replace(SHAPE, block=4), family="bd3lm")
    tensors = load_file(path / "model.safetensors")
    buffers = {"sampling_eps_min": torch.tensor(1e-3), "backbone.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**tensors, **buffers}, path / "model.safetensors")
    return path


def test_bd3lm_is_exported_and_its_graphs_verify(bd3lm: Path, tmp_path: Path) -> None:
    bundle = export(bd3lm, tmp_path / "bundle", ExportOptions(no_tokenizer=True))
    assert (bundle.manifest.family, bundle.manifest.shape.block) == ("bd3lm", 4)
    report = verify(bundle)
    assert report.passed
    assert [check.name for check in report.checks[-3:]] == [
        f"generation {name}" for name in ("none", "dllm-cache", "block")
    ]


@pytest.mark.parametrize(
    "changes", [{"causal": True}, {"adaln": False}, {"block_size": 0}, {"time_conditioning": True}]
)
def test_a_bd3lm_that_no_release_is_is_refused(changes: dict[str, object], bd3lm: Path) -> None:
    raw = {**json.loads((bd3lm / "config.json").read_text()), **changes}
    source = Source(config=raw)
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        detect_family(source).read_config(source)


# -- tokenizer
def test_a_missing_tokenizer_names_the_one_to_bring(mdlm: Path, refuse: Callable[..., str]) -> None:
    message = refuse(mdlm, CheckpointError)
    assert "family mdlm are published without one and use GPT-2's" in message
    assert "--tokenizer" in message
    assert "--no-tokenizer" in message


def test_a_tokenizer_of_another_directory_comes_with_the_bundle(mdlm: Path, tmp_path: Path) -> None:
    (tmp_path / "gpt2").mkdir()
    byte_tokenizer().save(str(tmp_path / "gpt2" / "tokenizer.json"))
    bundle = export(mdlm, tmp_path / "bundle", ExportOptions(tokenizer=tmp_path / "gpt2"))
    assert bundle.manifest.tokenizer is not None
    assert "tokenizer.json" in bundle.manifest.source


def test_a_tokenizer_and_none_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--tokenizer and --no-tokenizer contradict"):
        ExportOptions(tokenizer=tmp_path, no_tokenizer=True)


def test_the_random_checkpoint_is_in_the_published_layout(mdlm: Path) -> None:
    assert json.loads((mdlm / "config.json").read_text()).keys() >= MDLM.keys()
