"""`dllm-export profile-prefix`: how many layers may share a prefix, measured on texts that start with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

import click

from dllm_export.errors import UsageError
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions, option
from dllm_export.runtime.prefix_profile import PROFILE_THRESHOLD, PrefixProfile, measure_profile
from dllm_export.runtime.session import SessionOptions
from dllm_export.tools.flags import Command, Flag, from_fields, shared_flags
from dllm_export.tools.output import (
    make_table,
    on_terminal,
    print_json,
    print_result_text,
    print_table,
    show_progress,
    write_report,
)
from dllm_export.tools.prompts import read_prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileOptions:
    """What to measure."""

    texts: Path = option(MISSING, 'a JSONL file of {"prompt": "..."}, each starting with the prefix')
    prefix_file: Path = option(MISSING, "UTF-8 text that every prompt starts with")
    threshold: float = option(PROFILE_THRESHOLD, "layers are shared while the similarity is above")
    gen_length: int | None = option(None, "masks behind each prompt, as a request has them; default: the bundle's")

    def __post_init__(self) -> None:
        if not -1.0 <= self.threshold <= 1.0:
            raise UsageError(f"--threshold is {self.threshold}, expected a cosine from -1 to 1")


@click.command("profile-prefix", cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@from_fields(ProfileOptions, "options", "Options")
@click.option(
    "-o",
    "--output",
    cls=Flag,
    section="Options",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    metavar="FILE",
    help="the profile, for --prefix-profile",
)
@from_fields(SessionOptions, "session", "Provider")
@shared_flags
def command(bundle: Path, options: ProfileOptions, output: Path, session: SessionOptions, as_json: bool) -> None:
    """Measure how many layers may share a prefix.

    Keys and values of the prefix alone are compared with those that it has in whole requests, layer by layer: mean
    cosine, for every ratio of prefix to request in percent that the texts have.
    """
    texts, prefix = read_texts(options.texts), read_prompt(options.prefix_file)
    with DiffusionLM.from_pretrained(bundle, session) as lm, show_progress() as progress:
        profile = measure(lm, texts, prefix, options, lambda done: progress("measuring", done, len(texts)))
    write_report(output, profile)
    if as_json:
        print_json(profile)
    elif on_terminal():
        print_profile(profile)
    else:
        print_result_text(f"{output}\n")


def read_texts(path: Path) -> list[str]:
    """The prompts of a JSONL file."""
    texts = []
    for number, line in enumerate(read_prompt(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise UsageError(f'--texts {path}, line {number} is not like {{"prompt": "..."}}')
        texts.append(text)
    if not texts:
        raise UsageError(f"--texts {path} has no line with a prompt")
    return texts


def measure(
    lm: DiffusionLM, texts: Sequence[str], prefix: str, options: ProfileOptions, report: Callable[[int], None]
) -> PrefixProfile:
    """The profile of these texts, each checked and as long as its request is."""
    tokens = lm.encode(prefix)

    def requests() -> Iterator[list[int]]:
        for number, text in enumerate(texts):
            report(number)
            request = lm.continuation([lm.encode(text)], GenerationOptions(gen_length=options.gen_length))
            yield lm.share(request, tokens, depth=0).canvas[0].tolist()

    return measure_profile(lm.session, lm.bundle.manifest, tokens, requests(), options.threshold)


def print_profile(profile: PrefixProfile) -> None:
    """A row for every ratio."""
    layers = len(profile.ratios[0].similarity)
    names = [f"layer {layer}" for layer in range(layers)]
    table = make_table("prefix %", "texts", *names, "depth", right=("prefix %", "texts", *names, "depth"))
    for record in profile.ratios:
        table.add_row(
            str(record.ratio), str(record.texts), *(f"{value:.3f}" for value in record.similarity), str(record.depth)
        )
    print_table(table)
