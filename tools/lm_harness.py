"""A bundle as a model of EleutherAI's lm-evaluation-harness (extra `lm-eval`): generation tasks with any policy and rule.

    python -m dllm_export.tools.lm_harness --model dllm-export --model_args bundle=b,policy=dllm-cache --tasks gsm8k

is the harness's own command line with this model in it; in Python, `lm_eval.simple_evaluate(model=HarnessModel(...))`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from dllm_export.errors import UsageError
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.plugins import find_policy, find_transfer
from dllm_export.runtime.session import SessionOptions

T = TypeVar("T")


@register_model("dllm-export")
class HarnessModel(LM):
    """Answers tasks of the kind `generate_until`. Settings are the flags of `generate`, with underscores."""

    def __init__(self, bundle: str, policy: str = "none", transfer: str | None = None, **settings: Any) -> None:
        super().__init__()
        # The harness hands these to every model. Requests run one by one; its own default device is not taken for a wish.
        left = {name: value for name, value in settings.items() if name not in ("batch_size", "max_batch_size")}
        if left.get("device") in (None, "cuda:0"):
            left.pop("device", None)
        self.policy = take(find_policy(policy), left)
        self.transfer = None if transfer is None else take(find_transfer(transfer), left)
        self.options = take(GenerationOptions, left)
        session = take(SessionOptions, left)
        if left:
            raise UsageError(
                f"model_args has {', '.join(left)}, which no option of {policy}, {transfer or 'a rule'} or generate is called"
            )
        self.model = DiffusionLM.from_pretrained(bundle, session)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The continuation of every prompt, cut before the first of its stop texts."""
        return [self._answer(*request.args) for request in requests]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Refused: a likelihood needs the probability of given tokens, and the head returns the 64 most likely ones."""
        raise UsageError(
            "tasks that compare likelihoods cannot be answered: the head graph returns the most likely tokens of a row and not "
            "the probability of a given one; take tasks whose output_type is generate_until"
        )

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Refused like `loglikelihood`."""
        self.loglikelihood(requests)
        raise AssertionError

    def _answer(self, prompt: str, task: Mapping[str, Any]) -> str:
        options = self.options
        if options.gen_length is None and "max_gen_toks" in task:
            options = replace(options, gen_length=int(task["max_gen_toks"]))
        if task.get("do_sample") and not options.temperature:
            options = replace(options, temperature=float(task.get("temperature", 1.0)))
        text = self.model.generate([prompt], options, self.policy, self.transfer)[0].text
        stops = task.get("until") or []
        for stop in [stops] if isinstance(stops, str) else stops:
            text = text.split(stop, 1)[0] if stop else text
        return text


def take(kind: type[T], settings: dict[str, Any]) -> T:
    """An instance made of those settings that are its fields; they are removed."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: settings.pop(name) for name in names if name in settings})


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
