"""What the GGUF reader gives for good files: metadata, tensors, versions, split models, real models."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import (
    ARRAY,
    BLOCKS,
    EVERY_TYPE,
    MODEL_METADATA,
    STRING,
    TYPE_F32,
    U32,
    Array,
    Tensor,
    build,
    seeds,
)
from gguf_reader import Reader

from edgert._native import GgufFile
from edgert.errors import EngineError, ModelFileError


def opened(tmp_path: Path, data: bytes) -> GgufFile:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    return GgufFile(path)


@pytest.mark.parametrize("version", [2, 3])
def test_every_metadata_type(version: int, tmp_path: Path) -> None:
    file = opened(tmp_path, build(EVERY_TYPE, version=version).data)
    assert file.version == version
    expected = {
        "u8": 255, "i8": -128, "u16": 65535, "i16": -32768, "u32": 2**32 - 1, "i32": -(2**31), "f32": 0.5,
        "bool": True, "string": "grüß", "u64": 2**64 - 1, "i64": -(2**63), "f64": 0.1,
        "a0": [1, 0, 1], "a1": [1, 0, 1], "a2": [1, 0, 1], "a3": [1, 0, 1], "a4": [1, 0, 1], "a5": [1, 0, 1],
        "a6": [1.0, 0.0, 1.0], "a7": [True, False, True], "a10": [1, 0, 1], "a11": [1, 0, 1],
        "a12": [1.0, 0.0, 1.0], "strings": ["a", "", "ccc"], "empty": [], "nested": [[1, 2], [["x"]], []],
    }  # fmt: skip
    assert file.metadata == expected
    assert list(file.metadata) == file.metadata_keys == [key for key, _, _ in EVERY_TYPE]

    def types(value: object) -> object:
        return [types(v) for v in value] if isinstance(value, list) else type(value)

    for key, value in expected.items():
        assert types(file.metadata[key]) == types(value), key


def test_metadata_access(tmp_path: Path) -> None:
    file = opened(tmp_path, build(MODEL_METADATA, alignment=64).data)
    assert file.get("llama.context_length") == 8192
    assert file.get("absent") is None
    assert file.get("absent", 3) == 3
    assert file.metadata is file.metadata
    assert file.get("tokenizer.ggml.tokens") == file.metadata["tokenizer.ggml.tokens"]


def test_strings_beyond_a_chunk(tmp_path: Path) -> None:
    """The header is read 256 KiB at a time; strings and arrays may be longer or lie across an edge."""
    long = "é" * 300_000
    words = [f"w{i}" * (i % 7) for i in range(100_000)]
    numbers = list(range(200_000))
    metadata = [
        ("long", STRING, long),
        ("words", ARRAY, Array(STRING, words)),
        ("n", ARRAY, Array(U32, numbers)),
    ]
    file = opened(tmp_path, build(metadata, [Tensor("t", (4,))]).data)
    assert file.metadata == {"long": long, "words": words, "n": numbers}
    assert file.read("t") == Tensor("t", (4,)).content()


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    """A damaged token must not make the whole vocabulary unreadable: its bytes can be had back."""
    file = opened(tmp_path, build([("tokens", ARRAY, Array(STRING, [b"ok", b"\xff\xfe"]))]).data)
    ok, odd = file.metadata["tokens"]
    assert ok == "ok" and odd.encode("utf-8", "surrogateescape") == b"\xff\xfe"


@pytest.mark.parametrize("built", seeds())
def test_tensors(built: object, tmp_path: Path) -> None:
    """Against the reader of the `gguf` package, which accepts the same files (except nested arrays)."""
    file = opened(tmp_path, built.data)  # type: ignore[attr-defined]
    assert file.file_bytes == (tmp_path / "m.gguf").stat().st_size
    theirs = gguf.GGUFReader(tmp_path / "m.gguf")
    assert [t.name for t in file.tensors] == [t.name for t in theirs.tensors]
    for a, b in zip(file.tensors, theirs.tensors, strict=True):
        assert (a.type, a.offset, a.nbytes, a.shard) == (b.tensor_type.name, b.data_offset, b.n_bytes, 0)
        assert a.shape == tuple(int(d) for d in b.shape[::-1])
        assert file.read(a.name) == b.data.tobytes()
        assert file.dequantize(a.name).shape == a.shape


def test_default_and_largest_alignment(tmp_path: Path) -> None:
    tensors = [Tensor("a", (3,)), Tensor("b", (5,))]
    assert [t.offset % 32 for t in opened(tmp_path, build([], tensors).data).tensors] == [0, 0]
    big = build([("general.alignment", U32, 65536)], tensors, alignment=65536)
    assert [t.offset for t in opened(tmp_path, big.data).tensors] == [65536, 131072]


def test_path_and_repr(tmp_path: Path) -> None:
    data = build([], [Tensor("a", (3, 2))]).data
    file = opened(tmp_path, data)
    assert file.path == str(tmp_path / "m.gguf")
    assert repr(file.tensors[0]) == "TensorInfo('a', F32, (2, 3))"
    odd = os.fsencode(tmp_path) + b"/\xff.gguf"
    Path(os.fsdecode(odd)).write_bytes(data)
    assert os.fsencode(GgufFile(os.fsdecode(odd)).path) == odd


def test_arrays_outlive_the_file(tmp_path: Path) -> None:
    file = opened(
        tmp_path, build([], [Tensor("a", (1000,), data=np.arange(1000, dtype="<f4").tobytes())]).data
    )
    values = file.dequantize("a")
    del file
    gc.collect()
    assert np.array_equal(values, np.arange(1000, dtype=np.float32))


def test_reading_from_several_threads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"t{i}": rng.standard_normal(50_000).astype("<f4") for i in range(16)}
    tensors = [Tensor(name, (50_000,), data=a.tobytes()) for name, a in arrays.items()]
    file = opened(tmp_path, build([], tensors).data)
    with ThreadPoolExecutor(8) as pool:
        for name, values in pool.map(lambda n: (n, file.dequantize(n)), list(arrays) * 5):
            assert np.array_equal(values, arrays[name])


def test_file_that_shrinks_while_open(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    file = opened(tmp_path, build([], [Tensor("first", (64,)), Tensor("second", (4096,))]).data)
    second = file.tensors[1]
    os.truncate(path, second.offset + 100)
    assert len(file.read("first")) == 256
    for read in (file.read, file.dequantize):
        with pytest.raises(ModelFileError, match="became shorter while in use") as e:
            read("second")
        assert (e.value.offset, e.value.field) == (second.offset + 100, "tensor 'second'")


def test_absent_tensor(tmp_path: Path) -> None:
    file = opened(tmp_path, build([], [Tensor("a", (1,))]).data)
    for read in (file.read, file.dequantize):
        with pytest.raises(ModelFileError, match="no tensor 'b'") as e:
            read("b")
        assert (e.value.path, e.value.field) == (file.path, "b")
    assert not issubclass(ModelFileError, EngineError)


# Split models


def split(tmp_path: Path, parts: int = 3) -> list[Path]:
    writer = gguf.GGUFWriter(tmp_path / "model", "llama", split_max_tensors=2)
    writer.add_uint32("llama.context_length", 77)
    for i in range(2 * parts - 1):
        writer.add_tensor(f"t{i}", np.full((i + 1, 4), i, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = sorted(tmp_path.glob("model-*.gguf"))
    assert len(found) == parts
    return found


@pytest.mark.parametrize("start", [0, 1, 2])
def test_split_model_from_any_part(start: int, tmp_path: Path) -> None:
    paths = split(tmp_path)
    file = GgufFile(paths[start])
    assert file.path == str(paths[start])
    assert file.get("llama.context_length") == 77
    assert [(t.name, t.shard) for t in file.tensors] == [
        ("t0", 0),
        ("t1", 0),
        ("t2", 1),
        ("t3", 1),
        ("t4", 2),
    ]
    assert file.file_bytes == sum(p.stat().st_size for p in paths)
    for i in range(5):
        assert np.array_equal(file.dequantize(f"t{i}"), np.full((i + 1, 4), i, dtype=np.float32))


def refused(path: Path) -> ModelFileError:
    with pytest.raises(ModelFileError) as e:
        GgufFile(path)
    return e.value


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_split_model_lacks_a_part(lost: int, tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[lost].unlink()
    error = refused(paths[(lost + 1) % 3])
    assert f"part {lost + 1} of 3 is missing: expected {paths[lost]}" in str(error)


def test_split_model_renamed(tmp_path: Path) -> None:
    paths = split(tmp_path)
    other = paths[1].rename(tmp_path / "part2.gguf")
    assert "expected a name that ends like -00001-of-00003.gguf" in str(refused(other))
    for name in ("model-00002-of-00009.gguf", "model-00000-of-00003.gguf", "model-00004-of-00003.gguf"):
        other = other.rename(tmp_path / name)
        assert refused(other).field == "split.count"


def test_split_model_swapped(tmp_path: Path) -> None:
    one, two, _ = split(tmp_path)
    spare = one.rename(tmp_path / "spare")
    two.rename(one)
    spare.rename(two)
    error = refused(one)
    assert error.field == "split.no" and "renamed or belongs to another model" in str(error)


def part(number: int, count: int, total: int | None, names: list[str]) -> bytes:
    metadata = [("split.no", U32, number), ("split.count", U32, count)]
    if total is not None:
        metadata.append(("split.tensors.count", U32, total))
    return bytes(build(metadata, [Tensor(n, (1,)) for n in names]).data)


@pytest.mark.parametrize(
    ("first", "second", "field", "message"),
    [
        (
            part(0, 2, 3, ["a"]),
            part(1, 2, 3, ["b"]),
            "split.tensors.count",
            "expected 3 tensors in all parts, found 2",
        ),
        (part(0, 2, None, ["a"]), part(1, 2, 2, ["b"]), "split.tensors.count", "expected this key"),
        (part(0, 2, 2, ["a"]), part(1, 3, 2, ["b"]), "split.count", "expected 2, found 3"),
        (part(0, 2, 2, ["a"]), bytes(build([]).data), "split.count", "expected this key"),
        (
            part(0, 2, 2, ["a"]),
            part(1, 2, 2, ["a"]),
            "tensor 'a'",
            "an earlier part has a tensor of this name",
        ),
    ],
)
def test_split_model_inconsistent(
    first: bytes, second: bytes, field: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(first)
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(second)
    error = refused(path)
    assert error.field == field and message in str(error)


def test_split_count_must_be_a_number(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(build([("split.count", STRING, "2")]).data)
    assert refused(path).field == "split.count"


def test_name_of_a_part_alone_is_no_split(tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(build([], [Tensor("a", (1,))]).data)
    assert len(GgufFile(path).tensors) == 1


# Real models


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
def test_real_model(name: str, real_model: Callable[[str], Path]) -> None:
    path = real_model(name)
    file, theirs = GgufFile(path), Reader(path)
    for key, entry in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert file.metadata[key] == entry.contents(), key
    assert len(file.metadata) == len([k for k in theirs.fields if not k.startswith("GGUF.")])
    assert len(file.tensors) == len(theirs.tensors)
    decoded = set()
    for a, b in zip(file.tensors, theirs.tensors, strict=True):
        assert (a.name, a.type, a.offset, a.nbytes) == (b.name, b.tensor_type.name, b.data_offset, b.n_bytes)
        assert a.shape == tuple(int(d) for d in b.shape[::-1])
        if a.type in decoded or b.n_elements > 2_000_000:
            continue
        decoded.add(a.type)
        values = gguf.quants.dequantize(b.data, b.tensor_type).reshape(a.shape)
        assert np.array_equal(file.dequantize(a.name).view(np.uint32), values.view(np.uint32)), a.name
    assert len(decoded) >= 2


@pytest.mark.alone
def test_large_vocabulary_is_read_fast(real_model: Callable[[str], Path]) -> None:
    """262,144 tokens with scores and types. CPU time, so that a busy machine does not matter."""
    path = real_model("gemma-3-270m")
    seconds = []
    for _ in range(5):
        start = time.process_time()
        file = GgufFile(path)
        seconds.append(time.process_time() - start)
    assert len(file.get("tokenizer.ggml.tokens")) == 262_144
    assert min(seconds) < 0.1


def test_block_sizes_of_the_tests() -> None:
    for kind, sizes in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)] == sizes
    assert BLOCKS[TYPE_F32] == (1, 4)
