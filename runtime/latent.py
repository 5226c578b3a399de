"""The step loop of a continuous model: noisy vectors -> an estimate of the clean ones -> vectors with less noise.

There is no plan to make and no row to choose: every row of the canvas changes in every step, so that no feature can be kept,
and tokens are read off at the end. The sampler runs on the host in float64, where a thousandth part of a step still counts; a
step hands over a few numbers a row.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dllm_export.errors import OverflowedError, UsageError
from dllm_export.graphs import ModelShape
from dllm_export.graphs.families import SpecialTokens
from dllm_export.graphs.latents import LEVEL_WIDTH
from dllm_export.runtime.clock import EngineClock
from dllm_export.runtime.decoder import OVERFLOW
from dllm_export.runtime.generate import Frame
from dllm_export.runtime.noise_schedule import NoiseSchedule
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies.none import NoCache
from dllm_export.runtime.policies.policy import CachePolicy
from dllm_export.runtime.request import Request
from dllm_export.runtime.rope import rotary_tables
from dllm_export.runtime.session import Buffer, GraphCall, Session
from dllm_export.runtime.transfers.ancestral import Ancestral, draw_before, scales


class LatentDenoiser:
    """One request of a continuous model."""

    def __init__(
        self,
        session: Session,
        shape: ModelShape,
        special: SpecialTokens,
        request: Request,
        options: GenerationOptions,
        rule: Ancestral,
        schedule: NoiseSchedule,
    ) -> None:
        self._shape, self._mask, self._rule, self._schedule = shape, special.mask, rule, schedule
        self._steps, self._clock = request.schedule.steps, EngineClock(session.mark)
        batch, length = request.canvas.shape
        self._rngs = [np.random.default_rng(options.seed + row) for row in range(batch)]
        self._dims = (batch, length, shape.latent)
        self._buffers = self._allocate(session, batch, length)
        self._program = session.prepare(self._calls())

    def _allocate(self, session: Session, batch: int, length: int) -> dict[str, Buffer]:
        cos, sin = rotary_tables(self._shape, np.tile(np.arange(length), (batch, 1)))
        buffers: dict[str, Buffer] = {
            **{name: session.allocate(self._dims, "float32") for name in ("latent", "estimate", "estimate_out")},
            **{
                name: session.allocate((batch, length, self._shape.hidden), "compute")
                for name in ("hidden0", "hidden1")
            },
            **{name: session.allocate(cos.shape, "float32") for name in ("cos", "sin")},
            **{name: session.allocate((1,), "float32") for name in ("latent_scale", "pull")},
            "level": session.allocate((batch, LEVEL_WIDTH), "float32"),
            "mask": session.allocate((batch, length), "bool"),
            "token": session.allocate((batch, length), "int32"),
            "confidence": session.allocate((batch, length), "float32"),
        }
        for name, array in (("cos", cos), ("sin", sin), ("mask", np.ones((batch, length), np.bool_))):
            buffers[name].write(array)
        return buffers

    def _calls(self) -> list[GraphCall]:
        """A step: vectors in, layers, estimate and tokens out."""

        def take(*names: str) -> dict[str, Buffer]:
            return {name: self._buffers[name] for name in names}

        layers, hidden = self._shape.layers, (self._buffers["hidden0"], self._buffers["hidden1"])
        first = take("latent", "estimate", "level", "latent_scale")
        last = take("latent", "pull", "estimate_out", "token", "confidence")
        return [
            GraphCall("embed_latent", None, {**first, "hidden_out": hidden[0]}),
            *(
                GraphCall(
                    "layer_full",
                    layer,
                    {"hidden": hidden[layer % 2], "hidden_out": hidden[1 - layer % 2], **take("cos", "sin", "mask")},
                )
                for layer in range(layers)
            ),
            GraphCall("head_latent", None, {"hidden": hidden[layers % 2], **last}),
        ]

    def frames(self) -> Iterator[Frame]:
        """One frame a step, and a last one in which all tokens are decided."""
        latent, steps = self._draw(), self._steps
        estimate, nothing = np.zeros(self._dims), np.zeros(self._dims[:2], np.bool_)
        for step in range(1, steps + 2):
            start = time.perf_counter()
            moment = self._rule.time(step, steps)
            gamma, last = self._schedule.gamma(moment), step > steps
            estimate = self._look(latent, estimate, gamma)
            thinking = time.perf_counter()
            if moment > 0:
                clean = self._rule.sharpen(latent, estimate, gamma)
                latent = draw_before(latent, clean, gamma, self._schedule.gamma(moment - 1 / steps), self._draw())
            strategy = time.perf_counter() - thinking
            tokens = self._buffers["token"].read()
            unknown = np.full_like(tokens, self._mask)
            confidence = self._buffers["confidence"].read().astype(np.float64)
            yield Frame(
                step=step,
                steps=steps + 1,
                block=0,
                kind="full",
                tokens=tokens if last else unknown,
                committed=~nothing if last else nothing,
                confidence=confidence if last else np.full(tokens.shape, np.nan),
                edited=nothing,
                recomputed=~nothing,
                passes=step,
                engine_seconds=self._clock.take(),
                strategy_seconds=strategy,
                seconds=time.perf_counter() - start,
                drafts=tokens,
            )

    def _draw(self) -> NDArray[np.float64]:
        """Standard normal numbers; sequence i of a batch draws its own."""
        return np.stack([rng.standard_normal(self._dims[1:]) for rng in self._rngs])

    def _look(
        self, latent: NDArray[np.float64], estimate: NDArray[np.float64], gamma: float
    ) -> NDArray[np.float64]:  # two of [B, T, w] -> [B, T, w]
        """What the model takes for the clean vectors, by these and its last estimate."""
        alpha, sigma = scales(gamma)
        numbers = {
            "latent": latent,
            "estimate": estimate,
            "level": np.tile(level_table(gamma), (self._dims[0], 1)),
            "latent_scale": np.array([(alpha**2 / self._shape.latent + sigma**2) ** -0.5]),
            "pull": np.array([alpha / sigma**2]),
        }
        for name, array in numbers.items():
            self._buffers[name].write(array.astype(np.float32))
        self._clock.run(self._program)
        found = self._clock.wait(self._buffers["estimate_out"].read).astype(np.float64)
        if not np.isfinite(found).all():
            raise OverflowedError(OVERFLOW)
        return found


def level_table(gamma: float) -> NDArray[np.float64]:
    """The numbers that describe a noise level, rounded to float32 as published: sines, then cosines, at 32 frequencies."""
    angle = np.exp(np.linspace(-5.0, 5.0, LEVEL_WIDTH // 2)) * float(np.float32(gamma))
    return np.concatenate((np.sin(angle), np.cos(angle)))


def check_policy(policy: CachePolicy) -> None:
    """Refuse every cache policy but none."""
    if policy.name != NoCache.name:
        raise UsageError(
            f"--policy {policy.name} does not apply: this model denoises vectors, and as every one of them changes in every "
            f"step no feature can be kept: leave it out"
        )
