"""The safetensors reader: it gives back what the library wrote, and anything else is an IntegrityError."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dllm_export.errors import IntegrityError
from dllm_export.runtime.safetensors_file import HEADER_LIMIT, NUMPY_TYPES, SafetensorsFile, read_header

WriteFile = Callable[..., Path]

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
"""The entry of a tensor of two float32 numbers."""


@pytest.fixture
def write_file(tmp_path: Path) -> WriteFile:
    """Writes a file from a header (JSON value or raw bytes), data, and the length that the prefix claims."""

    def write(header: object, data: bytes = bytes(8), length: int | None = None) -> Path:
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = tmp_path / "weights.safetensors"
        path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
        return path

    return write


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    ],
    ids=str,
)  # fmt: skip
def test_views_equal_what_was_written(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.arange(12).reshape(3, 4).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "none": torch.zeros(0, 5, dtype=dtype),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        view = file.view(name)
        assert view.shape == tuple(tensor.shape)
        wide = view.astype(np.float64) if view.dtype == ml_dtypes.bfloat16 else view
        np.testing.assert_array_equal(wide, tensor.double().numpy() if tensor.dtype == torch.bfloat16 else tensor)


def test_a_view_is_no_copy_and_nothing_written_to_it_reaches_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "x.safetensors")
    before = (tmp_path / "x.safetensors").read_bytes()
    file = SafetensorsFile(tmp_path / "x.safetensors")
    view = file.view("a")
    assert np.shares_memory(view, file.view("a"))
    if view.flags.writeable:
        view[0] = 2.0
    del view, file
    assert (tmp_path / "x.safetensors").read_bytes() == before


def test_offsets_count_from_the_start_of_the_file(write_file: WriteFile) -> None:
    path = write_file({"__metadata__": {"format": "pt"}, "a": ONE}, np.array([1.5, 2.5], np.float32).tobytes())
    entry = read_header(path)["a"]
    assert (entry.dtype, entry.shape, entry.length) == ("F32", (2,), 8)
    with path.open("rb") as file:
        file.seek(entry.offset)
        assert np.frombuffer(file.read(entry.length), np.float32).tolist() == [1.5, 2.5]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"none\.safetensors is missing"):
        read_header(tmp_path / "none.safetensors")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 40, 70])
def test_a_file_cut_anywhere_is_refused(size: int, write_file: WriteFile) -> None:
    path = write_file({"a": ONE})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(IntegrityError, match=r"weights\.safetensors"):
        read_header(path)


@pytest.mark.parametrize("length", [10**6, HEADER_LIMIT + 1, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused_before_it_is_read(length: int, write_file: WriteFile) -> None:
    with pytest.raises(IntegrityError, match="truncated"):
        read_header(write_file({"a": ONE}, length=length))


def test_a_header_above_the_limit_is_refused_even_if_the_file_is_that_long(write_file: WriteFile) -> None:
    path = write_file({"a": ONE}, length=HEADER_LIMIT + 1)
    with path.open("r+b") as file:
        file.truncate(HEADER_LIMIT + 1000)  # sparse: takes no space
    with pytest.raises(IntegrityError):
        read_header(path)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[]",
        b"7",
        b'"text"',
        b"null",
        b"[" * 100_000 + b"]" * 100_000,
    ],
    ids=lambda header: header[:12].decode("latin-1"),
)
def test_a_header_that_is_no_json_object_is_refused(header: bytes, write_file: WriteFile) -> None:
    with pytest.raises(IntegrityError, match="header"):
        read_header(write_file(header))


@pytest.mark.parametrize(
    "entry",
    [
        None,
        7,
        "text",
        [],
        {},
        {**ONE, "dtype": "F8_E4M3"},
        {**ONE, "dtype": ["F32"]},
        {**ONE, "dtype": None},
        {**ONE, "shape": 2},
        {**ONE, "shape": "2"},
        {**ONE, "shape": {"2": 1}},
        {**ONE, "shape": [2.0]},
        {**ONE, "shape": [2.9]},
        {**ONE, "shape": [True, 2]},
        {**ONE, "shape": ["2"]},
        {**ONE, "shape": [None]},
        {**ONE, "shape": [float("inf")]},
        {**ONE, "shape": [float("nan")]},
        {**ONE, "shape": [3]},
        {**ONE, "shape": [-2]},
        {**ONE, "shape": [-1, -2]},
        {**ONE, "shape": [2**64, 2]},
        {**ONE, "shape": [1] * 100 + [2]},
        {**ONE, "data_offsets": [0]},
        {**ONE, "data_offsets": [0, 8, 8]},
        {**ONE, "data_offsets": "08"},
        {**ONE, "data_offsets": [0.0, 8.0]},
        {**ONE, "data_offsets": [0, float("inf")]},
        {**ONE, "data_offsets": [-8, 0]},
        {**ONE, "data_offsets": [8, 0]},
        {**ONE, "data_offsets": [8, 16]},
        {**ONE, "data_offsets": [2**63, 2**63 + 8]},
        {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [0, 2**70], "data_offsets": [0, 0]},
    ],
    ids=lambda entry: str(entry).removeprefix("{'dtype': 'F32', ").rstrip("}")[:50],
)
def test_an_entry_that_is_not_exactly_a_tensor_in_the_file_is_refused(entry: object, write_file: WriteFile) -> None:
    with pytest.raises(IntegrityError, match=r"weights\.safetensors"):
        read_header(write_file({"a": entry}))


def test_an_entry_is_named_in_the_message(write_file: WriteFile) -> None:
    with pytest.raises(IntegrityError, match=r"'layer\.q'"):
        read_header(write_file({"layer.q": {**ONE, "data_offsets": [0, 4]}}))


def test_ranges_that_overlap_are_refused(write_file: WriteFile) -> None:
    with pytest.raises(IntegrityError):
        read_header(write_file({"a": ONE, "b": {**ONE, "data_offsets": [4, 12]}}, bytes(12)))


def test_bytes_that_belong_to_no_tensor_are_refused(write_file: WriteFile) -> None:
    with pytest.raises(IntegrityError):
        read_header(write_file({"a": ONE}, bytes(16)))
    with pytest.raises(IntegrityError):
        read_header(write_file({"a": ONE, "b": {**ONE, "data_offsets": [12, 20]}}, bytes(20)))


def test_a_name_that_occurs_twice_is_refused(write_file: WriteFile) -> None:
    entry = json.dumps(ONE)
    with pytest.raises(IntegrityError):
        read_header(write_file(f'{{"a": {entry}, "a": {entry}}}'.encode()))


# -- fuzzing: whatever the bytes are, the reader gives tensors inside the file or an IntegrityError
NUMBERS = st.integers(-4, 40) | st.sampled_from(
    [2**31, 2**62, 2**64, 10**30, -1, 0.5, 1e300, float("inf"), float("nan")]
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
DTYPES = st.sampled_from([*NUMPY_TYPES, "F8_E5M2"])
SIZES = st.lists(NUMBERS, max_size=3)
ENTRIES = st.fixed_dictionaries(
    {"dtype": DTYPES, "shape": SIZES, "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2)}
)
ODD_ENTRIES = st.fixed_dictionaries(
    {}, optional={"dtype": DTYPES | VALUES, "shape": SIZES | VALUES, "data_offsets": VALUES}
)
HEADERS = st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), ENTRIES | ODD_ENTRIES | VALUES, max_size=4)


def check_reader(path: Path) -> None:
    """Every tensor that the reader accepts can be viewed and lies in the file."""
    try:
        tensors = read_header(path)
    except IntegrityError:
        return
    file = SafetensorsFile(path)
    for name, entry in tensors.items():
        assert 0 <= entry.offset <= entry.offset + entry.length <= path.stat().st_size
        assert file.view(name).nbytes == entry.length


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=HEADERS, data=st.binary(max_size=40))
def test_no_header_crashes_the_reader(header: dict[str, Any], data: bytes, write_file: WriteFile) -> None:
    check_reader(write_file(header, data))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200), prefix=st.none() | st.integers(0, 250))
def test_no_bytes_crash_the_reader(data: bytes, prefix: int | None, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data if prefix is None else prefix.to_bytes(8, "little") + data)
    check_reader(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
def test_no_changed_byte_of_a_real_file_crashes_the_reader(place: int, value: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, path, metadata={"format": "pt"})
    data = bytearray(path.read_bytes())
    data[place % len(data)] = value
    path.write_bytes(data)
    check_reader(path)
