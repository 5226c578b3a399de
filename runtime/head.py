"""The head on candidate rows: sampling statistics on the host, logits never."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from dllm_export.graphs import TOP_TOKENS, HeadGraph, ModelShape, TensorType
from dllm_export.runtime.buffers import RequestShape
from dllm_export.runtime.session import Buffer, GraphCall, Program, Session

STATES: Mapping[HeadGraph, str] = {"head_tracked": "distribution", "head_credited": "credit"}
"""Graph -> the state that it takes and returns."""

STATISTICS = ("token", "confidence", "margin", "entropy", "top_tokens", "top_logits", "logsumexp", "nll")

MOVED = ("divergence", "similarity")
"""What `head_tracked` gives beside the statistics."""
DRAWN = ("drawn", "drawn_logit")
"""What `head_drawn` and `head_moved` give beside the statistics."""

INTEGERS = frozenset({"index", "token", "given", "present", "top_tokens", "drawn"})
"""Tensors of candidates that hold places or token ids."""

STEP = 8
"""Rows by which candidates are padded where they are many."""

BANNED = -1e30
"""Logit bias of a token that must not be chosen; its probability is exactly 0 in float32."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Statistics of the candidate rows; K is the number of tokens the head returns, most likely first."""

    top_tokens: NDArray[np.int32]  # [B, Q, K]
    top_logits: NDArray[np.float32]  # [B, Q, K]
    nll: NDArray[np.float32]  # [B, Q] negative log-likelihood of the likeliest token, in nats
    entropy: NDArray[np.float32]  # [B, Q], in nats
    divergence: NDArray[np.float32] | None = None  # [B, Q] KL(p || p of the step before), in nats, of `head_tracked`
    similarity: NDArray[np.float32] | None = None  # [B, Q] cosine of the two
    drawn: NDArray[np.int32] | None = (
        None  # [B, Q] a token drawn from the whole vocabulary, of `head_drawn` and `head_moved`
    )
    drawn_logit: NDArray[np.float32] | None = None  # [B, Q]

    @property
    def logsumexp(self) -> NDArray[np.float64]:  # [B, Q]
        """Of all logits."""
        return self.top_logits[:, :, 0].astype(np.float64) + self.nll

    def take(self, index: NDArray[np.int32]) -> Candidates:
        """The statistics of these places among the candidates [B, n]."""
        sequence = np.arange(len(index))[:, None]
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: array[sequence, index] for name, array in arrays.items() if array is not None})


class Head:
    """Runs a head graph on rows of the response: `head`, or one that keeps a state or draws.

    The state of `head_tracked` and `head_credited` is a row per candidate and a number per token, in two halves: a run reads
    one and writes the other.
    """

    def __init__(
        self, session: Session, shape: ModelShape, request: RequestShape, shared: Mapping[str, Buffer] | None = None
    ) -> None:
        """`shared` are inputs of all head graphs that somebody else writes."""
        self._session, self._shape, self._request = session, shape, request
        self._shared = shared or {}
        self.vocab = shape.vocab
        self._top = min(TOP_TOKENS, shape.vocab)
        self._buffers: dict[tuple[str, int], Buffer] = {}
        self._programs: dict[tuple[object, ...], Program] = {}
        self._bias: dict[frozenset[int], Buffer] = {}
        self._unguided: dict[tuple[int, ...], tuple[Buffer, Buffer]] = {}
        dims = (request.batch, request.response_rows, shape.hidden)
        self.guidance = session.allocate(dims, "compute")
        self._scale = session.allocate((1,), "compute")
        self._half = 0

    def pad(self, count: int, largest: int) -> int:
        """How many rows to run where so many are wanted and there are at most `largest`."""
        return bucket(count, largest, few=self._session.few_sizes)

    def set_guidance_scale(self, scale: float) -> None:
        """The guidance scale of the next runs."""
        self._scale.write(np.array([scale], np.float32))

    def prepare(self, hidden: Buffer, index: NDArray[np.int32], banned: frozenset[int]) -> Program:
        """The program for candidate rows `index` [B, Q] of `hidden` [B, R, D]; `banned` tokens are never proposed."""
        return self._prepare_plain(hidden, index, banned, self.guidance, self._scale)

    def _prepare_plain(
        self, hidden: Buffer, index: NDArray[np.int32], banned: frozenset[int], guidance: Buffer, scale: Buffer
    ) -> Program:
        count = index.shape[1]
        self._output("index", count).write(index)
        key: tuple[object, ...] = ("head", id(hidden), count, banned)
        if key not in self._programs:
            tensors = {
                "hidden": hidden,
                **self._shared,
                "bias": self._bias_buffer(banned),
                "guidance": guidance,
                "cfg_scale": scale,
                **{name: self._output(name, count) for name in ("index", "given", *STATISTICS, "probability")},
            }
            self._programs[key] = self._session.prepare([GraphCall("head", None, tensors)])
        return self._programs[key]

    def prepare_state(
        self,
        graph: HeadGraph,
        hidden: Buffer,
        index: NDArray[np.int32],
        banned: frozenset[int],
        scalars: Mapping[str, float],
    ) -> Program:
        """The program of a graph that keeps a state, which counts as written after it; `scalars` are inputs by name."""
        count, half = index.shape[1], self._half
        self._output("index", count).write(index)
        for name, value in scalars.items():
            self._scalar(name).write(np.array([value], np.float32))
        key = (graph, id(hidden), count, banned, half)
        if key not in self._programs:
            state = STATES[graph]
            outputs = (*STATISTICS, *(MOVED if graph == "head_tracked" else ()))
            tensors = {
                "hidden": hidden,
                **self._shared,
                "bias": self._bias_buffer(banned),
                "guidance": self.guidance,
                "cfg_scale": self._scale,
                state: self._output(f"{state}.{half}", count),
                f"{state}_out": self._output(f"{state}.{1 - half}", count),
                **{name: self._output(name, count) for name in ("index", *outputs)},
                **{name: self._scalar(name) for name in scalars},
            }
            self._programs[key] = self._session.prepare([GraphCall(graph, None, tensors)])
        self._half = 1 - half
        return self._programs[key]

    def prepare_given(
        self, hidden: Buffer, index: NDArray[np.int32], tokens: NDArray[np.int32], banned: frozenset[int]
    ) -> Program:
        """The program that asks rows `index` [B, Q] of `hidden` [B, X, D] for the probabilities of `tokens` [B, Q].

        Guidance has no residual of other rows than the response's, so that these have none.
        """
        self._output("given", index.shape[1]).write(tokens)
        if hidden.dims not in self._unguided:
            residual, scale = (self._session.allocate(dims, "compute") for dims in (hidden.dims, (1,)))
            self._unguided[hidden.dims] = residual, scale
        return self._prepare_plain(hidden, index, banned, *self._unguided[hidden.dims])

    def read_given(self, count: int) -> NDArray[np.float32]:
        """The probabilities [B, Q] of the last run of `prepare_given` with this many rows."""
        return self._output("probability", count).read()

    def prepare_drawn(
        self,
        hidden: Buffer,
        index: NDArray[np.int32],
        banned: frozenset[int],
        uniform: NDArray[np.float32],
        sharpness: float,
    ) -> Program:
        """The program that also draws a token for each candidate by the numbers `uniform` [B, Q, 2], at 1 / temperature."""
        count = index.shape[1]
        for name, array in (("index", index), ("uniform", uniform)):
            self._output(name, count).write(array)
        self._scalar("sharpness").write(np.array([sharpness], np.float32))
        key: tuple[object, ...] = ("head_drawn", id(hidden), count, banned)
        if key not in self._programs:
            tensors = {
                "hidden": hidden,
                **self._shared,
                "bias": self._bias_buffer(banned),
                "guidance": self.guidance,
                "cfg_scale": self._scale,
                "sharpness": self._scalar("sharpness"),
                **{name: self._output(name, count) for name in ("index", "uniform", *STATISTICS, *DRAWN)},
            }
            self._programs[key] = self._session.prepare([GraphCall("head_drawn", None, tensors)])
        return self._programs[key]

    def prepare_moved(
        self,
        hidden: Buffer,
        index: NDArray[np.int32],
        present: NDArray[np.int32],
        banned: frozenset[int],
        uniform: NDArray[np.float32],
        moves: tuple[float, float, float, float],
    ) -> Program:
        """The program that draws each candidate's next token after its `present` one [B, Q], by `uniform` [B, Q, 2]."""
        count = index.shape[1]
        for name, array in (("index", index), ("present", present), ("uniform", uniform)):
            self._output(name, count).write(array)
        self._scalar("moves", len(moves)).write(np.array(moves, np.float32))
        key: tuple[object, ...] = ("head_moved", id(hidden), count, banned)
        if key not in self._programs:
            tensors = {
                "hidden": hidden,
                **self._shared,
                "bias": self._bias_buffer(banned),
                "moves": self._scalar("moves", len(moves)),
                **{name: self._output(name, count) for name in ("index", "present", "uniform", *STATISTICS, *DRAWN)},
            }
            self._programs[key] = self._session.prepare([GraphCall("head_moved", None, tensors)])
        return self._programs[key]

    def prepare_guidance(self, conditional: Buffer, unconditional: Buffer) -> Program:
        """The program that refreshes the guidance residual."""
        key = (id(conditional), id(unconditional), True, frozenset({-1}))
        if key not in self._programs:
            rows = {"hidden": conditional, "unconditional": unconditional, "guidance_out": self.guidance}
            tensors = {**rows, **self._shared}
            self._programs[key] = self._session.prepare([GraphCall("guidance", None, tensors)])
        return self._programs[key]

    def fetch(self, count: int, *others: str) -> Callable[[], Candidates]:
        """What waits for the statistics of the last run with this many candidate rows, and for the `others` of its graph."""
        names = ("top_tokens", "top_logits", "nll", "entropy", *others)
        wait = self._session.fetch([self._output(name, count) for name in names])
        return lambda: Candidates(**dict(zip(names, wait(), strict=True)))

    def outputs(self, count: int) -> dict[str, Buffer]:
        """What graph `commit` looks at, by name, of the last run with this many candidate rows."""
        return {name: self._output(name, count) for name in ("token", "nll")}

    def _output(self, name: str, count: int) -> Buffer:
        if (name, count) not in self._buffers:
            dims: tuple[int, ...] = (self._request.batch, count)
            if name in ("top_tokens", "top_logits"):
                dims = (*dims, self._top)
            if name.partition(".")[0] in STATES.values():
                dims = (*dims, self._shape.vocab)
            if name == "uniform":
                dims = (*dims, 2)
            type: TensorType = "int32" if name in INTEGERS else "float32"
            self._buffers[name, count] = self._session.allocate(dims, type)
        return self._buffers[name, count]

    def _scalar(self, name: str, count: int = 1) -> Buffer:
        if (name, count) not in self._buffers:
            self._buffers[name, count] = self._session.allocate((count,), "float32")
        return self._buffers[name, count]

    def _bias_buffer(self, banned: frozenset[int]) -> Buffer:
        if banned not in self._bias:
            bias = np.zeros(self._shape.vocab, np.float32)
            bias[list(banned)] = BANNED
            self._bias[banned] = self._session.allocate((self._shape.vocab,), "float32")
            self._bias[banned].write(bias)
        return self._bias[banned]


def bucket(count: int, largest: int, *, few: bool) -> int:
    """Candidate rows are padded, so that few programs serve all steps: to a power of two, above 8 to a multiple of 8.

    On a CPU a head's cost grows with its rows, and padding to the next power of two would waste a quarter of it. A GPU
    reads the head's matrix for one row as for 256, and a new size is compiled or captured: there sizes are `few`.
    """
    return min(largest, 1 << max(count - 1, 0).bit_length() if few or count <= STEP else -(-count // STEP) * STEP)
