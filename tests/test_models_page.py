"""docs/models.md says what the code and the tests say: its tables are generated, and every test it names exists."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest

from dllm_export.graphs.families import FAMILIES
from dllm_export.runtime.policies import POLICIES
from dllm_export.runtime.transfers import TRANSFERS
from dllm_export.tools.list_families import FamilyLine, describe_sampler, list_families

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
ANSWERS = ROOT / "docs" / "measurements" / "h200-answers.json"

ORACLE = "test_oracles.py::test_the_reduced_state_is_exact_for_every_flag_of_the_layer"
UNCACHED = "test_oracles.py::test_without_a_cache_the_graphs_give_the_logits_of_the_published_model"
STOCK = "exporter/test_transformers.py::test_logits_of_a_published_checkpoint_equal_those_of_transformers"
STOCK_TOKENS = (
    "exporter/test_transformers.py::test_a_generation_is_that_of_transformers_token_for_token_on_every_provider"
)
V2 = "exporter/test_transformers.py::"
TRAINED = "runtime/test_trained_layouts.py::"
BLOCK_TOKENS = (
    "exporter/test_transformers.py::"
    "test_a_generation_by_blocks_is_the_published_loop_token_for_token_with_every_policy_that_is_exact"
)
STOCK_GRAPHS = "exporter/test_transformers.py::test_an_export_verifies_with_every_policy_of_the_check"
VERIFIED = "exporter/test_verify.py::test_every_variant_passes_on_onnxruntime"
ENGINES = "exporter/test_engines.py::test_every_graph_has_an_engine_that_the_manifest_lists_and_verifies"
DIT_ENGINES = "exporter/test_dit.py::test_tensorrt_builds_every_graph"
FOLDED = "exporter/test_dit.py::test_folded_layers_equal_the_published_formula_in_double_precision[0.0]"
MOE = "exporter/test_expert_models.py::"
EDITED = "exporter/test_token_editing.py::test_a_generation_is_the_loop_token_for_token_and_pass_for_pass"
MOE_ENGINES = (
    "exporter/test_expert_plans.py::test_a_graph_with_experts_builds_for_both_kinds_of_gpu[layer_full-float16]"
)
TIME = "runtime/test_time_families.py::"
MOVED = "runtime/test_uniform_noise.py::"
PLAID = "runtime/test_plaid.py::"
REFRESHED = f"{TIME}test_policies_that_refresh_everything_sample_what_no_cache_samples"


def stock(family: str, *variants: str) -> dict[str, tuple[str, ...]]:
    """Evidence for a family that a class of transformers computes; `variants` are tiny models with its layers' flags."""
    return {
        "logits": (f"{STOCK}[{family}]",),
        "generation": (f"{STOCK_TOKENS}[{family}]",),
        "policies": tuple(f"{ORACLE}[{variant}]" for variant in variants),
        "graphs": (f"{STOCK_GRAPHS}[{family}]",),
        "engines": tuple(f"{ENGINES}[{variant}-bfloat16]" for variant in variants),
    }


def by_blocks(family: str, *variants: str) -> dict[str, tuple[str, ...]]:
    """The same for a family whose rows attend by blocks."""
    generated = tuple(
        f"{BLOCK_TOKENS}[{threshold}-{steps}-{family}]" for threshold in ("None", "0.3") for steps in (4, 2)
    )
    return {**stock(family, *variants), "generation": generated, "policies": generated}


def trained(shown: dict[str, tuple[str, ...]], layout: str) -> dict[str, tuple[str, ...]]:
    """The same with what was tried on a trained model of that layout."""
    exact = f"{TRAINED}test_an_exact_cache_decides_the_same_tokens_in_the_same_steps[{layout}-onnxruntime]"
    return {**shown, "policies": (*shown["policies"], exact)}


def anchored(base: str) -> dict[str, tuple[str, ...]]:
    """The same for a family whose blocks are counted from the response; logits are compared within the test."""
    generated = (f"{V2}test_a_generation_of_a2d_by_blocks_is_the_published_loop_token_for_token[{base}]",)
    verified = (f"{V2}test_a2d_by_blocks_is_exported_and_its_graphs_verify",)
    engines = (f"{ENGINES}[blocks-bfloat16]",)
    return {"logits": generated, "generation": generated, "policies": generated, "graphs": verified, "engines": engines}


def mixture(family: str, case: str = "") -> dict[str, tuple[str, ...]]:
    """Evidence for a family with experts; `case` is its name in tests of the experts' own formulas."""
    return {
        "logits": (f"{MOE}{case or f'test_logits_are_those_of_the_formulas_token_by_token[{family}]'}",),
        "graphs": (f"{MOE}test_onnxruntime_is_verified_against_torch_and_the_checkpoint[{family}-on]",),
        "engines": (MOE_ENGINES,),
    }


def mixture_by_blocks(family: str, case: str = "") -> dict[str, tuple[str, ...]]:
    """The same for a family whose rows attend by blocks."""
    cached = (
        f"{MOE}test_a_model_that_attends_by_blocks_generates_the_same_with_blocks_cached_on_every_provider[{family}]",
    )
    return {**mixture(family, case), "generation": cached, "policies": cached}


EVIDENCE: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "llada": {
        "logits": (f"{UNCACHED}[plain]",),
        "generation": (
            "runtime/test_llada_loop.py::test_continuation_equals_the_published_sampler[blocks-False-none]",
        ),
        "policies": ("test_oracles.py::test_refreshing_everything_on_every_step_equals_no_cache[Kp=Kr=1]",),
        "graphs": (f"{VERIFIED}[gqa]",),
        "engines": (f"{ENGINES}[plain-float16]",),
    },
    "illada": stock("illada", "gqa", "tied"),
    "a2d-qwen3": stock("a2d-qwen3", "qk_norm"),
    "a2d-qwen2": stock("a2d-qwen2", "bias"),
    "a2d-llama": stock("a2d-llama", "gqa"),
    "a2d-qwen3-bd3lm": anchored("a2d-qwen3"),
    "a2d-qwen2-bd3lm": anchored("a2d-qwen2"),
    "dream": trained(stock("dream", "dream"), "dream"),
    "open-dcoder": stock("open-dcoder", "dream"),
    "diffullama": stock("diffullama", "gqa"),
    "sdar": trained(by_blocks("sdar", "blocks"), "sdar"),
    "dream-reasoner": by_blocks("dream-reasoner", "blocks"),
    "stable-diffcoder": by_blocks("stable-diffcoder", "blocks"),
    "fast-dllm-v2": {
        **stock("fast-dllm-v2", "blocks"),
        "generation": (
            f"{V2}test_a_generation_of_fast_dllm_v2_is_the_published_loop_token_for_token[0.9-4]",
            f"{V2}test_a_generation_of_fast_dllm_v2_is_the_published_loop_token_for_token[0.3-2]",
        ),
        "policies": (
            f"{V2}test_kept_blocks_are_exact_for_a_model_that_predicts_the_next_token_with_every_rule[sub-blocks]",
            f"{V2}test_a_generation_of_fast_dllm_v2_with_its_dual_cache_is_the_published_loop_token_for_token[8-4-0.9]",
        ),
    },
    "llada-moe": {
        **mixture("llada-moe"),
        "generation": (f"{MOE}test_providers_generate_the_same_tokens[all experts-none]",),
        "policies": (f"{MOE}test_a_cache_that_refreshes_everything_generates_what_no_cache_does",),
    },
    "llada2": {
        **mixture_by_blocks("llada2"),
        "generation": (f"{EDITED}[whatever is likelier]", f"{EDITED}[reviews until nothing is edited]"),
    },
    "sdar-moe": mixture_by_blocks("sdar-moe", "test_logits_are_those_of_qwen3_moe_by_blocks"),
    "mdlm": {
        "logits": (FOLDED,),
        "generation": (f"{TIME}test_mdlm_samples_what_the_published_loop_samples[6-float64]",),
        "policies": (f"{REFRESHED}[dllm-cache-mdlm]",),
        "graphs": ("exporter/test_dit.py::test_an_export_verifies_against_the_unfolded_probe",),
        "engines": (f"{DIT_ENGINES}[mdlm]",),
    },
    "bd3lm": {
        "logits": (FOLDED,),
        "generation": (f"{TIME}test_bd3lm_samples_what_the_published_loop_samples[none-float64]",),
        "policies": (f"{TIME}test_bd3lm_samples_what_the_published_loop_samples[block-float64]",),
        "graphs": ("exporter/test_dit.py::test_bd3lm_is_exported_and_its_graphs_verify",),
        "engines": (f"{DIT_ENGINES}[mdlm]",),
    },
    "sedd": {
        "logits": (
            "exporter/test_dit.py::test_layers_that_see_the_noise_level_equal_the_published_formula_in_double_precision[0.25]",
        ),
        "generation": (
            f"{TIME}test_sedd_samples_what_the_published_loop_samples[6-euler-float64]",
            f"{MOVED}test_it_samples_what_the_published_loop_samples[euler-float64]",
        ),
        "policies": (
            f"{REFRESHED}[dllm-cache-sedd]",
            f"{MOVED}test_policies_that_refresh_everything_sample_what_no_cache_samples[dllm-cache]",
        ),
        "graphs": (
            "exporter/test_dit.py::test_an_export_that_sees_the_noise_level_verifies",
            f"{MOVED}test_an_export_verifies",
        ),
        "engines": (
            f"{DIT_ENGINES}[sedd]",
            "exporter/test_dit.py::test_tensorrt_builds_the_graph_that_moves_tokens",
        ),
    },
    "plaid": {
        "logits": (f"{PLAID}test_a_step_gives_what_the_published_formulas_give",),
        "generation": (f"{PLAID}test_it_samples_what_the_published_loop_samples[float64]",),
        "policies": (f"{PLAID}test_no_cache_policy_applies",),
        "graphs": (f"{PLAID}test_an_export_verifies[float32]",),
        "engines": (f"{PLAID}test_tensorrt_builds_every_graph",),
    },
}
"""Family -> what is shown -> the tests that show it, by their names below tests/."""

RUN_ON_A_GPU = ("llada",)
"""Families whose tokens of a trained model a GPU's engines have given (the file at ANSWERS)."""

SHOWN = {
    "logits": "logits equal an independent implementation's",
    "generation": "whole generations equal a plain loop's, token for token",
    "policies": "cached steps are exact where they refresh everything, or equal the published cache, or are refused",
    "graphs": "every graph on ONNX Runtime equals PyTorch and the checkpoint's own activations",
    "engines": "every graph builds with TensorRT for RTX",
}


def names(chosen: tuple[str, ...], every: Mapping[str, object]) -> str:
    """All, none, or all but those that are missing."""
    missing = [name for name in every if name not in chosen]
    if not missing or not chosen:
        return "all" if chosen else "none"
    return f"all but `{'`, `'.join(missing)}`" if len(missing) < len(chosen) else f"`{'`, `'.join(chosen)}`"


def tensorrt_status(line: FamilyLine) -> str:
    return "the bundled model ran with 8.6 on an H200; " * (line.name in RUN_ON_A_GPU) + "engines build without a GPU"


def supported_table() -> str:
    rows = [
        "| family | checkpoints | parameters | layout | sampler | policies | rules | TensorRT | limits |",
        "|---" * 9 + "|",
    ]
    for line in list_families():
        if line.supported:
            applies = names(line.policies, POLICIES), names(line.rules, TRANSFERS)
            cells = (
                f"`{line.name}`", line.checkpoints, ", ".join(line.sizes), line.layout, describe_sampler(line.sampler),
                *applies, tensorrt_status(line), line.reason,
            )  # fmt: skip
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def evidence_list() -> str:
    rows = []
    for family, shown in EVIDENCE.items():
        rows.append(f"- `{family}`")
        for what, tests in shown.items():
            rows += [f"  - {SHOWN[what]}:", *(f"    `{test}`" for test in tests)]
    return "\n".join(rows) + "\n"


def refused_table() -> str:
    rows = ["| name | checkpoints | why |", "|---|---|---|"]
    rows += [
        f"| `{line.name}` | {line.checkpoints} | {line.reason} |" for line in list_families() if not line.supported
    ]
    return "\n".join(rows) + "\n"


SECTIONS = {"supported": supported_table, "evidence": evidence_list, "refused": refused_table}


@pytest.mark.parametrize("name", SECTIONS)
def test_a_table_of_the_page_is_the_one_that_the_code_gives(name: str, tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")

    def renew(match: re.Match[str]) -> str:
        return match[1] + SECTIONS[match[2]]() + match[3]

    renewed, count = re.subn(r"(<!-- (\w+): begin -->\n).*?(<!-- \2: end -->)", renew, text, flags=re.DOTALL)
    assert count == len(SECTIONS)
    (tmp_path / "models.md").write_text(renewed, encoding="utf-8")
    table = f"<!-- {name}: begin -->\n{SECTIONS[name]()}<!-- {name}: end -->"
    assert table in text, f"the page is behind the code: cp {tmp_path}/models.md {PAGE}"


def test_every_family_has_evidence_of_everything_that_is_claimed() -> None:
    assert EVIDENCE.keys() == FAMILIES.keys()
    for name in FAMILIES:
        assert EVIDENCE[name].keys() == SHOWN.keys(), name


def test_every_test_that_is_named_exists(request: pytest.FixtureRequest) -> None:
    if find_spec("transformers") is None:
        pytest.skip("tests against transformers need Python 3.11")
    named = {test for shown in EVIDENCE.values() for tests in shown.values() for test in tests}
    if named <= {item.nodeid.removeprefix("tests/") for item in request.session.items}:
        return  # in a run of all tests
    files = sorted({f"tests/{test.split('::')[0]}" for test in named})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    collected = {line.removeprefix("tests/") for line in done.stdout.splitlines()}
    assert done.returncode == 0, done.stdout + done.stderr
    assert not sorted(named - collected)


def test_what_is_said_of_a_gpu_was_measured() -> None:
    answers = json.loads(ANSWERS.read_text(encoding="utf-8"))["answers"]
    assert all(
        answer["equal"] == 1.0 for answer in answers if (answer["column"], answer["dtype"]) == ("tensorrt", "float32")
    )
    assert any(answer["column"] == "tensorrt" for answer in answers)
