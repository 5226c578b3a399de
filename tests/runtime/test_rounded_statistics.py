"""A provider that rounds what the head found: rows that are nearly sure must keep their order, on a trained model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pipeline import export
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import NoCache
from dllm_export.runtime.session import Buffer, SessionOptions
from dllm_export.runtime.sessions.torch import TorchSession

MODEL = Path(__file__).resolve().parents[2] / "models" / "worksheets-4m"


class RoundingSession(TorchSession):
    """Gives every float32 number as the float16 that is nearest."""

    def fetch(self, buffers: Sequence[Buffer]) -> Callable[[], list[NDArray[Any]]]:
        wait = super().fetch(buffers)
        return lambda: [
            array.astype(np.float16).astype(np.float32) if array.dtype == np.float32 else array for array in wait()
        ]


def test_statistics_rounded_to_float16_change_no_answer(tmp_path: Path) -> None:
    """Ranked by logits less a logsumexp that is rounded so, 8 of these 64 tokens are those of TensorRT 8.6 in float16."""
    bundle = export(MODEL, tmp_path / "bundle", ExportOptions())
    options, found = GenerationOptions(gen_length=64), []
    for kind in (TorchSession, RoundingSession):
        with DiffusionLM(bundle, kind(bundle, SessionOptions(provider="torch"))) as lm:
            prompt = lm.encode((MODEL / "example.txt").read_text())
            *_, last = lm.stream(lm.continuation([prompt], options), options, NoCache())
            found.append(last.tokens.tolist())
    assert found[0] == found[1]
