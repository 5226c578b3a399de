"""The step loop: plan -> run -> sample -> commit -> yield a frame.

Where a device decides too (`Denoiser._looks_ahead`), the next step's layers are queued before the host samples, so that the
device waits for nobody; the frames are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dllm_export.errors import MismatchError, UsageError
from dllm_export.graphs import ModelShape
from dllm_export.graphs.families import SpecialTokens
from dllm_export.runtime.blocks import number_blocks
from dllm_export.runtime.buffers import RequestShape
from dllm_export.runtime.clock import Clock, EngineClock
from dllm_export.runtime.combinations import check_attention, check_model, check_strategies
from dllm_export.runtime.conditioning import Conditioner
from dllm_export.runtime.decoder import Decoder, Question
from dllm_export.runtime.head import Head
from dllm_export.runtime.options import SettledOptions
from dllm_export.runtime.policies.contract import make_plan
from dllm_export.runtime.policies.policy import (
    CachePolicy,
    Compaction,
    PrefixState,
    StepKind,
    StepPlan,
    StepState,
    is_foreseeable,
)
from dllm_export.runtime.prefix_store import PrefixStore
from dllm_export.runtime.request import Prefix, Request
from dllm_export.runtime.rope import rotary_tables
from dllm_export.runtime.session import Buffer, Fetch, Session
from dllm_export.runtime.shadow import Shadow
from dllm_export.runtime.sharing import Sharing
from dllm_export.runtime.transfers import Quota, Transfer
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
    edited: NDArray[np.bool_]  # [B, R] decided before, and replaced by another token in this step
    confidence: NDArray[np.float64]  # [B, R] of the rows decided so far, nan elsewhere and where an early stop filled
    recomputed: NDArray[np.bool_] | None  # [B, R] rows the last layer recomputed, where asked for
    passes: int
    """Forward passes so far; guidance adds its own."""
    engine_seconds: float
    """Time of this step's programs in the provider, on the device's clock where they are queued."""
    strategy_seconds: float
    """Time of this step that the cache policy took for its plan, and sampler and decoding rule for their decisions."""
    seconds: float
    """Time of this step in all."""
    ahead: bool = False
    """Whether the layers of the next step, if there is one, are queued behind this one already: a device decided too."""
    drafts: NDArray[np.int32] | None = None
    """[B, R] The tokens with what undecided rows hold for now, in a model whose noise is other tokens."""


class Workspace:
    """Buffers and prepared programs of one request shape; reused by every request of that shape."""

    def __init__(self, session: Session, shape: ModelShape, request: RequestShape) -> None:
        self.request = request
        self.conditioner = Conditioner(session, shape, request.batch)
        self.conditional = Trunk(session, shape, request.led, self.conditioner.inputs)
        self.head = Head(session, shape, request.led, self.conditioner.inputs)
        self._unconditional: Trunk | None = None
        self._shadow: Shadow | None = None
        self.session, self._shape = session, shape

    @property
    def unconditional(self) -> Trunk:
        """The second pass of classifier-free guidance, with caches of its own."""
        if self._unconditional is None:
            self._unconditional = Trunk(self.session, self._shape, self.request.led, self.conditioner.inputs)
        return self._unconditional

    @property
    def shadow(self) -> Shadow:
        """The shadow rows of decoding rules that verify."""
        if self._shadow is None:
            self._shadow = Shadow(self.session, self._shape, self.request.led)
        return self._shadow


@dataclass(slots=True)
class Passes:
    """What a trunk has run so far: the conditional and the unconditional pass count apart, as their caches are apart."""

    step: int = 0
    block: int = -1
    block_step: int = 0
    masked: NDArray[np.bool_] | None = None  # [B, R] at the start of the last step
    edited: NDArray[np.bool_] | None = None  # [B, R] whose tokens were replaced since it began, by a rule that edits
    compacted: Compaction | None = None
    """The compaction that was made last."""
    drift: NDArray[np.float64] | None = None  # [B, L] of the last step, where its plan measured it
    sharing: Sharing | None = None

    def advance(self, block: int) -> None:
        """Count a pass in this block."""
        self.step += 1
        self.block_step = self.block_step + 1 if block == self.block else 1
        self.block = block


@dataclass(frozen=True, slots=True)
class Queued:
    """A step whose layers run already, with what was decided on the device."""

    state: StepState
    plan: StepPlan
    canvas: Fetch
    """Waits for the tokens of its alive rows [B, X], as the device has them."""


@dataclass(slots=True)
class Denoiser:
    """One request on its way through the loop."""

    workspace: Workspace
    shape: ModelShape
    special: SpecialTokens
    request: Request
    options: SettledOptions
    policy: CachePolicy
    transfer: Transfer = Quota()
    watch: bool = False
    prefixes: PrefixStore | None = None
    """Where the prefix of the request is kept; without it the request shares none."""
    _decoder: Decoder = field(init=False)
    _given: NDArray[np.bool_] = field(init=False)
    _upcoming: NDArray[np.bool_] | None = field(init=False, default=None)  # [B, R] rows that this step will decide
    _inspected: NDArray[np.bool_] | None = field(init=False, default=None)  # [B, R] rows that this step looks at
    _residual: NDArray[np.bool_] = field(init=False)  # [B, R] rows that the guidance residual was computed for, led
    _clock: EngineClock = field(init=False)
    _strategies: Clock = field(init=False, default_factory=Clock)
    _passes: int = field(init=False, default=0)
    _queued: Queued | None = field(init=False, default=None)
    _conditional: Passes = field(init=False, default_factory=Passes)
    _unconditional: Passes = field(init=False, default_factory=Passes)

    def __post_init__(self) -> None:
        check_strategies(self.options, self.policy, self.transfer)
        check_model(self.shape, self.transfer)
        check_attention(self.shape, self.policy)
        request = self.request
        self._clock = EngineClock(self.workspace.session.mark)
        self._decoder = Decoder(self.workspace.head, self.special, request, self.options, self.transfer, self._clock)
        self._residual = np.zeros((request.shape.batch, request.shape.led.response_rows), np.bool_)
        columns = np.arange(request.shape.length)
        visible = columns[None, :] >= request.padding[:, None]
        self._given = visible & (request.canvas != self.special.mask)
        positions = np.maximum(columns[None, :] - request.padding[:, None], 0)
        cos, sin = rotary_tables(self.shape, positions)
        blocks = number_blocks(visible, request.schedule.block_length) if self.shape.block else None
        for trunk in (self.workspace.conditional, *((self.workspace.unconditional,) if self._guided else ())):
            trunk.start(cos, sin, visible, blocks)
        self.workspace.head.set_guidance_scale(self.options.cfg_scale)
        if request.prefix is not None and self.prefixes is not None:
            self._share(self.prefixes, request.prefix)

    def _share(self, store: PrefixStore, prefix: Prefix) -> None:
        if self.shape.conditioning:
            raise UsageError(
                "a shared prefix does not go with a model that sees the noise level, which changes the prefix's features in "
                "every step: leave --prefix-file out"
            )
        starts = tuple(self.request.padding.tolist())
        place = PrefixState(rows=prefix.rows, starts=starts, depth=prefix.depth, stored=False)
        store.check(prefix, guided=self._guided)
        self._conditional.sharing = Sharing.start(store, self.workspace.conditional, place, self._decoder.canvas)
        if self._guided:
            self._unconditional.sharing = Sharing.start(store, self.workspace.unconditional, place, self._blank())

    def close(self) -> None:
        """Let go of what the request holds of the store."""
        for passes in (self._conditional, self._unconditional):
            if passes.sharing is not None:
                passes.sharing.close()

    @property
    def _guided(self) -> bool:
        return self.options.cfg_scale > 0

    def frames(self) -> Iterator[Frame]:
        """Denoise block after block, one frame for each step that runs."""
        schedule = self.request.schedule
        step = 0
        for block in range(schedule.blocks):
            for block_step, quota in enumerate(self._quotas(block), 1):
                step += 1
                frame = self._step(step, block, block_step, quota)
                if frame is not None:
                    yield frame

    def _quotas(self, block: int) -> Iterator[NDArray[np.int64]]:
        """Tokens to commit per sequence in each step of a block: the schedule's, or one until nothing is masked."""
        schedule = self.request.schedule
        end, begun = (block + 1) * schedule.block_length, self._decoder.begin(block)
        if self.shape.block:
            # The schedule is that of a whole block, even where the prompt has some of its rows; it ends with the last mask.
            begun = np.full_like(begun, schedule.block_length)
        if self.transfer.keeps_schedule:
            steps = schedule.steps_per_block
            for step in range(1, steps + self.transfer.extra_steps + 1):
                masked = self._decoder.masked(end).sum(1)
                if (self.options.early_stop or self.shape.block) and not masked.any():
                    return
                yield self.transfer.quotas(begun, masked, step, steps)
            return
        while self._decoder.is_open(block):
            yield np.ones(self.request.shape.batch, np.int64)

    def _step(self, step: int, block: int, block_step: int, quota: NDArray[np.int64]) -> Frame | None:
        """The frame of a step, or None where the rule commits nothing and so runs nothing."""
        start, decided_before = time.perf_counter(), self._strategies.seconds
        idles = self.transfer.idles
        if idles and not self._decoder.foresees and not quota.any():
            return None
        self._inspected = self._decoder.inspect(block, block_step)
        self._upcoming = self._decoder.foresee(block, block_step, quota)
        if idles and self._upcoming is not None and not self._upcoming.any():
            return None
        if self.shape.conditioning:
            level = self.transfer.noise_level(block_step, self.request.schedule.steps_per_block)
            self._clock.run(self.workspace.conditioner.prepare(level))
        plan = self._forward(step, block)
        hidden, shadow = self.workspace.conditional.hidden, self._run_shadow(plan, block)
        asked = self._strategize(lambda: self._decoder.ask(hidden, block, block_step, quota))
        if asked is not None and self._looks_ahead and self._goes_on(asked, block):
            self._look_ahead(asked, block)
        committed = self._strategize(lambda: self._decoder.decide(asked, shadow))
        if self._queued is not None:
            self._check(self._queued)
        edited = self._decoder.edited.copy()
        if self.transfer.edits:
            for passes in (self._conditional, self._unconditional):
                passes.edited = edited if passes.edited is None else passes.edited | edited
        recomputed = self.workspace.conditional.recomputed(plan) if self.watch else None
        lead = self.request.shape.lead
        return Frame(
            step=step,
            steps=self._most_steps,
            block=block,
            kind=plan.kind,
            tokens=self._decoder.decided,
            ahead=self._queued is not None,
            drafts=self._decoder.response.copy() if self.transfer.moves else None,
            committed=committed,
            edited=edited,
            confidence=self._decoder.confidence.copy(),
            recomputed=None if recomputed is None else recomputed[:, lead:],
            passes=self._passes,
            engine_seconds=self._clock.take(ahead=self._queued is not None),
            strategy_seconds=self._strategies.seconds - decided_before,
            seconds=time.perf_counter() - start,
        )

    @property
    def _most_steps(self) -> int:
        """Steps of the schedule; a rule that keeps none takes at most one for each of its tokens, and what it adds."""
        schedule = self.request.schedule
        extra = schedule.blocks * self.transfer.extra_steps
        return extra + (schedule.steps if self.transfer.keeps_schedule else schedule.gen_length)

    def _strategize(self, work: Callable[[], T]) -> T:
        """Do a strategy's work and count its time, less that of the graphs that run in between."""
        engines = self._clock.host.seconds
        result = self._strategies.time(work)
        self._strategies.seconds -= self._clock.host.seconds - engines
        return result

    # -- run
    def _forward(self, step: int, block: int) -> StepPlan:
        if self._queued is not None:
            plan, self._queued = self._queued.plan, None
            self._passes += 1
            return plan
        state, plan = self._run_trunk(self.workspace.conditional, self._conditional, self._decoder.canvas, block)
        if not self._guided:
            return plan
        due = (step - 1) % self.options.cfg_interval == 0 or step <= GUIDANCE_WARMUP
        missing = state.needed & ~self._residual
        if due or missing.any():
            _, other = self._run_trunk(self.workspace.unconditional, self._unconditional, self._blank(), block)
            hidden = self.workspace.conditional.hidden, self.workspace.unconditional.hidden
            self._clock.run(self.workspace.head.prepare_guidance(*hidden))
            self._residual = self._alive(plan) & self._alive(other)
        return plan

    def _run_shadow(self, plan: StepPlan, block: int) -> Buffer | None:
        """Hidden rows [B, n, D] of the block's shadow after the step of this plan, where the rule verifies some of its rows.

        They are part of the step's pass and count as none of their own: nothing that was decided since is in them.
        """
        shown = self._decoder.find_shadow(block)
        if shown is None:
            return None
        length = self.request.schedule.block_length
        start = self.request.shape.prompt_rows + block * length
        shadow, trunk = self.workspace.shadow, self.workspace.conditional
        self._clock.run(shadow.prepare(trunk, plan, (start, start + length), shown, self.special.mask))
        return shadow.hidden

    def _alive(self, plan: StepPlan) -> NDArray[np.bool_]:
        """Response rows [B, R], led, whose hidden rows mean something after a step of this plan."""
        request = self.request.shape.led
        everything = np.ones((request.batch, request.length), np.bool_)
        return (plan.rows.mask(request.length) if plan.rows else everything)[:, request.prompt_rows :]

    def _blank(self) -> NDArray[np.int32]:
        """The canvas [B, S] without what was given: the unconditional pass of guidance."""
        return np.where(self._given, np.int32(self.special.mask), self._decoder.canvas)

    @property
    def _looks_ahead(self) -> bool:
        """Whether the layers of a step may run before the host knows what the step before commits.

        The device must be able to decide, the plan must not wait for the decision, and nothing else may look at what the
        layers leave, or write what they read.
        """
        return (
            self.workspace.session.queues
            and self._decoder.takes_best
            and is_foreseeable(self.policy)
            and not (self._guided or self.watch or self.shape.block or self.shape.conditioning)
            and self._conditional.sharing is None
        )

    def _goes_on(self, asked: Question, block: int) -> bool:
        """Whether another step of the same block follows, as far as that is known before this one is decided.

        Where the rule decides how many tokens a step commits there may be none. Layers that ran for nothing change no token
        behind the last block, but they would in the caches of a block that follows.
        """
        schedule = self.request.schedule
        if self.transfer.keeps_schedule:
            return asked.block_step < schedule.steps_per_block
        return block == schedule.blocks - 1 and max(map(len, asked.rows)) > 1

    def _look_ahead(self, asked: Question, block: int) -> None:
        """Queue the decision of a step, whose head is queued, and the layers of the next one."""
        trunk, passes, workspace = self.workspace.conditional, self._conditional, self.workspace
        state, plan = self._advance(passes, block)
        columns = [self.request.shape.prompt_rows + rows for rows in asked.rows]
        statistics, tokens = workspace.head.outputs(asked.index.shape[1]), trunk.tokens(plan)
        commit = trunk.commit.prepare(
            statistics, columns, asked.quota, self.transfer.sure, self._decoder.canvas, trunk.columns(plan), tokens
        )
        self._clock.run(commit)
        seen = self._clock.wait(lambda: workspace.session.fetch([tokens]))
        self._clock.run(trunk.prepare(plan, None))
        self._queued = Queued(state, plan, seen)

    def _check(self, queued: Queued) -> None:
        """Refuse to go on where the device and the host decided otherwise by the same numbers."""
        (found,) = self._clock.wait(queued.canvas)
        expected = np.take_along_axis(self._decoder.canvas, self.workspace.conditional.columns(queued.plan), axis=1)
        different = np.argwhere(found != expected)
        if len(different):
            sequence, row = different[0]
            raise MismatchError(
                f"the device decided otherwise than the host before step {queued.state.step}: token {found[sequence, row]} in "
                f"alive row {row} of sequence {sequence}, expected {expected[sequence, row]}; use --captures 0, which "
                f"decides on the host alone, and report it"
            )

    def _advance(self, passes: Passes, block: int) -> tuple[StepState, StepPlan]:
        """Count a pass, and plan it."""
        passes.advance(block)
        state, plan = self._strategies.time(lambda: self._plan(passes))
        passes.masked, passes.compacted = state.masked, plan.compaction or passes.compacted
        passes.edited = None
        return state, plan

    def _run_trunk(
        self, trunk: Trunk, passes: Passes, canvas: NDArray[np.int32], block: int
    ) -> tuple[StepState, StepPlan]:
        state, plan = self._advance(passes, block)
        if passes.sharing is not None and plan.join is not None:
            self._clock.run(passes.sharing.load())
        self._clock.run(trunk.prepare(plan, canvas))
        if passes.sharing is not None and plan.share is not None and (save := passes.sharing.save()):
            self._clock.run(save)
        passes.drift = self._clock.wait(lambda: trunk.drift(plan)) if plan.measure_drift else None
        self._passes += 1
        return state, plan

    def _plan(self, passes: Passes) -> tuple[StepState, StepPlan]:
        """What the policy looks at, and what it makes of it."""
        state = self._state(passes)
        return state, make_plan(self.policy, state)

    def _state(self, passes: Passes) -> StepState:
        request, length, lead = self.request.shape, self.request.schedule.block_length, self.request.shape.lead
        masked = self._led(self._decoder.masked(request.response_rows))
        before = masked if passes.masked is None else passes.masked
        if passes.edited is not None:
            before = before | self._led(passes.edited)
        upcoming = None if self._upcoming is None else self._led(self._upcoming)
        inspected = None if self._inspected is None else self._led(self._inspected)
        for array in (masked, before, passes.drift, upcoming, inspected):
            if array is not None:
                array.setflags(write=False)
        start = request.prompt_rows + passes.block * length
        return StepState(
            step=passes.step,
            block_step=passes.block_step,
            block=(start, start + length),
            layers=self.shape.layers,
            prompt_rows=request.prompt_rows - lead,
            response_rows=request.response_rows + lead,
            padding=tuple(self.request.padding.tolist()),
            shift=request.shift,
            masked=masked,
            masked_before=before,
            compacted=passes.compacted,
            drift=passes.drift,
            indicator_rank=self.shape.indicator_rank,
            upcoming=upcoming,
            inspected=inspected,
            prefix=passes.sharing.look() if passes.sharing is not None else None,
        )

    def _led(self, rows: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Masks of response rows [B, R] with those of the rows that lead it, which are given."""
        lead = self.request.shape.lead
        return np.pad(rows, ((0, 0), (lead, 0))) if lead else rows
