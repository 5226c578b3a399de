"""The TensorRT backend against the published type stubs, tensorrt_rtx and the CUDA bindings: every name it uses exists.

mypy checks what is annotated. What is not, because the library is a value here, is followed by syntax: from
`library.module` and from variables of the library's types through assignments, loops, calls and attributes.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
STUBS = ROOT / ".venv" / "stubs"
FOLDERS = ("graphs", "runtime", "exporter", "tools")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
BACKEND = [
    path
    for path in SOURCES
    if re.search(r"import tensorrt\b|(library|self)\.module\b|\bmodule: Any", path.read_text(encoding="utf-8"))
]
"""Found by what is written in them, so that a module added later is checked too."""
CUDA = ROOT / "runtime" / "cuda.py"

BINDINGS = "tensorrt_bindings/tensorrt.pyi"
REPAIRS = (
    # No Python reads these.
    (BINDINGS, r"(?<=, )in(?=: list)", "in_"),
    (BINDINGS, r"(?<=, )channel_axis: int(?=\) -> IScaleLayer)", "channel_axis: int = ..."),
    # A class that the generator met before it was declared.
    (BINDINGS, r"(?<=def get_error\(self, index: int\) -> )\.\.\.", "ParserError"),
    # A package that cannot be installed.
    ("tensorrt/__init__.pyi", r"^import tensorrt_libs.*\n", ""),
    ("tensorrt_bindings/__init__.pyi", r"^import tensorrt_libs.*\n", ""),
    # Said only in the docstring of Dims: it behaves like a tuple, and tuples and lists are taken in its place.
    (BINDINGS, r"^class Dims:", "class Dims(typing.Sequence[int]):"),
    (BINDINGS, r"(?<=set_shape\(self, input: str, )min: Dims, opt: Dims, max: Dims", "*shapes: typing.Sequence[int]"),
)
"""(file, pattern, replacement) of what the stubs' generator got wrong; one that matches nothing fails the tests."""

STUBS_ONLY, RTX_ONLY = {"the stubs"}, {"tensorrt_rtx"}
SOME_RELEASES: Mapping[str, set[str]] = {
    # TensorRT 8.6 must be told of explicit batches, of number types and of shared profiles; others know nothing else.
    "NetworkDefinitionCreationFlag.EXPLICIT_BATCH": STUBS_ONLY,
    "BuilderFlag.FP16": STUBS_ONLY,
    "BuilderFlag.OBEY_PRECISION_CONSTRAINTS": STUBS_ONLY,
    "ILayer.precision": STUBS_ONLY,
    "ILayer.set_output_type": STUBS_ONLY,
    "PreviewFeature.PROFILE_SHARING_0806": STUBS_ONLY,
    # 8.6 has only these, 10 still has them, TensorRT for RTX has their successors.
    "ICudaEngine.create_execution_context_without_device_memory": STUBS_ONLY,
    "ICudaEngine.device_memory_size": STUBS_ONLY,
    # Can only be set, which the stubs' generator leaves out.
    "IExecutionContext.device_memory": RTX_ONLY,
    # Naming the GPUs of a build, and compiling at run time, are what TensorRT for RTX is for.
    "ComputeCapability": RTX_ONLY,
    "IBuilderConfig.num_compute_capabilities": RTX_ONLY,
    "IBuilderConfig.set_compute_capability": RTX_ONLY,
    "CudaGraphStrategy": RTX_ONLY,
    "CudaGraphStrategy.DISABLED": RTX_ONLY,
    "DynamicShapesKernelSpecializationStrategy": RTX_ONLY,
    "DynamicShapesKernelSpecializationStrategy.EAGER": RTX_ONLY,
    "IRuntimeConfig.cuda_graph_strategy": RTX_ONLY,
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy": RTX_ONLY,
}
"""Name -> the only side that has it; the backend asks for each of these before it uses it, or uses it on that side."""

COMPUTED = {"getattr(self.module.ComputeCapability, 'SM' + target.replace('.', ''))"}
"""Names put together at run time; this one's digits were read from the same class."""


# -- the stubs
@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A readable copy of the installed stubs."""
    if not (STUBS / BINDINGS).is_file():
        pytest.skip("TensorRT's type stubs are not in .venv/stubs: 'make test' puts them there")
    root = tmp_path_factory.mktemp("stubs")
    for file in {file for file, _, _ in REPAIRS}:
        text = (STUBS / file).read_text(encoding="utf-8")
        for _, pattern, replacement in (repair for repair in REPAIRS if repair[0] == file):
            text, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
            assert count, f"{file} has nothing to repair with {pattern!r}: drop it from REPAIRS"
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_text(text, encoding="utf-8")
    return root


# -- types
def check_types(stubs: Path, work: Path, *targets: str) -> subprocess.CompletedProcess[str]:
    """mypy with the repository's configuration and these stubs, whose own errors do not count."""
    config = work / "pyproject.toml"
    silent = '[[tool.mypy.overrides]]\nmodule = ["tensorrt", "tensorrt_bindings.*"]\nignore_errors = true\n'
    text = re.sub(r"^packages = .*\n", "", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    config.write_text(f"{text}\n{silent}", encoding="utf-8")
    command = ["mypy", "--strict", "--config-file", str(config), "--cache-dir", str(work / "cache"), *targets]
    environment = {**os.environ, "MYPYPATH": str(stubs)}
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_backend_type_checks_against_the_stubs(stubs: Path, tmp_path: Path) -> None:
    modules = [".".join(("dllm_export", *path.relative_to(ROOT).with_suffix("").parts)) for path in BACKEND]
    assert {"dllm_export.runtime.tensorrt.engine", "dllm_export.exporter.precision"} <= set(modules)
    modules = [*modules, "dllm_export.exporter.engines", "dllm_export.runtime.sessions.tensorrt"]
    result = check_types(stubs, tmp_path, *(word for module in sorted(set(modules)) for word in ("-m", module)))
    assert result.returncode == 0, result.stdout + result.stderr


CONTROL = """import tensorrt as trt


def call(engine: trt.ICudaEngine, profile: trt.IOptimizationProfile) -> None:
    profile.set_shape(engine.get_tensor_name(0), *([1], (1,), tuple(engine.get_tensor_shape("x"))))
    engine.get_tensor_namee(0)
    engine.get_tensor_name("x")
    engine.get_tensor_name()
    profile.set_shape("x", 1, 2, 3)
    trt.NoSuchClass()
"""


def test_wrong_names_and_arguments_would_be_found(stubs: Path, tmp_path: Path) -> None:
    control = tmp_path / "control.py"
    control.write_text(CONTROL, encoding="utf-8")
    result = check_types(stubs, tmp_path, str(control))
    wrong = [number for number, line in enumerate(CONTROL.splitlines(), 1) if number > 5 and line]
    assert sorted({int(line) for line in re.findall(r"control\.py:(\d+): error", result.stdout)}) == wrong
    assert '"ICudaEngine" has no attribute "get_tensor_namee"' in result.stdout


# -- names by syntax
@dataclass(frozen=True, slots=True)
class StubNames:
    """What the stubs declare: members of a class by name, and module names, each with the class it gives, if any."""

    classes: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    values: Mapping[str, str | None] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        owner, _, member = name.rpartition(".")
        return member in (self.classes.get(owner, {}) if owner else self.values)

    def gives(self, name: str) -> str | None:
        owner, _, member = name.rpartition(".")
        return (self.classes.get(owner, {}) if owner else self.values).get(member)


def read_stubs(stubs: Path) -> StubNames:
    tree = ast.parse((stubs / BINDINGS).read_text(encoding="utf-8"))
    found = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}

    def declared(body: list[ast.stmt]) -> dict[str, str | None]:
        names: dict[str, str | None] = {}
        for node in body:
            if isinstance(node, ast.FunctionDef):
                names[node.name] = first_class(node.returns)
            elif isinstance(node, ast.AnnAssign):
                names[ast.unparse(node.target)] = first_class(node.annotation)
            elif isinstance(node, ast.ClassDef):
                names[node.name] = node.name if node.name in found else None
        return names

    def first_class(annotation: ast.expr | None) -> str | None:
        words = re.findall(r"\w+", ast.unparse(annotation)) if annotation else []
        return next((word for word in words if word in found), None)

    def members(name: str) -> dict[str, str | None]:
        bases = [base.id for base in found[name].bases if isinstance(base, ast.Name) and base.id in found]
        return {key: value for base in bases for key, value in members(base).items()} | declared(found[name].body)

    package = ast.parse((stubs / "tensorrt/__init__.pyi").read_text(encoding="utf-8"))
    reexported = {
        alias.name: alias.name if alias.name in found else None
        for node in package.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return StubNames({name: members(name) for name in found}, reexported | declared(package.body))


MODULE = ""
"""What stands for the library itself where the other values are names of its classes."""
OURS = "ours"
"""What stands for a parameter of one of our own types."""
OUR_TYPES = (str, bytes, int, list, tuple, dict, set, BaseException, Path, re.Pattern, type(hashlib.sha256()))
OTHER_TYPES = (
    type,
    np.ndarray,
    np.dtype,
    type(np.empty(0).ctypes),
    Future,
    ThreadPoolExecutor,
    subprocess.CompletedProcess,
)


@cache
def own_names() -> frozenset[str]:
    """Attributes that are not the library's: everything that our modules define, and methods of common types."""
    names = {name for kind in (*OUR_TYPES, *OTHER_TYPES) for name in dir(kind)}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.AnnAssign):
                names.add(ast.unparse(node.target).removeprefix("self."))
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr) if ast.unparse(node.value) == "self" else None
    return frozenset(names)


class Uses:
    """The library's names that one module uses, and what could not be followed."""

    def __init__(self, source: str, stubs: StubNames, root: str | None = None) -> None:
        self.names: set[str] = set()
        self.unknown: set[str] = set()
        self._stubs, self._root = stubs, root
        self._tree = ast.parse(source)
        self._types: dict[ast.AST, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        self._words: dict[tuple[ast.AST, str], tuple[str, ...]] = {}
        self._scope: dict[ast.AST, list[ast.AST]] = {}
        self._place(self._tree, [self._tree])
        imports = (node for node in ast.walk(self._tree) if isinstance(node, (ast.Import, ast.ImportFrom)))
        self._imported = {alias.asname or alias.name for node in imports for alias in node.names} - {"trt"}
        for kinds in (ast.arg, ast.AnnAssign), *((ast.stmt, ast.comprehension),) * 3:
            # What is annotated first, the rest until it settles: names are used above their assignment too.
            for node in ast.walk(self._tree):
                if isinstance(node, kinds):
                    self._bind(node)
        self._own = own_names()
        for node in ast.walk(self._tree):
            self._use(node)

    def _place(self, node: ast.AST, scopes: list[ast.AST]) -> None:
        """Functions around every node, the innermost first."""
        self._scope[node] = scopes
        inner = [node, *scopes] if isinstance(node, (ast.FunctionDef, ast.Lambda)) else scopes
        for child in ast.iter_child_nodes(node):
            self._place(child, inner)

    # -- which variable holds what
    def _bind(self, node: ast.AST) -> None:
        if isinstance(node, ast.arg) and node.annotation is not None:
            untyped = ast.unparse(node.annotation) == "Any"
            self._store(node, node.arg, self._annotated(node.annotation) or (None if untyped else OURS))
            if untyped and node.arg in ("module", "trt"):
                self._store(node, node.arg, MODULE)
        elif isinstance(node, ast.AnnAssign):
            given = self._type(node.value) if node.value is not None else None
            self._store(node, ast.unparse(node.target), self._annotated(node.annotation) or given)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                self._assign(target, node.value)
        elif isinstance(node, (ast.For, ast.comprehension)):
            self._assign(node.target, node.iter)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, given in zip(target.elts, value.elts, strict=True):
                self._assign(one, given)
        elif words := self._constants(value):
            self._words[self._scope[target][0], ast.unparse(target)] = words
        else:
            self._store(target, ast.unparse(target), self._type(value))

    def _store(self, node: ast.AST, name: str, type: str | None) -> None:
        if type is not None:
            self._types[self._scope[node][0]][name].add(type)

    def _annotated(self, annotation: ast.expr) -> str | None:
        found = re.match(r"trt\.(\w+)", ast.unparse(annotation))
        return found[1] if found else None

    def _constants(self, value: ast.expr) -> tuple[str, ...]:
        if isinstance(value, ast.Tuple):
            return tuple(str(item.value) for item in value.elts if isinstance(item, ast.Constant))
        found = ((scope, ast.unparse(value)) for scope in self._scope[value])
        return next((self._words[key] for key in found if key in self._words), ())

    # -- what an expression gives
    def _type(self, node: ast.expr) -> str | None:
        if isinstance(node, (ast.Name, ast.Attribute)):
            return self._named(node)
        if isinstance(node, ast.Subscript):
            return self._type(node.value)
        if isinstance(node, (ast.ListComp, ast.GeneratorExp)):
            return self._type(node.elt)
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if function.endswith(".require"):
                return self._type(node.args[0])
            if function == "getattr":
                return next(iter(map(self._stubs_or_itself, self._asked(node))), None)
            if function == "importlib.import_module":
                return MODULE
            given = self._type(node.func)
            return given if given in self._stubs.classes else None
        return None

    def _named(self, node: ast.Name | ast.Attribute) -> str | None:
        text = ast.unparse(node)
        if text == self._root or (self._root is None and (text == "trt" or text.endswith(".module"))):
            return MODULE
        for scope in self._scope[node]:
            if text in self._types[scope]:
                found = self._types[scope][text]
                return None if OURS in found else min(found)
        if isinstance(node, ast.Attribute):
            owner = self._type(node.value)
            if owner is not None:
                return self._stubs_or_itself(f"{owner}.{node.attr}" if owner else node.attr)
        # A parameter without a type: what that name means elsewhere in the module.
        elsewhere = {type for scope in self._types.values() for type in scope.get(text, ())} - {OURS}
        return elsewhere.pop() if len(elsewhere) == 1 else None

    def _stubs_or_itself(self, name: str) -> str | None:
        """The class that a name of the library gives; a name that the stubs lack is taken for a class."""
        return self._stubs.gives(name) if self._stubs.has(name) or "." in name else name

    def _asked(self, call: ast.Call) -> list[str]:
        """Full names that getattr or hasattr asks of the library for."""
        owner, name = self._type(call.args[0]), call.args[1]
        if owner is None:
            return []
        words = (str(name.value),) if isinstance(name, ast.Constant) else self._constants(name)
        if not words:
            self.unknown.add(ast.unparse(call))
        return [f"{owner}.{word}" if owner else word for word in words]

    # -- what is used
    def _use(self, node: ast.AST) -> None:
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            self.names.update(self._asked(node))
        if isinstance(node, ast.arg) and node.annotation is not None:
            self.names.update(filter(None, [self._annotated(node.annotation)]))
        if isinstance(node, ast.ClassDef):  # what a class of ours overrides
            bases = filter(None, map(self._type, node.bases))
            methods = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
            self.names.update(f"{base}.{method}" for base in bases for method in methods)
        if not isinstance(node, ast.Attribute) or self._named(node) == MODULE:
            return
        owner = self._type(node.value)
        if owner is not None:
            self.names.add(f"{owner}.{node.attr}" if owner else node.attr)
        elif re.findall(r"\w+", ast.unparse(node))[0] not in self._imported and node.attr not in self._own:
            self.unknown.add(ast.unparse(node))


def exists(module: ModuleType, name: str) -> bool:
    found: object = module
    for part in name.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


@pytest.fixture(scope="module")
def uses(stubs: Path) -> dict[str, Uses]:
    """By file of the backend."""
    names = read_stubs(stubs)
    return {path.name: Uses(path.read_text(encoding="utf-8"), names) for path in BACKEND}


def test_every_name_of_tensorrt_exists_in_the_stubs_and_in_tensorrt_rtx(uses: dict[str, Uses], stubs: Path) -> None:
    library = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX has wheels for Linux on x86-64 only")
    names, used = read_stubs(stubs), {name for file in uses.values() for name in file.names}
    sides = {
        name: ({"the stubs"} if names.has(name) else set()) | ({"tensorrt_rtx"} if exists(library, name) else set())
        for name in used
    }
    lacking = {name: found for name, found in sides.items() if len(found) < 2}
    assert lacking == SOME_RELEASES


def test_nothing_that_the_backend_uses_escapes(uses: dict[str, Uses]) -> None:
    """An attribute of what cannot be followed is one that our own modules define."""
    assert {text for file in uses.values() for text in file.unknown} == COMPUTED
    used = {name for file in uses.values() for name in file.names}
    for name in ("Builder.build_serialized_network", "IExecutionContext.execute_async_v3", "LayerType.SOFTMAX"):
        assert name in used
    assert "ILogger.log" in used


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("def f(library): return library.module.Bulder", "Bulder"),
        ("def f(self): kind = self._library.module.TensorIOMode; return kind.INPT", "TensorIOMode.INPT"),
        ("def f(engine: trt.ICudaEngine): engine.get_tensor_namee()", "ICudaEngine.get_tensor_namee"),
        ("def f(engine: trt.ICudaEngine): engine.create_execution_context().runn()", "IExecutionContext.runn"),
        ("def f(b: trt.Builder): c = b.create_builder_config(); c.set_flg(1)", "IBuilderConfig.set_flg"),
        ("def f(x): return [getattr(x.module.BuilderFlag, n) for n in ('TF32', 'FP61')]", "BuilderFlag.FP61"),
        ("def f(context: trt.IExecutionContext): pass\ndef g(context: Any): context.runn()", "IExecutionContext.runn"),
        ("def f(module: Any):\n class M(module.IProgressMonitor):\n  def stepp(self): pass", "IProgressMonitor.stepp"),
    ],
)
def test_a_wrong_name_would_be_found_without_types(source: str, name: str, stubs: Path) -> None:
    names = read_stubs(stubs)
    found = Uses(source, names)
    assert [used for used in found.names if not names.has(used)] == [name]


def test_a_name_on_something_that_cannot_be_followed_is_reported(stubs: Path) -> None:
    assert Uses("def f(thing): thing.get_tensor_namee()", read_stubs(stubs)).unknown == {"thing.get_tensor_namee"}


# -- CUDA
def test_every_name_of_cuda_exists_in_the_bindings() -> None:
    bindings = pytest.importorskip("cuda.bindings.runtime", reason="the CUDA bindings are not installed")
    found = Uses(CUDA.read_text(encoding="utf-8"), StubNames(), "cudart")
    assert not found.unknown
    assert {
        "cudaMalloc",
        "cudaError_t.cudaErrorInsufficientDriver",
        "cudaMemcpyKind.cudaMemcpyHostToDevice",
    } <= found.names
    assert not [name for name in found.names if not exists(bindings, name)]
    control = Uses("def f(): kinds = cudart.cudaError_t; return kinds.cudaErrorNope", StubNames(), "cudart")
    assert [name for name in control.names if not exists(bindings, name)] == ["cudaError_t.cudaErrorNope"]
