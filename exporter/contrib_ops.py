"""ONNX reading of `Ops` with an operator of ONNX Runtime's own, for its kernels alone: experts as one node."""

from __future__ import annotations

from dllm_export.exporter.onnx_ops import OnnxOps, Value
from dllm_export.graphs.shape import Experts

CONTRIB = "com.microsoft"
UNCHOSEN = -1e4
"""Logit of an expert that a row does not go to: its share underflows to 0 in every type."""
LEAST = 1e-30
"""Added to every share, so that it has a logarithm."""


class ContribOps(OnnxOps):
    """As `OnnxOps`, but experts are com.microsoft MoE."""

    def experts(self, experts: Experts, x: Value, chosen: Value, share: Value, gate_up: Value, down: Value) -> Value:
        # The operator routes by itself: softmax, the k largest, scaled to a sum of 1. Logarithms of the shares give the
        # shares back, whatever made them, over their sum.
        with self.scope("combine"):
            names, zero = self.unsqueeze(self.count_up(experts.count, x), 1), self.fill(share, 0.0)
            hits = self.matches(self.unsqueeze(chosen, 2), names)  # [B, N, E, k]
            share = self.add(share, self.fill(share, LEAST))
            spread = self.sum(self.where(hits, self.unsqueeze(share, 2), zero), keep=False)
            chance = self.max(self.where(hits, self.fill(share, 1.0), zero), keep=False)
            logits = self.where(self.at_most(chance, zero), self.fill(share, UNCHOSEN), self.log(spread))
            logits = self._reshape(self.narrow(logits, x), (-1, experts.count), ("rows", experts.count))
            mixed = self._node(
                "MoE",
                (x, logits, gate_up, Value("", x.type, ()), down),
                x.type,
                x.dims,
                domain=CONTRIB,
                k=experts.per_token,
                activation_type="swiglu",
                activation_alpha=1.0,
                activation_beta=0.0,
                swiglu_fusion=1,
                normalize_routing_weights=1,
            )
            return self.narrow(self.mul(self.widen(mixed), self.sum(share, keep=True)), x)
