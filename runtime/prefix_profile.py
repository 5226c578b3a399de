"""How many layers may share a prefix: measured offline on a model's own texts (BiCache, arXiv 2606.07571)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from dllm_export.errors import UsageError
from dllm_export.graphs import ModelShape
from dllm_export.runtime.buffers import RequestShape
from dllm_export.runtime.manifest import Manifest
from dllm_export.runtime.policies.policy import StepPlan, StepState
from dllm_export.runtime.rope import rotary_tables
from dllm_export.runtime.session import Session
from dllm_export.runtime.trunk import Trunk

PROFILE_THRESHOLD = 0.97


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioRecord:
    """What was measured at one ratio of prefix to sequence."""

    ratio: int
    """round(100 * prefix / sequence)."""
    texts: int
    similarity: tuple[float, ...]
    """Mean cosine of keys and of values by layer, prefix alone against the whole sequence."""
    depth: int
    """Leading layers whose similarity is above the threshold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixProfile:
    """Measurements of one model, as `profile-prefix` writes them."""

    model: str
    """Digest of the bundle's weights."""
    threshold: float
    ratios: tuple[RatioRecord, ...]

    @property
    def depths(self) -> Mapping[int, int]:
        """Ratio -> depth, only where the depth exceeds those of all smaller ratios."""
        depths: dict[int, int] = {}
        for record in sorted(self.ratios, key=lambda record: record.ratio):
            if record.depth > max(depths.values(), default=0):
                depths[record.ratio] = record.depth
        return depths

    def depth(self, prefix_rows: int, length: int) -> int:
        """Layers that may share a prefix of this length in a sequence of this length: those of the nearest lower ratio."""
        ratio = find_ratio(prefix_rows, length)
        return max((depth for stored, depth in self.depths.items() if stored <= ratio), default=0)

    def check(self, model: str) -> None:
        """Refuse a profile of another model."""
        if self.model != model:
            raise UsageError(
                f"--prefix-profile was measured with weights {self.model[:12]}, this bundle has {model[:12]}: measure this "
                f"one with 'dllm-export profile-prefix'"
            )


def find_ratio(prefix_rows: int, length: int) -> int:
    """phi, in percent."""
    return round(100 * prefix_rows / length)


def digest_weights(manifest: Manifest) -> str:
    """What a profile belongs to: the weights, whichever engines were built beside them."""
    files = sorted(f"{file.path} {file.sha256}" for file in manifest.files if file.path.startswith("weights/"))
    return hashlib.sha256("\n".join(files).encode()).hexdigest()


def read_profile(path: Path) -> PrefixProfile:
    """A file that `profile-prefix` wrote."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=PrefixProfile)
    except OSError as error:
        raise UsageError(f"cannot read --prefix-profile {path}: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise UsageError(
            f"--prefix-profile {path} is not a profile ({error}): write one with 'dllm-export profile-prefix'"
        ) from None


def measure_profile(
    session: Session,
    manifest: Manifest,
    prefix: Sequence[int],
    texts: Iterable[Sequence[int]],
    threshold: float = PROFILE_THRESHOLD,
) -> PrefixProfile:
    """Profile of a prefix (token ids) in whole sequences that start with it, masks included."""
    shape, rows = manifest.shape, len(prefix)
    if shape.conditioning or shape.block:
        raise UsageError(
            "this model's features of a prefix cannot be shared: they follow the noise level of a step, or it attends by blocks"
        )
    alone = compute_features(session, shape, prefix)
    found: dict[int, list[NDArray[np.float64]]] = {}
    for text in texts:
        whole = compute_features(session, shape, text)
        similarity = np.array(
            [
                np.mean([mean_cosine(mine, its[:rows]) for mine, its in zip(own, other, strict=True)])
                for own, other in zip(alone, whole, strict=True)
            ]
        )
        found.setdefault(find_ratio(rows, len(text)), []).append(similarity)
    records = []
    for ratio, similarities in sorted(found.items()):
        mean = np.mean(similarities, axis=0)
        low = np.flatnonzero(~(mean > threshold))
        depth = int(low[0]) if len(low) else shape.layers
        records.append(RatioRecord(ratio=ratio, texts=len(similarities), similarity=tuple(mean.tolist()), depth=depth))
    return PrefixProfile(model=digest_weights(manifest), threshold=threshold, ratios=tuple(records))


def compute_features(
    session: Session, shape: ModelShape, tokens: Sequence[int]
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Keys and values [S, G*d] of every layer, computed whole. Keys are rotated, alike wherever positions are."""
    state = StepState.first(layers=shape.layers, prompt_rows=0, response_rows=len(tokens))
    trunk = Trunk(session, shape, RequestShape(batch=1, prompt_rows=0, response_rows=len(tokens)))
    trunk.start(*rotary_tables(shape, np.arange(len(tokens))[None]), np.ones((1, len(tokens)), np.bool_))
    trunk.prepare(StepPlan.refresh(state, keep_delta=False), np.array([tokens], np.int32))()
    return [
        (key.read()[0].astype(np.float64), value.read()[0].astype(np.float64))
        for key, value in map(trunk.features, range(shape.layers))
    ]


def mean_cosine(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:  # [n, D] twice
    """Mean over rows of the cosine, heads together; a row of zeros has none with anything."""
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return float(np.mean((left * right).sum(1) / np.maximum(norms, 1e-30)))
