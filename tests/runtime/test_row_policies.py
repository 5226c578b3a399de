"""Policies that recompute chosen rows, as whole generations in float64 against a plain loop in PyTorch, token for token.

The loop keeps lists of keys and values of its own, one sequence at a time: it runs the rows that a policy's published rule
names, overwrites their keys and values, and attends over everything that is visible. Only those rows travel. With a shift the
token of a row is read from the row before it, which a rule then has to name as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import (
    CachePolicy,
    DkvDecode,
    DkvGreedy,
    DualCache,
    FreeCache,
    NoCache,
    PrefixCache,
    SparseCache,
    WindowCache,
)
from dllm_export.runtime.request import Request
from dllm_export.runtime.transfers import Quota, Threshold, Transfer
from dllm_export.tools.eager import EagerModel

OpenModel = Callable[[str], DiffusionLM]
MASK = 96


@dataclass(frozen=True, slots=True)
class Look:
    """What a rule of rows is written in terms of; steps are counted per pass and from 1."""

    step: int
    block_step: int
    start: int
    end: int
    length: int
    masked: list[set[int]]
    before: list[set[int]]
    upcoming: list[set[int]]
    shift: bool
    padding: list[int]

    @property
    def first(self) -> int:
        """Where the rows of the block begin, with the one that predicts the first of them."""
        return self.start - 1 if self.shift and self.start > 0 else self.start

    def predict(self, number: int, rows: set[int]) -> set[int]:
        """The rows that the tokens of these rows of a sequence are read from."""
        return {predictor(row, self.padding[number], shift=self.shift) for row in rows}


def predictor(row: int, padding: int, *, shift: bool) -> int:
    """Where the token of a row is read from: the first row of a sequence has none before it."""
    return max(row - 1, padding) if shift else row


RowRule = Callable[[Look, int], Sequence[int]]
"""The rows that a policy recomputes for one sequence of the batch, in the words of its paper."""


def everything(look: Look) -> range:
    return range(look.length)


def dual(look: Look, _: int) -> range:
    """Fast-dLLM: the block, and everything at its start."""
    return everything(look) if look.block_step == 1 else range(look.first, look.end)


def prefix(look: Look, _: int) -> range:
    """Fast-dLLM: from the block's start to the end, and everything at its start."""
    return everything(look) if look.block_step == 1 else range(look.first, look.length)


def freecache(look: Look, _: int) -> range:
    """FreeCache: everything once, then from the block's start to the end."""
    return everything(look) if look.step == 1 else range(look.first, look.length)


def window(before: int, after: int, interval: int) -> RowRule:
    """dInfer: the block and its neighbours; as many rows at the ends of the sequence as elsewhere."""

    def rows(look: Look, _: int) -> range:
        if look.block_step == 1 or (interval and look.block_step % interval == 1 % interval):
            return everything(look)
        start, end = look.first - before, look.end + after
        while start < 0:
            start, end = start + 1, end + 1
        while end > look.length:
            start, end = start - 1, end - 1
        return range(max(start, 0), end)

    return rows


def dkv_decode(interval: int) -> RowRule:
    """dKV-Cache-Decode: what was masked when the last step began; all in the first two steps and every few after."""

    def rows(look: Look, number: int) -> Sequence[int]:
        if look.block_step <= 2 or (interval and look.block_step % interval == 1 % interval):
            return everything(look)
        rows = look.before[number] | look.masked[number]
        return sorted(rows | look.predict(number, rows))

    return rows


def dkv_greedy(interval: int, width: int) -> RowRule:
    """dKV-Cache-Greedy: what is decided now, what was decided last, and the masked rows nearest to the former."""

    def rows(look: Look, number: int) -> Sequence[int]:
        if look.block_step == 1 or (interval and look.block_step % interval == 1 % interval):
            return everything(look)
        now, last = look.upcoming[number], look.before[number] - look.masked[number]
        others = [(min(abs(row - other) for other in now), row) for row in look.masked[number] - now if now]
        return sorted(now | look.predict(number, now) | last | {row for _, row in sorted(others)[:width]})

    return rows


@dataclass(frozen=True, slots=True)
class Sparse:
    """Sparse-dLLM: the second step keeps in every layer what the block's queries agree with most; later ones see no more."""

    ratio: float

    def __call__(self, look: Look, _: int) -> range:
        return everything(look) if look.block_step <= 2 else range(look.first, look.end)

    def choose(self, query: Tensor, keys: dict[int, Tensor], block: range) -> list[int]:
        """Rows that a layer keeps: query [n, heads, d] of the block's visible rows, keys [heads, d] of all, both rotated."""
        score = {row: float((query.mean(0) * key).sum(-1).mean()) for row, key in keys.items() if row not in block}
        pooled = {row: max(score[other] for other in (row - 1, row, row + 1) if other in score) for row in score}
        best = sorted(pooled, key=lambda row: (-pooled[row], row))
        return sorted(best[: int(len(best) * self.ratio)])


def dual_from_the_second_step(look: Look, _: int) -> range:
    """The dual cache, but the second step of a block fills it."""
    return everything(look) if look.block_step <= 2 else range(look.first, look.end)


RULES: Mapping[str, tuple[CachePolicy, RowRule]] = {
    "prefix": (PrefixCache(), prefix),
    "dual": (DualCache(), dual),
    "freecache": (FreeCache(), freecache),
    "window": (WindowCache(before=3, after=2), window(3, 2, 0)),
    "window, refreshed": (WindowCache(before=0, after=9, refresh_interval=3), window(0, 9, 3)),
    "dkv-decode": (DkvDecode(refresh_interval=5, bucket=4), dkv_decode(5)),
    "dkv-decode, no bucket": (DkvDecode(refresh_interval=0, bucket=1), dkv_decode(0)),
    "dkv-greedy": (DkvGreedy(bucket=4), dkv_greedy(2, 6)),
    "dkv-greedy, few": (DkvGreedy(refresh_interval=3, nearest=1, bucket=1), dkv_greedy(3, 1)),
    "sparse": (SparseCache(), Sparse(0.5)),
    "sparse, little": (SparseCache(keep_ratio=0.2), Sparse(0.2)),
    "sparse, nothing": (SparseCache(keep_ratio=0.0), Sparse(0.0)),
    "sparse, everything": (SparseCache(keep_ratio=1.0), dual_from_the_second_step),
}
IN_ORDER = {name for name, (policy, _) in RULES.items() if isinstance(policy, DkvGreedy)}


# -- the plain loop
@dataclass(slots=True)
class PlainSequence:
    """One sequence in one pass: its keys (not rotated) and values by layer and position, never written ones missing."""

    model: EagerModel
    padding: int
    length: int
    keys: list[dict[int, Tensor]] = field(init=False)
    values: list[dict[int, Tensor]] = field(init=False)
    kept: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.keys = [{} for _ in self.model.layers]
        self.values = [{} for _ in self.model.layers]
        self.kept = [[] for _ in self.model.layers]

    def run(
        self, tokens: list[int], rows: Sequence[int], look: Look, sparse: Sparse | None = None
    ) -> dict[int, Tensor]:
        """Logits of these rows by position."""
        model, context = self.model, self.model.context([self.padding], self.length)
        cos, sin = context.cos[0], context.sin[0]

        def turn(x: Tensor, places: list[int]) -> Tensor:  # [n, heads, d]
            low, high = x.chunk(2, dim=-1)
            return x * cos[places].unsqueeze(1) + torch.cat((-high, low), dim=-1) * sin[places].unsqueeze(1)

        order, visible, block = list(rows), range(self.padding, self.length), range(look.first, look.end)
        if not order:
            return {}
        x = model.embed(torch.tensor([tokens[row] for row in order]))
        for layer, weights in enumerate(model.layers):
            inner = model.norm(x, weights["attn_norm.weight"])
            query, key, value = (model.project(weights, name, inner) for name in ("q_proj", "k_proj", "v_proj"))
            for place, row in enumerate(order):
                self.keys[layer][row], self.values[layer][row] = key[place], value[place]
            seen = list(visible)
            if sparse and look.block_step > 2:
                seen = [*self.kept[layer], *(row for row in block if row in visible)]
            every_key = torch.stack([self.keys[layer][row] for row in seen]).unflatten(1, (model.kv_heads, -1))
            every_value = torch.stack([self.values[layer][row] for row in seen]).unflatten(1, (model.kv_heads, -1))
            groups = model.heads // model.kv_heads
            every_key = turn(every_key, seen).repeat_interleave(groups, dim=1)
            every_value = every_value.repeat_interleave(groups, dim=1)
            query = turn(query.unflatten(1, (model.heads, -1)), order)
            if sparse and look.block_step == 2:
                asking = query[[place for place, row in enumerate(order) if row in block and row in visible]]
                self.kept[layer] = sparse.choose(asking, dict(zip(seen, every_key, strict=True)), block)
            weight = (torch.einsum("qhd,khd->hqk", query, every_key) / model.head_dim**0.5).softmax(-1)
            mixed = torch.einsum("hqk,khd->qhd", weight, every_value).flatten(1)
            x = x + model.project(weights, "attn_out", mixed)
            x = x + model.mlp(weights, x)
        return dict(zip(order, model.classify(x), strict=True))


@dataclass(slots=True)
class PlainPass:
    """All sequences in one pass, with the pass's own counters and history."""

    sequences: list[PlainSequence]
    rule: RowRule
    shift: bool = False
    step: int = 0
    block_step: int = 0
    block: int = -1
    before: list[set[int]] | None = None

    def run(
        self, canvas: list[list[int]], block: tuple[int, int], masked: list[set[int]], upcoming: list[set[int]]
    ) -> list[dict[int, Tensor]]:
        self.step += 1
        self.block_step = self.block_step + 1 if block[0] == self.block else 1
        self.block = block[0]
        before = self.before or masked
        padding, length = [sequence.padding for sequence in self.sequences], len(canvas[0])
        look = Look(
            self.step, self.block_step, block[0], block[1], length, masked, before, upcoming, self.shift, padding
        )
        self.before = masked
        found = [
            sequence.run(tokens, self.rule(look, number), look, self.rule if isinstance(self.rule, Sparse) else None)
            for number, (sequence, tokens) in enumerate(zip(self.sequences, canvas, strict=True))
        ]
        read = [{row: predictor(row, pad, shift=self.shift) for row in range(pad, length)} for pad in padding]
        return [
            {row: logits[place] for row, place in places.items() if place in logits}
            for logits, places in zip(found, read, strict=True)
        ]


def plain_generation(
    model: EagerModel,
    request: Request,
    options: GenerationOptions,
    rule: RowRule,
    transfer: Transfer,
    *,
    shift: bool = False,
) -> tuple[list[list[int]], int]:
    """LLaDA's loop at temperature 0: (response of every sequence, forward passes)."""
    canvas: list[list[int]] = request.canvas.tolist()
    length, prompt, block = len(canvas[0]), request.shape.prompt_rows, request.schedule.block_length
    given = [[token != MASK for token in row] for row in canvas]

    def open_pass() -> PlainPass:
        return PlainPass([PlainSequence(model, int(padding), length) for padding in request.padding], rule, shift)

    def masks(until: int) -> list[set[int]]:
        return [{row for row in range(prompt, until) if tokens[row] == MASK} for tokens in canvas]

    conditional, unconditional = open_pass(), open_pass()
    residual: list[dict[int, Tensor]] = [{} for _ in canvas]
    draws = [np.random.default_rng(options.seed + number) for number in range(len(canvas))]
    step = 0
    for start in range(prompt, length, block):
        end, counts = start + block, [len(rows) for rows in masks(start + block)]
        for inner in range(request.schedule.steps_per_block if isinstance(transfer, Quota) else block):
            candidates = masks(end)
            if not isinstance(transfer, Quota) and not any(candidates):
                break
            step += 1
            steps = request.schedule.steps_per_block
            quotas = [count // steps + (inner < count % steps) for count in counts]
            orders: list[list[int]] = []
            if options.remasking == "random":
                for draw, rows in zip(draws, candidates, strict=True):
                    number_of = dict(zip(sorted(rows), draw.random(len(rows)), strict=True))
                    orders.append(sorted(rows, key=lambda row: -number_of[row]))
            upcoming = [set(order[:quota]) for order, quota in zip(orders, quotas, strict=False)]
            wanted = upcoming or candidates
            logits = conditional.run(canvas, (start, end), masks(length), upcoming)
            if options.cfg_scale:
                due = (step - 1) % options.cfg_interval == 0 or step <= 5
                known = all(rows <= kept.keys() for rows, kept in zip(wanted, residual, strict=True))
                if due or not known:
                    blank = [
                        [token if not fixed else MASK for token, fixed in zip(row, flags, strict=True)]
                        for row, flags in zip(canvas, given, strict=True)
                    ]
                    other = unconditional.run(blank, (start, end), masks(length), upcoming)
                    residual = [
                        {row: mine[row] - theirs[row] for row in mine.keys() & theirs.keys()}
                        for mine, theirs in zip(logits, other, strict=True)
                    ]
                logits = [
                    {row: rows[row] + options.cfg_scale * residual[number][row] for row in wanted[number]}
                    for number, rows in enumerate(logits)
                ]
            for number, rows in enumerate(wanted):
                sure = {}
                for row in sorted(rows):
                    scores = logits[number][row].clone()
                    scores[MASK] = -torch.inf
                    confidence, token = scores.softmax(-1).max(-1)
                    sure[row] = (float(confidence), int(token))
                order = sorted(sure, key=lambda row: (-sure[row][0], row))
                count = len(order) if upcoming else quotas[number]
                if isinstance(transfer, Threshold):
                    count = max(1, sum(confidence >= transfer.threshold for confidence, _ in sure.values()))
                for row in order[:count]:
                    canvas[number][row] = sure[row][1]
    return [row[prompt:] for row in canvas], conditional.step + unconditional.step


def generate(
    lm: DiffusionLM, request: Request, options: GenerationOptions, policy: CachePolicy, transfer: Transfer
) -> tuple[list[list[int]], int]:
    *_, last = lm.stream(request, options, policy, transfer)
    return last.tokens.tolist(), last.passes


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 90, length).tolist() for length in lengths]


CASES: Mapping[str, tuple[tuple[int, ...], dict[str, Any], Transfer]] = {
    "one sequence": ((9,), {"gen_length": 16, "block_length": 8}, Quota()),
    "one block": ((5,), {"gen_length": 12}, Quota()),
    "a padded batch": ((11, 6), {"gen_length": 18, "block_length": 6, "steps": 12}, Quota()),
    "several tokens a step": ((4, 9), {"gen_length": 24, "block_length": 12, "steps": 10}, Quota()),
    "threshold": ((8, 13), {"gen_length": 24, "block_length": 8}, Threshold(threshold=0.2)),
    "random order": ((9, 12), {"gen_length": 18, "block_length": 9, "steps": 12, "remasking": "random"}, Quota()),
    "guidance": ((9, 5), {"gen_length": 16, "block_length": 8, "cfg_scale": 1.2}, Quota()),
    "guidance kept": ((9, 5), {"gen_length": 16, "block_length": 4, "cfg_scale": 0.8, "cfg_interval": 3}, Quota()),
    "guidance, threshold": (
        (7, 12),
        {"gen_length": 18, "block_length": 6, "cfg_scale": 0.5, "cfg_interval": 2},
        Threshold(threshold=0.3),
    ),
}
every_rule = pytest.mark.parametrize("name", RULES)


def options_for(name: str, **keywords: Any) -> GenerationOptions:
    """The options of a case; a policy that must know what a step decides gets the order that tells."""
    return GenerationOptions(**({"remasking": "random"} if name in IN_ORDER else {}) | keywords)


PAIRS = [(case, name) for case in CASES for name in RULES if name not in IN_ORDER or isinstance(CASES[case][2], Quota)]
"""What goes together; the plain loop is compared for every second of them, as the white fields of a chess board."""


def is_white(*places: int) -> bool:
    return sum(places) % 2 == 0


WHITE = [(case, name) for case, name in PAIRS if is_white(list(CASES).index(case), list(RULES).index(name))]


@pytest.mark.parametrize(("case", "name"), WHITE)
def test_a_generation_equals_the_plain_loop(
    case: str, name: str, open_model: OpenModel, tiny_eager: dict[str, EagerModel]
) -> None:
    lm, (policy, rule), (lengths, keywords, transfer) = open_model("float64"), RULES[name], CASES[case]
    options = options_for(name, **keywords)
    request = lm.continuation(prompts(*lengths, seed=len(case)), options)
    expected = plain_generation(tiny_eager["plain"], request, options, rule, transfer)
    assert generate(lm, request, options, policy, transfer) == expected


SHIFTED = ("a padded batch", "threshold", "random order", "guidance kept")


@pytest.mark.parametrize(("case", "name"), [(case, name) for case, name in WHITE if case in SHIFTED])
def test_a_generation_with_a_shift_equals_the_plain_loop(
    case: str, name: str, open_shifted: OpenModel, tiny_eager: dict[str, EagerModel]
) -> None:
    lm, (policy, rule), (lengths, keywords, transfer) = open_shifted("float64"), RULES[name], CASES[case]
    options = options_for(name, **keywords)
    request = lm.continuation(prompts(*lengths, seed=len(case)), options)
    expected = plain_generation(tiny_eager["plain"], request, options, rule, transfer, shift=True)
    assert generate(lm, request, options, policy, transfer) == expected
    if case == "threshold":
        unshifted = plain_generation(tiny_eager["plain"], request, options, rule, transfer)
        assert unshifted[0] != expected[0], "a forgotten shift would be seen"


HOLES = {
    "behind a prompt": ([[6, 7, 11, 15], [3, 9, 10, 14]], {}),
    "everywhere": ([[0, 8, 9, 19], [2, 15]], {"steps": 2}),
    "guided": ([[4, 5, 17], [3, 9, 10, 14, 15]], {"cfg_scale": 1.0, "cfg_interval": 2}),
    "first rows of a padded text": ([[1, 8, 9], [0, 1, 5]], {}),
}


@pytest.mark.parametrize(
    ("shift", "case", "name"),
    [
        (shift, case, name)
        for shift in (False, True)
        for row, case in enumerate(HOLES)
        for column, name in enumerate(RULES)
        if is_white(shift, row, column)
    ],
)
def test_infilling_equals_the_plain_loop(
    shift: bool,
    case: str,
    name: str,
    open_model: OpenModel,
    open_shifted: OpenModel,
    tiny_eager: dict[str, EagerModel],
) -> None:
    lm, (policy, rule), (places, keywords) = (
        (open_shifted if shift else open_model)("float64"),
        RULES[name],
        HOLES[case],
    )
    options = options_for(name, **keywords)
    texts = [
        [MASK if place in holes else token for place, token in enumerate(text)]
        for text, holes in zip(prompts(20, 16), places, strict=True)
    ]
    request = lm.infilling(texts, options)
    expected = plain_generation(tiny_eager["plain"], request, options, rule, Quota(), shift=shift)
    assert generate(lm, request, options, policy, Quota()) == expected


@every_rule
@pytest.mark.parametrize("shift", [False, True], ids=["", "shift"])
def test_a_batch_gives_what_its_sequences_give_alone(
    shift: bool, name: str, open_model: OpenModel, open_shifted: OpenModel
) -> None:
    lm = (open_shifted if shift else open_model)("float64")
    policy, options = RULES[name][0], options_for(name, gen_length=16, block_length=8)
    texts = prompts(12, 7)
    together = lm.run(lm.continuation(texts, options), options, policy)
    own = [replace(options, seed=options.seed + number) for number in range(len(texts))]
    alone = [lm.run(lm.continuation([text], each), each, policy)[0] for text, each in zip(texts, own, strict=True)]
    assert [result.tokens for result in together] == [result.tokens for result in alone]


@every_rule
def test_a_request_finds_nothing_of_the_one_before(name: str, open_model: OpenModel) -> None:
    """Requests of one shape share buffers and programs; here the padding is another."""
    lm, policy, options = open_model("float64"), RULES[name][0], options_for(name, gen_length=16, block_length=8)
    texts, others = prompts(12, 7), prompts(8, 12, seed=3)
    first, _, again = (lm.run(lm.continuation(each, options), options, policy) for each in (texts, others, texts))
    assert [result.tokens for result in first] == [result.tokens for result in again]


@every_rule
def test_every_provider_gives_the_tokens_of_the_reference(name: str, open_model: OpenModel) -> None:
    policy, options = RULES[name][0], options_for(name, gen_length=24, block_length=8, cfg_scale=0.6)
    results = {}
    for provider in ("float64", "onnxruntime", "torch"):
        lm = open_model(provider)
        request = lm.continuation(prompts(11, 5), options)
        results[provider] = [result.tokens for result in lm.run(request, options, policy)]
    assert results["onnxruntime"] == results["float64"]
    assert results["torch"] == results["float64"]


@every_rule
def test_the_cases_tell_a_cache_from_none(name: str, open_model: OpenModel) -> None:
    """The comparison above can fail: without a cache a request comes out differently."""
    lm, (policy, _) = open_model("float64"), RULES[name]

    def differs(lengths: tuple[int, ...], keywords: dict[str, Any], transfer: Transfer) -> bool:
        options = options_for(name, **keywords)
        request = lm.continuation(prompts(*lengths), options)
        found, uncached = (generate(lm, request, options, each, transfer)[0] for each in (policy, NoCache()))
        return found != uncached

    assert any(differs(*CASES[case]) for case, other in PAIRS if other == name)
