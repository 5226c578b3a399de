"""One plan: what is wrong with a graph reaches the user as one line with the node."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from onnx import TensorProto, helper

from dllm_export.errors import IncompatibleError
from dllm_export.exporter.build_options import BuildOptions
from dllm_export.exporter.build_progress import BuildProgress
from dllm_export.exporter.onnx_graph import build_onnx
from dllm_export.exporter.plans import (
    build_plan,
    describe_error,
    embed_constants,
    make_builder,
    parse_graph,
    shorten,
)
from dllm_export.exporter.ranges import dim_ranges
from dllm_export.graphs import ModelShape, graph_specs
from dllm_export.runtime.tensorrt.library import TensorRt, load_tensorrt
from dllm_export.tools.gpu_check import TINY

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX has wheels for Linux on x86-64 only")


@pytest.fixture(scope="module")
def library() -> TensorRt:
    return load_tensorrt("tensorrt-rtx")


def make_graph(nodes: list[tuple[str, list[str], str]], second_type: int = TensorProto.FLOAT) -> bytes:
    """Inputs x [2, 2] in float16 and w [2, 2] in another type; nodes are named after their operator; the output is y."""
    square = [2, 2]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT16, square),
        helper.make_tensor_value_info("w", second_type, square),
    ]
    made = [
        helper.make_node(kind, sources, [target], name=f"the_{kind.lower()}", domain="my" if kind == "Mine" else "")
        for kind, sources, target in nodes
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
    model = helper.make_model(helper.make_graph(made, "graph", inputs, outputs), opset_imports=opsets, ir_version=8)
    return bytes(model.SerializeToString())


def refuse(library: TensorRt, llada_8b: ModelShape, onnx: bytes) -> str:
    spec = graph_specs(llada_8b)["embed"]
    with pytest.raises(IncompatibleError) as refused:
        build_plan(library, onnx, spec, "float16", [dim_ranges(spec, 4096, BuildOptions())], ("8.9",))
    message = str(refused.value)
    assert "\n" not in message
    assert "/_src/" not in message
    assert library.logger.messages == []
    return message


def test_bytes_that_are_no_graph_are_refused(library: TensorRt, llada_8b: ModelShape) -> None:
    assert refuse(library, llada_8b, b"not a graph").startswith("TensorRT could not parse graph 'embed': ")


@pytest.mark.parametrize("kind", ["NonZero", "Mine"])
def test_an_operator_that_the_library_lacks_is_named_with_its_node(
    kind: str, library: TensorRt, llada_8b: ModelShape
) -> None:
    message = refuse(library, llada_8b, make_graph([("Relu", ["x"], "r"), (kind, ["r"], "y")]))
    assert message.startswith(f"TensorRT could not parse graph 'embed': node 1 'the_{kind.lower()}' ({kind}): ")
    assert "lugin" in message, "the library's own reason follows"


def test_a_product_of_two_types_is_named_with_both(library: TensorRt, llada_8b: ModelShape) -> None:
    message = refuse(library, llada_8b, make_graph([("MatMul", ["x", "w"], "y")]))
    assert message == (
        "TensorRT could not parse graph 'embed': node 0 'the_matmul' (MatMul): ITensor::getDimensions: Error Code 4: API "
        "Usage Error (the_matmul: IMatrixMultiplyLayer must have same input types. `A` is of type Half and `B` is of type "
        "Float.)"
    )


def test_what_the_compiler_refuses_is_one_line_too(library: TensorRt, llada_8b: ModelShape) -> None:
    spec = graph_specs(llada_8b)["layer_full"]
    onnx = build_onnx(spec, llada_8b, "bfloat16").SerializeToString()
    with pytest.raises(IncompatibleError, match=r"could not build graph 'layer_full': .*sm75.*b16\.\)$") as refused:
        build_plan(library, onnx, spec, "bfloat16", [dim_ranges(spec, 4096, BuildOptions())], ("7.5",))
    assert "\n" not in str(refused.value)


def test_an_error_of_8_6_has_the_number_of_its_node_only() -> None:
    old = SimpleNamespace(desc=lambda: "No importer registered for op: Foo", node=lambda: 3)
    assert describe_error(old) == "node 3: No importer registered for op: Foo"
    assert describe_error(SimpleNamespace(desc=lambda: "", node=lambda: -1)) == "it gave no reason"


def test_noise_stays_where_it_is_all_there_is() -> None:
    driver = "[checkMacros.cpp::catchCudaError::250] no driver"
    assert list(shorten([f"{driver}\nreal\n"])) == ["real"]
    assert list(shorten([driver])) == [driver]


# -- weights as constants
def test_an_input_with_a_value_is_a_constant_wherever_it_was_read(library: TensorRt) -> None:
    """What the two forms compute is compared on a GPU: tests/gpu/test_embedded.py."""
    spec = graph_specs(TINY)["layer_partial"]
    values = {weight.name: np.ones(weight.dims, np.float16) for weight in spec.weights}
    network = make_builder(library).create_network(library.network_flags())
    parse_graph(library, network, build_onnx(spec, TINY, "float16").SerializeToString(), spec.name)
    embed_constants(library, network, values)
    assert {network.get_input(place).name for place in range(network.num_inputs)} == {
        tensor.name for tensor in spec.inputs
    }
    layers = [network.get_layer(place) for place in range(network.num_layers)]
    read = {layer.get_input(slot).name for layer in layers for slot in range(layer.num_inputs)}
    assert read.isdisjoint(values)
    constants = [layer for layer in layers if layer.type == library.module.LayerType.CONSTANT]
    shapes = [tuple(layer.get_output(0).shape) for layer in constants if layer.get_output(0).name in read]
    assert Counter(weight.dims for weight in spec.weights) <= Counter(shapes)


def test_a_plan_with_constants_holds_their_values(library: TensorRt) -> None:
    shape = replace(TINY, mlp=8192)  # weights that weigh more than the code
    spec = graph_specs(shape)["layer_partial"]
    onnx, ranges = build_onnx(spec, shape, "float16").SerializeToString(), [dim_ranges(spec, 96, BuildOptions(rows=32))]
    values = {weight.name: np.ones(weight.dims, np.float16) for weight in spec.weights}
    without, _ = build_plan(library, onnx, spec, "float16", ranges, ("8.9",))
    holding, _ = build_plan(library, onnx, spec, "float16", ranges, ("8.9",), constants=values)
    total = sum(value.nbytes for value in values.values())
    assert len(without) < total <= len(holding)


# -- switches that the compiler answers to, though only standard TensorRT acts on them
DEPRECATED = pytest.mark.filterwarnings(
    "ignore:.*Timing cache operations are no-ops in TensorRT-RTX:DeprecationWarning"
)


def test_a_plan_for_newer_versions_reaches_the_compiler(library: TensorRt, llada_8b: ModelShape) -> None:
    """TensorRT for RTX has the flag and lacks the library that such a plan would hold, so that its build fails."""
    spec = graph_specs(llada_8b)["embed"]
    onnx, ranges = build_onnx(spec, llada_8b, "float16").SerializeToString(), [dim_ranges(spec, 4096, BuildOptions())]
    build_plan(library, onnx, spec, "float16", ranges, ("8.9",))
    with pytest.raises(IncompatibleError, match=r"could not build graph 'embed': .*lean"):
        build_plan(library, onnx, spec, "float16", ranges, ("8.9",), compatible="versions")


@DEPRECATED
def test_a_strict_build_records_its_flag_and_leaves_the_cache_as_it_is(
    library: TensorRt, llada_8b: ModelShape, tmp_path: Path
) -> None:
    spec, file = graph_specs(llada_8b)["embed"], tmp_path / "timing.cache"
    onnx, ranges = build_onnx(spec, llada_8b, "float16").SerializeToString(), [dim_ranges(spec, 4096, BuildOptions())]
    file.write_bytes(b"")
    _, flags = build_plan(library, onnx, spec, "float16", ranges, ("8.9",), timing=file, strict=True)
    assert flags == ("ERROR_ON_TIMING_CACHE_MISS",)
    assert file.read_bytes() == b""
    assert build_plan(library, onnx, spec, "float16", ranges, ("8.9",), timing=file)[1] == ()
    assert file.read_bytes() != b""


@DEPRECATED
def test_a_strict_build_that_fails_names_the_graph_and_what_would_measure(
    library: TensorRt, llada_8b: ModelShape, tmp_path: Path
) -> None:
    spec, file = graph_specs(llada_8b)["layer_full"], tmp_path / "timing.cache"
    onnx, ranges = build_onnx(spec, llada_8b, "bfloat16").SerializeToString(), [dim_ranges(spec, 4096, BuildOptions())]
    file.write_bytes(b"")
    with pytest.raises(IncompatibleError) as refused:
        build_plan(library, onnx, spec, "bfloat16", ranges, ("7.5",), timing=file, strict=True)
    assert str(refused.value).startswith(
        "TensorRT could not build graph 'layer_full' from timing.cache alone (--timing-cache use measures what that lacks): "
    )
    assert "\n" not in str(refused.value)


# -- progress
def test_a_build_stops_soon_after_it_is_told_to(library: TensorRt, llada_8b: ModelShape) -> None:
    spec = graph_specs(llada_8b)["layer_partial"]
    onnx = build_onnx(spec, llada_8b, "float16").SerializeToString()

    class Counted(BuildProgress):
        calls = 0

        def step(self, name: str, step: int) -> bool:
            self.calls += 1
            return super().step(name, step)

    def build(stop_at: float) -> int:
        def report(share: float) -> None:
            if share >= stop_at:
                raise InterruptedError

        progress = Counted(report)
        ranges = [dim_ranges(spec, 4096, BuildOptions())]
        if stop_at > 1:
            build_plan(library, onnx, spec, "float16", ranges, ("8.9",), progress=progress)
        else:
            with pytest.raises(InterruptedError):
                build_plan(library, onnx, spec, "float16", ranges, ("8.9",), progress=progress)
        return progress.calls

    whole = build(stop_at=2)
    assert whole > 300
    assert build(stop_at=0.1) < whole / 2


def test_nested_phases_are_one_share_that_never_falls() -> None:
    shares: list[float] = []
    progress = BuildProgress(shares.append)
    progress.start("build", None, 2)
    progress.start("inner", "build", 4)
    for step in range(4):
        assert progress.step("inner", step)
    progress.finish("inner")
    progress.step("unknown", 7)
    progress.step("build", 0)
    progress.start("again", "build", 2)
    progress.step("again", 0)
    progress.finish("again")
    progress.step("build", 1)
    assert shares == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.75, 1.0]


def test_after_a_failure_every_step_says_stop() -> None:
    def report(share: float) -> None:
        raise ZeroDivisionError

    progress = BuildProgress(report)
    progress.start("build", None, 2)
    assert not progress.step("build", 0)
    assert not progress.step("build", 1)
    assert isinstance(progress.failure, ZeroDivisionError)
