"""What this machine does at best: reads a LimitsTask as JSON on stdin, measures, prints MeasuredLimits in the last line.

Every figure is the best of the libraries that are there, so that a share of the limit flatters nobody.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from statistics import median

import numpy as np

from dllm_export.tools.bench.processes import answer
from dllm_export.tools.bench.records import LimitsTask, MeasuredLimits, ProductQuery

SQUARE = {"cpu": 1536, "cuda": 8192}
"""Size of the square product that shows the matrix rate."""
LEAST_COPY, MOST_COPY = 2**20, 2**28
SPREAD_WEIGHTS = 2**27
"""Bytes of different weights that a repeated product goes through, so that they come from memory as in a step."""
LEAST, MOST_SECONDS = 3, 0.15

Sample = Callable[[], float]
"""Seconds of one run."""


def measure_limits(task: LimitsTask) -> MeasuredLimits:
    """Copy, square product, then every product asked for."""
    library = TorchProducts(task) if importlib.util.find_spec("torch") else None
    others: list[ProductLibrary] = [library] if library else []
    if task.device == "cpu":
        others += [] if library else [NumpyProducts(task)]
        if task.dtype == "float32" and importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
            others += [OrtProducts(task)]
    if not others:
        raise RuntimeError("measuring a GPU's limits needs PyTorch: pip install 'dllm-export[export]'")
    size = min(max(task.working_set, LEAST_COPY), MOST_COPY if task.device == "cpu" else 2**31)
    bandwidth = max(2 * size / min(sample(one.copy(size))) for one in others if one.copies)
    edge = SQUARE[task.device]
    square = ProductQuery(rows=edge, inner=edge, columns=edge, count=1, stored=True, weights=1)
    seconds, rate = [], max(count_flops(square) / min(sample(one.product(square))) for one in others)
    for query in task.products:
        found = [sample(one.product(query)) for one in others]
        rate = max(rate, *(count_flops(query) / query.count / min(times) for times in found))
        seconds.append(query.count * min(median(times) for times in found))
    return MeasuredLimits(
        bytes_per_second=bandwidth,
        flops_per_second=rate,
        product_seconds=tuple(seconds),
        libraries=tuple(one.name for one in others),
    )


def count_flops(query: ProductQuery) -> float:
    """Multiplications and additions of a query."""
    return 2.0 * query.count * query.rows * query.inner * query.columns


def sample(run: Sample) -> list[float]:
    """Seconds of some runs, the first not counted."""
    run()
    seconds: list[float] = []
    while len(seconds) < LEAST or (sum(seconds) < MOST_SECONDS and len(seconds) < 50):
        seconds.append(run())
    return seconds


def clock(work: Callable[[], object], count: int = 1) -> Sample:
    """Times work that does `count` things alike; the seconds of one."""

    def run() -> float:
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) / count

    return run


def spread(query: ProductQuery, itemsize: int) -> int:
    """How many different weights to go through in one run: as many as there are, up to a limit."""
    return max(1, min(query.weights, SPREAD_WEIGHTS // max(1, itemsize * query.inner * query.columns)))


class ProductLibrary:
    """A library that multiplies matrices. `copy` and `product` give samplers; a product's time is that of one of them."""

    name: str
    copies = True

    def __init__(self, task: LimitsTask) -> None:
        self.task = task

    def copy(self, size: int) -> Sample:
        """Copies this many bytes."""
        raise NotImplementedError

    def product(self, query: ProductQuery) -> Sample:
        """One product of these sizes."""
        raise NotImplementedError


class NumpyProducts(ProductLibrary):
    """numpy's BLAS, where PyTorch is missing; who starts the process limits its threads."""

    name = "numpy"

    def copy(self, size: int) -> Sample:
        source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
        pieces = np.linspace(0, size, self.task.threads + 1).astype(np.int64)
        spans = [slice(start, end) for start, end in pairwise(pieces.tolist())]
        pool = ThreadPoolExecutor(self.task.threads)
        return clock(lambda: list(pool.map(lambda span: np.copyto(target[span], source[span]), spans)))

    def product(self, query: ProductQuery) -> Sample:
        kind = np.float64 if self.task.dtype == "float64" else np.float32
        draw = np.random.default_rng(0).standard_normal
        stack = () if query.stored else (query.count,)
        left = draw((*stack, query.rows, query.inner), np.float32).astype(kind)
        count = spread(query, 4) if query.stored else 1
        rights = [draw((*stack, query.inner, query.columns), np.float32).astype(kind) for _ in range(count)]
        per_run = count if query.stored else query.count
        return clock(lambda: [np.matmul(left, right) for right in rights], per_run)


class TorchProducts(ProductLibrary):
    """PyTorch, on the CPU or the GPU."""

    name = "torch"

    def __init__(self, task: LimitsTask) -> None:
        import torch

        super().__init__(task)
        self._torch, self._dtype = torch, getattr(torch, task.dtype)
        torch.set_num_threads(task.threads)

    def copy(self, size: int) -> Sample:
        source = self._torch.ones(size, dtype=self._torch.uint8, device=self.task.device)
        target = self._torch.zeros_like(source)
        return self._clock(lambda: target.copy_(source))

    def product(self, query: ProductQuery) -> Sample:
        draw, where = self._torch.randn, {"dtype": self._dtype, "device": self.task.device}
        stack = () if query.stored else (query.count,)
        left = draw(*stack, query.rows, query.inner, **where)
        count = spread(query, left.element_size()) if query.stored else 1
        rights = [draw(*stack, query.inner, query.columns, **where) for _ in range(count)]
        per_run = count if query.stored else query.count
        return self._clock(lambda: [left @ right for right in rights], per_run)

    def _clock(self, work: Callable[[], object], count: int = 1) -> Sample:
        if self.task.device == "cpu":
            return clock(work, count)

        def wait() -> None:
            work()
            self._torch.cuda.synchronize()

        return clock(wait, count)


class OrtProducts(ProductLibrary):
    """ONNX Runtime on the CPU: one graph with as many products as there are weights, each a constant as in a step."""

    name, copies = "onnxruntime", False

    def product(self, query: ProductQuery) -> Sample:
        import onnxruntime as ort
        from onnx import TensorProto, helper, numpy_helper

        draw = np.random.default_rng(0).standard_normal
        stack = () if query.stored else (query.count,)
        feeds = {"left": draw((*stack, query.rows, query.inner), np.float32)}
        count = spread(query, 4) if query.stored else 1
        rights = {f"right{number}": draw((*stack, query.inner, query.columns), np.float32) for number in range(count)}
        nodes = [helper.make_node("MatMul", ["left", name], [f"{name}_out"]) for name in rights]
        outputs = [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None) for name in rights]
        constants = [numpy_helper.from_array(array, name) for name, array in rights.items()] if query.stored else []
        feeds |= {} if query.stored else rights
        inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in feeds.items()]
        graph = helper.make_graph(nodes, "products", inputs, outputs, constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.task.threads, 1
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return clock(lambda: session.run(None, feeds), count if query.stored else query.count)


if __name__ == "__main__":
    sys.exit(answer(LimitsTask, measure_limits))
