"""The second half of a step: hidden rows -> candidates -> what the decoding rule commits to the canvas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dllm_export.errors import OverflowedError
from dllm_export.graphs.families import SpecialTokens
from dllm_export.runtime.clock import EngineClock
from dllm_export.runtime.combinations import is_foreseen
from dllm_export.runtime.head import DRAWN, MOVED, Candidates, Head
from dllm_export.runtime.options import SettledOptions
from dllm_export.runtime.request import Request
from dllm_export.runtime.sampler import Proposal, propose, rank, share, temper
from dllm_export.runtime.session import Buffer
from dllm_export.runtime.transfers.contract import choose_rows, narrow_rows
from dllm_export.runtime.transfers.transfer import Transfer, TransferState, best_first

OVERFLOW = (
    "the model's logits are not finite: activations overflow in this dtype; export with --dtype bfloat16 or float32"
)

UNIFORM = 2**23
"""Random numbers for drawing tokens are multiples of its reciprocal, so that none rounds to 1 in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a step chooses among, on its way through the head. Lists have an entry for each sequence."""

    span: tuple[int, int]
    """First row of the block and the one after its last, among the response's."""
    block_step: int
    quota: NDArray[np.int64]  # [B]
    rows: list[NDArray[np.int64]]
    """Masked rows of the response among which the rule chooses: the candidates."""
    read: list[NDArray[np.int64]]
    """The same and, behind them, decided ones that may be replaced."""
    decided: list[NDArray[np.int64]]
    draws: list[NDArray[np.float64]] | None
    index: NDArray[np.int32]  # [B, Q]
    """Where the rows that are read lie in `hidden`; padded."""
    hidden: Buffer
    temperature: float
    candidates: Callable[[], Candidates]
    """Waits for the head's statistics."""


class Decoder:
    """The canvas of one request, and what is decided on it step by step."""

    def __init__(
        self,
        head: Head,
        special: SpecialTokens,
        request: Request,
        options: SettledOptions,
        transfer: Transfer,
        clock: EngineClock,
    ) -> None:
        self._head, self._special, self._request = head, special, request
        self._options, self._transfer, self._clock = options, transfer, clock
        batch = request.shape.batch
        self.foresees = is_foreseen(options, transfer)
        """Whether what is drawn before a step settles which rows it decides."""
        self._predictors = request.predictors
        self.canvas: NDArray[np.int32] = request.canvas.copy()
        self.response = self.canvas[:, request.shape.prompt_rows :]  # view [B, R]
        self.confidence = np.full((batch, request.shape.response_rows), np.nan)  # of the rows decided so far
        self.edited = np.zeros(self.response.shape, np.bool_)
        """Rows [B, R] whose token the last step replaced by another."""
        self._undecided: NDArray[np.bool_] = np.equal(self.response, special.mask)  # [B, R]
        self._asked = self._undecided.copy()
        self._rngs = [np.random.default_rng(options.seed + row) for row in range(batch)]
        self._orders: list[NDArray[np.float64]] | None = (
            None  # drawn for the coming step, one number for each candidate
        )
        self._draws: list[NDArray[np.float64]] | None = None  # likewise, for a rule that asks for them
        self._upcoming: NDArray[np.bool_] | None = None
        self._inspected: NDArray[np.bool_] | None = None
        self._goes_on = np.zeros(batch, np.bool_)  # sequences whose block takes another step, of a rule that edits
        self._memories: list[Any] = [None] * batch
        self._block_masks = np.zeros(batch, np.int64)
        # The mask token is never a proposal: committed, it would leave a hole (docs/decisions.md).
        self._banned = frozenset({special.mask, *((special.eos,) if options.logits_eos_inf else ())})
        self._ranked_last = special.ends if options.confidence_eos_eot_inf else frozenset[int]()
        self._vocab = head.vocab
        if transfer.moves:
            self._banned -= {special.mask}  # no token of this vocabulary
            self._start_from_noise()

    def _start_from_noise(self) -> None:
        """Any token that is not banned, each with the same chance, in every undecided row."""
        tokens = np.setdiff1d(np.arange(self._vocab), list(self._banned))
        for row, rng in enumerate(self._rngs):
            places = np.flatnonzero(self._undecided[row])
            self.response[row, places] = tokens[rng.integers(0, len(tokens), len(places))]

    @property
    def decided(self) -> NDArray[np.int32]:
        """The response's tokens, the mask id where undecided [B, R]."""
        decided: NDArray[np.int32] = np.where(self._undecided, np.int32(self._special.mask), self.response)
        return decided

    def masked(self, end: int) -> NDArray[np.bool_]:
        """Undecided response rows before row `end` [B, R]."""
        masked: NDArray[np.bool_] = self._undecided.copy()
        masked[:, end:] = False
        return masked

    def foresee(self, block: int, block_step: int, quota: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """Draw a step's random numbers before it runs; the rows [B, R] it will decide, where these alone say so."""
        self._upcoming = self._foresee(block, block_step, quota)
        return self._upcoming

    def _foresee(self, block: int, block_step: int, quota: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        ordered = self._options.remasking == "random"
        if not (ordered or self._transfer.draws):
            return None
        masked = self._candidate_rows((block + 1) * self._request.schedule.block_length)
        if ordered:
            self._orders = [rng.random(int(row.sum())) for rng, row in zip(self._rngs, masked, strict=True)]
        if self._transfer.draws:
            self._draws = [rng.random(int(row.sum())) for rng, row in zip(self._rngs, masked, strict=True)]
        if not self.foresees:
            return None
        upcoming = np.zeros(masked.shape, np.bool_)
        for sequence, row in enumerate(masked):
            if self._transfer.reveals:
                assert self._draws is not None, "drawn above"
                steps = self._request.schedule.steps_per_block
                chosen = self._transfer.reveal(self._draws[sequence], block_step, steps)
            else:
                assert self._orders is not None, "drawn above"
                chosen = best_first(self._orders[sequence])[: quota[sequence]]
            upcoming[sequence, np.flatnonzero(row)[chosen]] = True
        return upcoming

    def inspect(self, block: int, block_step: int) -> NDArray[np.bool_] | None:
        """The rows [B, R] that a step looks at, where the rule narrows them or looks at decided ones too; else None."""
        self._inspected, rule = None, self._transfer
        if not (rule.narrows or rule.edits):
            return None
        span = self._span(block)
        inspected = self.masked(span[1])
        for sequence, row in enumerate(inspected):
            places = row.nonzero()[0]
            if rule.narrows and len(places):
                row[:] = False
                row[narrow_rows(rule, places, span, block_step)] = True
            if rule.edits and self._goes_on[sequence]:
                row[self._decided(sequence, span)] = True
        self._inspected = inspected
        return inspected

    def is_open(self, block: int) -> bool:
        """Whether a block takes another step: rows of it or of a block before are masked, or a rule that edits says so."""
        masked = self.masked((block + 1) * self._request.schedule.block_length)
        return bool(masked.any() or (self._transfer.edits and self._goes_on.any()))

    def _candidate_rows(self, end: int) -> NDArray[np.bool_]:
        """Undecided response rows before row `end` that the rule chooses among [B, R]."""
        masked = self.masked(end)
        return masked if self._inspected is None else masked & self._inspected

    def find_shadow(self, block: int) -> NDArray[np.bool_] | None:
        """Which rows [B, n] of the block have a shadow that others see: all but given ones. None if the step needs no shadow.

        It needs one where the rule verifies and some sequence still has masked rows in the block beside decided ones.
        """
        if not self._transfer.verifies:
            return None
        span = self._span(block)
        open_rows = self.masked(span[1]).any(1)
        decided = (len(self._decided(sequence, span)) > 0 for sequence in np.flatnonzero(open_rows).tolist())
        return self._asked[:, slice(*span)] if any(decided) else None

    def begin(self, block: int) -> NDArray[np.int64]:
        """Masks of each sequence [B] up to the end of a block, which begins now."""
        self._block_masks = self.masked((block + 1) * self._request.schedule.block_length).sum(1)
        self._goes_on = self._block_masks > 0
        return self._block_masks

    @property
    def takes_best(self) -> bool:
        """Whether every step commits the likeliest tokens and nothing else, as graph `commit` does too."""
        options, rule = self._options, self._transfer
        plain = options.temperature == 0 and options.remasking == "low_confidence" and not self._ranked_last
        best = rule.takes_best and "takes_best" in vars(type(rule))  # what a class says of itself is not inherited
        return plain and best and not options.early_stop

    def ask(self, hidden: Buffer, block: int, block_step: int, quota: NDArray[np.int64]) -> Question | None:
        """Queue the head on what the rule chooses among; None where there is nothing to choose, nor to replace."""
        span = self._span(block)
        masked = self._candidate_rows(span[1])
        draws = self._draws
        if self._upcoming is not None and self._transfer.draws:
            # The rows are known, so that the head need not look at others, nor random numbers be spent on them.
            draws = [draw[self._upcoming[n, masked[n]]] for n, draw in enumerate(draws)] if draws else None
            masked &= self._upcoming
        rows = [mask.nonzero()[0] for mask in masked]
        decided = [self._decided(sequence, span) for sequence in range(len(rows))]
        read = rows
        if self._transfer.edits:
            # Behind the candidates the head looks at the rows whose tokens may be replaced.
            editable = (own if on else own[:0] for own, on in zip(decided, self._goes_on, strict=True))
            read = [np.append(places, own) for places, own in zip(rows, editable, strict=True)]
        most = max(map(len, read))
        if not most:
            return None
        index = np.zeros((len(rows), self._head.pad(most, span[1] - span[0])), np.int32)
        for sequence, places in enumerate(read):
            index[sequence, : len(places)] = self._predictors[sequence, places]
        greedy = self._transfer.is_greedy(block_step, self._request.schedule.steps_per_block)
        temperature = 0.0 if greedy else self._options.temperature
        return Question(
            span=span,
            block_step=block_step,
            quota=quota,
            rows=rows,
            read=read,
            decided=decided,
            draws=draws,
            index=index,
            hidden=hidden,
            temperature=temperature,
            candidates=self._evidence(hidden, index, read, span, block_step, temperature),
        )

    def decide(self, asked: Question | None, shadow: Buffer | None = None) -> NDArray[np.bool_]:
        """Commit what the rule chooses among the block's masked rows; returns which rows became decided [B, R].

        `shadow` [B, n, D] are the hidden rows of the block's shadow, where `find_shadow` asked for one.
        """
        committed = np.zeros(self.response.shape, np.bool_)
        if self._transfer.edits:
            self.edited[:] = False
        if asked is None:
            return committed
        span, block_step, temperature, decided = asked.span, asked.block_step, asked.temperature, asked.decided
        candidates = _check_finite(self._clock.wait(asked.candidates))
        verified = self._verify(shadow, span) if self._transfer.verifies else None
        last, ranked = self._ranked_last, candidates
        if last:
            ranked = _check_finite(self._clock.wait(self._candidates(asked.hidden, asked.index, self._banned | last)))
        for sequence, places in enumerate(asked.rows):
            rng = self._rngs[sequence]
            tempered = self._temper(candidates, sequence, len(places), temperature)
            proposal = propose(
                candidates,
                sequence,
                len(places),
                temperature=temperature,
                rng=rng,
                tempered=tempered,
                ranking_logsumexp=ranked.logsumexp if last else None,
                ranked_last=last,
            )
            if not len(asked.read[sequence]):
                continue
            rivals = self._find_rivals(candidates, sequence, len(places), decided[sequence])
            order = self._orders[sequence] if self._orders else None
            ranking = rank(
                self._options.remasking,
                ranked,
                sequence,
                proposal,
                order=order,
                tempered=tempered if self._transfer.tempered else None,
                ranked_last=last,
            )
            state = TransferState(
                quota=int(asked.quota[sequence]),
                block=span,
                block_step=block_step,
                block_masks=int(self._block_masks[sequence]),
                rows=places,
                ranking=ranking,
                confidence=proposal.confidence,
                second=share(candidates, sequence, len(places), 1),
                entropy=candidates.entropy[sequence, : len(places)].astype(np.float64),
                divergence=_moved(candidates.divergence, sequence, len(places), first=block_step == 1),
                similarity=_moved(candidates.similarity, sequence, len(places), first=block_step == 1),
                decided=decided[sequence],
                decided_confidence=self.confidence[sequence, decided[sequence]],
                verified=verified[sequence] if verified else None,
                rival=rivals.confidence if rivals else None,
                steps=self._request.schedule.steps_per_block,
                draw=asked.draws[sequence] if asked.draws else None,
                logsumexp=candidates.logsumexp[sequence, : len(places)],
                memory=self._memories[sequence],
            )
            committed[sequence, self._commit(sequence, state, proposal, rivals)] = True
        return committed | self._fill_after_end() if self._options.early_stop else committed

    def _temper(
        self, candidates: Candidates, sequence: int, count: int, temperature: float
    ) -> NDArray[np.float64] | None:
        """What tokens are drawn from, if it is not the head's own distribution and somebody looks at it."""
        options = self._options
        filtered = options.top_p < 1 or options.top_k is not None
        if not filtered and (not self._transfer.tempered or temperature in (0.0, 1.0)):
            return None
        return temper(candidates, sequence, count, temperature=temperature, top_p=options.top_p, top_k=options.top_k)

    def _find_rivals(
        self, candidates: Candidates, sequence: int, masked: int, decided: NDArray[np.int64]
    ) -> Proposal | None:
        """The likeliest tokens of the decided rows [m], which the head read behind the masked ones, without those they have.

        The confidence of a row that has its likeliest token is nan.
        """
        if not self._transfer.edits:
            return None
        places = slice(masked, masked + len(decided))
        tokens = candidates.top_tokens[sequence, places, 0]
        confidence = share(candidates, sequence, places.stop, 0)[masked:]
        confidence[tokens == self.response[sequence, decided]] = np.nan
        return Proposal(tokens, confidence, np.zeros(len(decided), np.int64))

    def _commit(
        self, sequence: int, state: TransferState, proposal: Proposal, rivals: Proposal | None
    ) -> NDArray[np.int64]:
        """Write the rule's choice to the canvas; the rows that it committed."""
        choice = choose_rows(self._transfer, state)
        self._memories[sequence] = choice.memory
        if self._transfer.moves:
            self.response[sequence, state.rows] = proposal.tokens
        places = state.rows[choice.commit]
        self.response[sequence, places] = proposal.tokens[choice.commit]
        self.confidence[sequence, places] = proposal.confidence[choice.commit]
        self._undecided[sequence, places] = False
        if len(choice.remask):
            again = state.decided[choice.remask]
            self.response[sequence, again] = self._special.mask
            self._undecided[sequence, again] = True
            self.confidence[sequence, again] = np.nan
        if rivals is not None:
            edited = state.decided[choice.edit]
            self.response[sequence, edited] = rivals.tokens[choice.edit]
            self.confidence[sequence, edited] = rivals.confidence[choice.edit]
            self.edited[sequence, edited] = True
            self._goes_on[sequence] = choice.goes_on or self.masked(state.block[1])[sequence].any()
        return places

    def _span(self, block: int) -> tuple[int, int]:
        """First row of a block and the one after its last, among the response's."""
        length = self._request.schedule.block_length
        return block * length, (block + 1) * length

    def _verify(self, shadow: Buffer | None, span: tuple[int, int]) -> list[NDArray[np.float64]]:
        """For each sequence the probabilities [m] of its decided rows' tokens in their shadows."""
        decided = [self._decided(sequence, span) for sequence in range(len(self.response))]
        if shadow is None:
            return [np.full(len(rows), np.nan) for rows in decided]
        index = np.zeros((len(decided), self._head.pad(max(map(len, decided)), span[1] - span[0])), np.int32)
        tokens = np.zeros_like(index)
        for sequence, rows in enumerate(decided):
            index[sequence, : len(rows)] = rows - span[0]
            tokens[sequence, : len(rows)] = self.response[sequence, rows]
        self._clock.run(self._head.prepare_given(shadow, index, tokens, self._banned))
        probability = self._clock.wait(lambda: self._head.read_given(index.shape[1]))
        if not np.isfinite(probability).all():
            raise OverflowedError(OVERFLOW)
        return [row[: len(rows)].astype(np.float64) for row, rows in zip(probability, decided, strict=True)]

    def _decided(self, sequence: int, span: tuple[int, int]) -> NDArray[np.int64]:
        """Rows of the block that were decided here; given text is none of them."""
        start, end = span
        decided = self._asked[sequence, start:end] & ~self._undecided[sequence, start:end]
        rows: NDArray[np.int64] = start + decided.nonzero()[0]
        return rows

    def _fill_after_end(self) -> NDArray[np.bool_]:
        """Every masked row behind an end of text becomes one too, without a confidence; returns which did [B, R].

        Where an end may be replaced it counts once its block is finished.
        """
        ended = np.logical_or.accumulate(np.isin(self.response, list(self._special.ends)), axis=1)
        filled: NDArray[np.bool_] = ended & self._undecided
        if self._transfer.edits:
            filled &= ~self._goes_on[:, None]
        self.response[filled] = self._special.eos
        self._undecided[filled] = False
        return filled

    def _evidence(
        self,
        hidden: Buffer,
        index: NDArray[np.int32],
        rows: list[NDArray[np.int64]],
        span: tuple[int, int],
        block_step: int,
        temperature: float,
    ) -> Callable[[], Candidates]:
        """Queue the rule's head on the candidates [B, n], and give what waits for them.

        With a state it runs on the whole block, so that a row keeps its place.
        """
        graph = self._transfer.head
        if graph == "head_moved":
            return self._move_tokens(hidden, index, rows, block_step)
        if graph == "head_drawn" and temperature > 0:
            return self._draw_tokens(hidden, index, rows, temperature)
        if graph in ("head", "head_drawn"):
            return self._candidates(hidden, index, self._banned)
        start, end = span
        block = np.ascontiguousarray(self._predictors[:, start:end])
        numbers = self._transfer.head_inputs(block_step)
        self._clock.run(self._head.prepare_state(graph, hidden, block, self._banned, numbers))
        candidates = self._fetch(end - start, *(MOVED if graph == "head_tracked" else ()))
        places = np.zeros_like(index)
        for sequence, own in enumerate(rows):
            places[sequence, : len(own)] = own - start
        return lambda: candidates().take(places)

    def _draw_tokens(
        self, hidden: Buffer, index: NDArray[np.int32], rows: list[NDArray[np.int64]], temperature: float
    ) -> Callable[[], Candidates]:
        """Candidates with a token of each that was drawn from the whole vocabulary: two random numbers a row."""
        uniform = self._draw_uniform(index, rows)
        self._clock.run(self._head.prepare_drawn(hidden, index, self._banned, uniform, 1.0 / temperature))
        return self._fetch(index.shape[1], *DRAWN)

    def _move_tokens(
        self, hidden: Buffer, index: NDArray[np.int32], rows: list[NDArray[np.int64]], block_step: int
    ) -> Callable[[], Candidates]:
        """Candidates with the token of each that comes after its present one: two random numbers a row, as above."""
        uniform, present = self._draw_uniform(index, rows), np.zeros_like(index)
        for sequence, places in enumerate(rows):
            present[sequence, : len(places)] = self.response[sequence, places]
        moves = self._transfer.move_weights(block_step, self._request.schedule.steps_per_block, self._vocab)
        self._clock.run(self._head.prepare_moved(hidden, index, present, self._banned, uniform, moves))
        return self._fetch(index.shape[1], *DRAWN)

    def _draw_uniform(self, index: NDArray[np.int32], rows: list[NDArray[np.int64]]) -> NDArray[np.float32]:
        uniform = np.zeros((*index.shape, 2), np.float32)
        for sequence, places in enumerate(rows):
            uniform[sequence, : len(places)] = self._rngs[sequence].integers(0, UNIFORM, (len(places), 2)) / UNIFORM
        return uniform

    def _candidates(self, hidden: Buffer, index: NDArray[np.int32], banned: frozenset[int]) -> Callable[[], Candidates]:
        self._clock.run(self._head.prepare(hidden, index, banned))
        return self._fetch(index.shape[1])

    def _fetch(self, count: int, *others: str) -> Callable[[], Candidates]:
        return self._clock.wait(lambda: self._head.fetch(count, *others))


def _moved(values: NDArray[np.float32] | None, sequence: int, count: int, *, first: bool) -> NDArray[np.float64] | None:
    """A statistic of two steps for the first `count` candidates; the first step of a block has no step before it."""
    if values is None:
        return None
    return np.full(count, np.nan) if first else values[sequence, :count].astype(np.float64)


def _check_finite(candidates: Candidates) -> Candidates:
    if not np.isfinite(candidates.nll).all():
        raise OverflowedError(OVERFLOW)
    return candidates
