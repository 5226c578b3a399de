"""The seam between the step loop and a decoding rule: which candidate rows become decided in a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from dllm_export.graphs import HeadGraph
from dllm_export.runtime.schedule import commit_counts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TransferState:
    """What a rule may look at: one sequence's block, n of its masked rows and its m decided ones, left to right.

    The n are all of the block, at least one; of a rule that `narrows` those it asked for; of one that `edits` maybe none.
    Rows are places in the response. Probabilities are those of the noise-free distribution after bans and guidance.
    """

    quota: int
    """Rows that the schedule of `--steps` would commit now."""
    block: tuple[int, int]
    """First row of the block and the one after its last."""
    block_step: int
    """1-based within the block; of the schedule, where the rule keeps one."""
    block_masks: int
    """Rows that were masked when the block began."""
    rows: NDArray[np.int64]  # [n] the candidates: masked rows
    ranking: NDArray[np.float64]  # [n] what `--remasking` ranks by, larger first
    confidence: NDArray[np.float64]  # [n] probability of the proposed token
    second: NDArray[np.float64]  # [n] second-largest probability of the row
    entropy: NDArray[np.float64]  # [n] of the row's distribution, in nats
    decided: NDArray[np.int64]  # [m] rows that were decided in earlier steps; none that was given
    decided_confidence: NDArray[np.float64]  # [m] their confidence when they were committed
    divergence: NDArray[np.float64] | None = None
    """[n] KL(p || p of the step before) in nats, of `head_tracked`; nan in the first step of a block."""
    similarity: NDArray[np.float64] | None = None
    """[n] Cosine of p and p of the step before, of `head_tracked`; nan in the first step of a block."""
    verified: NDArray[np.float64] | None = None
    """[m] Probability that each decided row's token has in the row's shadow, which sees all but the row (docs/policies.md);
    for rules that ask for it with `verifies`."""
    rival: NDArray[np.float64] | None = None
    """[m] Probability of the likeliest token of each decided row where it is another than the row's own, else nan; for rules
    that ask for it with `edits`."""
    steps: int = 1
    """Steps of the block's schedule."""
    draw: NDArray[np.float64] | None = None
    """[n] A random number from 0 to 1 for each candidate, drawn before the forward pass for a rule that `draws`."""
    logsumexp: NDArray[np.float64] | None = None  # [n] of the row's logits, without banned tokens
    memory: Any = None
    """What the rule's last choice for this sequence wanted to see again; None at first."""


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """What a rule makes of a state."""

    commit: NDArray[np.int64]
    """Indices into the candidates: the schedule's number of rows or more under `keeps_schedule`, else at least one of any."""
    remask: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Indices into the decided rows: those to mask again. After k steps a block has k masks fewer at least."""
    memory: Any = None
    """Comes back as `memory` in the next state of this sequence."""
    edit: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Indices into the decided rows: those that get their likeliest token in place of their own."""
    goes_on: bool = False
    """Whether this sequence's block takes another step though nothing is masked in it, of a rule that `edits`."""


class Transfer(Protocol):
    """A decoding rule: frozen, pure, and the same for every policy and provider. Derive from it to get the defaults."""

    name: ClassVar[str]
    keeps_schedule: ClassVar[bool] = False
    """Whether a block takes the steps of its schedule; else it ends as soon as nothing is masked."""
    ranks: ClassVar[bool] = False
    """Whether the rule looks at `ranking`, so that `--remasking` means something."""
    remasks: ClassVar[bool] = False
    """Whether the rule may mask decided rows again."""
    tempered: ClassVar[bool] = False
    """Whether `ranking` is of the distribution that tokens are drawn from: after temperature, top-p and top-k."""
    edits: ClassVar[bool] = False
    """Whether the rule may replace decided tokens: the head then also runs on the block's decided rows, and a block ends when
    nothing is masked and the rule says so."""
    narrows: ClassVar[bool] = False
    """Whether `narrow` says before a step runs which masked rows are candidates; for rules that do not mask rows again."""
    verifies: ClassVar[bool] = False
    """Whether the rule looks at `verified`: a step with decided rows in its block then also runs the block's shadow."""
    reveals: ClassVar[bool] = False
    """Whether `reveal` says before a step runs which candidates it commits; such a rule `draws`."""
    takes_best: ClassVar[bool] = False
    """Whether a step commits the rows with the highest `ranking` and nothing else, so that graph `commit` can decide, too: as
    many as the schedule says, one where the rule keeps none, and all that are `sure`. Not inherited by derived rules."""
    idles: ClassVar[bool] = False
    """Whether a step that is known to commit nothing is left out, its forward pass too."""

    sees_noise: ClassVar[bool] = False
    """Whether the rule is for models that are shown the noise level of a step, and states it."""
    moves: ClassVar[bool] = False
    """Whether undecided rows hold tokens too, which every step draws anew: for models whose noise is other tokens. Such a rule
    takes `head_moved` and states `move_weights`."""
    continuous: ClassVar[bool] = False
    """Whether the rule moves vectors instead of choosing rows: for continuous models, which it alone is for."""

    head: ClassVar[HeadGraph] = "head"
    """Which head graph gives the statistics. One that keeps a state runs on every row of the block; `head_drawn` draws tokens
    from the whole vocabulary, and where the rows are known before the step it runs on them alone."""

    @property
    def draws(self) -> bool:
        """Whether the rule looks at `draw`."""
        return False

    @property
    def sure(self) -> float:
        """Of a rule that `takes_best`: the least confidence that commits a row whatever its rank; above 1 none does."""
        return math.inf

    @property
    def extra_steps(self) -> int:
        """Steps of a block beyond those of its schedule, or of a rule that `edits` beyond its masks."""
        return 0

    def narrow(self, rows: NDArray[np.int64], block: tuple[int, int], block_step: int) -> NDArray[np.int64]:
        """Of a rule that `narrows`: the indices of the masked rows [n] of a block that a step chooses among, at least one."""
        return np.arange(len(rows))

    def quotas(self, begun: NDArray[np.int64], masked: NDArray[np.int64], step: int, steps: int) -> NDArray[np.int64]:
        """Rows that a step of a block's schedule commits in each sequence [B], by its masks at the block's begin and now."""
        return commit_counts(begun, steps)[:, step - 1]

    def reveal(self, draw: NDArray[np.float64], step: int, steps: int) -> NDArray[np.int64]:
        """Of a rule that `reveals`: the candidates that a step of a block commits, by their random numbers [n]."""
        return np.zeros(0, np.int64)

    def noise_level(self, step: int, steps: int) -> float:
        """What a step of a block shows to a model that sees the noise level."""
        return 0.0

    def move_weights(self, step: int, steps: int, states: int) -> tuple[float, float, float, float]:
        """Of a rule that `moves`: a, b, c, d of a step of a block, for a model of so many states. A row's next token is drawn
        with weight a s(y) - b sum(s) for another token y and c - d sum(s) for its own, by its ratios s, 1 for its own."""
        return 0.0, 0.0, 1.0, 0.0

    def is_greedy(self, step: int, steps: int) -> bool:
        """Whether a step of a block takes the likeliest tokens, whatever the temperature."""
        return False

    def head_inputs(self, block_step: int) -> Mapping[str, float]:
        """Numbers that the head graph takes in this step of a block, by name: those of `head_credited`."""
        return {}

    def choose(self, state: TransferState) -> Choice:
        """The rows to commit; the same state always gives the same choice."""
        ...


def best_first(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices by falling value; ties go to the leftmost row."""
    return np.argsort(-values, kind="stable")
