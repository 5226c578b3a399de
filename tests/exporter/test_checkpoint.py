"""Model directories: every published form is read the same, and whatever is wrong is refused before a bundle exists."""

from __future__ import annotations

import json
import math
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dllm_export.errors import CheckpointError, DllmExportError, IntegrityError
from dllm_export.exporter.checkpoint import expected_tensors, open_checkpoint
from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pipeline import export
from dllm_export.graphs.families import FAMILIES, Source
from dllm_export.runtime.bundle import Bundle

WriteCheckpoint = Callable[..., Path]
Refuse = Callable[..., str]
Tensors = dict[str, torch.Tensor]

FORMS = ("safetensors", "safetensors shards", "bin", "bin shards")
QUERY = "model.transformer.blocks.1.q_proj.weight"
HEAD = "model.transformer.ff_out.weight"
FIRST_SHARD = "model-00001-of-00003.safetensors"
SECOND_SHARD = "model-00002-of-00003.safetensors"


def weight_digests(bundle: Bundle) -> dict[str, str]:
    return {file.path: file.sha256 for file in bundle.manifest.files if file.path.startswith(("weights/", "probe"))}


def edit_index(model: Path, edit: Callable[[dict[str, str]], object]) -> Path:
    """Change the weight map of a sharded directory."""
    file = model / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    edit(index["weight_map"])
    file.write_text(json.dumps(index))
    return model


# -- forms
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_checkpoint_gives_the_same_weights(
    form: str, write_checkpoint: WriteCheckpoint, tmp_path: Path, bundle: Bundle
) -> None:
    other = export(write_checkpoint(tmp_path / "model", form=form), tmp_path / "bundle")
    assert weight_digests(other) == weight_digests(bundle)


def test_safetensors_win_over_pickled_weights(
    write_checkpoint: WriteCheckpoint, tmp_path: Path, bundle: Bundle
) -> None:
    model = write_checkpoint(tmp_path / "model")
    (model / "pytorch_model.bin").write_bytes(b"never opened")
    assert weight_digests(export(model, tmp_path / "bundle")) == weight_digests(bundle)


def test_a_directory_of_links_as_in_a_hub_cache_is_read(
    write_checkpoint: WriteCheckpoint, tmp_path: Path, bundle: Bundle
) -> None:
    blobs = write_checkpoint(tmp_path / "blobs", form="safetensors shards")
    (tmp_path / "snapshot").mkdir()
    for number, file in enumerate(sorted(blobs.iterdir())):
        blob = file.rename(blobs / f"{number:064x}")
        (tmp_path / "snapshot" / file.name).symlink_to(Path("../blobs") / blob.name)
    assert weight_digests(export(tmp_path / "snapshot", tmp_path / "bundle")) == weight_digests(bundle)


@pytest.mark.parametrize("form", FORMS)
def test_stored_rotary_frequencies_are_ignored(
    form: str, write_checkpoint: WriteCheckpoint, tmp_path: Path, bundle: Bundle
) -> None:
    extra = {f"model.transformer.blocks.{layer}.rotary_emb.inv_freq": torch.ones(4) for layer in range(3)}
    model = write_checkpoint(tmp_path / "model", form=form, tensors=extra)
    assert weight_digests(export(model, tmp_path / "bundle")) == weight_digests(bundle)


def test_block_groups_hold_the_same_weights(
    write_checkpoint: WriteCheckpoint, base_tensors: Tensors, tmp_path: Path, bundle: Bundle
) -> None:
    renamed: dict[str, torch.Tensor | None] = dict.fromkeys(base_tensors)
    for name, tensor in base_tensors.items():
        parts = name.split(".")
        if parts[2] == "blocks":
            parts[2:4] = ["block_groups", str(int(parts[3]) // 2), str(int(parts[3]) % 2)]
        renamed[".".join(parts)] = tensor
    model = write_checkpoint(tmp_path / "model", tensors=renamed, config={"block_group_size": 2})
    assert weight_digests(export(model, tmp_path / "bundle")) == weight_digests(bundle)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_stored_type_may_differ_from_the_exported_one(
    dtype: torch.dtype, write_checkpoint: WriteCheckpoint, base_tensors: Tensors, tmp_path: Path
) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in base_tensors.items()}
    bundle = export(write_checkpoint(tmp_path / "model", tensors=stored), tmp_path / "bundle")
    for layer in range(3):
        weights = load_file(bundle.file(f"weights/layer.{layer:03d}.safetensors"))
        down = stored[f"model.transformer.blocks.{layer}.ff_out.weight"]
        assert torch.equal(weights["down"], down.float().T)


def test_the_first_layers_alone_can_be_exported(
    write_checkpoint: WriteCheckpoint, tmp_path: Path, bundle: Bundle, refuse: Refuse
) -> None:
    model = write_checkpoint(tmp_path / "model")
    short = export(model, tmp_path / "bundle", ExportOptions(num_layers=2))
    assert short.manifest.shape.layers == len(short.manifest.layer_bindings) == 2
    kept = {
        name: digest
        for name, digest in weight_digests(bundle).items()
        if name not in ("weights/layer.002.safetensors",)
    }
    assert {name for name in weight_digests(short)} == set(kept)
    assert weight_digests(short)["weights/layer.001.safetensors"] == kept["weights/layer.001.safetensors"]


@pytest.mark.parametrize("layers", [0, -1, 4])
def test_a_layer_count_outside_the_model_is_refused_with_the_range(
    layers: int, checkpoint: Path, refuse: Refuse
) -> None:
    message = refuse(checkpoint, CheckpointError, ExportOptions(num_layers=layers))
    assert message == f"--num-layers is {layers}, expected 1 to 3"


def test_the_released_8b_model_has_291_tensors() -> None:
    raw = {
        "architectures": ["LLaDAModelLM"], "activation_type": "silu", "block_type": "llama", "d_model": 4096,
        "embedding_size": 126464, "layer_norm_type": "rms", "max_sequence_length": 4096, "mlp_hidden_size": 12288,
        "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "rope": True, "vocab_size": 126464, "weight_tying": False,
    }  # fmt: skip
    expected = expected_tensors(FAMILIES["llada"].read_config(Source(config=raw)))
    assert len(expected) == 291
    assert sum(math.prod(shape) for shape in expected.values()) == 8_015_581_184
    assert expected["model.transformer.wte.weight"] == expected[HEAD] == (126464, 4096)
    assert expected["model.transformer.blocks.31.ff_proj.weight"] == (12288, 4096)
    assert expected["model.transformer.blocks.0.ff_out.weight"] == (4096, 12288)
    assert expected["model.transformer.blocks.7.k_proj.weight"] == (4096, 4096)
    assert expected["model.transformer.ln_f.weight"] == (4096,)


def test_grouped_heads_biases_and_tying_change_the_expected_tensors() -> None:
    raw = {
        "architectures": ["LLaDAModelLM"], "activation_type": "silu", "block_type": "llama", "d_model": 64,
        "embedding_size": 100, "layer_norm_type": "rms", "mlp_hidden_size": 96, "n_heads": 4, "n_kv_heads": 2,
        "n_layers": 2, "rope": True, "mask_token_id": 99, "eos_token_id": 98, "pad_token_id": 98,
        "include_qkv_bias": True,
    }  # fmt: skip
    expected = expected_tensors(FAMILIES["llada"].read_config(Source(config=raw)))
    assert HEAD not in expected  # weight_tying is true unless the file says otherwise
    assert len(expected) == 2 * (9 + 3) + 2
    assert expected["model.transformer.blocks.1.k_proj.weight"] == (32, 64)
    assert expected["model.transformer.blocks.1.q_proj.bias"] == (64,)
    assert expected["model.transformer.blocks.1.v_proj.bias"] == (32,)


# -- code in the directory
def test_python_files_of_a_checkpoint_are_never_imported(
    write_checkpoint: WriteCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "executed"
    auto_map = {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"}
    model = write_checkpoint(tmp_path / "model", config={"auto_map": auto_map})
    for name in ("__init__", "modeling_llada", "configuration_llada", "tokenization_llada", "sitecustomize"):
        (model / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise SystemExit('imported')\n")
    monkeypatch.chdir(model)
    export(model, tmp_path / "bundle")
    assert not marker.exists()
    assert not [name for name in sys.modules if name.split(".")[-1] in ("modeling_llada", "configuration_llada")]


class Bomb:
    """Unpickles to a call that leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_code_in_a_pickled_checkpoint_is_refused_and_not_run(
    form: str, write_checkpoint: WriteCheckpoint, tmp_path: Path, refuse: Refuse
) -> None:
    model = write_checkpoint(tmp_path / "model", form="bin")
    content = {"model.transformer.wte.weight": Bomb(tmp_path / "executed")}
    if form == "plain pickle":
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, model / "pytorch_model.bin", _use_new_zipfile_serialization=form == "zip")
    message = refuse(model, IntegrityError)
    assert "pytorch_model.bin" in message
    assert "it was not loaded" in message
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content", [[torch.ones(2)], torch.ones(2), {"a": 1}, {"state_dict": {"a": torch.ones(2)}}, None]
)
def test_a_pickled_checkpoint_that_is_no_state_dict_is_refused(
    content: object, write_checkpoint: WriteCheckpoint, tmp_path: Path, refuse: Refuse
) -> None:
    model = write_checkpoint(tmp_path / "model", form="bin")
    torch.save(content, model / "pytorch_model.bin")
    message = refuse(model, IntegrityError)
    assert "pytorch_model.bin" in message


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn], ids=str)
def test_weights_that_are_no_plain_floats_are_refused(
    dtype: torch.dtype, form: str, write_checkpoint: WriteCheckpoint, tmp_path: Path
) -> None:
    model = write_checkpoint(tmp_path / "model", form=form, tensors={QUERY: torch.ones(32, 32).to(dtype)})
    with pytest.raises(DllmExportError, match=r"q_proj|model\.(safetensors|bin)"):
        export(model, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_sparse_weights_are_refused(write_checkpoint: WriteCheckpoint, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", form="bin", tensors={QUERY: torch.eye(32).to_sparse()})
    with pytest.raises(DllmExportError, match=r"q_proj|model\.bin"):
        export(model, tmp_path / "bundle")


def test_a_pickled_checkpoint_of_the_format_before_zip_is_read(
    write_checkpoint: WriteCheckpoint, base_tensors: Tensors, tmp_path: Path, bundle: Bundle
) -> None:
    model = write_checkpoint(tmp_path / "model", form="bin")
    torch.save(base_tensors, model / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert weight_digests(export(model, tmp_path / "bundle")) == weight_digests(bundle)


def test_a_truncated_pickled_checkpoint_is_refused(
    write_checkpoint: WriteCheckpoint, tmp_path: Path, refuse: Refuse
) -> None:
    model = write_checkpoint(tmp_path / "model", form="bin shards")
    shard = model / "pytorch_model-00002-of-00003.bin"
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert shard.name in refuse(model, IntegrityError)


# -- tensors
def test_a_missing_tensor_is_named(write_checkpoint: WriteCheckpoint, tmp_path: Path, refuse: Refuse) -> None:
    message = refuse(write_checkpoint(tmp_path / "model", tensors={QUERY: None}), CheckpointError)
    assert f"lacks '{QUERY}'" in message
    assert "a shard is missing or config.json is another model's" in message


def test_many_missing_tensors_are_counted(write_checkpoint: WriteCheckpoint, tmp_path: Path, refuse: Refuse) -> None:
    model = write_checkpoint(tmp_path / "model", config={"n_layers": 4})
    message = refuse(model, CheckpointError)
    assert "'model.transformer.blocks.3.attn_norm.weight'" in message
    assert "and 6 more" in message


def test_an_extra_tensor_is_named(write_checkpoint: WriteCheckpoint, tmp_path: Path, refuse: Refuse) -> None:
    model = write_checkpoint(tmp_path / "model", tensors={"model.transformer.wpe.weight": torch.ones(2)})
    message = refuse(model, CheckpointError)
    assert (
        "holds 'model.transformer.wpe.weight', which this model does not use; remove it or fix config.json" in message
    )


def test_a_tensor_of_another_shape_is_named_with_both_shapes(
    write_checkpoint: WriteCheckpoint, tmp_path: Path, refuse: Refuse
) -> None:
    message = refuse(write_checkpoint(tmp_path / "model", tensors={QUERY: torch.ones(32, 16)}), CheckpointError)
    assert message == f"tensor '{QUERY}' is (32, 16), expected (32, 32) from config.json"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["model.transformer.wte.weight", QUERY, "model.transformer.ln_f.weight", HEAD])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_value_that_is_no_number_is_refused_by_tensor_and_file(
    form: str,
    name: str,
    value: float,
    write_checkpoint: WriteCheckpoint,
    base_tensors: Tensors,
    tmp_path: Path,
    refuse: Refuse,
) -> None:
    damaged = base_tensors[name].clone()
    damaged.view(-1)[-1] = value
    model = write_checkpoint(tmp_path / "model", form=form, tensors={name: damaged})
    message = refuse(model, CheckpointError)
    assert f"tensor '{name}' holds NaN or infinity" in message
    assert message.startswith(("model.safetensors", "pytorch_model.bin"))


@pytest.mark.parametrize(
    ("stored", "value", "dtype"),
    [
        (torch.float32, 70000.0, "float16"),
        (torch.float64, 1e300, "float32"),
        (torch.float32, 3.4e38, "bfloat16"),
    ],
)
def test_a_value_too_large_for_the_exported_type_is_refused_with_the_remedy(
    stored: torch.dtype, value: float, dtype: str, write_checkpoint: WriteCheckpoint, base_tensors: Tensors, tmp_path: Path,
    refuse: Refuse,
) -> None:  # fmt: skip
    damaged = base_tensors[QUERY].to(stored, copy=True)
    damaged[3, 4] = value
    model = write_checkpoint(tmp_path / "model", tensors={QUERY: damaged})
    message = refuse(model, CheckpointError, ExportOptions(dtype=dtype))
    assert f"overflows {dtype}" in message
    assert "layer.001" in message
    assert dtype != "float16" or "--dtype bfloat16 or float32" in message


# -- files
@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(
    size: int, write_checkpoint: WriteCheckpoint, tmp_path: Path, refuse: Refuse
) -> None:
    model = write_checkpoint(tmp_path / "model")
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    message = refuse(model, IntegrityError)
    assert "model.safetensors" in message
    assert "truncated" in message


@pytest.mark.parametrize("place", [8, 9, 40])
def test_a_damaged_header_is_refused(
    place: int, write_checkpoint: WriteCheckpoint, tmp_path: Path, refuse: Refuse
) -> None:
    model = write_checkpoint(tmp_path / "model")
    data = bytearray((model / "model.safetensors").read_bytes())
    data[place] = 0xFF
    (model / "model.safetensors").write_bytes(data)
    assert "model.safetensors" in refuse(model, IntegrityError)


def test_a_git_lfs_pointer_instead_of_weights_is_refused(
    write_checkpoint: WriteCheckpoint, tmp_path: Path, refuse: Refuse
) -> None:
    model = write_checkpoint(tmp_path / "model")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4976698672\n"
    (model / "model.safetensors").write_text(pointer)
    assert "model.safetensors" in refuse(model, IntegrityError)


def test_overlapping_tensors_are_refused(write_checkpoint: WriteCheckpoint, tmp_path: Path, refuse: Refuse) -> None:
    model = write_checkpoint(tmp_path / "model")
    data = (model / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    key, value = (f"model.transformer.blocks.0.{slot}_proj.weight" for slot in "kv")
    header[value]["data_offsets"] = header[key]["data_offsets"]
    raw = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])
    assert "model.safetensors" in refuse(model, IntegrityError)


def test_a_missing_shard_is_named(write_checkpoint: WriteCheckpoint, tmp_path: Path, refuse: Refuse) -> None:
    model = write_checkpoint(tmp_path / "model", form="safetensors shards")
    (model / SECOND_SHARD).unlink()
    message = refuse(model, CheckpointError)
    assert f"shard {SECOND_SHARD} is missing" in message
    assert "download it again" in message


def test_a_directory_without_weights_says_what_is_expected(
    write_checkpoint: WriteCheckpoint, tmp_path: Path, refuse: Refuse
) -> None:
    model = write_checkpoint(tmp_path / "model")
    (model / "model.safetensors").unlink()
    message = refuse(model, CheckpointError)
    assert "holds no weights: expected model.safetensors, model.safetensors.index.json" in message


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "./model.safetensors",
        "..\\model.safetensors",
        "model.bin",
        "..",
        "",
        "model.safetensors\0",
    ],
)
def test_an_index_that_names_a_file_elsewhere_is_refused(
    file: str, write_checkpoint: WriteCheckpoint, tmp_path: Path, refuse: Refuse
) -> None:
    model = write_checkpoint(tmp_path / "model", form="safetensors shards")
    save_file({QUERY: torch.ones(32, 32)}, tmp_path / "model.safetensors")
    message = refuse(edit_index(model, lambda names: names.update({QUERY: file})), CheckpointError)
    assert message.startswith(f"model.safetensors.index.json names the file {file!r}")


def test_an_index_that_names_the_wrong_shard_is_refused_by_tensor(
    write_checkpoint: WriteCheckpoint, tmp_path: Path, refuse: Refuse
) -> None:
    model = write_checkpoint(tmp_path / "model", form="safetensors shards")
    held = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"][QUERY]
    other = FIRST_SHARD if held == SECOND_SHARD else SECOND_SHARD
    message = refuse(edit_index(model, lambda names: names.update({QUERY: other})), CheckpointError)
    assert message == f"model.safetensors.index.json places '{QUERY}' in {other}, which does not hold it"


def test_an_index_that_names_a_tensor_nobody_holds_is_refused(
    write_checkpoint: WriteCheckpoint, tmp_path: Path, refuse: Refuse
) -> None:
    model = write_checkpoint(tmp_path / "model", form="safetensors shards")
    message = refuse(edit_index(model, lambda names: names.update({"ghost": FIRST_SHARD})), CheckpointError)
    assert "'ghost'" in message


def test_a_tensor_in_two_shards_is_refused(
    write_checkpoint: WriteCheckpoint, base_tensors: Tensors, tmp_path: Path, refuse: Refuse
) -> None:
    model = write_checkpoint(tmp_path / "model", form="safetensors shards")
    for shard in (FIRST_SHARD, SECOND_SHARD):
        save_file({**load_file(model / shard), QUERY: base_tensors[QUERY]}, model / shard)
    message = refuse(model, CheckpointError)
    assert f"tensor '{QUERY}' is in both " in message


@pytest.mark.parametrize(
    "content", ["", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{}", '{"weight_map": {}}']
)
def test_an_index_that_is_no_index_is_refused(
    content: str, write_checkpoint: WriteCheckpoint, tmp_path: Path, refuse: Refuse
) -> None:
    model = write_checkpoint(tmp_path / "model", form="safetensors shards")
    (model / "model.safetensors.index.json").write_text(content)
    assert refuse(model, CheckpointError)


# -- config.json
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not valid JSON"),
        (b"{'a': 1}", "is not valid JSON"),
        (b'{"d_model": 32,', "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[1]", "is not a JSON object"),
        (b'"LLaDAModelLM"', "is not a JSON object"),
        (b"null", "is not a JSON object"),
        (b"{}", "describes no supported family"),
    ],
    ids=lambda value: value[:16] if isinstance(value, bytes) else None,
)
def test_a_config_that_is_no_object_is_refused(
    content: bytes, reason: str, write_checkpoint: WriteCheckpoint, tmp_path: Path, refuse: Refuse
) -> None:
    model = write_checkpoint(tmp_path / "model")
    (model / "config.json").write_bytes(content)
    assert f"config.json {reason}" in refuse(model, CheckpointError)


def test_a_missing_config_is_refused(write_checkpoint: WriteCheckpoint, tmp_path: Path, refuse: Refuse) -> None:
    model = write_checkpoint(tmp_path / "model")
    (model / "config.json").unlink()
    assert "config.json is missing" in refuse(model, CheckpointError)


def test_a_huge_config_is_refused_before_it_is_read(
    write_checkpoint: WriteCheckpoint, tmp_path: Path, refuse: Refuse
) -> None:
    model = write_checkpoint(tmp_path / "model")
    with (model / "config.json").open("r+b") as file:
        file.truncate(2**36)  # sparse: takes no space
    assert "more than any configuration needs" in refuse(model, CheckpointError)


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_a_path_that_is_no_directory_is_refused(kind: str, checkpoint: Path, tmp_path: Path, refuse: Refuse) -> None:
    path = checkpoint / "config.json" if kind == "file" else tmp_path / "nowhere"
    assert refuse(path, CheckpointError) == f"{path} is not a directory; give the local directory of a downloaded model"


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["LLaDAMoEModelLM"], "num_experts": 64},
        {"d_model": 32.0},
        {"rope": False},
        {"mask_token_id": 264},
        {"n_heads": 5},
    ],
    ids=str,
)
def test_a_config_that_the_family_refuses_leaves_nothing(
    config: dict[str, object], write_checkpoint: WriteCheckpoint, tmp_path: Path, refuse: Refuse
) -> None:
    refuse(write_checkpoint(tmp_path / "model", config=config), CheckpointError)


def test_a_missing_mask_id_is_refused_with_the_option_and_accepted_with_it(
    write_checkpoint: WriteCheckpoint, tmp_path: Path, refuse: Refuse
) -> None:
    model = write_checkpoint(tmp_path / "model", drop=("mask_token_id",))
    assert "--mask-id" in refuse(model, CheckpointError)
    assert export(model, tmp_path / "bundle", ExportOptions(mask_id=258)).manifest.tokens.mask == 258


def test_a_mask_id_that_contradicts_the_config_is_refused(checkpoint: Path, refuse: Refuse) -> None:
    assert "--mask-id 5 contradicts" in refuse(checkpoint, CheckpointError, ExportOptions(mask_id=5))


def test_an_unknown_family_is_refused_with_the_known_ones(checkpoint: Path, refuse: Refuse) -> None:
    message = refuse(checkpoint, CheckpointError, ExportOptions(family="gpt"))
    assert "'gpt'" in message
    assert "llada" in message


def test_a_family_given_by_name_is_not_detected(write_checkpoint: WriteCheckpoint, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", config={"architectures": ["MyLLaDA"], "model_type": "mine"})
    with pytest.raises(CheckpointError, match="no supported family"):
        open_checkpoint(model)
    checkpoint = open_checkpoint(model, family="llada")
    assert (checkpoint.config.family, checkpoint.architecture) == ("llada", "MyLLaDA")


def test_all_refusals_share_one_base_class() -> None:
    assert issubclass(CheckpointError, DllmExportError)
    assert issubclass(IntegrityError, DllmExportError)
    assert (CheckpointError.exit_code, IntegrityError.exit_code) == (2, 5)
