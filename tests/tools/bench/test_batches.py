"""Batches, several tokens a step and the threshold rule in the benchmark's columns: tokens are compared, times are not."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from dllm_export.errors import UsageError
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.policies import DllmCache, StepState
from dllm_export.runtime.transfers import Threshold
from dllm_export.tools.bench.column import measure_column
from dllm_export.tools.bench.measure import Measurement, draw_prompts
from dllm_export.tools.bench.records import RawRun
from dllm_export.tools.bench.request import SHORT_STEPS, BenchOptions, Request, ShapeOptions, plan_measurement
from dllm_export.tools.bench.roofline import Limits
from dllm_export.tools.bench.statistics import compare_tokens
from dllm_export.tools.bench.summary import find_bars, summarize_run
from dllm_export.tools.bench.tables import describe_rule
from dllm_export.tools.cli import run as run_cli

PROMPT, RESPONSE, BATCH = 10, 9, 3
OPTIONS = BenchOptions(
    prompt_length=PROMPT, gen_length=RESPONSE, batch=BATCH, warmup=0, threads=1, device="cpu", graphs=False
)
CACHE = DllmCache(prompt_interval=4, response_interval=2)


def run_column(bundle: Bundle, column: str, options: BenchOptions = OPTIONS, rule: Threshold | None = None) -> RawRun:
    """The last run of a column: with the cache where it has one."""
    return measure_column(plan_measurement(bundle, None, options, CACHE, rule).task(column)).runs[-1]


@pytest.mark.parametrize("count", [1, 2])
def test_every_sequence_of_a_batch_gets_the_tokens_that_it_gets_alone(tiny_bundle: Bundle, count: int) -> None:
    """In plain PyTorch, in the published cache and in the runtime, whose responses are also equal to one another's."""
    options = replace(OPTIONS, tokens_per_step=count)
    prompts = draw_prompts(tiny_bundle, PROMPT, 0, BATCH)
    assert len(set(prompts)) == BATCH
    for columns in (("eager",), ("four-feature", "torch")):
        found = {name: run_column(tiny_bundle, name, options) for name in columns}
        for run in found.values():
            assert len(run.steps) == -(-RESPONSE // count)
            assert sum(len(step.decided) for step in run.steps) == BATCH * RESPONSE
            task = plan_measurement(tiny_bundle, None, options, CACHE).task(columns[0])
            for number, prompt in enumerate(prompts):
                settings = plan_measurement(tiny_bundle, None, replace(options, batch=1), CACHE).settings
                alone = measure_column(msgspec.structs.replace(task, prompts=(prompt,), settings=settings)).runs[-1]
                assert run.tokens[number * RESPONSE :][:RESPONSE] == alone.tokens
        first, *others = found.values()
        assert all(compare_tokens(other, first) == (1.0, None) for other in others)


def test_a_batch_multiplies_what_is_computed_and_cached_but_reads_the_weights_once(tiny_bundle: Bundle) -> None:
    options = replace(OPTIONS, steps=3)
    single, batch = (run_column(tiny_bundle, "torch", replace(options, batch=count)) for count in (1, BATCH))
    embedding = 4 * tiny_bundle.manifest.shape.hidden
    for one, many in zip(single.steps, batch.steps, strict=True):
        assert one.kind == many.kind
        assert many.work.flops == BATCH * one.work.flops
        assert many.work.cache_bytes == BATCH * one.work.cache_bytes
        rows = (many.work.weight_bytes - one.work.weight_bytes) / embedding
        assert rows == (BATCH - 1) * (PROMPT + RESPONSE if one.kind == "full" else RESPONSE)


def test_a_step_decides_as_many_tokens_as_asked_and_speed_counts_those_of_all_sequences(tiny_bundle: Bundle) -> None:
    run = run_column(tiny_bundle, "torch", replace(OPTIONS, tokens_per_step=2))
    assert [len(step.decided) for step in run.steps] == [BATCH * count for count in (2, 2, 2, 2, 1)]
    manifest = tiny_bundle.manifest
    made = summarize_run(run, Limits(flops_per_second=1, bytes_per_second=1), None, [], manifest.tokens.mask, BATCH)
    assert made.tokens_per_pass == BATCH * RESPONSE / 5
    assert made.tokens_per_second == pytest.approx(BATCH * RESPONSE / sum(step.seconds for step in run.steps))
    assert made.answer_tokens == BATCH * RESPONSE


def test_the_threshold_rule_decides_what_it_trusts_and_plain_pytorch_one_token_a_step(tiny_bundle: Bundle) -> None:
    trusting = run_column(tiny_bundle, "torch", rule=Threshold(threshold=0.0))
    assert [len(step.decided) for step in trusting.steps] == [BATCH * RESPONSE]
    doubting = run_column(tiny_bundle, "torch", rule=Threshold(threshold=1.0))
    assert [len(step.decided) for step in doubting.steps] == [BATCH] * RESPONSE
    assert doubting.tokens == run_column(tiny_bundle, "torch").tokens
    plain = run_column(tiny_bundle, "eager", rule=Threshold(threshold=0.0))
    assert [len(step.decided) for step in plain.steps] == [BATCH] * RESPONSE
    share, differs = compare_tokens(trusting, plain)
    assert 0 <= share <= 1
    assert differs == 1


def test_graphs_are_timed_at_the_size_of_the_batch(tiny_bundle: Bundle) -> None:
    options = replace(OPTIONS, graphs=True, steps=1)
    found = measure_column(plan_measurement(tiny_bundle, None, options, CACHE).task("torch"))
    assert {graph.sizes["B"] for graph in found.graphs} == {BATCH}


def test_bars_of_one_sequence_and_one_token_a_step_are_for_no_other_request(tiny_bundle: Bundle) -> None:
    settings = plan_measurement(tiny_bundle, None, replace(OPTIONS, batch=1), CACHE).settings
    shape = replace(settings.shape, hidden=512, layers=8)
    barred = msgspec.structs.replace(settings, shape=shape, prompt=512, response=128)
    assert find_bars(barred) is not None
    assert find_bars(msgspec.structs.replace(barred, batch=4)) is None
    assert find_bars(msgspec.structs.replace(barred, tokens_per_step=2)) is None
    assert describe_rule(barred) == "one token a step"


def test_the_prompts_of_a_batch_begin_with_the_one_of_a_smaller_batch(tiny_bundle: Bundle) -> None:
    few, many = (draw_prompts(tiny_bundle, PROMPT, 5, count) for count in (1, 4))
    assert many[:1] == few
    assert np.unique(many, axis=0).shape == (4, PROMPT)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--batch 0", "--batch is 0, expected at least 1"),
        ("--tokens-per-step 0", "--tokens-per-step is 0, expected at least 1"),
        (
            "--gen-length 8 --tokens-per-step 3 --steps 4",
            "expected at most --gen-length / --tokens-per-step, 3: 3 tokens a step",
        ),
        ("--threshold 0.5", "--threshold belongs to the decoding rule: threshold"),
        ("--transfer wino", "decoding rule"),
        ("--batch 2 --prompt-file README.md", "--prompt-file has one prompt"),
    ],
)
def test_batches_and_rules_that_make_no_sense_are_refused(
    line: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(["bench", *line.split()]) == UsageError.exit_code
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_tokens_per_step_and_a_rule_that_decides_itself_are_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="--tokens-per-step has no effect with --transfer threshold"):
        plan_measurement(tiny_bundle, None, replace(OPTIONS, tokens_per_step=2), CACHE, Threshold())


# -- what is left out of a bundle's report on a CPU
def test_a_bundle_on_a_cpu_is_measured_for_fewer_steps_and_by_no_column_that_compiles(tiny_bundle: Bundle) -> None:
    def plan(options: BenchOptions, path: Path | None = tiny_bundle.path) -> Measurement:
        request = Request(path=path, options=options, policy=CACHE, transfer=None, shape=ShapeOptions())
        return request.plan(tiny_bundle, None)

    asked = BenchOptions(prompt_length=100, device="cpu")
    short, whole = plan(asked), plan(asked, None)
    assert (short.settings.steps, whole.settings.steps) == (25, 128)
    assert set(whole.columns) - set(short.columns) == {"eager-compile"}
    explicit = plan(replace(asked, steps=60, columns="eager-compile,torch"))
    assert (explicit.settings.steps, tuple(explicit.columns)) == (60, ("eager-compile", "torch"))
    assert plan(replace(asked, gen_length=9)).settings.steps == 9
    assert plan(replace(asked, tokens_per_step=8)).settings.steps == 16


def test_the_fewer_steps_have_the_mix_of_a_long_generation() -> None:
    """So that tokens/s are those of a whole one: refreshes of the prompt come every 25 steps, of the response every 5."""
    policy, first = DllmCache(), StepState.first(layers=2, prompt_rows=10, response_rows=10)
    kinds = [policy.plan(replace(first, step=step, block_step=step)).kind for step in range(1, 1001)]
    few, all_of_them = Counter(kinds[:SHORT_STEPS]), Counter(kinds)
    assert {kind: 40 * count for kind, count in few.items()} == all_of_them
