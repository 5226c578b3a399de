"""What other processes take of the machine is told from one's own share, and whose memory is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dllm_export.tools.machine import Others, find_free_memory, find_memory


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="the system does not tell")
def test_processor_time_of_others_is_told_from_ones_own() -> None:
    def burn(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    with Others() as alone:
        burn(0.3)
    program = "import time\nend = time.perf_counter() + 20\nwhile time.perf_counter() < end: pass"
    other = subprocess.Popen([sys.executable, "-c", program])
    try:
        with Others() as beside:
            burn(0.6)
    finally:
        other.kill()
        other.wait()
    assert alone.share is not None
    assert beside.share is not None
    assert 0 <= alone.share <= 1
    assert beside.share > 0.3 / (os.cpu_count() or 1)


def test_free_memory_is_less_than_there_is() -> None:
    free, total = find_free_memory("cpu"), find_memory()
    if free is not None and total is not None:
        assert 0 < free < total


@pytest.mark.parametrize(("visible", "asked"), [(None, "0"), ("3,1", "3"), ("GPU-8a46ae4d", "GPU-8a46ae4d")])
def test_memory_is_that_of_the_first_gpu_that_this_process_sees(
    visible: str | None, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvidia-smi knows nothing of CUDA_VISIBLE_DEVICES; this one answers for one GPU of the machine."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\n[ "$1" = --id={asked} ] && echo 1024\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_free_memory("cuda") == 2**30
