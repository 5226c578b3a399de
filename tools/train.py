"""Trains the demo model on worksheets: `python -m dllm_export.tools.train --output DIR`.

Every batch is fresh worksheets with one number of problems, padded at the left. Weights and optimizer are float32; on a
GPU the forward pass runs in bfloat16. Where `minutes` ends the run, its length in steps depends on the machine, so that
the same seed gives the same sheets and masks but not the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_export.errors import UsageError
from dllm_export.graphs import ModelShape
from dllm_export.tools.demo_checkpoint import load_weights, save_checkpoint
from dllm_export.tools.demo_conversion import convert_weights
from dllm_export.tools.demo_layouts import LAYOUTS
from dllm_export.tools.demo_loss import LONGEST, masked_loss
from dllm_export.tools.demo_model import Layer, Weights, draw_weights, evaluate, layer_runner, weight_specs
from dllm_export.tools.problems import KINDS
from dllm_export.tools.worksheets import COLUMNS, PROBLEMS, draw_sheets, held_out, training_stream

BUCKETS = (320, 384, 448, COLUMNS)
"""Sequence lengths that batches are padded to: one compiled layer for each."""
VOCAB = 264
BETAS = (0.9, 0.95)
CLIP = 1.0
PROGRESS_STEPS = 50
HELD_OUT_SEED = 1
QUICK_SHEETS = 64
"""Sheets of an evaluation during training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """What to train and for how long; every field is a flag."""

    output: Path = Path("demo-model")
    layout: str = "llada"
    """llada, dream (shared keys, biases, a row predicts the next token) or sdar (shared keys, query norms, blocks)."""
    resume: Path | None = None
    """A directory written by an earlier run of the same sizes to start from; give another seed for fresh sheets."""
    source: Path | None = field(default=None, metadata={"flag": "from"})
    """A directory of LLaDA's layout whose weights are converted to start from."""
    state: bool = True
    """Whether to write state.pt, from which `resume` takes the optimizer."""
    minutes: float = 8.0
    steps: int = 1_000_000
    """The run ends, and its learning rate reaches the floor, at this step or after `minutes`, whichever comes first."""
    batch: int = 512
    rate: float = 1.5e-3
    floor: float = 0.0
    """Share of `rate` that the cosine ends at."""
    warmup: int = 200
    decay: float = 0.05
    seed: int = 0
    problems: int = PROBLEMS[1]
    """Most problems of a training sheet."""
    look_up: float = 1 / len(KINDS)
    """Share of look-up problems; the other kinds have equal shares of the rest. Look-up is learned last by far."""
    least: float = 0.0
    """Least share of masked answer tokens. Low shares weigh their few tokens heavily, which is noise early on."""
    eval_minutes: float = 2.0
    eval_sheets: int = 200
    layers: int = 6
    hidden: int = 256
    heads: int = 4
    mlp: int = 480
    max_length: int = 640
    block: int = 16
    """Rows of a block, in a layout that attends by blocks."""

    @property
    def shape(self) -> ModelShape:
        """The model's shape."""
        shape = ModelShape(
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.hidden // self.heads,
            mlp=self.mlp,
            vocab=VOCAB,
            max_length=self.max_length,
            norm_eps=1e-5,
            rope_theta=10_000.0,
        )
        return LAYOUTS[self.layout].adapt(shape, self.block)


class Trainer:
    """Weights and optimizer of one run. `step` advances both; `rounded` is what a checkpoint holds."""

    def __init__(self, options: TrainOptions, device: torch.device) -> None:
        self.options = options
        self.shape = options.shape
        self.device = device
        self.weights = {name: weight.to(device).requires_grad_() for name, weight in first_weights(options).items()}
        self.optimizer = _optimizer(self.weights, options, fused=device.type == "cuda")
        if options.resume and (options.resume / "state.pt").exists():
            state = torch.load(options.resume / "state.pt", map_location=device, weights_only=True)
            self.optimizer.load_state_dict(state["optimizer"])
            with torch.no_grad():
                for name, weight in state["weights"].items():
                    self.weights[name].copy_(weight)
        self.sheets = training_stream(options.seed)
        self.noise = torch.Generator(device).manual_seed(options.seed)
        # bfloat16 has too few digits for an angle, whatever type the layout rotates in.
        self.layer: Layer = layer_runner(replace(self.shape, rope_float32=True))
        if device.type == "cuda":
            torch.backends.cuda.enable_cudnn_sdp(False)  # the memory-efficient kernel takes the broadcast mask as it is
            self.layer = torch.compile(self.layer, dynamic=False)

    def step(self, rate: float) -> Tensor:
        """Train on a fresh batch; returns its loss without waiting for the device."""
        problems = int(self.sheets.integers(PROBLEMS[0], self.options.problems + 1))
        other = (1 - self.options.look_up) / (len(KINDS) - 1)
        shares = [self.options.look_up if kind.name == "look up" else other for kind in KINDS]
        sheets = draw_sheets(self.sheets, self.options.batch, problems, shares=shares)
        sheets = sheets.cut(next(columns for columns in BUCKETS if columns >= sheets.longest))
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        loss = masked_loss(
            self.shape, self.weights, sheets, self.noise, layer=self.layer, dtype=dtype, least=self.options.least
        )
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.weights.values(), CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def rounded(self) -> Weights:
        """The weights as float16 keeps them."""
        return {name: weight.detach().half() for name, weight in self.weights.items()}

    def grade(self, count: int, block: int) -> dict[str, float]:
        """Accuracy of the rounded weights on held-out sheets, computed in float16 on a GPU, in float32 elsewhere."""
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        return evaluate(self.shape, self.rounded(), held_out(count, HELD_OUT_SEED), block, dtype)

    def save(self, report: Mapping[str, object]) -> None:
        """Write the checkpoint and, beside it, the state that `resume` continues from."""
        save_checkpoint(self.options.output, self.shape, self.rounded(), report, LAYOUTS[self.options.layout])
        if not self.options.state:
            return
        state = {"weights": self.weights, "optimizer": self.optimizer.state_dict()}
        torch.save(state, self.options.output / "state.pt")


def first_weights(options: TrainOptions) -> Weights:
    """What a run starts from: saved weights, converted ones or drawn ones."""
    if options.resume:
        shape, weights = load_weights(options.resume)
        if shape != options.shape:
            raise UsageError(
                f"--resume holds a model of shape {shape}, the flags say {options.shape}: make them the same"
            )
        return weights
    if options.source:
        return convert_weights(*load_weights(options.source), new=options.shape)
    return draw_weights(options.shape, torch.Generator().manual_seed(options.seed))


def _optimizer(weights: Weights, options: TrainOptions, *, fused: bool) -> torch.optim.AdamW:
    matrices = [weight for weight in weights.values() if weight.dim() == 2]
    norms = [weight for weight in weights.values() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": options.decay}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.rate, betas=BETAS, fused=fused)


def learning_rate(options: TrainOptions, step: int, progress: float) -> float:
    """Linear warm-up in steps, then a cosine in the share of the run that is over."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return options.rate * min(1.0, (step + 1) / options.warmup) * (options.floor + (1 - options.floor) * cosine)


def train(options: TrainOptions, device: torch.device) -> dict[str, object]:
    """Train, evaluate and save, the latter every `eval_minutes`; returns what training.json holds at the end."""
    trainer = Trainer(options, device)
    began = graded = time.monotonic()
    losses: dict[int, float] = {}
    accuracy: dict[str, dict[str, float]] = {}
    step, progress = 0, 0.0
    while progress < 1.0:
        loss = trainer.step(learning_rate(options, step, progress))
        step += 1
        now = time.monotonic()
        progress = max((now - began) / (60 * options.minutes), step / options.steps)
        if step % PROGRESS_STEPS == 0 or step == 1 or progress >= 1.0:
            losses[step] = round(loss.item(), 5)
            print(f"step {step} seconds {now - began:.0f} loss {losses[step]:.4f}", flush=True)
        if now - graded > 60 * options.eval_minutes and progress < 0.95:
            accuracy[f"step {step}, {QUICK_SHEETS} sheets"] = trainer.grade(QUICK_SHEETS, LONGEST)
            graded = time.monotonic()
            print(json.dumps(accuracy), flush=True)
            trainer.save(_report(options, device, losses, now - began, accuracy))
    seconds = time.monotonic() - began
    trainer.save(_report(options, device, losses, seconds, accuracy))
    blocks = (options.shape.block,) if options.shape.block else (LONGEST, 32)
    for block in blocks:
        name = "whole answer" if block == LONGEST else f"blocks of {block}"
        accuracy[f"step {step}, {options.eval_sheets} sheets, {name}"] = trainer.grade(options.eval_sheets, block)
    report = _report(options, device, losses, seconds, accuracy)
    trainer.save(report)
    return report


def _report(
    options: TrainOptions,
    device: torch.device,
    losses: Mapping[int, float],
    seconds: float,
    accuracy: Mapping[str, Mapping[str, float]],
) -> dict[str, object]:
    return {
        "command": _command(options),
        "seed": options.seed,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "software": f"Python {platform.python_version()}, PyTorch {torch.__version__}",
        "parameters": sum(math.prod(map(int, spec.dims)) for spec in weight_specs(options.shape).values()),
        "steps": max(losses),
        "seconds": round(seconds, 1),
        "held_out": f"worksheets.held_out(..., {HELD_OUT_SEED}), one token a step, temperature 0",
        "accuracy": accuracy,
        "losses": losses,
        **({"resumed": json.loads((options.resume / "training.json").read_text())} if options.resume else {}),
    }


def _command(options: TrainOptions) -> str:
    """The command line that gives these options, without the directories, which are the machine's business."""
    words = ["python -m dllm_export.tools.train"]
    for option in fields(options):
        value = getattr(options, option.name)
        if option.name == "output" or value == option.default:
            continue
        if isinstance(value, bool):
            words.append(_flag(option) if value else _flag(option).replace("--", "--no-"))
        else:
            words.append(f"{_flag(option)} {value.name if isinstance(value, Path) else value}")
    return " ".join(words)


def _flag(option: Field[Any]) -> str:
    return "--" + str(option.metadata.get("flag", option.name)).replace("_", "-")


def parse_options(arguments: Sequence[str]) -> TrainOptions:
    """Options from command-line flags, which are the fields of TrainOptions."""
    parser = argparse.ArgumentParser(description="Train the demo model on worksheets.")
    for option in fields(TrainOptions):
        settings: dict[str, Any] = {"type": Path if option.default is None else type(option.default)}
        if isinstance(option.default, bool):
            settings = {"action": argparse.BooleanOptionalAction}
        if option.name == "layout":
            settings["choices"] = list(LAYOUTS)
        parser.add_argument(_flag(option), dest=option.name, default=option.default, **settings)
    return TrainOptions(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    found = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(train(parse_options(sys.argv[1:]), found)["accuracy"], indent=2))
