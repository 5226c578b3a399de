"""Times the ways in which onnxruntime can run a mixture of experts: `python -m dllm_export.tools.expert_forms`.

Three forms of the same experts with random weights, one after the other in every round, so that a busy machine slows them
alike: every expert on every row, tiles (the portable form), and onnxruntime's own operator.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

from dllm_export.exporter.contrib_ops import CONTRIB, ContribOps
from dllm_export.exporter.onnx_ops import OPSET, OnnxOps, Value
from dllm_export.graphs import Experts

Feeds = Mapping[str, NDArray[Any]]


class DenseOps(OnnxOps):
    """As `OnnxOps`, but every expert runs on every row of the one sequence; shares of 0 drop what was not asked for."""

    def experts(self, experts: Experts, x: Value, chosen: Value, share: Value, gate_up: Value, down: Value) -> Value:
        names, zero = self.unsqueeze(self.count_up(experts.count, x), 1), self.fill(share, 0.0)
        hits = self.matches(self.unsqueeze(chosen, 2), names)
        spread = self.sum(self.where(hits, self.unsqueeze(share, 2), zero), keep=False)  # [1, N, E]
        gate, up = self.take_turns(self.matmul(gate_up, self._transpose(x, (0, 2, 1))))
        shares = self.narrow(self._transpose(spread, (2, 0, 1)), x)  # [E, 1, N]
        weighed = self.mul(self.mul(self.silu(gate), up), shares)  # [E, F, N]
        results = self.matmul(down, weighed)  # [E, D, N]
        return self.unsqueeze(self.sum(self._transpose(results, (2, 1, 0)), keep=False), 0)


FORMS: Mapping[str, Callable[[], OnnxOps]] = {
    "every expert on every row": DenseOps,
    "tiles": OnnxOps,
    "onnxruntime's own operator": ContribOps,
}


def open_form(form: str, experts: Experts, hidden: int) -> ort.InferenceSession:
    """A session with a graph of nothing but the experts."""
    ops, k = FORMS[form](), experts.per_token
    dims: dict[str, tuple[str | int, ...]] = {
        "x": ("B", "N", hidden),
        "chosen": ("B", "N", k),
        "share": ("B", "N", k),
        "gate_up": (experts.count, 2 * experts.mlp, hidden),
        "down": (experts.count, hidden, experts.mlp),
    }
    types = {name: TensorProto.INT32 if name == "chosen" else TensorProto.FLOAT for name in dims}
    values = [Value(name, types[name], dims[name]) for name in dims]
    result = ops.experts(experts, *values)
    graph = helper.make_graph(
        ops.nodes,
        "experts",
        [helper.make_tensor_value_info(name, types[name], dims[name]) for name in dims],
        [helper.make_tensor_value_info(result.name, TensorProto.FLOAT, ("B", "N", hidden))],
        ops.initializers,
    )
    domains = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=8)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def draw_feeds(experts: Experts, hidden: int, rows: int, alike: float, rng: np.random.Generator) -> dict[str, Any]:
    """Rows and choices; a share of the rows, as masks do, goes to about the same experts."""
    logits = rng.standard_normal((1, rows, experts.count))
    same = int(alike * rows)
    logits[:, :same] = logits[:, :1] + 0.3 * rng.standard_normal((1, same, experts.count))
    chosen = np.argsort(-logits, axis=-1)[..., : experts.per_token].astype(np.int32)
    share = rng.random(chosen.shape, np.float32)
    return {"x": rng.standard_normal((1, rows, hidden), np.float32), "chosen": chosen, "share": share}


def time_forms(experts: Experts, hidden: int, rows: int, alike: float, rounds: int, weights: Feeds) -> dict[str, float]:
    """Median seconds of each form; all must give the same numbers."""
    feeds = {**draw_feeds(experts, hidden, rows, alike, np.random.default_rng(rows)), **weights}
    sessions = {form: open_form(form, experts, hidden) for form in FORMS}
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    results = {}
    for _ in range(rounds + 1):
        for form, session in sessions.items():
            start = time.perf_counter()
            (results[form],) = session.run(None, feeds)
            times[form].append(time.perf_counter() - start)
    first, *others = results.values()
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-3, atol=1e-4)
    return {form: median(taken[1:]) for form, taken in times.items()}


def main() -> None:
    """Print milliseconds, and ratios to the first form."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("hidden", 2048), ("count", 64), ("per-token", 8), ("mlp", 1024), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 1149])
    args = parser.parse_args()
    experts = Experts(count=args.count, per_token=args.per_token, mlp=args.mlp)
    rng = np.random.default_rng(0)
    weights = {
        "gate_up": rng.standard_normal((args.count, 2 * args.mlp, args.hidden), np.float32) * args.hidden**-0.5,
        "down": rng.standard_normal((args.count, args.hidden, args.mlp), np.float32) * args.mlp**-0.5,
    }
    for rows in args.rows:
        for alike in (0.0, 0.7):
            times = time_forms(experts, args.hidden, rows, alike, args.rounds, weights)
            base = next(iter(times.values()))
            shown = ", ".join(f"{form} {1e3 * taken:.0f} ms ({taken / base:.2f})" for form, taken in times.items())
            print(f"{rows} rows, {alike:.0%} alike: {shown}", flush=True)


if __name__ == "__main__":
    main()
