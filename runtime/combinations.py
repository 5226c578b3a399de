"""Which options, decoding rules, cache policies and models go together; what does not is refused in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from dllm_export.errors import StrategyError, UsageError
from dllm_export.graphs import HeadGraph, ModelShape
from dllm_export.runtime.options import GenerationOptions, flag
from dllm_export.runtime.policies.contract import suits
from dllm_export.runtime.policies.policy import CachePolicy
from dllm_export.runtime.transfers.quota import Quota
from dllm_export.runtime.transfers.transfer import Transfer

DRAWING = ("head_drawn", "head_moved")
"""Head graphs that draw tokens from the whole vocabulary."""


def is_foreseen(options: GenerationOptions, transfer: Transfer) -> bool:
    """Whether what is drawn before a step runs settles which rows it decides."""
    return transfer.reveals or (options.remasking == "random" and type(transfer) is Quota)


def check_options(options: GenerationOptions, transfer: Transfer) -> None:
    """Refuse options that this rule would ignore or break, and a rule that asks for what there is not."""
    if transfer.head not in get_args(HeadGraph):
        raise StrategyError(
            f"the decoding rule '{transfer.name}' asks for the head {transfer.head!r}, expected one of: "
            f"{', '.join(get_args(HeadGraph))}"
        )
    if options.steps is not None and not transfer.keeps_schedule:
        raise UsageError(
            f"--steps has no effect with --transfer {transfer.name}, which commits as many tokens in a step as it "
            f"trusts: leave it out"
        )
    if options.remasking not in (None, "low_confidence") and not transfer.ranks:
        raise UsageError(
            f"--remasking {options.remasking} has no effect with --transfer {transfer.name}, which goes by its own formula: "
            f"leave it out, or take --transfer quota"
        )
    if transfer.head in DRAWING and (options.top_k is not None or (options.top_p or 1.0) < 1):
        raise UsageError(
            f"--top-p and --top-k have no effect with --transfer {transfer.name}, which draws from the whole vocabulary: leave "
            f"them out"
        )
    if transfer.continuous:
        check_continuous(options, transfer)
    if transfer.moves:
        check_moving(options, transfer)
    if options.confidence_eos_eot_inf and (transfer.draws or transfer.moves) and not transfer.ranks:
        raise UsageError(
            f"--confidence-eos-eot-inf has no effect with --transfer {transfer.name}, which decides rows whatever they "
            f"propose: leave it out"
        )
    if options.confidence_eos_eot_inf and transfer.head == "head_credited":
        raise UsageError(
            f"--confidence-eos-eot-inf does not go with --transfer {transfer.name}: its credit belongs to the distribution "
            f"with the end tokens, and there is none without them: leave it out"
        )
    if options.cfg_scale > 0 and transfer.verifies:
        raise UsageError(
            f"--cfg-scale does not go with --transfer {transfer.name}, which asks the conditional pass alone whether decided "
            f"tokens still hold: leave it out"
        )
    if options.confidence_eos_eot_inf and transfer.tempered:
        raise UsageError(
            f"--confidence-eos-eot-inf does not go with --transfer {transfer.name}, which ranks the distribution that tokens "
            f"are drawn from: leave it out"
        )
    if options.early_stop and transfer.remasks:
        raise UsageError(
            f"--early-stop does not go with --transfer {transfer.name}, which may mask an end of text again: leave it out"
        )


def check_moving(options: GenerationOptions, transfer: Transfer) -> None:
    """Refuse options that mean nothing where no row is decided before the last step and noise is no mask."""
    if options.temperature not in (None, 1.0):
        raise UsageError(
            f"--temperature is {options.temperature}, but --transfer {transfer.name} draws by ratios of probabilities as they "
            f"are: leave it out"
        )
    if options.block_length not in (None, options.gen_length):
        raise UsageError(
            f"--block-length does not go with --transfer {transfer.name}: rows of later blocks would be noise that nobody can "
            f"tell from text: leave it out"
        )
    if options.cfg_scale > 0:
        raise UsageError(
            f"--cfg-scale does not go with --transfer {transfer.name}: without a mask there is nothing to hide the prompt "
            f"with: leave it out"
        )
    if options.early_stop:
        raise UsageError(
            f"--early-stop has no effect with --transfer {transfer.name}, which decides all rows in its last step: leave it out"
        )


def check_continuous(options: GenerationOptions, transfer: Transfer) -> None:
    """Refuse options that say how tokens are chosen, where vectors are denoised."""
    settings: Mapping[str, tuple[object, ...]] = {
        "block_length": (None, options.gen_length),
        "temperature": (None, 0.0),
        "top_p": (None, 1.0),
        "top_k": (None,),
        "cfg_scale": (0.0,),
        "remasking": (None, "low_confidence"),
        "logits_eos_inf": (False,),
        "confidence_eos_eot_inf": (False,),
        "early_stop": (False,),
    }
    for name, allowed in settings.items():
        if getattr(options, name) not in allowed:
            raise UsageError(
                f"{flag(name)} has no effect with --transfer {transfer.name}, which denoises vectors and takes the likeliest "
                f"tokens at its end: leave it out"
            )
    if options.steps == 1:
        raise UsageError(f"--steps is 1, expected at least 2 with --transfer {transfer.name}: times fall from 1 to 0")


def check_model(shape: ModelShape, transfer: Transfer) -> None:
    """Refuse a model that generation does not know how to run, and a rule that shows it a noise level or fails to."""
    if (shape.latent > 0) != transfer.continuous:
        raise UsageError(
            f"--transfer {transfer.name} decides tokens, and this model denoises vectors: take --transfer ancestral"
            if shape.latent
            else f"--transfer {transfer.name} denoises vectors, and this model has tokens alone: take another rule"
        )
    if shape.block and transfer.verifies:
        raise UsageError(
            f"--transfer {transfer.name} needs shadow rows, which are not made for a model that attends by blocks: take "
            f"another rule"
        )
    if shape.shift and transfer.verifies:
        raise UsageError(
            f"--transfer {transfer.name} asks a token's own row whether the token still holds, and this model predicts a token "
            f"from the row before it: take another rule"
        )
    if bool(shape.conditioning) == transfer.sees_noise and shape.uniform_noise == transfer.moves:
        return
    if shape.conditioning:
        own = "sedd-uniform" if shape.uniform_noise else "sedd"
        if transfer.sees_noise:
            raise UsageError(
                f"--transfer {transfer.name} is for the other kind of noise: this model's is "
                f"{'any token' if shape.uniform_noise else 'a mask'}, take --transfer {own}"
            )
        raise UsageError(
            f"this model sees the noise level of a step, which --transfer {transfer.name} does not have: take --transfer {own}"
        )
    raise UsageError(
        f"--transfer {transfer.name} reads a model's ratios of probabilities at a noise level, and this model sees none: "
        f"take another rule"
    )


def check_attention(shape: ModelShape, policy: CachePolicy) -> None:
    """Refuse a cache policy that counts on another attention than the model's."""
    if suits(policy, by_blocks=shape.block > 0):
        return
    if shape.block:
        raise UsageError(
            f"--policy {policy.name} counts on every row seeing all others, and this model attends by blocks: take --policy "
            f"block, which is exact for it"
        )
    raise UsageError(
        f"--policy {policy.name} is for models that attend by blocks, and in this one every row sees all others: take "
        f"--policy dual"
    )


def check_strategies(options: GenerationOptions, policy: CachePolicy, transfer: Transfer) -> None:
    """Refuse options, a cache policy and a decoding rule that do not go together."""
    check_options(options, transfer)
    if getattr(policy, "needs_upcoming", False) and not is_foreseen(options, transfer):
        raise UsageError(
            f"--policy {policy.name} must know which rows a step decides before the step runs, which takes --remasking "
            f"random and --transfer quota, or --transfer ddpm, ddpm-cache, first-hitting or origin; these are "
            f"{options.remasking or 'low_confidence'} and {transfer.name}"
        )
