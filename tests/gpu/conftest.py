"""What the tests of a real GPU share: they need TensorRT and no PyTorch, so that they run where engines are served.

    pytest tests/gpu --confcutdir tests/gpu [--gpu-bundle BUNDLE]

BUNDLE is models/worksheets-4m exported in float32; without it the test exports it, which takes PyTorch.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GRAPHS = "embed,layer_full,gather,head,commit"
"""What a generation without a cache runs. TensorRT 8.6 takes seconds to start for each graph."""
LONGEST, ROWS = 96, 32


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-bundle", type=Path, help="models/worksheets-4m, exported in float32")


@pytest.fixture(scope="session")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with engines of standard TensorRT for this machine's GPU."""
    cudart = pytest.importorskip("cuda.bindings.runtime", reason="the CUDA bindings are not installed")
    error, count = cudart.cudaGetDeviceCount()
    if error != cudart.cudaError_t.cudaSuccess or count == 0:
        pytest.skip("no GPU answers")
    pytest.importorskip("tensorrt", reason="standard TensorRT is not installed")
    from dllm_export.exporter.build_options import BuildOptions
    from dllm_export.exporter.engines import build_engines
    from dllm_export.runtime.bundle import open_bundle

    place = tmp_path_factory.mktemp("gpu") / "bundle"
    given: Path | None = request.config.getoption("--gpu-bundle", default=None)
    if given is None:
        pytest.importorskip("torch", reason="neither --gpu-bundle nor PyTorch to export with")
        from dllm_export.exporter.options import ExportOptions
        from dllm_export.exporter.pipeline import export

        export(ROOT / "models" / "worksheets-4m", place, ExportOptions(dtype="float32"))
    else:
        shutil.copytree(given, place)
    options = BuildOptions(flavour="tensorrt", max_batch=1, max_length=LONGEST, rows=ROWS, graphs=GRAPHS)
    return Path(build_engines(open_bundle(place), options).path)
