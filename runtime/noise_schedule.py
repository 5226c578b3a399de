"""The noise schedule that a continuous model learned, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dllm_export.errors import IntegrityError
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.safetensors_file import SafetensorsFile

NAMES = ("rate", "bias", "share", "first", "last")


@dataclass(frozen=True, slots=True, eq=False)
class NoiseSchedule:
    """gamma(t) = log(sigma^2 / alpha^2) rises from `first` at time 0 to `last` at 1 (Plaid, arXiv 2305.18619).

    Between them it goes by a sum of tanh, n units with positive `rate` and `share`, so that it never falls.
    """

    rate: NDArray[np.float64]  # [n]
    bias: NDArray[np.float64]  # [n]
    share: NDArray[np.float64]  # [n]
    first: NDArray[np.float64]  # [1]
    last: NDArray[np.float64]  # [1]

    def gamma(self, time: float) -> float:
        """The noise level at a time from 0 to 1."""
        risen = self._rise(time) - self._rise(0.0)
        whole = self._rise(1.0) - self._rise(0.0)
        return float(self.first[0] + (self.last[0] - self.first[0]) * (risen / whole))

    def _rise(self, time: float) -> float:
        return float(self.share @ np.tanh((time - 0.5) * self.rate + self.bias))


def open_schedule(bundle: Bundle) -> NoiseSchedule:
    """The schedule of a continuous model's bundle."""
    if bundle.manifest.schedule is None:
        raise IntegrityError("manifest.json names no noise schedule, which this model needs; export again")
    file = SafetensorsFile(bundle.file(bundle.manifest.schedule))
    if not set(NAMES) <= set(file.tensors):
        raise IntegrityError(f"{bundle.manifest.schedule} is no noise schedule; export again")
    return NoiseSchedule(*(file.view(name).astype(np.float64) for name in NAMES))
