"""`dllm-export families`: every family is listed with what applies to it, or with why it is refused."""

from __future__ import annotations

import json

import pytest

from dllm_export.graphs.families import FAMILIES, KNOWN_FAMILIES
from dllm_export.runtime.policies import POLICIES
from dllm_export.tools import cli
from dllm_export.tools.list_families import describe_sampler, describe_status, list_families

LINES = {line.name: line for line in list_families()}


def test_a_person_reads_every_family_and_how_far_it_goes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["families"]) == 0
    text = capsys.readouterr().out
    assert all(name in text.split() for name in (*FAMILIES, *KNOWN_FAMILIES))
    assert "supported: no more than its window of 1024 tokens: the cache does not shift" in map(
        describe_status, LINES.values()
    )
    assert describe_sampler(LINES["mdlm"].sampler) == "ddpm-cache, 128 in blocks of 128, temperature 1"


def test_a_machine_reads_the_same_and_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["families", "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert [line["name"] for line in lines] == [*FAMILIES, *KNOWN_FAMILIES]
    assert [line["supported"] for line in lines] == [True] * len(FAMILIES) + [False] * len(KNOWN_FAMILIES)
    first = lines[0]
    assert (first["name"], first["sampler"]["transfer"], first["sizes"]) == ("llada", "quota", ["8.02 B"])
    assert first["recognised_by"] == "LLaDAModelLM"
    assert all(line["reason"] for line in lines if not line["supported"])


@pytest.mark.parametrize("name", ["llada", "illada", "a2d-qwen3", "mdlm"])
def test_every_policy_applies_to_models_that_do_not_see_the_noise(name: str) -> None:
    assert LINES[name].policies == tuple(policy for policy in POLICIES if policy != "block")
    assert not {"sedd", "sedd-uniform"} & set(LINES[name].rules)
    assert {"quota", "threshold"} < set(LINES[name].rules)


def test_what_generation_would_refuse_does_not_apply() -> None:
    for name in ("bd3lm", "sdar", "llada2"):
        assert set(POLICIES) - set(LINES[name].policies) == {"sparse", "shared-prefix"}
        assert not {"wino", "sedd", "sedd-uniform"} & set(LINES[name].rules)
    assert LINES["sedd"].rules == ("sedd", "sedd-uniform")
    assert set(POLICIES) - set(LINES["sedd"].policies) == {"shared-prefix", "block"}


def test_a_continuous_model_has_its_own_rule_and_no_cache() -> None:
    assert (LINES["plaid"].policies, LINES["plaid"].rules) == (("none",), ("ancestral",))
    assert (LINES["plaid"].recognised_by, LINES["plaid"].supported) == ("model.pt", True)
    assert "no cache applies" in LINES["plaid"].reason
    assert not [name for name, line in LINES.items() if name != "plaid" and "ancestral" in line.rules]
