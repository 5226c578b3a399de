"""What a cache policy says about a step. Plans are values: a policy never touches a tensor of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

LayerGraph = Literal["layer_full", "layer_partial", "layer_adaptive", "layer_tracking", "layer_indicated", "layer_skip"]
PICKING_GRAPHS = ("layer_adaptive", "layer_tracking", "layer_indicated")
"""Layers that pick `budget` of the alive rows by how far they drifted."""
Attention = Literal["any", "full", "blocks"]
"""What a policy counts on: rows that all see each other, or blocks that see themselves and those before them. A policy that
does not serve any kind has a class variable `attention`."""
Reference = Literal["input", "indicator"]
Alive = Literal["sequence", "response", "rows"]
StepKind = Literal["full", "split", "refresh_prompt", "refresh_response", "partial"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixState:
    """The rows at the start of every sequence that other requests share, and what is known of them from those."""

    rows: int
    """n, equally many in every sequence."""
    starts: tuple[int, ...]
    """First position of the prefix in each sequence; padding lies before it."""
    depth: int
    """Layers, counted from the first, whose keys and values of the prefix may come from another request."""
    stored: bool
    """Whether they are stored, with the rows that enter layer `depth`."""


REFRESH_INTERVAL = "steps of a block from one full pass to the next; 0: only its first step is one"
"""Help text of `refresh_interval`, which means the same in every policy that has it (StepState.is_refresh)."""

BUCKET = "counts of rows are raised to a multiple of this, so that few sizes occur; 1 keeps the exact counts"
"""Help text of `bucket`, which means the same in every policy that has it: rows are repeated (Rows.padded), or more picked."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepState:
    """What a policy may look at. Rows before `prompt_rows` are given text; the response is the rest.

    With a shift the last row of the prompt predicts into the response and is counted as its first row, decided from the start.

    Steps are counted per pass: the unconditional pass of guidance has caches, and so a count and a history, of its own.
    """

    step: int
    """1-based and counted over the whole request, across blocks."""
    block_step: int
    """1-based within the block."""
    block: tuple[int, int]
    """First position of the block that is being decoded and the one after its last, counted from the sequence's start."""
    layers: int
    prompt_rows: int
    response_rows: int
    padding: tuple[int, ...]
    """Rows on the left of each sequence that are padding: nothing attends to them."""
    shift: bool = False
    """Whether a row's logits are those of the next token, so that the row before a masked one must be fresh."""
    masked: NDArray[np.bool_]  # [B, R] response rows that are undecided now
    masked_before: NDArray[np.bool_]  # [B, R]
    """Those that were at the start of the last step, and those whose token it replaced by another; `masked` in the first."""
    compacted: Compaction | None = None
    """The compaction that was made last, of this pass."""
    upcoming: NDArray[np.bool_] | None = None  # [B, R]
    """The rows that this step will decide, where that is known before it runs: with --remasking random and the rule
    `quota`. A policy that cannot do without it has a class variable `needs_upcoming = True`."""
    inspected: NDArray[np.bool_] | None = None  # [B, R]
    """The rows whose predictions this step looks at, where they are not all that are masked so far: fewer under a rule that
    goes by parts of the block, decided ones too under a rule that edits."""
    drift: NDArray[np.float64] | None = None
    """[B, L] mean drift of the response rows in every layer in the last step, if its plan measured it."""
    indicator_rank: int = 0
    """Width of the bundle's change indicator, which `layer_indicated` needs; 0 in a bundle without."""
    prefix: PrefixState | None = None
    """The prefix that the request shares with others, where it names one."""

    @classmethod
    def first(cls, *, layers: int, prompt_rows: int, response_rows: int, batch: int = 1) -> StepState:
        """The first step of a request without given response rows, decoded as one block."""
        masked = np.ones((batch, response_rows), np.bool_)
        return cls(
            step=1,
            block_step=1,
            block=(prompt_rows, prompt_rows + response_rows),
            layers=layers,
            prompt_rows=prompt_rows,
            response_rows=response_rows,
            padding=(0,) * batch,
            masked=masked,
            masked_before=masked,
        )

    def is_refresh(self, interval: int) -> bool:
        """Whether this is the first step of its block, or one that comes every `interval` steps (0: none) after it."""
        return self.block_step == 1 or (interval > 0 and (self.block_step - 1) % interval == 0)

    @property
    def candidates(self) -> NDArray[np.bool_]:
        """The rows [B, R] that this step may decide: those it will, where that is known, those that it looks at, or all
        masked ones so far."""
        if self.upcoming is not None:
            return self.upcoming
        if self.inspected is not None:
            return self.inspected
        before_end = np.arange(self.response_rows) < self.block[1] - self.prompt_rows
        return self.masked & before_end

    @property
    def span(self) -> tuple[int, int]:
        """First position of the rows that a step of this block cannot do without, and the one after the last.

        They are the block's own, whose keys change, and with a shift the one before it, which predicts the first of them.
        """
        return max(self.block[0] - self.shift, self.prompt_rows), self.block[1]

    def predicting(self, rows: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The rows [B, R] that predict the tokens of these [B, R]: they themselves, or with a shift those before them."""
        if not self.shift:
            return rows
        predictors = np.zeros_like(rows)
        sequences, places = np.nonzero(rows)
        # The first row of a sequence has none before it and predicts itself.
        first = np.maximum(np.array(self.padding) - self.prompt_rows, 0)
        predictors[sequences, np.maximum(places - 1, first[sequences])] = True
        return predictors

    @property
    def needed(self) -> NDArray[np.bool_]:
        """The rows [B, R] whose hidden states this step looks at: what predicts its candidates."""
        return self.predicting(self.candidates)

    @property
    def batch(self) -> int:
        """B, sequences of the request."""
        return len(self.masked)

    @property
    def length(self) -> int:
        """S, rows of a sequence."""
        return self.prompt_rows + self.response_rows


@dataclass(frozen=True, slots=True)
class Rows:
    """Positions in the sequence, one tuple for each sequence of the batch, equally long; repeats are harmless."""

    positions: tuple[tuple[int, ...], ...]

    @classmethod
    def span(cls, start: int, end: int, batch: int) -> Rows:
        """The positions from `start` up to, not including, `end`, in every sequence."""
        return cls((tuple(range(start, end)),) * batch)

    @classmethod
    def padded(cls, chosen: NDArray[np.bool_], first: int, bucket: int) -> Rows:
        """The true places of each sequence in `chosen` [B, N], counted from `first`.

        Repeats bring all sequences to the same multiple of `bucket`, or to N; one without a place gets its first.
        """
        count = min(-(-max(1, int(chosen.sum(1).max())) // bucket) * bucket, chosen.shape[1])
        places = (np.flatnonzero(row) if row.any() else np.zeros(1, np.int64) for row in chosen)
        return cls(tuple(tuple((first + np.resize(row, count)).tolist()) for row in places))

    @property
    def count(self) -> int:
        """Rows of one sequence."""
        return len(self.positions[0])

    @classmethod
    def outside(cls, prefix: PrefixState, length: int) -> Rows:
        """All positions of sequences of this length but those of the prefix."""
        ends = ((start, start + prefix.rows) for start in prefix.starts)
        return cls(tuple((*range(start), *range(end, length)) for start, end in ends))

    def array(self) -> NDArray[np.int32]:
        """The positions as an array [B, count]."""
        return np.array(self.positions, np.int32).reshape(len(self.positions), self.count)

    def mask(self, length: int) -> NDArray[np.bool_]:
        """Which of `length` positions these are [B, length]."""
        chosen = np.zeros((len(self.positions), length), np.bool_)
        np.put_along_axis(chosen, self.array().astype(np.int64), True, axis=1)
        return chosen


@dataclass(frozen=True, slots=True)
class Compaction:
    """A cache cut down to some rows (graphs/compaction.py). A plan over the sequence makes it after its full layers; a
    plan of exactly its rows then runs against it. Both hold the same value, which says which compaction is meant."""

    rows: Rows
    """The block: these rows are kept whatever their relevance. No repeats, by rising position."""
    kept: tuple[int, ...]
    """How many other visible rows are kept of each sequence: the most relevant ones, layer by layer."""

    @property
    def count(self) -> int:
        """C, rows of the compacted cache, the same for every sequence."""
        return self.rows.count + max(self.kept)


class LayerPlan(NamedTuple):
    """Which graph runs a layer, and how many rows one that picks them may pick per sequence.

    A named tuple, since every step compares and hashes one for each layer.
    """

    graph: LayerGraph
    budget: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step. Plans that differ in nothing but positions run the same calls: a provider prepares them once."""

    kind: StepKind
    alive: Alive
    """Rows that travel through the layers: all of the sequence, the response, or `rows`."""
    layers: tuple[LayerPlan, ...]
    rows: Rows | None = None
    """The alive rows of a plan whose `alive` is rows."""
    keep_delta: bool = True
    """Whether the deltas of the response are cached for later steps."""
    compaction: Compaction | None = None
    reference: Reference | None = None
    """What every layer keeps of its response rows, for the next step to measure drift from: its input, as
    `layer_tracking` needs it of the step before, or its indicator, for `layer_indicated`, which then renews it itself."""
    measure_drift: bool = False
    """Whether the mean drift of every layer is read back, into the state of the next step."""
    forced: Rows | None = None
    """Positions that layers must pick."""
    write_response_values: bool = True
    """`layer_adaptive` stores the projected values of all alive rows, not of the prompt rows alone."""
    share: int | None = None
    """Store the prefix's keys and values below this layer, and its rows that enter it, for later requests."""
    join: int | None = None
    """Layers below this one run `rows`, all but the prefix, against its stored keys and values; here its stored rows join
    and the whole sequence is alive. As many as there are layers: they never join."""

    @classmethod
    def refresh(
        cls,
        state: StepState,
        *,
        keep_delta: bool = True,
        compaction: Compaction | None = None,
        reference: Reference | None = None,
    ) -> StepPlan:
        """Every row of every layer."""
        layers = (LayerPlan("layer_full"),) * state.layers
        return cls(
            kind="full",
            alive="sequence",
            layers=layers,
            keep_delta=keep_delta,
            compaction=compaction,
            reference=reference,
        )

    @classmethod
    def refresh_response(cls, state: StepState, *, reference: Reference | None = None) -> StepPlan:
        """Every response row of every layer, against the cached prompt."""
        layers = (LayerPlan("layer_partial"),) * state.layers
        return cls(kind="refresh_response", alive="response", layers=layers, reference=reference)

    @property
    def whole(self) -> bool:
        """Whether every layer computes every row."""
        return self.alive == "sequence" and all(layer.graph == "layer_full" for layer in self.layers)

    @classmethod
    def recompute(cls, state: StepState, rows: Rows, *, compaction: Compaction | None = None) -> StepPlan:
        """These rows in every layer, against the cached keys and values of all others, or of those that were kept."""
        layers = (LayerPlan("layer_partial"),) * state.layers
        return cls(kind="partial", alive="rows", rows=rows, layers=layers, keep_delta=False, compaction=compaction)

    @classmethod
    def split(cls, state: StepState, prefix: PrefixState, *, keep_delta: bool) -> StepPlan:
        """Every row of every layer, but for the prefix's in the first `depth` layers, which are as stored."""
        depth = prefix.depth
        layers = (*[LayerPlan("layer_partial")] * depth, *[LayerPlan("layer_full")] * (state.layers - depth))
        rows = Rows.outside(prefix, state.length)
        return cls(kind="split", alive="rows", rows=rows, layers=layers, keep_delta=keep_delta, join=depth)


class CachePolicy(Protocol):
    """A named, frozen set of parameters with one pure method.

    One whose plans are the same whatever rows are decided, because they go by the numbers of the step and the block, has a
    class variable `foreseeable = True` of its own: its steps can be queued before the step before them is decided.
    """

    name: ClassVar[str]
    """The name under which the command line knows the policy."""

    def plan(self, state: StepState) -> StepPlan:
        """The plan of a step; the same state always gives the same plan."""
        ...


def is_foreseeable(policy: CachePolicy) -> bool:
    """Whether the policy's own class says that its plans are the same whatever rows are decided.

    What a class says of itself is not inherited: one derived from it may plan by what is decided.
    """
    return "foreseeable" in vars(type(policy)) and bool(getattr(policy, "foreseeable", False))
