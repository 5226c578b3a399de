"""The step loop: plan -> run -> sample -> commit -> yield a frame."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dllm_export.errors import OverflowedError, UsageError
from dllm_export.graphs import ModelShape
from dllm_export.graphs.families import SpecialTokens
from dllm_export.runtime.buffers import RequestShape
from dllm_export.runtime.head import Candidates, Head, bucket
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies.contract import make_plan
from dllm_export.runtime.policies.policy import CachePolicy, StepKind, StepPlan, StepState
from dllm_export.runtime.request import Request
from dllm_export.runtime.rope import rotary_tables
from dllm_export.runtime.sampler import propose, rank
from dllm_export.runtime.schedule import commit_counts
from dllm_export.runtime.session import Session
from dllm_export.runtime.transfers import Quota, Transfer, TransferState
from dllm_export.runtime.trunk import Trunk

T = TypeVar("T")

GUIDANCE_WARMUP = 5
"""The guidance residual is fresh in the first steps whatever the interval (dLLM-Cache's released code)."""


@dataclass(frozen=True, slots=True)
class Frame:
    """The canvas after one step. Arrays are copies: a caller may keep them."""

    step: int
    steps: int
    """Steps in all; the most there can be where the decoding rule decides how many tokens a step commits."""
    block: int
    kind: StepKind
    tokens: NDArray[np.int32]  # [B, R] response, mask id where undecided
    committed: NDArray[np.bool_]  # [B, R] decided in this step
    confidence: NDArray[np.float64]  # [B, R] of the rows decided so far, nan elsewhere and where an early stop filled
    recomputed: NDArray[np.bool_] | None  # [B, R] rows the last layer recomputed, where asked for
    passes: int
    """Forward passes so far; guidance adds its own."""
    engine_seconds: float
    """Time of this step inside the provider."""
    seconds: float
    """Time of this step in all."""


class Workspace:
    """Buffers and prepared programs of one request shape; reused by every request of that shape."""

    def __init__(self, session: Session, shape: ModelShape, request: RequestShape) -> None:
        self.request = request
        self.conditional = Trunk(session, shape, request)
        self.head = Head(session, shape, request)
        self._unconditional: Trunk | None = None
        self._session, self._shape = session, shape

    @property
    def unconditional(self) -> Trunk:
        """The second pass of classifier-free guidance, with caches of its own."""
        if self._unconditional is None:
            self._unconditional = Trunk(self._session, self._shape, self.request)
        return self._unconditional


@dataclass(slots=True)
class Clock:
    """Adds up the time spent inside a provider."""

    seconds: float = 0.0

    def time(self, work: Callable[[], T]) -> T:
        """Do provider work, such as running a program or waiting for its results, and count its time."""
        start = time.perf_counter()
        result = work()
        self.seconds += time.perf_counter() - start
        return result


@dataclass(slots=True)
class Passes:
    """What a trunk has run so far: the conditional and the unconditional pass count apart, as their caches are apart."""

    step: int = 0
    block: int = -1
    block_step: int = 0
    masked: NDArray[np.bool_] | None = None  # [B, R] at the start of the last step

    def advance(self, block: int) -> None:
        """Count a pass in this block."""
        self.step += 1
        self.block_step = self.block_step + 1 if block == self.block else 1
        self.block = block


@dataclass(slots=True)
class Denoiser:
    """One request on its way through the loop."""

    workspace: Workspace
    shape: ModelShape
    special: SpecialTokens
    request: Request
    options: GenerationOptions
    policy: CachePolicy
    transfer: Transfer = Quota()
    watch: bool = False
    _canvas: NDArray[np.int32] = field(init=False)
    _confidence: NDArray[np.float64] = field(init=False)
    _rngs: list[np.random.Generator] = field(init=False)
    _given: NDArray[np.bool_] = field(init=False)
    _residual: NDArray[np.bool_] = field(init=False)  # [B, R] rows that the guidance residual was computed for
    _clock: Clock = field(init=False, default_factory=Clock)
    _passes: int = field(init=False, default=0)
    _conditional: Passes = field(init=False, default_factory=Passes)
    _unconditional: Passes = field(init=False, default_factory=Passes)

    def __post_init__(self) -> None:
        if self.options.steps is not None and not self.transfer.keeps_schedule:
            raise UsageError(
                f"--steps has no effect with --transfer {self.transfer.name}, which commits as many tokens in a step as it "
                f"trusts: leave it out"
            )
        request = self.request
        self._canvas = request.canvas.copy()
        self._confidence = np.full((request.shape.batch, request.shape.response_rows), np.nan)
        self._residual = np.zeros(self._confidence.shape, np.bool_)
        self._rngs = [np.random.default_rng(self.options.seed + row) for row in range(request.shape.batch)]
        columns = np.arange(request.shape.length)
        visible = columns[None, :] >= request.padding[:, None]
        self._given = visible & (request.canvas != self.special.mask)
        positions = np.maximum(columns[None, :] - request.padding[:, None], 0)
        cos, sin = rotary_tables(self.shape, positions)
        for trunk in (self.workspace.conditional, *((self.workspace.unconditional,) if self._guided else ())):
            trunk.start(cos, sin, visible)
        self.workspace.head.set_guidance_scale(self.options.cfg_scale)

    @property
    def _guided(self) -> bool:
        return self.options.cfg_scale > 0

    def frames(self) -> Iterator[Frame]:
        """Denoise block after block, one frame a step."""
        schedule = self.request.schedule
        step = 0
        for block in range(schedule.blocks):
            end = (block + 1) * schedule.block_length
            for quota in self._quotas(end):
                step += 1
                yield self._step(step, block, end, quota)

    def _quotas(self, end: int) -> Iterator[NDArray[np.int64]]:
        """Tokens to commit per sequence in each step of a block: the schedule's, or one until nothing is masked."""
        if self.transfer.keeps_schedule:
            for quota in commit_counts(self._masked(end).sum(1), self.request.schedule.steps_per_block).T:
                if self.options.early_stop and not self._masked(end).any():
                    return
                yield quota
            return
        while self._masked(end).any():
            yield np.ones(self.request.shape.batch, np.int64)

    def _step(self, step: int, block: int, end: int, quota: NDArray[np.int64]) -> Frame:
        start, before = time.perf_counter(), self._clock.seconds
        plan = self._forward(step, block)
        committed = self._sample(end, quota)
        response = self._response()
        recomputed = self.workspace.conditional.recomputed(plan) if self.watch else None
        return Frame(
            step=step,
            steps=self._most_steps,
            block=block,
            kind=plan.kind,
            tokens=response.copy(),
            committed=committed,
            confidence=self._confidence.copy(),
            recomputed=recomputed,
            passes=self._passes,
            engine_seconds=self._clock.seconds - before,
            seconds=time.perf_counter() - start,
        )

    @property
    def _most_steps(self) -> int:
        """Steps of the schedule; a rule that keeps none takes at most one for each of its tokens."""
        schedule = self.request.schedule
        return schedule.steps if self.transfer.keeps_schedule else schedule.gen_length

    # -- run
    def _forward(self, step: int, block: int) -> StepPlan:
        plan = self._run_trunk(self.workspace.conditional, self._conditional, self._canvas, block)
        due = (step - 1) % self.options.cfg_interval == 0 or step <= GUIDANCE_WARMUP
        missing = self._masked((block + 1) * self.request.schedule.block_length) & ~self._residual
        if self._guided and (due or missing.any()):
            blank = np.where(self._given, np.int32(self.special.mask), self._canvas)
            other = self._run_trunk(self.workspace.unconditional, self._unconditional, blank, block)
            hidden = self.workspace.conditional.hidden, self.workspace.unconditional.hidden
            self._clock.time(self.workspace.head.prepare_guidance(*hidden))
            self._residual = self._alive(plan) & self._alive(other)
        return plan

    def _alive(self, plan: StepPlan) -> NDArray[np.bool_]:
        """Response rows [B, R] whose hidden rows mean something after a step of this plan."""
        request = self.request.shape
        everything = np.ones((request.batch, request.length), np.bool_)
        return (plan.rows.mask(request.length) if plan.rows else everything)[:, request.prompt_rows :]

    def _run_trunk(self, trunk: Trunk, passes: Passes, canvas: NDArray[np.int32], block: int) -> StepPlan:
        passes.advance(block)
        plan = make_plan(self.policy, self._state(passes))
        passes.masked = self._masked(self.request.shape.response_rows)
        self._clock.time(trunk.prepare(plan, canvas))
        self._passes += 1
        return plan

    def _state(self, passes: Passes) -> StepState:
        request, length = self.request.shape, self.request.schedule.block_length
        masked = self._masked(request.response_rows)
        before = masked if passes.masked is None else passes.masked
        for array in (masked, before):
            array.setflags(write=False)
        start = request.prompt_rows + passes.block * length
        return StepState(
            step=passes.step,
            block_step=passes.block_step,
            block=(start, start + length),
            layers=self.shape.layers,
            prompt_rows=request.prompt_rows,
            response_rows=request.response_rows,
            masked=masked,
            masked_before=before,
        )

    # -- sample and commit
    def _sample(self, end: int, quota: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Commit the step's quota among the masked rows before `end`; returns what was committed [B, R]."""
        masked = self._masked(end)
        committed = np.zeros(self._response().shape, np.bool_)
        counts = masked.sum(1)
        if not counts.any():
            return committed
        size = bucket(int(counts.max()), self.request.schedule.block_length)
        index = np.zeros((len(counts), size), np.int32)
        rows = [np.flatnonzero(mask) for mask in masked]
        for sequence, places in enumerate(rows):
            index[sequence, : len(places)] = places
        # The mask token is never a proposal: committed, it would leave a hole (docs/decisions.md).
        banned = frozenset({self.special.mask, *((self.special.eos,) if self.options.logits_eos_inf else ())})
        candidates = self._candidates(index, banned)
        last = self._ranked_last()
        ranked = self._candidates(index, banned | last) if last else candidates
        for sequence, places in enumerate(rows):
            rng = self._rngs[sequence]
            proposal = propose(
                candidates,
                sequence,
                len(places),
                temperature=self.options.temperature,
                rng=rng,
                ranking_logsumexp=ranked.logsumexp,
                ranked_last=last,
            )
            if not len(places):
                continue
            state = TransferState(
                quota=int(quota[sequence]),
                ranking=rank(self.options.remasking, ranked, sequence, proposal, rng=rng, ranked_last=last),
                confidence=proposal.confidence,
                entropy=candidates.entropy[sequence, : len(places)].astype(np.float64),
                rows=places,
            )
            chosen = self.transfer.choose(state)
            self._response()[sequence, places[chosen]] = proposal.tokens[chosen]
            self._confidence[sequence, places[chosen]] = proposal.confidence[chosen]
            committed[sequence, places[chosen]] = True
        return committed | self._fill_after_end() if self.options.early_stop else committed

    def _fill_after_end(self) -> NDArray[np.bool_]:
        """Every masked row behind an end of text becomes one too, without a confidence; returns which did [B, R]."""
        response = self._response()
        ended = np.logical_or.accumulate(np.isin(response, list(self.special.ends)), axis=1)
        filled: NDArray[np.bool_] = ended & (response == self.special.mask)
        response[filled] = self.special.eos
        return filled

    def _candidates(self, index: NDArray[np.int32], banned: frozenset[int]) -> Candidates:
        head, hidden = self.workspace.head, self.workspace.conditional.hidden
        self._clock.time(head.prepare(hidden, index, banned, guided=self._guided))
        candidates = self._clock.time(lambda: head.read(index.shape[1]))
        if not np.isfinite(candidates.logsumexp).all():
            raise OverflowedError(
                "the model's logits are not finite: activations overflow in this dtype; export with --dtype bfloat16 or float32"
            )
        return candidates

    def _ranked_last(self) -> frozenset[int]:
        return self.special.ends if self.options.confidence_eos_eot_inf else frozenset()

    def _response(self) -> NDArray[np.int32]:
        """View of the response rows of the canvas."""
        return self._canvas[:, self.request.shape.prompt_rows :]

    def _masked(self, end: int) -> NDArray[np.bool_]:
        """Undecided response rows before row `end` [B, R]."""
        masked: NDArray[np.bool_] = np.equal(self._response(), self.special.mask)
        masked[:, end:] = False
        return masked
