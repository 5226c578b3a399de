"""manifest.json: one canonical encoding, and nothing but it is accepted."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_export.errors import DllmExportError, IncompatibleError, IntegrityError
from dllm_export.graphs import graph_specs, with_stages
from dllm_export.runtime.manifest import (
    FORMAT,
    MANIFEST_LIMIT,
    FileRecord,
    Manifest,
    check_relative,
    decode_manifest,
    encode_manifest,
    tensor_records,
)

WithKey = Callable[..., bytes]

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "manifest.json"
FIRST = b'{\n "format": %d,' % FORMAT


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    """The manifest of a real export."""
    return msgspec.json.decode(GOLDEN.read_bytes(), type=Manifest)


@pytest.fixture(scope="module")
def encoded(manifest: Manifest) -> bytes:
    return encode_manifest(manifest)


@pytest.fixture(scope="module")
def with_key(encoded: bytes) -> WithKey:
    """The manifest with top-level keys changed, in canonical form and with a fitting digest."""

    def change(**keys: object) -> bytes:
        content = {**json.loads(encoded), **keys, "digest": ""}
        return spell({**content, "digest": hashlib.sha256(spell(content)).hexdigest()})

    return change


def spell(content: object) -> bytes:
    """JSON as the manifest spells it: one space of indent and a final newline."""
    return msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n"


def test_a_manifest_survives_writing_and_reading(manifest: Manifest, encoded: bytes) -> None:
    read = decode_manifest(encoded)
    assert msgspec.structs.replace(read, digest="") == msgspec.structs.replace(manifest, digest="")
    assert encode_manifest(read) == encoded


def test_the_digest_is_that_of_the_same_bytes_without_it(encoded: bytes, with_key: WithKey) -> None:
    digest = json.loads(encoded)["digest"]
    assert encoded.count(digest.encode()) == 1
    assert hashlib.sha256(encoded.replace(digest.encode(), b"")).hexdigest() == digest
    assert with_key() == encoded


def test_the_encoding_has_one_space_of_indent_and_a_final_newline(encoded: bytes) -> None:
    assert encoded.startswith(b'{\n "format": %d,\n "digest": "' % FORMAT)
    assert encoded.endswith(b"}\n")


def test_the_signatures_in_it_are_those_of_the_catalog(manifest: Manifest) -> None:
    specs = with_stages(graph_specs(manifest.shape))
    assert manifest.graphs.keys() == specs.keys()
    for name, record in manifest.graphs.items():
        assert record.inputs == tensor_records(specs[name].inputs)
        assert record.outputs == tensor_records(specs[name].outputs)


# -- format
@pytest.mark.parametrize(
    "version", [0, FORMAT - 1, FORMAT + 1, -1, 10**30, float(FORMAT), str(FORMAT), None, True, [1], {}]
)
def test_another_format_is_refused_before_the_rest_is_read(version: object, with_key: WithKey) -> None:
    for data in (with_key(format=version), json.dumps({"format": version, "from": "the future"}).encode()):
        with pytest.raises(IncompatibleError, match=r"(?s)has format .*reads format \d+: export again") as refused:
            decode_manifest(data)
        assert refused.value.exit_code == 4


def test_a_manifest_without_a_format_is_damaged(encoded: bytes) -> None:
    content = json.loads(encoded)
    del content["format"]
    with pytest.raises(IntegrityError, match="damaged"):
        decode_manifest(spell(content))


# -- schema
@pytest.mark.parametrize(
    "keys",
    [
        {"remarks": "hello"},
        {"dtype": "int4"},
        {"dtype": "float32 "},
        {"topology": "causal"},
        {"weights": "both"},
        {"opset": "17"},
        {"opset": 17.5},
        {"files": {}},
        {"files": [{"path": "a", "size": 1}]},
        {"files": [{"path": "a", "size": 1, "sha256": "0", "mode": 7}]},
        {"shape": {}},
        {"tokens": {"mask": 1, "eos": 2, "pad": 3, "unk": 4}},
        {"graphs": []},
        {"tokenizer": "tokenizer.json"},
        {"probe": None},
    ],
    ids=str,
)
def test_an_unknown_or_wrong_key_is_refused_even_with_a_fitting_digest(
    keys: dict[str, object], with_key: WithKey
) -> None:
    with pytest.raises(IntegrityError, match=r"manifest\.json .*export again"):
        decode_manifest(with_key(**keys))


def test_an_unknown_key_inside_a_record_is_refused(encoded: bytes, with_key: WithKey) -> None:
    content = json.loads(encoded)
    for key in ("shape", "sampler", "tokens"):
        with pytest.raises(IntegrityError):
            decode_manifest(with_key(**{key: {**content[key], "extra": 1}}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"1",
        b"\xff\xfe",
        b'{"format": %d}' % FORMAT,
        b'{"format": \xff}',
        b'{"format": %d, "digest": "\\ud800"}' % FORMAT,
        b'{"format": %d, "x": ' % FORMAT + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"format": %d, "tools": ' % FORMAT + b'{"a": ' * 100_000 + b"}" * 100_001,
    ],
    ids=lambda data: data[:24].decode("latin-1"),
)
def test_what_is_no_manifest_is_damaged(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        decode_manifest(data)


def test_a_huge_manifest_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(IntegrityError, match="more than any bundle needs"):
        decode_manifest(b" " * (MANIFEST_LIMIT + 1))


# -- encoding
def test_every_other_spelling_of_the_same_content_is_refused(encoded: bytes) -> None:
    content = json.loads(encoded)
    spellings = [
        json.dumps(content).encode(),
        json.dumps(content, indent=2).encode() + b"\n",
        json.dumps(content, indent=1, sort_keys=True).encode() + b"\n",
        encoded.rstrip(b"\n"),
        encoded + b"\n",
        b" " + encoded,
        encoded.replace(b'"float32"', b'"\\u0066loat32"', 1),
        encoded.replace(FIRST, FIRST + FIRST[1:], 1),
    ]
    for data in spellings:
        assert data != encoded
        with pytest.raises(IntegrityError):
            decode_manifest(data)


def test_a_digest_of_other_content_is_refused(manifest: Manifest, encoded: bytes) -> None:
    digest = json.loads(encoded)["digest"]
    other = msgspec.structs.replace(manifest, opset=18)
    forged = encode_manifest(other).replace(json.loads(encode_manifest(other))["digest"].encode(), digest.encode())
    with pytest.raises(IntegrityError, match="does not match its own digest"):
        decode_manifest(forged)


def test_any_flipped_bit_is_refused(encoded: bytes) -> None:
    places = random.Random(0).sample(range(len(encoded)), 250)
    for place in {0, 1, len(encoded) - 1, *range(12, 40), *places}:
        data = bytearray(encoded)
        data[place] ^= 1 << place % 8
        with pytest.raises((IntegrityError, IncompatibleError)):
            decode_manifest(bytes(data))


def test_any_cut_is_refused(encoded: bytes) -> None:
    for size in range(0, len(encoded), 97):
        with pytest.raises(IntegrityError):
            decode_manifest(encoded[:size])


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 10**6), removed=st.integers(0, 30), added=st.binary(max_size=8))
def test_no_edit_gets_past_the_reader_or_crashes_it(place: int, removed: int, added: bytes, encoded: bytes) -> None:
    place %= len(encoded)
    data = encoded[:place] + added + encoded[place + removed :]
    if data == encoded:
        return
    with pytest.raises((IntegrityError, IncompatibleError)):
        decode_manifest(data)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from(sorted(Manifest.__struct_fields__)), value=JSON_VALUES)
def test_no_value_of_a_key_crashes_the_reader(key: str, value: object, with_key: WithKey) -> None:
    try:
        decode_manifest(with_key(**{key: value}))
    except DllmExportError:
        return


# -- paths
@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "..",
        "../weights",
        "a/../../b",
        "a/..",
        "/etc/passwd",
        "//a",
        "a//b",
        "a/",
        "./a",
        "a/./b",
        "..\\b",
        "a\\b",
        "C:\\b",
        "a\0b",
        "\0",
    ],
)
def test_a_path_that_is_not_plain_and_inside_is_refused(path: str, manifest: Manifest) -> None:
    record = FileRecord(path=path, size=1, sha256="0" * 64)
    data = encode_manifest(msgspec.structs.replace(manifest, files=(*manifest.files, record)))
    with pytest.raises(IntegrityError, match="not a plain path inside the bundle"):
        decode_manifest(data)


@pytest.mark.parametrize("path", ["a", "weights/layer.000.safetensors", "a b/ü", "...", "..a", "a/..b/c"])
def test_plain_paths_are_accepted(path: str) -> None:
    check_relative(path)
