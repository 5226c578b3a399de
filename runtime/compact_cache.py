"""A second, smaller cache beside the whole one: a block's rows and those it attends to most, layer by layer.

Its C rows are laid out like a padded sequence: columns that a shorter sequence leaves empty, the kept rows, and the block's
rows last. Which rows were kept never comes to the host. The halves alternate as those of the whole cache do.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from dllm_export.errors import StrategyError
from dllm_export.graphs import ModelShape, TensorType
from dllm_export.runtime.buffers import Buffers, RequestShape
from dllm_export.runtime.policies.policy import Compaction
from dllm_export.runtime.session import Buffer, GraphCall

TYPES: Mapping[str, TensorType] = {
    **dict.fromkeys(("block", "index", "slot"), "int32"),
    **dict.fromkeys(("cos", "sin"), "float32"),
}
"""Types of what says where rows lie; the rest is true or false."""


class CompactCache:
    """The compacted cache of one pass: graph calls that make it, and the tensors of a layer that runs against it."""

    def __init__(self, buffers: Buffers, shape: ModelShape, request: RequestShape) -> None:
        self._buffers, self._shape, self._request = buffers, shape, request
        self._tables: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]] | None = None
        self._placed: Compaction | None = None
        self._layout: dict[str, Buffer] = {}
        self.half = 0
        """Which half holds what was written last."""

    def start(self, cos: NDArray[np.float64], sin: NDArray[np.float64], mask: NDArray[np.bool_]) -> None:
        """Keep what stays fixed for a request: rotary tables [B, S, d/2] and the key mask [B, S]."""
        self._tables, self._placed = (cos, sin, mask), None

    def place(self, compaction: Compaction) -> None:
        """Upload where the rows of a compaction lie, in the sequence and in the compacted cache."""
        if compaction == self._placed:
            return
        assert self._tables is not None, "a request was started"
        cos, sin, visible = self._tables
        block, column = compaction.rows.array(), np.arange(compaction.count)
        rows, limit = compaction.rows.count, np.array(compaction.kept)[:, None]
        start = compaction.count - rows
        own = np.take_along_axis(visible, block.astype(np.int64), axis=1)
        tables = []
        for table in (cos, sin):
            compact = np.zeros((len(block), compaction.count, table.shape[2]))
            compact[:, start:] = np.take_along_axis(table, block.astype(np.int64)[:, :, None], axis=1)
            tables.append(compact)
        arrays = {
            "block": block,
            "members": compaction.rows.mask(self._request.length),
            "kept": column < rows + limit,
            "index": np.tile(np.arange(start, compaction.count, dtype=np.int32), (len(block), 1)),
            "slot": np.tile(np.maximum(column - start, 0).astype(np.int32), (len(block), 1)),
            "fresh": np.tile(column >= start, (len(block), 1)),
            "mask": np.concatenate((column[None, :start] >= start - limit, own), axis=1),
            "cos": tables[0],
            "sin": tables[1],
        }
        self._layout = {
            name: self._buffers.get(f"{name}.compact.{rows}.{compaction.count}", array.shape, TYPES.get(name, "bool"))
            for name, array in arrays.items()
        }
        for name, array in arrays.items():
            self._layout[name].write(array)
        self._placed = compaction

    def _features(self, compaction: Compaction, name: str, layer: int, half: int) -> Buffer:
        dims = (self._request.batch, compaction.count, self._shape.key_width)
        return self._buffers.get(f"{name}.compact.{compaction.count}.{layer}.{half}", dims, "compute")

    def _written(self, compaction: Compaction, layer: int) -> dict[str, Buffer]:
        new = 1 - self.half
        return {f"{name}_out": self._features(compaction, name, layer, new) for name in ("key", "value")}

    def compact(self, compaction: Compaction, layer: int, whole: dict[str, Buffer]) -> GraphCall:
        """The call that makes a layer's compacted cache from `hidden`, `key`, `value`, `cos`, `sin` and `mask` of all rows."""
        count = compaction.count
        chosen = {
            "index": self._layout["block"],
            "fresh": self._layout["members"],
            "kept": self._layout["kept"],
            "budget": self._buffers.constant(f"budget.{count}", np.array([count]), "int64"),
            "index_out": self._buffers.get(f"index_out.compact.{count}", (self._request.batch, count), "int32"),
            "relevance": self._buffers.get("relevance", (self._request.batch, self._request.length), "float32"),
        }
        return GraphCall("layer_compact", layer, {**whole, **chosen, **self._written(compaction, layer)})

    def tensors(self, compaction: Compaction, layer: int) -> dict[str, Buffer]:
        """What `layer_partial` takes and gives where it runs against the compacted cache."""
        placed = {name: self._layout[name] for name in ("index", "slot", "fresh")}
        return {**self.attended(compaction, layer), **placed, **self._written(compaction, layer)}

    def attended(self, compaction: Compaction, layer: int) -> dict[str, Buffer]:
        """`key`, `value`, `cos`, `sin` and `mask` of what was written last."""
        cached = {name: self._features(compaction, name, layer, self.half) for name in ("key", "value")}
        return {**cached, **{name: self._layout[name] for name in ("cos", "sin", "mask")}}

    def places(self, compaction: Compaction, block: tuple[int, int]) -> NDArray[np.int32]:
        """Columns [B, n] of a block's rows, which must all be among those that were compacted for."""
        rows, wanted = compaction.rows.array(), np.arange(*block)
        if not all(np.isin(wanted, row).all() for row in rows):
            raise StrategyError(
                f"this step runs against a compacted cache that does not hold all rows of its block, {block[0]} to "
                f"{block[1] - 1}, which a decoding rule that verifies needs: use another --policy or --transfer"
            )
        found = np.stack([np.searchsorted(row, wanted) for row in rows])
        return (compaction.count - compaction.rows.count + found).astype(np.int32)
