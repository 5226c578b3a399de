"""Provider tensorrt before a GPU answers: refusals of one sentence with their exit code, and nothing heavy imported."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from dllm_export.errors import IncompatibleError, IntegrityError, UsageError
from dllm_export.exporter.build_options import BuildOptions
from dllm_export.exporter.engines import build_engines
from dllm_export.exporter.pipeline import export
from dllm_export.runtime.bundle import Bundle, open_bundle
from dllm_export.runtime.session import SessionOptions, open_session
from dllm_export.runtime.sessions.tensorrt import find_engines
from dllm_export.tools.demo_checkpoint import save_checkpoint
from dllm_export.tools.demo_model import draw_weights
from dllm_export.tools.train import TrainOptions

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX has wheels for Linux on x86-64 only")
cudart = pytest.importorskip("cuda.bindings.runtime", reason="the CUDA bindings are not installed")

SHAPE = replace(TrainOptions(), layers=2, hidden=64, heads=2, mlp=96).shape
TENSORRT = SessionOptions(provider="tensorrt")


def gpu_answers() -> bool:
    error, count = cudart.cudaGetDeviceCount()
    return bool(error == cudart.cudaError_t.cudaSuccess and count > 0)


without_gpu = pytest.mark.skipif(gpu_answers(), reason="a GPU answers here")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny bundle of bytes with engines of TensorRT for RTX."""
    root = tmp_path_factory.mktemp("tensorrt")
    save_checkpoint(root / "model", SHAPE, draw_weights(SHAPE, torch.Generator().manual_seed(0)), {})
    exported = export(root / "model", root / "bundle")
    return build_engines(exported, BuildOptions(flavour="tensorrt-rtx", sm="8.9", max_length=64))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a process gave."""

    code: int
    out: str
    err: str


def run_python(*arguments: object) -> Outcome:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    return Outcome(done.returncode, done.stdout, done.stderr)


def generate(bundle: Bundle, *arguments: str) -> Outcome:
    command = ("generate", bundle.path, "--prompt", "a", "--gen-length", 8, "--provider", "tensorrt")
    return run_python("-m", "dllm_export.tools.cli", *command, *arguments)


# -- refusals
@without_gpu
def test_without_a_driver_generate_says_so_in_one_sentence(bundle: Bundle) -> None:
    result = generate(bundle)
    assert (result.code, result.out) == (IncompatibleError.exit_code, "")
    assert result.err.count("\n") == 1
    assert "no NVIDIA" in result.err
    assert "use --provider onnxruntime" in " ".join(result.err.split())


@without_gpu
@pytest.mark.parametrize("captures", [0, 32])
def test_without_a_driver_the_session_is_refused_with_the_remedy(captures: int, bundle: Bundle) -> None:
    with pytest.raises(
        IncompatibleError, match=r"no NVIDIA .*: (install or update the driver, or )?use --provider onnx"
    ):
        open_session(bundle, replace(TENSORRT, captures=captures))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "cpu"), "--device cpu does not go with --provider tensorrt"),
        (("--captures", "-1"), "--captures is -1, expected 0 (none) or more"),
    ],
)
def test_options_that_no_gpu_could_serve_are_refused_first(
    arguments: tuple[str, str], message: str, bundle: Bundle
) -> None:
    result = generate(bundle, *arguments)
    assert (result.code, result.out) == (UsageError.exit_code, "")
    assert message in result.err


def test_host_code_is_allowed_to_tensorrt_alone_and_by_the_option_alone(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    for provider in ("onnxruntime", "torch"):
        with pytest.raises(UsageError, match=f"--allow-host-code does not go with --provider {provider}"):
            SessionOptions(provider=provider, allow_host_code=True)
    monkeypatch.setattr("dllm_export.runtime.sessions.tensorrt.gpu_capability", lambda: "8.9")
    monkeypatch.setattr("dllm_export.runtime.sessions.tensorrt.driver_cuda", lambda: "13.0")
    for allowed in (False, True):
        _, host, _ = find_engines(bundle, ["tensorrt-rtx"], replace(TENSORRT, allow_host_code=allowed))
        assert host.host_code is allowed


BLOCKED = """
import sys
import onnxruntime
onnxruntime.get_available_providers = lambda: ["CUDAExecutionProvider"]
sys.modules["cuda"] = None  # as if it were not installed
from dllm_export.errors import IncompatibleError
from dllm_export.runtime.bundle import open_bundle
from dllm_export.runtime.session import SessionOptions, open_session
try:
    open_session(open_bundle({path!r}), SessionOptions({options}))
except IncompatibleError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "provider='tensorrt'",
            "provider 'tensorrt' needs the package cuda-bindings: "
            "pip install 'dllm-export[tensorrt]', or 'dllm-export[tensorrt-rtx]'",
        ),
        (
            "device='cuda'",
            "provider 'onnxruntime' needs the package cuda-bindings: pip install 'dllm-export[onnxruntime-gpu]'",
        ),
    ],
)
def test_without_the_cuda_bindings_the_pip_line_is_given(options: str, message: str, bundle: Bundle) -> None:
    result = run_python("-c", BLOCKED.format(path=str(bundle.path), options=options))
    assert (result.code, result.err, result.out) == (0, "", f"{message}\n")


# -- imports
IMPORTS = """
import json, sys
import dllm_export.runtime.sessions.tensorrt
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


def test_importing_the_session_loads_no_torch_onnx_or_tensorrt() -> None:
    result = run_python("-c", IMPORTS)
    assert (result.code, result.err) == (0, "")
    loaded = set(json.loads(result.out))
    assert {"cuda", "numpy"} <= loaded
    assert not loaded & {"torch", "onnx", "transformers", "onnxruntime", "tensorrt", "tensorrt_rtx"}


# -- plans that are not what the manifest says
@pytest.mark.parametrize("damage", ["cut", "longer", "swapped"])
def test_a_plan_that_is_not_the_listed_one_is_refused_before_the_library_sees_it(
    damage: str, bundle: Bundle, tmp_path: Path
) -> None:
    """Swapped: another graph's plan lies where the manifest expects this one's."""
    root = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    first, second = (root / record.file for record in bundle.manifest.engines[:2])
    data = first.read_bytes()
    first.write_bytes({"cut": data[: len(data) // 2], "longer": data + b"?", "swapped": second.read_bytes()}[damage])
    with pytest.raises(IntegrityError, match=re.escape(first.name)):
        open_bundle(root)
