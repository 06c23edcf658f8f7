"""Dequantisation against the `gguf` package, bit for bit."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from edgert._native import GgufFile

TYPES = [
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ4_NL", "IQ4_XS", "MXFP4",
]  # fmt: skip

# Byte offsets in a block where a float16 scale or minimum lies.
SCALES = {
    "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip


def sizes(name: str) -> tuple[int, int]:
    """Elements and bytes of a block."""
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]


def both(path: Path, name: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tensor with the bytes `rows` (uint8, [rows, bytes]) as the core and as `gguf` decode it."""
    kind = gguf.GGMLQuantizationType[name]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = GgufFile(str(path)).dequantize("t")
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(rows, kind)
    return ours, np.asarray(theirs).reshape(ours.shape)


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    nan = np.isnan(theirs)
    assert np.array_equal(np.isnan(ours), nan)
    a, b = ours[~nan].view(np.uint32), theirs[~nan].view(np.uint32)
    assert np.array_equal(a, b), f"{np.count_nonzero(a != b)} of {a.size} values differ"


@pytest.mark.parametrize("name", TYPES)
def test_random_bytes(name: str, tmp_path: Path) -> None:
    """Any bytes, so scales that are infinite, NaN, negative and subnormal as well."""
    _, nbytes = sizes(name)
    rows = np.random.default_rng(1).integers(0, 256, (37, 64 * nbytes), dtype=np.uint8)
    ours, theirs = both(tmp_path / "t.gguf", name, rows)
    assert np.isfinite(theirs).mean() > 0.5
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("name", sorted(SCALES))
def test_every_half_as_scale(name: str, tmp_path: Path) -> None:
    """All 65,536 float16 values, zeros of both signs, subnormals and infinities among them."""
    _, nbytes = sizes(name)
    halves = np.arange(65536, dtype=np.uint16).view(np.uint8).reshape(-1, 2)
    blocks = np.random.default_rng(2).integers(0, 256, (65536, nbytes), dtype=np.uint8)
    if nbytes > 80:  # a super block: a quarter of the values is plenty
        blocks, halves = blocks[::4], halves[::4]
    for i, at in enumerate(SCALES[name]):
        blocks[:, at : at + 2] = np.roll(halves, 1000 * i, axis=0)
    assert_same_bits(*both(tmp_path / "t.gguf", name, blocks.reshape(64, -1)))


def test_every_half_and_bfloat16(tmp_path: Path) -> None:
    values = np.arange(65536, dtype=np.uint16).view(np.uint8).reshape(16, -1)
    for name in ("F16", "BF16"):
        assert_same_bits(*both(tmp_path / f"{name}.gguf", name, values))


def test_every_mxfp4_exponent(tmp_path: Path) -> None:
    blocks = np.random.default_rng(3).integers(0, 256, (256, 17), dtype=np.uint8)
    blocks[:, 0] = np.arange(256)
    assert_same_bits(*both(tmp_path / "t.gguf", "MXFP4", blocks))


@pytest.mark.parametrize("name", TYPES)
def test_types_table(name: str, tmp_path: Path) -> None:
    block, nbytes = sizes(name)
    ours, _ = both(tmp_path / "t.gguf", name, np.zeros((3, 5 * nbytes), np.uint8))
    (info,) = GgufFile(str(tmp_path / "t.gguf")).tensors
    assert (info.type, info.shape, info.nbytes) == (name, (3, 5 * block), 15 * nbytes)
    assert ours.shape == info.shape and ours.dtype == np.float32


def test_longer_than_a_chunk(tmp_path: Path) -> None:
    """The core reads and decodes a large tensor in pieces."""
    rows = np.random.default_rng(4).integers(0, 256, (3000, 5 * 210), dtype=np.uint8)
    assert_same_bits(*both(tmp_path / "t.gguf", "Q6_K", rows))
