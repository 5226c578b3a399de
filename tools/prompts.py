"""The prompts of `generate`: from flags, files or stdin to a checked request."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import click

from dllm_export.errors import UsageError
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.request import Request, refuse_prompt
from dllm_export.tools.flags import Flag


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """What to continue or to fill in: one of the three is not empty, or what stdin gives is continued."""

    texts: tuple[str, ...] = ()
    ids: tuple[tuple[int, ...], ...] = ()
    infill: tuple[str, ...] = ()
    chat: bool = False


def prompt_flags(command: Callable[..., object]) -> Callable[..., object]:
    """The flags of which `collect_prompts` makes the prompts."""
    file = click.Path(path_type=Path, allow_dash=True)
    many = partial(click.option, cls=Flag, section="Prompt", multiple=True)
    flags = (
        many("--prompt", metavar="TEXT", help="text to continue; may be repeated: all prompts run as one batch"),
        many("--prompt-file", metavar="FILE", type=file, help="a file with one prompt, UTF-8, taken whole; - is stdin"),
        many(
            "--infill", metavar="TEXT", help="text with mask tokens to fill in; 'inspect' shows how a mask is written"
        ),
        many("--prompt-ids", metavar="IDS", help="token ids such as '17 4 99', for a bundle without a tokenizer"),
        click.option("--chat", cls=Flag, section="Prompt", is_flag=True, help="put prompts into the chat template"),
    )
    for decorate in reversed(flags):
        command = decorate(command)
    return command


def collect_prompts(
    texts: tuple[str, ...], files: tuple[Path, ...], infill: tuple[str, ...], ids: tuple[str, ...], chat: bool
) -> Prompts:
    """The prompts of the flags; more than one kind of them is an error."""
    kinds = {"--prompt": (*texts, *files), "--infill": infill, "--prompt-ids": ids}
    given = [name for name, values in kinds.items() if values]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude one another; a call continues prompts or fills in texts")
    if chat and (infill or ids):
        raise UsageError(f"--chat applies to --prompt, not to {given[0]}; leave one of them out")
    for text in (*texts, *infill):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UsageError(
                "a prompt on the command line is not UTF-8 text; give it in a UTF-8 file with --prompt-file"
            )
    return Prompts(texts=(*texts, *map(read_prompt, files)), ids=tuple(map(parse_ids, ids)), infill=infill, chat=chat)


def read_stdin() -> str:
    """The piped prompt, where no flag gives one."""
    if sys.stdin is not None and not sys.stdin.isatty() and (text := read_prompt(Path("-"))):
        return text
    raise UsageError("no prompt was given: add --prompt TEXT or --prompt-file FILE, or pipe a prompt in")


def read_prompt(file: Path) -> str:
    """The whole file as text."""
    name = "stdin" if str(file) == "-" else str(file)
    try:
        data = sys.stdin.buffer.read() if name == "stdin" else file.read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text (byte {error.start}); convert it, for example with iconv") from None
    except OSError as error:
        raise UsageError(f"cannot read the prompt from {name}: {error.strerror}") from None


def parse_ids(text: str) -> tuple[int, ...]:
    """'17, 4 99' -> (17, 4, 99)."""
    try:
        return tuple(int(word) for word in text.replace(",", " ").split())
    except ValueError:
        raise UsageError(f"--prompt-ids {text!r} is not a list of whole numbers such as '17 4 99'") from None


def make_request(model: DiffusionLM, prompts: Prompts, options: GenerationOptions) -> Request:
    """The checked request; stdin is read where no flag gave a prompt and the model takes one."""
    none = prompts == Prompts(chat=prompts.chat)
    if not none or prompts.chat:
        refuse_prompt(model.bundle.manifest.shape)
    if none:
        if model.bundle.manifest.shape.latent:
            return model.unconditional(1, options)
        prompts = replace(prompts, texts=(read_stdin(),))
    if not prompts.infill:
        encoded = [model.encode(text, chat=prompts.chat) for text in prompts.texts]
        return model.continuation([*encoded, *prompts.ids], options)
    canvases = [model.encode(text) for text in prompts.infill]
    mask = model.bundle.manifest.tokens.mask
    if model.tokenizer and any(mask not in canvas for canvas in canvases):
        raise UsageError(f"a text for --infill holds no mask token; this model writes it {model.tokenizer.piece(mask)}")
    return model.infilling(canvases, options)
