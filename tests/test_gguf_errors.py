"""Every way a GGUF file can be wrong, and the error that says so."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import (
    ARRAY,
    BOOL,
    I32,
    MODEL_METADATA,
    STRING,
    TYPE_F32,
    TYPE_Q4_0,
    U8,
    U32,
    Array,
    Built,
    Tensor,
    build,
    seeds,
)

from edgert._native import GgufFile
from edgert.errors import EdgertError, ModelFileError, UnsupportedModelError

BASE = build(MODEL_METADATA, [Tensor("w", (64, 2), TYPE_Q4_0), Tensor("norm", (64,))], alignment=64)
END = len(BASE.data)
HUGE = 2**64 - 1


def refused(tmp_path: Path, data: bytes, kind: type[EdgertError] = ModelFileError) -> EdgertError:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(EdgertError) as e:
        GgufFile(path)
    assert type(e.value) is kind
    assert str(e.value).startswith(f"{path}: ") and "\n" not in str(e.value)
    return e.value


# What is changed in BASE, the field and the place (a number's label) of the error, words of the message.
CHANGES = [
    ("version", 1, "version", "version", "expected GGUF version 2 or 3, found 1"),
    ("version", 4, "version", "version", "expected GGUF version 2 or 3, found 4"),
    ("version", 3 << 24, "version", "version", "the file is big endian"),
    (
        "tensor_count",
        HUGE,
        "tensor count",
        "kv_count",
        "tensor count needs at least 18446744073709551615 bytes",
    ),
    (
        "tensor_count",
        1000,
        "tensor count",
        "kv_count",
        f"the file ends at byte {END}: the download is incomplete",
    ),
    ("kv_count", 2**62, "metadata count", "kv0.key.length", "metadata count needs at least"),
    ("kv0.key.length", HUGE, "metadata[0] key", None, f"the file ends at byte {END}"),
    (
        "kv0.type",
        13,
        "general.architecture (type)",
        "kv0.type",
        "expected a value type from 0 to 12, found 13",
    ),
    ("kv0.length", 2**40, "general.architecture", None, "general.architecture needs 1099511627776 bytes"),
    ("kv1", 0, "general.alignment", None, "expected an unsigned power of two up to 65536, found 0"),
    ("kv1", 48, "general.alignment", None, "found 48"),
    ("kv1", 131072, "general.alignment", None, "found 131072"),
    ("kv4.element_type", 99, "tokenizer.ggml.tokens (array)", "kv4.element_type", "found 99"),
    ("kv4.count", 2**61, "tokenizer.ggml.tokens (array)", None, "needs at least 18446744073709551615 bytes"),
    (
        "kv4[2].length",
        2**32,
        "tokenizer.ggml.tokens[2]",
        None,
        "tokenizer.ggml.tokens[2] needs 4294967296 bytes",
    ),
    ("kv5.count", 2**62 + 1, "tokenizer.ggml.scores (array)", None, "the download is incomplete"),
    ("kv7", 2, "tokenizer.ggml.add_bos_token", "kv7", "expected a boolean, 0 or 1, found 2"),
    ("tensor0.name.length", 2**63, "tensor[0] name", None, "tensor[0] name needs 9223372036854775808 bytes"),
    ("tensor0.n_dims", 0, "tensor 'w' dimensions", "tensor0.n_dims", "expected 1 to 4 dimensions, found 0"),
    ("tensor0.n_dims", 5, "tensor 'w' dimensions", "tensor0.n_dims", "expected 1 to 4 dimensions, found 5"),
    ("tensor0.dim1", 0, "tensor 'w' dimensions", "tensor0.dim1", "a dimension is zero"),
    (
        "tensor0.dim0",
        33,
        "tensor 'w' dimensions",
        "tensor0.n_dims",
        "multiple of 32, the block of Q4_0, found 33",
    ),
    ("tensor0.dim0", 2**63, "tensor 'w' dimensions", "tensor0.n_dims", "larger than any file can be"),
    ("tensor0.dim1", HUGE, "tensor 'w' dimensions", "tensor0.n_dims", "larger than any file can be"),
    ("tensor1.dim0", 2**61, "tensor 'norm' dimensions", "tensor1.n_dims", "larger than any file can be"),
    ("tensor0.offset", 8, "tensor 'w' offset", None, "expected a multiple of the alignment 64, found 8"),
    ("tensor1.offset", 64, "tensor 'norm' offset", None, "it starts inside tensor 'w', which ends at byte"),
    ("tensor0.offset", 192, "tensor 'w' offset", None, "it starts inside tensor 'norm'"),
    ("tensor0.dim1", 2000, "tensor 'w' data", None, f"the file ends at byte {END} but tensor 'w' needs"),
    ("tensor1.offset", 2**40, "tensor 'norm' data", None, "the download is incomplete"),
    ("tensor1.offset", HUGE - 63, "tensor 'norm' data", None, "needs more than any file can hold"),
]


@pytest.mark.parametrize(("label", "value", "field", "place", "message"), CHANGES)
def test_changed_number(
    label: str, value: int, field: str, place: str | None, message: str, tmp_path: Path
) -> None:
    error = refused(tmp_path, BASE.change(label, value))
    assert isinstance(error, ModelFileError)
    assert message in str(error)
    assert error.field == field
    assert error.path == str(tmp_path / "m.gguf")
    assert 0 <= error.offset <= END
    if place is not None:
        assert error.offset == BASE.at(place)
    assert str(error).endswith(f"(byte {error.offset}, {field})")


def test_base_is_good(tmp_path: Path) -> None:
    """The cases above fail for their change alone."""
    (tmp_path / "m.gguf").write_bytes(BASE.data)
    assert len(GgufFile(tmp_path / "m.gguf").tensors) == 2


@pytest.mark.parametrize("type_id", [9, 16, 24, 36, 2**32 - 1])
def test_tensor_type_without_code(type_id: int, tmp_path: Path) -> None:
    error = refused(tmp_path, BASE.change("tensor0.type", type_id), UnsupportedModelError)
    name = {9: "Q8_1", 16: "IQ2_XXS", 24: "I8"}.get(type_id, "unknown")
    assert f"tensor 'w' has type {name} (id {type_id})" in str(error)
    assert "it reads F32, F16, Q4_0," in str(error)


@pytest.mark.parametrize("data", [s for s in seeds() if len(s.data) > 100])
def test_cut_at_every_byte(data: Built, tmp_path: Path) -> None:
    """A truncated download says so wherever it ends."""
    for n in range(len(data.data)):
        error = refused(tmp_path, bytes(data.data[:n]))
        if n >= 4:
            assert "the download is incomplete" in str(error), n
            assert f"the file ends at byte {n}" in str(error)


NOT_GGUF = [
    (b"", "the file is empty"),
    (b"GG", "not a GGUF file: starts with 'GG'; expected a model in GGUF format"),
    (b"GGUf" + bytes(60), "starts with 'GGUf'"),
    (b"# A model card\n", "not a GGUF file: starts with '# A '"),
    (b"\x00\x1b[2J", "starts with '\\x00\\x1b[2'"),
    (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    (b"<!DOCTYPE html><html>", "this is a web page"),
    (b"<html></html>", "this is a web page"),
    (b"PK\x03\x04", "a PyTorch checkpoint"),
    (b"tjgg\x03\x00\x00\x00", "a format older than GGUF"),
]


@pytest.mark.parametrize(("data", "message"), NOT_GGUF)
def test_something_else(data: bytes, message: str, tmp_path: Path) -> None:
    error = refused(tmp_path, data)
    assert isinstance(error, ModelFileError)
    assert message in str(error)
    assert (error.offset, error.field) == (0, "magic")


def test_big_endian_file(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("t", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "the file is big endian" in str(refused(tmp_path, (tmp_path / "m.gguf").read_bytes()))


def open_error(path: Path | str) -> ModelFileError:
    with pytest.raises(ModelFileError) as e:
        GgufFile(path)
    assert e.value.path == str(path) and (e.value.offset, e.value.field) == (-1, "file")
    return e.value


def test_no_regular_file(tmp_path: Path) -> None:
    assert "no such file" in str(open_error(tmp_path / "absent.gguf"))
    assert "is a directory; expected the path of a .gguf file" in str(open_error(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in str(open_error(tmp_path / "pipe"))
    assert "is not a regular file" in str(open_error("/dev/zero"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "cannot be opened: Too many levels" in str(open_error(tmp_path / "loop"))


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_no_permission(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(BASE.data)
    (tmp_path / "m.gguf").chmod(0)
    assert "cannot be opened: Permission denied" in str(open_error(tmp_path / "m.gguf"))


def test_path_of_another_type() -> None:
    with pytest.raises(TypeError):
        GgufFile(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="null"):
        GgufFile("a\0b")


def test_duplicates(tmp_path: Path) -> None:
    error = refused(tmp_path, build([("a", U8, 1), ("b", U8, 1), ("a", U8, 1)]).data)
    assert isinstance(error, ModelFileError)
    assert error.field == "metadata[2] key" and "the key 'a' occurs twice" in str(error)
    error = refused(tmp_path, build([], [Tensor("x", (1,)), Tensor("x", (2,))]).data)
    assert isinstance(error, ModelFileError)
    assert error.field == "tensor 'x' name" and "two tensors have this name" in str(error)


BAD_UTF8 = [
    b"\xff",
    b"\xc0\x80",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\xe2\x82",
    b"a\x80",
    b"\xf8\x88\x80\x80\x80",
]


@pytest.mark.parametrize("text", BAD_UTF8)
def test_names_must_be_utf8(text: bytes, tmp_path: Path) -> None:
    with pytest.raises(UnicodeDecodeError):
        text.decode()
    assert "expected UTF-8 text, found '" in str(refused(tmp_path, build([(text, U8, 1)]).data))
    assert "expected UTF-8 text, found '" in str(refused(tmp_path, build([], [Tensor(text, (1,))]).data))


def test_names_in_utf8(tmp_path: Path) -> None:
    names = ["", "é", "\u0800", "\ud7ff", "\ue000", "\uffff", "\U00010000", "\U0010ffff", "a\0b"]
    (tmp_path / "m.gguf").write_bytes(
        build([(n, U8, 1) for n in names], [Tensor(n, (1,)) for n in names]).data
    )
    file = GgufFile(tmp_path / "m.gguf")
    assert file.metadata_keys == names == [t.name for t in file.tensors]


def test_empty_key_still_names_a_field(tmp_path: Path) -> None:
    error = refused(tmp_path, build([("", BOOL, 7)]).data)
    assert isinstance(error, ModelFileError) and error.field == "''"


def test_names_in_messages_are_harmless(tmp_path: Path) -> None:
    """A name from a file can neither move the cursor of a terminal nor fill it."""
    error = refused(tmp_path, build([], [Tensor("\x1b[2Jé" + "x" * 5000, (0,))]).data)
    assert "tensor '\\x1b[2J\\xc3\\xa9xxx" in str(error) and len(str(error)) < 500


def test_long_key(tmp_path: Path) -> None:
    good = build([("k" * 65535, U8, 1)]).data
    (tmp_path / "m.gguf").write_bytes(good)
    assert len(GgufFile(tmp_path / "m.gguf").metadata_keys[0]) == 65535
    assert "at most 65535 bytes, found 65536" in str(refused(tmp_path, build([("k" * 65536, U8, 1)]).data))


def test_deep_arrays(tmp_path: Path) -> None:
    def nested(depth: int) -> Array:
        return Array(I32, [7]) if depth == 1 else Array(ARRAY, [nested(depth - 1)])

    (tmp_path / "m.gguf").write_bytes(build([("a", ARRAY, nested(8))]).data)
    assert GgufFile(tmp_path / "m.gguf").get("a") == [[[[[[[[7]]]]]]]]
    assert "nested more than 8 deep" in str(refused(tmp_path, build([("a", ARRAY, nested(9))]).data))
    assert "nested more than 8 deep" in str(refused(tmp_path, build([("a", ARRAY, nested(200))]).data))


def test_alignment_of_another_type(tmp_path: Path) -> None:
    error = refused(tmp_path, build([("general.alignment", STRING, "32")]).data)
    assert "expected an unsigned power of two up to 65536, found another type of value" in str(error)


def test_boolean_in_an_array(tmp_path: Path) -> None:
    error = refused(tmp_path, build([("flags", ARRAY, Array(BOOL, [0, 1, 7]))]).data)
    assert isinstance(error, ModelFileError) and error.field == "flags[2]"


def test_more_elements_than_addresses(tmp_path: Path) -> None:
    """A tensor that would fit a sparse file of 2^62 bytes, but not memory once dequantised."""
    data = build([], [Tensor("t", (2**61, 2), TYPE_Q4_0, data=b"")]).data
    assert "more elements than memory can address" in str(refused(tmp_path, data))


def test_sparse_file_cannot_claim_memory(tmp_path: Path) -> None:
    """A terabyte of zeros that takes no room on the disk: neither strings nor numbers may be believed."""
    path = tmp_path / "m.gguf"
    for element in (U8, U32, STRING, ARRAY):
        head = build([("a", ARRAY, Array(element, []))])
        path.write_bytes(head.change("kv0.count", 2**36))
        os.truncate(path, 2**40)
        with pytest.raises(ModelFileError, match="a header may not be larger than 268435456 bytes"):
            GgufFile(path)


def test_data_of_a_large_file_is_not_header(tmp_path: Path) -> None:
    """The bound on the header is no bound on the tensors."""
    data = build([], [Tensor("t", (2**30,), TYPE_F32, data=b"")]).data
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    os.truncate(path, 2**33)
    assert GgufFile(path).tensors[0].nbytes == 2**32


def test_error_inside_a_header_that_crosses_a_chunk(tmp_path: Path) -> None:
    """Offsets stay exact after the read buffer has moved."""
    words = Array(STRING, ["x" * 1000] * 1000)
    data = build([("words", ARRAY, words), ("flag", BOOL, 9)])
    error = refused(tmp_path, bytes(data.data))
    assert isinstance(error, ModelFileError)
    assert (error.offset, error.field) == (data.at("kv1"), "flag")
    assert struct.unpack_from("B", data.data, error.offset) == (9,)
