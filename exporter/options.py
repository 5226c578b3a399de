"""The options of an export. No torch and no onnx here: the command line shows them without either."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from dllm_export.errors import UsageError
from dllm_export.runtime.options import flag, option

ExportType = Literal["float32", "float16", "bfloat16"]
WeightsForm = Literal["bound", "embedded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What to make of a checkpoint."""

    dtype: ExportType = option("float32", "type of weights and activations", choices=get_args(ExportType))
    weights: WeightsForm = option(
        "bound", "embedded adds self-contained ONNX files per layer", choices=get_args(WeightsForm)
    )
    family: str | None = option(None, "take the checkpoint for this family instead of detecting it")
    mask_id: int | None = option(None, "id of the mask token, where config.json does not state it")
    num_layers: int | None = option(None, "export only the first layers (for trials)")
    indicator_rank: int = option(
        128,
        "width of the change indicator that --policy spa picks rows by, at most the width of a key; 0 leaves it out",
    )
    tokenizer: Path | None = option(None, "directory of the tokenizer's files, where the model's own has none")
    no_tokenizer: bool = option(False, "export without a tokenizer; the bundle then works on token ids")
    force: bool = option(False, "replace an existing bundle")

    def __post_init__(self) -> None:
        for name, known in (("dtype", get_args(ExportType)), ("weights", get_args(WeightsForm))):
            if getattr(self, name) not in known:
                raise UsageError(f"{flag(name)} is {getattr(self, name)!r}, expected one of: {', '.join(known)}")
        if self.tokenizer is not None and self.no_tokenizer:
            raise UsageError("--tokenizer and --no-tokenizer contradict each other; drop one of them")
        if self.indicator_rank < 0:
            raise UsageError(f"--indicator-rank is {self.indicator_rank}, expected 0 (no indicator) or more")
