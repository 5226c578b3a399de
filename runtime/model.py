"""The front door for Python: open a bundle, generate, stream, infill."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dllm_export.errors import UsageError
from dllm_export.runtime.bundle import Bundle, open_bundle
from dllm_export.runtime.combinations import DRAWING, check_model, check_options
from dllm_export.runtime.generate import Denoiser, Frame, Workspace
from dllm_export.runtime.latent import LatentDenoiser, check_policy
from dllm_export.runtime.noise_schedule import open_schedule
from dllm_export.runtime.options import GenerationOptions, SettledOptions
from dllm_export.runtime.plugins import find_transfer
from dllm_export.runtime.policies import CachePolicy, NoCache
from dllm_export.runtime.prefix_profile import PrefixProfile, digest_weights
from dllm_export.runtime.prefix_store import PREFIX_BUDGET, PrefixStore
from dllm_export.runtime.request import Request, continuation, infilling, share_prefix, unconditional
from dllm_export.runtime.session import Session, SessionOptions, open_session
from dllm_export.runtime.tokenizer import Tokenizer
from dllm_export.runtime.transfers import Ancestral, Transfer


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The result of one sequence. Times and passes are those of its whole batch."""

    text: str
    tokens: tuple[int, ...]
    """The response's ids, all R of them."""
    confidence: tuple[float, ...]
    """Probability of each token when it was committed; nan for given text and for what an early stop filled."""
    finish_reason: str
    """`stop` if an end-of-text token was generated, else `length`."""
    passes: int
    """Forward passes (NFE) of the request."""
    steps_by_kind: dict[str, int]
    seconds: float
    engine_seconds: float
    """Time of programs in the provider, on the device's clock where they are queued."""
    strategy_seconds: float
    """Time that the cache policy took for its plans, and sampler and decoding rule for their decisions."""

    @property
    def partial_share(self) -> float:
        """Share of steps that did not recompute everything."""
        return 1 - self.steps_by_kind.get("full", 0) / sum(self.steps_by_kind.values())


class DiffusionLM:
    """A bundle opened on one provider. A context manager; not for two threads at once."""

    def __init__(self, bundle: Bundle, session: Session, *, prefix_budget: int = PREFIX_BUDGET) -> None:
        self.bundle, self.session = bundle, session
        manifest = bundle.manifest
        identity = f"{manifest.digest} {manifest.dtype} {session.provider}"
        self.prefixes = PrefixStore(session, manifest.shape, identity, prefix_budget)
        self._workspace: Workspace | None = None
        self.tokenizer: Tokenizer | None = None
        if manifest.tokenizer is not None:
            record = manifest.tokenizer
            self.tokenizer = Tokenizer(bundle.file(record.file), record.chat_template, record.bos)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        options: SessionOptions = SessionOptions(),
        *,
        prefix_budget: int = PREFIX_BUDGET,
    ) -> DiffusionLM:
        """Open and verify a bundle directory; `prefix_budget` is in tokens of shared prefixes that are kept."""
        bundle = open_bundle(path)
        session = open_session(bundle, options)
        try:
            return cls(bundle, session, prefix_budget=prefix_budget)
        except BaseException:
            session.close()
            raise

    def __enter__(self) -> DiffusionLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the provider's memory."""
        self._workspace = None
        self.prefixes.clear()
        self.session.close()

    # -- requests
    def encode(self, text: str, *, chat: bool = False) -> list[int]:
        """Token ids of a prompt, with the chat template where asked for."""
        if self.tokenizer is None:
            raise UsageError("this bundle has no tokenizer: pass token ids instead of text")
        return self.tokenizer.encode(self.tokenizer.chat(text) if chat else text)

    def continuation(self, prompts: Sequence[Sequence[int]], options: GenerationOptions) -> Request:
        """Checked request: token ids of prompts, each followed by masks."""
        manifest = self.bundle.manifest
        return continuation(prompts, options, manifest.shape, manifest.tokens, manifest.sampler)

    def infilling(self, canvases: Sequence[Sequence[int]], options: GenerationOptions) -> Request:
        """Checked request: token ids with mask ids anywhere."""
        return infilling(canvases, options, self.bundle.manifest.shape, self.bundle.manifest.tokens)

    def unconditional(self, count: int = 1, options: GenerationOptions = GenerationOptions()) -> Request:
        """Checked request of so many texts out of nothing, for a continuous model."""
        manifest = self.bundle.manifest
        return unconditional(count, options, manifest.shape, manifest.tokens, manifest.sampler)

    def settle(self, options: GenerationOptions, transfer: Transfer | None = None) -> tuple[SettledOptions, Transfer]:
        """Options and decoding rule with the defaults of the bundle's family filled in."""
        sampler = self.bundle.manifest.sampler
        rule = find_transfer(sampler.transfer)() if transfer is None else transfer
        check_options(options, rule)
        return options.settle(sampler, ranks=rule.ranks, filters=rule.head not in DRAWING), rule

    def share(
        self,
        request: Request,
        prefix: Sequence[int],
        *,
        depth: int | None = None,
        profile: PrefixProfile | None = None,
    ) -> Request:
        """The request with these token ids named as the start that its prompts share with other requests.

        Policy `SharedPrefix` then takes their features below layer `depth` from the first request that had them.
        """
        manifest = self.bundle.manifest
        if depth is None:
            if profile is None:
                raise UsageError(
                    "a shared prefix needs a depth: give --prefix-depth, or --prefix-profile with a file that "
                    "'dllm-export profile-prefix' wrote"
                )
            profile.check(digest_weights(manifest))
            depth = profile.depth(len(prefix), request.shape.length)
        return share_prefix(request, prefix, depth, manifest.shape.layers)

    def stream(
        self,
        request: Request,
        options: GenerationOptions = GenerationOptions(),
        policy: CachePolicy = NoCache(),
        transfer: Transfer | None = None,
        *,
        watch: bool = False,
    ) -> Iterator[Frame]:
        """One frame per denoising step; stop iterating to cancel. Streams may be interleaved: none shares a buffer.

        What options leave open and a missing `transfer` are the family's.
        """
        settled, rule = self.settle(options, transfer)
        if self.bundle.manifest.shape.latent:
            yield from self._denoise_latents(request, settled, policy, rule)
            return
        # The last request's buffers and prepared programs are taken if they fit, and put back afterwards.
        workspace, self._workspace = self._workspace, None
        manifest = self.bundle.manifest
        if workspace is None or workspace.request != request.shape:
            workspace = Workspace(self.session, manifest.shape, request.shape)
        denoiser = Denoiser(
            workspace, manifest.shape, manifest.tokens, request, settled, policy, rule, watch, self.prefixes
        )
        try:
            yield from denoiser.frames()
        except Exception:
            raise  # whatever failed may have left it half allocated: its memory goes, and the next request starts anew
        except BaseException:
            self._workspace = workspace
            raise
        finally:
            denoiser.close()
        self._workspace = workspace

    def _denoise_latents(
        self, request: Request, options: SettledOptions, policy: CachePolicy, rule: Transfer
    ) -> Iterator[Frame]:
        """The frames of a continuous model."""
        manifest = self.bundle.manifest
        check_model(manifest.shape, rule)
        check_policy(policy)
        assert isinstance(rule, Ancestral)
        schedule = open_schedule(self.bundle)
        denoiser = LatentDenoiser(self.session, manifest.shape, manifest.tokens, request, options, rule, schedule)
        yield from denoiser.frames()

    def run(
        self,
        request: Request,
        options: GenerationOptions = GenerationOptions(),
        policy: CachePolicy = NoCache(),
        transfer: Transfer | None = None,
    ) -> list[Generation]:
        """Denoise a request to its end."""
        start = time.perf_counter()
        frames = list(self.stream(request, options, policy, transfer))
        return self.summarize(request, frames, time.perf_counter() - start)

    def generate(
        self,
        prompts: Sequence[str],
        options: GenerationOptions = GenerationOptions(),
        policy: CachePolicy = NoCache(),
        transfer: Transfer | None = None,
    ) -> list[Generation]:
        """Continue every prompt."""
        request = self.continuation([self.encode(prompt) for prompt in prompts], options)
        return self.run(request, options, policy, transfer)

    def infill(
        self,
        texts: Sequence[str],
        options: GenerationOptions = GenerationOptions(),
        policy: CachePolicy = NoCache(),
        transfer: Transfer | None = None,
    ) -> list[Generation]:
        """Fill the mask tokens in every text; a result's tokens start at its first mask, its text is the whole text."""
        request = self.infilling([self.encode(text) for text in texts], options)
        return self.run(request, options, policy, transfer)

    def summarize(self, request: Request, frames: Sequence[Frame], seconds: float) -> list[Generation]:
        """The finished frames of a request as one result per sequence.

        A result starts at the sequence's first mask. A continuation's text ends at the first end-of-text token; an
        infilled text is whole, from its first token to its last.
        """
        last, special = frames[-1], self.bundle.manifest.tokens
        results = []
        for row, canvas in enumerate(request.canvas):
            asked = canvas[request.shape.prompt_rows :] == special.mask
            first = int(np.argmax(asked))
            end = None if request.wanted is None else first + request.wanted
            tokens, confidence = last.tokens[row, first:end], last.confidence[row, first:end]
            ends = np.flatnonzero(np.isin(tokens, list(special.ends)) & asked[first:end])
            shown = tokens[: ends[0]] if len(ends) else tokens
            if request.infilling:
                given = canvas[request.padding[row] : request.shape.prompt_rows + first]
                shown = np.concatenate((given, tokens))
            results.append(
                Generation(
                    text=self.tokenizer.decode(shown.tolist()) if self.tokenizer else "",
                    tokens=tuple(tokens.tolist()),
                    confidence=tuple(confidence.tolist()),
                    finish_reason="stop" if len(ends) else "length",
                    passes=last.passes,
                    steps_by_kind=dict(Counter(frame.kind for frame in frames)),
                    seconds=seconds,
                    engine_seconds=sum(frame.engine_seconds for frame in frames),
                    strategy_seconds=sum(frame.strategy_seconds for frame in frames),
                )
            )
        return results
