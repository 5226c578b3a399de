"""`dllm-export doctor`: what this machine has, which providers really work, and the pip line for what is missing."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
from rich.text import Text

from dllm_export.errors import DllmExportError, IncompatibleError
from dllm_export.runtime.bundle import Bundle, open_bundle
from dllm_export.runtime.plugins import Plugin, find_installed
from dllm_export.runtime.session import GraphCall, SessionOptions, open_session
from dllm_export.runtime.tensorrt.library import REFUSED_BY_RTX, Flavour, find_library
from dllm_export.tools.flags import Command, shared_flags
from dllm_export.tools.machine import PACKAGES, Machine, inspect_machine, pip_line
from dllm_export.tools.output import format_bytes, make_table, print_json, print_pairs, print_table, print_warning

IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)
"""An ONNX model, y = x for one float: the smallest thing a provider can be asked to run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Whether a provider works on a device; `detail` says why not, and what to install."""

    provider: str
    device: str
    works: bool
    detail: str


@click.command("doctor", cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@shared_flags
def command(bundle: Path | None, as_json: bool) -> None:
    """Show what this machine can run, and what to install for the rest.

    Starts every provider on every device. With BUNDLE each runs a graph of that bundle, so that a dtype the provider
    lacks shows too. Exit code 4 means that no provider works.
    """
    opened, failure = try_bundle(bundle)
    machine = inspect_machine(opened.path if opened else Path())
    findings = [probe(provider, device, opened) for provider, device in combinations()]
    plugins = find_installed().plugins
    if as_json:
        state = {"path": bundle, "opens": failure is None, "detail": str(failure or "")} if bundle else None
        print_json({"machine": machine, "providers": findings, "plugins": plugins, "bundle": state})
    else:
        print_machine(machine)
        print_findings(findings)
        print_plugins(plugins)
    if failure is not None:
        raise failure
    if not any(finding.works for finding in findings):
        raise IncompatibleError(
            f"no provider {'runs this bundle' if bundle else 'works'} here; see what each one lacks"
        )


def try_bundle(path: Path | None) -> tuple[Bundle | None, DllmExportError | None]:
    """The opened bundle, or why it does not open."""
    if path is None:
        return None, None
    try:
        return open_bundle(path), None
    except DllmExportError as error:
        return None, error


def combinations() -> Iterator[tuple[str, str]]:
    """Every provider with every device that it can run on, as the runtime's options list them."""
    choices = {field.name: field.metadata.get("choices", ()) for field in fields(SessionOptions)}
    pairs = itertools.product(choices["provider"], choices["device"])
    return (pair for pair in pairs if pair[1] != "auto" and pair != ("tensorrt", "cpu"))


def probe(provider: str, device: str, bundle: Bundle | None) -> Finding:
    """Start a provider and run something on it."""
    try:
        if bundle is not None:
            detail = run_graph(bundle, SessionOptions(provider=provider, device=device))
        else:
            detail = PROBES[provider](provider, device)
    except DllmExportError as error:
        return Finding(provider=provider, device=device, works=False, detail=str(error))
    except Exception as error:  # whatever a provider's libraries raise is a finding, not a failure of this command
        text = (str(error).splitlines() or [""])[0]
        return Finding(provider=provider, device=device, works=False, detail=f"{type(error).__name__}: {text}")
    return Finding(provider=provider, device=device, works=True, detail=detail)


def run_graph(bundle: Bundle, options: SessionOptions) -> str:
    """Run the smallest graph of the bundle in its own dtype."""
    dims = (1, 1, bundle.manifest.shape.hidden)
    session = open_session(bundle, options)
    try:
        spec = bundle.specs["layer_skip"]
        buffers = {tensor.name: session.allocate(dims, tensor.type) for tensor in (*spec.inputs, *spec.outputs)}
        for tensor in spec.inputs:
            buffers[tensor.name].write(np.ones(dims, np.float32))
        session.prepare([GraphCall("layer_skip", 0, buffers)])()
        if not np.all(buffers["hidden_out"].read() == 2):
            raise IncompatibleError("it runs, but gives 1 + 1 = 3 or the like: driver and library do not fit")
    finally:
        session.close()
    return f"runs this bundle's {bundle.manifest.dtype} graphs"


def probe_onnxruntime(provider: str, device: str) -> str:
    """Run a model of one node; the provider list alone does not show missing CUDA libraries."""
    runtime = _import(provider)
    wanted = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    if wanted not in runtime.get_available_providers():
        raise IncompatibleError(f"this build has no {wanted}: pip install 'dllm-export[onnxruntime-gpu]' in its place")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    runtime.set_default_logger_severity(4)
    session = runtime.InferenceSession(IDENTITY, options, providers=[wanted])
    if wanted not in session.get_providers():
        raise IncompatibleError(f"{wanted} does not start: the driver or a CUDA library is missing or does not fit")
    session.run(None, {"x": np.ones(1, np.float32)})
    return "works"


def probe_torch(provider: str, device: str) -> str:
    """Allocate one number."""
    torch = _import(provider)
    if device == "cuda" and not torch.cuda.is_available():
        raise IncompatibleError(
            "this PyTorch is a CPU build" if torch.version.cuda is None else "no CUDA device is visible"
        )
    torch.ones(1, device=device)
    return "works (slow: the reference that others are compared with)"


def probe_tensorrt(provider: str, device: str) -> str:
    """Find a library and a GPU that it runs on."""
    libraries = [library for library in map(find_library, get_args(Flavour)) if library is not None]
    if not libraries:
        raise IncompatibleError(f"not installed: {pip_line('tensorrt')}, or {pip_line('tensorrt_rtx')}")
    try:
        from dllm_export.runtime.cuda import gpu_capability
    except ModuleNotFoundError:
        raise IncompatibleError(f"needs the package cuda-bindings: {pip_line('cuda')}") from None
    capability, names = gpu_capability(), [f"{library.flavour} {library.version}" for library in libraries]
    if all(library.flavour == "tensorrt-rtx" for library in libraries) and capability in REFUSED_BY_RTX:
        raise IncompatibleError(f"{names[0]} does not run on compute capability {capability}: {pip_line('tensorrt')}")
    return f"{', '.join(names)} on compute capability {capability}; with BUNDLE its engines are tried"


PROBES: Mapping[str, Callable[[str, str], str]] = {
    "onnxruntime": probe_onnxruntime,
    "tensorrt": probe_tensorrt,
    "torch": probe_torch,
}


def print_machine(machine: Machine) -> None:
    """Facts, GPUs and packages."""
    print_pairs(
        (
            ("dllm-export", machine.version),
            ("python", f"{machine.python}  ({machine.platform})"),
            ("cpu", f"{machine.cpus} cores"),
            ("memory", format_bytes(machine.memory) if machine.memory else "unknown"),
            ("free disk", format_bytes(machine.disk)),
            *(("gpu", f"{gpu.name}, driver {gpu.driver}, compute capability {gpu.capability}") for gpu in machine.gpus),
            *((("gpu", "none found (no nvidia-smi, or it lists none)"),) if not machine.gpus else ()),
        )
    )
    for gpu in machine.gpus:
        if not gpu.runs_rtx:
            print_warning(
                f"{gpu.name}: TensorRT for RTX refuses compute capability {gpu.capability}; use tensorrt there"
            )
    table = make_table("package", "version")
    for name, version in machine.packages.items():
        table.add_row(PACKAGES[name][0], version or Text(f"missing: {pip_line(name)}", "yellow"))
    click.echo()
    print_table(table)
    click.echo()


def print_findings(findings: Sequence[Finding]) -> None:
    """One line per provider and device."""
    table = make_table("provider", "device", "works", "detail")
    for finding in findings:
        mark = Text("ok", "green") if finding.works else Text("no", "red")
        table.add_row(finding.provider, finding.device, mark, finding.detail)
    print_table(table)


def print_plugins(plugins: Sequence[Plugin]) -> None:
    """One line per cache policy or decoding rule that a package brings; nothing where none does."""
    if not plugins:
        return
    table = make_table("plug-in", "what", "package", "works", "detail")
    for plugin in plugins:
        mark = Text("no", "red") if plugin.fault else Text("ok", "green")
        table.add_row(plugin.name, plugin.noun, plugin.package, mark, plugin.fault or "")
    click.echo()
    print_table(table)


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError:
        raise IncompatibleError(f"not installed: {pip_line(package)}") from None
    except (ImportError, OSError) as error:
        raise IncompatibleError(f"installed, but it does not load: {error}") from None
