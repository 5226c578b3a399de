"""`dllm-export dump`: what went into a graph and what came out, from a real generation, as Polygraphy data."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import click

from dllm_export.errors import UsageError
from dllm_export.exporter.recording import (
    Recording,
    RecordingSession,
    Target,
    check_folder,
    check_polygraphy,
    check_target,
    save_recording,
)
from dllm_export.runtime.bundle import open_bundle
from dllm_export.runtime.combinations import check_strategies
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import CachePolicy
from dllm_export.runtime.session import SessionOptions, open_session
from dllm_export.runtime.transfers import Quota, Transfer
from dllm_export.tools.flags import Command, Flag, from_fields, shared_flags, strategy_flags
from dllm_export.tools.output import format_bytes, on_terminal, plural, print_json, print_note, print_pairs
from dllm_export.tools.prefix_flags import PrefixOptions
from dllm_export.tools.prompts import collect_prompts, make_request, prompt_flags

LARGE = 10**8
"""Bytes of weights from which on the size is announced, because writing takes a while."""

CALLED_WITH: Mapping[str, str] = {
    "layer_partial": "--policy dllm-cache",
    "layer_adaptive": "--policy dllm-cache --update-ratio 0.25",
    "layer_compact": "--policy sparse",
    "layer_tracking": "--policy dynamic-dllm",
    "layer_indicated": "--policy spa",
    "layer_indicator": "--policy spa",
    "layer_skip": "--policy dllm-cache --update-ratio 0",
    **dict.fromkeys(
        ("copy_features", "copy_rows", "join_rows"),
        "--policy shared-prefix --refresh-interval 1 --prefix-file FILE --prefix-depth 1",
    ),
    "guidance": "--cfg-scale 1.5",
    "head": "--transfer quota",
    "head_tracked": "--transfer klass",
    "head_credited": "--transfer credit",
    "head_drawn": "--transfer ddpm --temperature 1",
    "layer_shadow": "--transfer wino",
    "commit": "--transfer quota --temperature 0",
}
"""Flags with which a generation of a few steps calls a graph; the others are called by every generation."""


@click.command("dump", cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("graph")
@click.option(
    "-o",
    "--output",
    cls=Flag,
    section="Recording",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FOLDER",
    help="folder to write; it appears when all its files are complete",
)
@click.option("--layer", cls=Flag, section="Recording", type=int, help="the call of this layer, 0 is the first")
@click.option(
    "--step",
    cls=Flag,
    section="Recording",
    type=int,
    default=1,
    show_default=True,
    help="the first call in this step or later",
)
@prompt_flags
@from_fields(GenerationOptions, "options", "Generation")
@strategy_flags
@from_fields(PrefixOptions, "prefix", "Shared prefix")
@from_fields(SessionOptions, "session", "Provider")
@shared_flags
def command(
    bundle: Path,
    graph: str,
    output: Path,
    layer: int | None,
    step: int,
    prompt: tuple[str, ...],
    prompt_file: tuple[Path, ...],
    infill: tuple[str, ...],
    prompt_ids: tuple[str, ...],
    chat: bool,
    options: GenerationOptions,
    policy: CachePolicy,
    transfer: Transfer | None,
    prefix: PrefixOptions,
    session: SessionOptions,
    as_json: bool,
) -> None:
    """Record one graph call of a generation as Polygraphy data.

    Generates as `generate` does up to the first call of GRAPH, and writes GRAPH.onnx with weights as inputs,
    inputs.json (weights too) and outputs.json for `polygraphy run`. Needs the extra `polygraphy`.
    """
    check_strategies(options, policy, transfer or Quota())
    prompts = collect_prompts(prompt, prompt_file, infill, prompt_ids, chat)
    prefix.check(policy)
    check_folder(output)
    opened, target = open_bundle(bundle), Target(graph=graph, layer=layer, step=step)
    check_target(opened, target)
    check_polygraphy(opened)
    with closing(RecordingSession(open_session(opened, session), opened, target)) as recorder:
        model = DiffusionLM(opened, recorder, prefix_budget=prefix.prefix_budget)
        request = prefix.share(model, make_request(model, prompts, options))
        recording = recorder.record(model.stream(request, options, policy, transfer))
    if recording is None:
        raise UsageError(explain_absence(target, recorder.called, request.schedule.steps))
    weights = sum(array.nbytes for array in recording.weights.values())
    if weights >= LARGE:
        print_note(f"writing {format_bytes(weights)} of weights, a third more as JSON")
    print_dump(recording, output, save_recording(opened, recording, output), as_json=as_json)


def explain_absence(target: Target, called: Mapping[int | None, int], steps: int) -> str:
    """Why no call was recorded, and what to change. `called` has the last step by layer."""
    graph, ran = f"graph '{target.graph}'", f"in the {plural(steps, 'step')} of this generation"
    if not called:
        return f"{graph} is not called {ran}; one of several steps with {CALLED_WITH[target.graph]} calls it"
    if target.layer is not None and target.layer not in called:
        return f"{graph} is not called in layer {target.layer} {ran}, but it is in: {', '.join(map(str, called))}"
    last = max(called.values()) if target.layer is None else called[target.layer]
    return f"{graph} is not called in step {target.step} or later {ran}; its last call is in step {last}"


def print_dump(recording: Recording, folder: Path, sizes: Mapping[str, int], *, as_json: bool) -> None:
    """Which call was written, and how large its files are."""
    call = {"graph": recording.graph, "layer": recording.layer, "step": recording.step, "provider": recording.provider}
    if as_json:
        print_json({"folder": str(folder), **call, "files": sizes})
    elif on_terminal():
        facts = [(name, value) for name, value in call.items() if value is not None]
        print_pairs([("folder", folder), *facts, *((name, format_bytes(size)) for name, size in sizes.items())])
    else:
        click.echo(folder)
