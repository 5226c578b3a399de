"""What goes wrong on a GPU: one sentence that says what to do, nothing left behind, and the next request is answered."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import msgspec
import pytest

from dllm_export.errors import IncompatibleError, IntegrityError, ResourceError, UsageError
from dllm_export.runtime.bundle import open_bundle
from dllm_export.runtime.manifest import EngineRecord, Manifest, encode_manifest
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.session import SessionOptions

pytestmark = pytest.mark.gpu

TENSORRT = SessionOptions(provider="tensorrt", captures=4)
SHORT = GenerationOptions(gen_length=16)
PROMPT = "A) add 12 + 34"
LOSE_THE_DEVICE = """
import sys
from cuda.bindings import driver
from dllm_export.errors import DllmExportError
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.session import SessionOptions

PTX = b".version 6.0\\n.target sm_70\\n.address_size 64\\n.visible .entry broken() { trap; }\\n\\0"
with DiffusionLM.from_pretrained(sys.argv[1], SessionOptions(provider="tensorrt")) as lm:
    request = lm.continuation([lm.encode(sys.argv[2])], GenerationOptions(gen_length=16))
    frames = lm.stream(request, GenerationOptions(gen_length=16))
    next(frames)
    error, module = driver.cuModuleLoadData(PTX)
    assert error == driver.CUresult.CUDA_SUCCESS, error
    error, broken = driver.cuModuleGetFunction(module, b"broken")
    assert error == driver.CUresult.CUDA_SUCCESS, error
    driver.cuLaunchKernel(broken, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0)
    for attempt in "in the middle", "again":
        try:
            list(frames if attempt == "in the middle" else lm.stream(request, GenerationOptions(gen_length=16)))
        except DllmExportError as failure:
            print(failure)
        else:
            raise AssertionError("the device was not lost")
"""


def answer(lm: DiffusionLM) -> tuple[int, ...]:
    """The tokens of one generation."""
    return lm.generate([PROMPT], SHORT)[0].tokens


@pytest.fixture(scope="module")
def expected(served: Path) -> tuple[int, ...]:
    """The tokens when nothing is wrong."""
    with DiffusionLM.from_pretrained(served, TENSORRT) as lm:
        return answer(lm)


@pytest.fixture
def copied(served: Path, tmp_path: Path) -> Path:
    """A bundle of this test's own."""
    return Path(shutil.copytree(served, tmp_path / "bundle"))


def change_engine(bundle: Path, graph: str, **fields: object) -> None:
    """The manifest with another record of the graph's engine, and a digest that fits: what a wrong build would leave."""
    manifest = open_bundle(bundle).manifest

    def change(record: EngineRecord) -> EngineRecord:
        return msgspec.structs.replace(record, **fields) if record.graph == graph else record

    write_manifest(bundle, msgspec.structs.replace(manifest, engines=tuple(map(change, manifest.engines))))


def write_manifest(bundle: Path, manifest: Manifest) -> None:
    (bundle / "manifest.json").write_bytes(encode_manifest(manifest))


@contextlib.contextmanager
def no_memory() -> Iterator[None]:
    """All of the device's memory taken, but for scraps."""
    from cuda.bindings import runtime as cudart

    held = []
    for size in (2**30, 2**26, 2**22, 2**20, 2**16, 2**12, 2**9):
        while True:
            error, address = cudart.cudaMalloc(size)
            if error != cudart.cudaError_t.cudaSuccess:
                break
            held.append(address)
    try:
        yield
    finally:
        for address in held:
            cudart.cudaFree(address)


# -- engines that do not fit
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"targets": ("8.0",)}, "it was built for compute capability 8.0, this GPU has"),
        ({"version": "8.5.3"}, "it was built with tensorrt 8.5.3, here"),
        ({"cuda": "99.0"}, "it was built under a driver for CUDA 99.0"),
    ],
)
def test_an_engine_of_another_machine_is_refused_with_the_line_that_builds_it(
    fields: dict[str, object], reason: str, copied: Path
) -> None:
    change_engine(copied, "layer_full", **fields)
    with pytest.raises(IncompatibleError, match=reason) as caught:
        DiffusionLM.from_pretrained(copied, TENSORRT)
    assert "run 'dllm-export build" in str(caught.value)


def test_a_plan_that_belongs_to_another_graph_is_refused_before_anything_is_bound(copied: Path) -> None:
    """Its bytes are whole and listed, so that only the plan's own tensors can tell."""
    files = {record.graph: record.file for record in open_bundle(copied).manifest.engines}
    change_engine(copied, "layer_full", file=files["head"])
    with pytest.raises(IntegrityError, match="is not an engine of graph 'layer_full'"):
        DiffusionLM.from_pretrained(copied, TENSORRT)


# -- requests that do not fit
def test_a_request_beyond_the_profile_names_the_flag_and_the_session_lives_on(
    served: Path, expected: tuple[int, ...]
) -> None:
    with DiffusionLM.from_pretrained(served, TENSORRT) as lm:
        for _ in range(2):
            with pytest.raises(UsageError, match="--max-length"):
                lm.generate([PROMPT * 20], SHORT)
            assert answer(lm) == expected


# -- memory
def test_memory_that_runs_out_at_opening_says_what_was_needed(served: Path, expected: tuple[int, ...]) -> None:
    with no_memory(), pytest.raises(ResourceError, match="GB of device memory for weights"):
        DiffusionLM.from_pretrained(served, TENSORRT)
    with DiffusionLM.from_pretrained(served, TENSORRT) as lm:
        assert answer(lm) == expected


def test_memory_that_runs_out_between_requests_says_what_lowers_it_and_the_next_one_is_answered(
    served: Path, expected: tuple[int, ...]
) -> None:
    with DiffusionLM.from_pretrained(served, TENSORRT) as lm:
        assert answer(lm) == expected
        longer = lm.continuation([lm.encode(PROMPT)], GenerationOptions(gen_length=32))
        before = lm.session.inspect().memory
        with no_memory(), pytest.raises(ResourceError, match="--gen-length"):
            lm.run(longer, GenerationOptions(gen_length=32))
        assert set(lm.session.inspect().memory) == {"weights", "workspace"}, "buffers of neither request are left"
        assert answer(lm) == expected
        assert lm.session.inspect().memory == before
        assert len(lm.run(longer, GenerationOptions(gen_length=32))[0].tokens) == 32


def test_memory_that_runs_out_in_the_middle_ends_the_generation_with_what_lowers_it(
    served: Path, expected: tuple[int, ...]
) -> None:
    """Heads of fewer rows come later, each with buffers of its own."""
    with DiffusionLM.from_pretrained(served, TENSORRT) as lm:
        request = lm.continuation([lm.encode(PROMPT)], SHORT)
        frames = lm.stream(request, SHORT)
        begun = list(islice(frames, 3))
        with no_memory(), pytest.raises(ResourceError, match="--gen-length"):
            list(frames)
        assert len(begun) == 3
        assert answer(lm) == expected


# -- the device
def test_a_lost_device_is_one_sentence_and_another_process_works(served: Path, expected: tuple[int, ...]) -> None:
    lost = subprocess.run(
        [sys.executable, "-c", LOSE_THE_DEVICE, served, PROMPT], capture_output=True, text=True, timeout=120
    )
    assert lost.returncode == 0, lost.stderr
    assert lost.stdout.count("start the process again") == 2
    assert lost.stdout.count("\n") == 2
    with DiffusionLM.from_pretrained(served, TENSORRT) as lm:
        assert answer(lm) == expected


def test_a_gpu_that_is_hidden_is_one_sentence(served: Path) -> None:
    command = ["generate", served, "--prompt", PROMPT, "--gen-length", "8", "--provider", "tensorrt"]
    hidden = subprocess.run(
        [sys.executable, "-m", "dllm_export.tools.cli", *command],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (hidden.returncode, hidden.stdout) == (IncompatibleError.exit_code, "")
    assert "no NVIDIA GPU is visible to this process: use --provider onnxruntime" in " ".join(hidden.stderr.split())
