"""Seeded inputs for one run of a graph, shaped like a step of a real request."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from dllm_export.graphs.latents import LEVEL_WIDTH
from dllm_export.graphs.steps import TIME_WIDTH
from dllm_export.runtime.blocks import number_blocks
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.rope import rotary_tables
from dllm_export.runtime.safetensors_file import SafetensorsFile

Feeds = Mapping[str, NDArray[np.generic]]

BATCH, PROMPT, RESPONSE, BUDGET, PADDING = 2, 13, 11, 5, 3
LENGTH = PROMPT + RESPONSE


def make_feeds(bundle: Bundle, graph: str) -> Feeds:
    """Inputs of a graph: two sequences, one left-padded; hidden rows as large as the checkpoint's own activations."""
    spec, shape = bundle.specs[graph], bundle.manifest.shape
    rng = np.random.default_rng(7)
    states = SafetensorsFile(bundle.file(bundle.manifest.probe)).view("hidden")
    size = float(np.sqrt(np.mean(states[len(states) // 2].astype(np.float64) ** 2)))
    columns = np.arange(LENGTH)
    padding = np.array([0, PADDING])[:, None]
    cos, sin = rotary_tables(shape, np.maximum(columns - padding, 0))
    alive = np.tile(np.arange(PROMPT, LENGTH, dtype=np.int32), (BATCH, 1))
    whole = graph.startswith(("layer_full", "layer_compact", "head_latent"))
    placed = any(tensor.name in ("fresh", "shown") for tensor in spec.inputs)
    rows = LENGTH if whole else RESPONSE
    # Copies take rows of any sequence, counted through all, here into one.
    places = (1, BATCH * RESPONSE) if graph.startswith("copy_") else (BATCH, RESPONSE)
    known: dict[str, NDArray[np.generic]] = {
        "tokens": rng.integers(0, shape.vocab, (BATCH, rows)).astype(np.int32),
        "cos": cos,
        "sin": sin,
        "mask": columns >= padding,
        "block": number_blocks(columns >= padding, shape.block) if shape.block else columns,
        "index": alive if placed else rng.integers(0, places[1], (places[0], BUDGET)).astype(np.int32),
        "slot": np.tile(np.maximum(columns - PROMPT, 0).astype(np.int32), (BATCH, 1)),
        "fresh": np.tile(columns >= PROMPT, (BATCH, 1)),
        # Where a layer keeps rows by their score it keeps all, so that near-equal scores of half types do not count.
        "budget": np.array([LENGTH if graph == "layer_compact" else BUDGET], np.int64),
        "kept": columns < LENGTH - padding,
        "shown": np.arange(RESPONSE) >= padding,
        "given": rng.integers(0, shape.vocab, (BATCH, BUDGET)).astype(np.int32),
        "forced": rng.random((BATCH, rows)) < 0.1,
        "bias": np.zeros(shape.vocab),
        "cfg_scale": np.array([1.5]),
        "guidance": rng.standard_normal((BATCH, rows, shape.hidden)) * 0.1,
        "distribution": np.log(rng.dirichlet(np.ones(shape.vocab), (BATCH, BUDGET))),
        "credit": rng.random((BATCH, BUDGET, shape.vocab)),
        "credit_decay": np.array([0.8]),
        "credit_power": np.array([0.2]),
        "credit_weight": np.array([0.7]),
        "condition": np.random.default_rng(8).standard_normal((BATCH, shape.conditioning)),
        "time": np.cos(np.linspace(0, 3, TIME_WIDTH) * np.array([[1.0], [2.0]])),
        "sharpness": np.array([1.0]),
        "present": np.random.default_rng(10).integers(0, shape.vocab, (BATCH, BUDGET)).astype(np.int32),
        "latent": np.random.default_rng(11).standard_normal((BATCH, LENGTH, shape.latent)),
        "estimate": np.random.default_rng(12).standard_normal((BATCH, LENGTH, shape.latent)) * 0.25,
        "level": np.cos(np.linspace(0, 3, LEVEL_WIDTH) * np.array([[1.0], [2.0]])),
        "latent_scale": np.array([1.2]),
        "pull": np.array([0.9]),
        "moves": np.array([0.02, 0.0004, 0.9, 0.02]),
        "uniform": np.random.default_rng(9).integers(0, 2**23, (BATCH, BUDGET, 2)) / 2**23,
    }
    if graph == "commit":
        known |= draw_statistics(shape.vocab)
    feeds = {}
    for tensor in spec.inputs:
        if tensor.name in known:
            feeds[tensor.name] = known[tensor.name]
            continue
        count = LENGTH if tensor.name in ("key", "value", "rest") else rows
        feeds[tensor.name] = rng.standard_normal((BATCH, count, int(tensor.dims[-1]))) * size
    return feeds


def draw_statistics(vocab: int) -> dict[str, NDArray[np.generic]]:
    """What a head says of its candidates, of which the second sequence has one less, and where they lie."""
    rng, place = np.random.default_rng(13), np.arange(RESPONSE, dtype=np.int32)
    return {
        "slot": np.tile(place % BUDGET, (BATCH, 1)),
        "fresh": np.tile(place < 2 * BUDGET, (BATCH, 1)),
        "token": rng.integers(0, vocab, (BATCH, BUDGET)).astype(np.int32),
        "nll": rng.random((BATCH, BUDGET)) * 2 * np.log(vocab),
        "candidate": np.arange(BUDGET) < np.array([[BUDGET], [BUDGET - 1]]),
        "quota": np.arange(1.0, BATCH + 1),
        "sure": np.array([-np.log(vocab)]),
    }
