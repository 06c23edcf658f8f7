"""Thousands of broken files, always the same ones, opened in a process of little address space: each
must open or be refused with one of the two errors for files. No crash, no hang, no other exception,
and no more memory than such small files justify."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf_files import STRING, Array, Built, Tensor, build, seeds

from edgert._native import GgufFile
from edgert.errors import ModelFileError, UnsupportedModelError

CHILD = Path(__file__).parent / "gguf_fuzz_child.py"
Case = tuple[str, bytes]


def edges(number_bits: int, old: int, file_bytes: int) -> set[int]:
    """Values near which a check can be off by one or a product can overflow."""
    top = 2**number_bits
    values = {
        0,
        1,
        2,
        3,
        5,
        8,
        13,
        32,
        33,
        256,
        top - 1,
        top // 2,
        top // 2 - 1,
        top // 4,
        top // 8,
        top - 32,
    }
    values |= {old - 1, old + 1, old * 2, old + 32, old * 256, file_bytes, file_bytes - 1, file_bytes // 8}
    return {v for v in values if 0 <= v < top and v != old}


def one_number(name: str, built: Built) -> Iterator[Case]:
    """Each count, length, type, dimension, offset and value of the file at each edge."""
    for n in built.numbers:
        if n.format in "fd":
            continue
        bits = 8 * struct.calcsize(n.format)
        (old,) = struct.unpack_from("<" + n.format.upper(), built.data, n.offset)
        for value in sorted(edges(bits, old, len(built.data))):
            copy = bytearray(built.data)
            copy[n.offset : n.offset + bits // 8] = value.to_bytes(bits // 8, "little")
            yield f"{name} {n.label}={value}", bytes(copy)


def random_damage(name: str, built: Built, count: int, rng: random.Random) -> Iterator[Case]:
    """Several faults at once: numbers, bytes, parts of the file doubled, dropped or moved."""
    for i in range(count):
        data = bytearray(built.data)
        for _ in range(rng.randint(1, 4)):
            kind = rng.randrange(5)
            a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
            if kind == 0:
                n = rng.choice(built.numbers)
                size = struct.calcsize(n.format)
                data[n.offset : n.offset + size] = rng.randbytes(size) if rng.random() < 0.5 else bytes(size)
            elif kind == 1 and data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            elif kind == 2:
                del data[a : min(b, a + 40)]
            elif kind == 3:
                data[a:a] = data[a : min(b, a + 40)]
            else:
                data[a : min(b, a + 8)] = bytes([rng.choice([0, 1, 0x7F, 0x80, 0xFF])]) * 8
        yield f"{name} damage {i}", bytes(data)


def cases() -> Iterator[Case]:
    rng = random.Random(20260101)
    built = seeds()
    assert len(built) == 8  # the child takes its first reading of memory after them
    for i, b in enumerate(built):
        yield f"seed {i}", bytes(b.data)
    for i, b in enumerate(built):
        for n in range(0, len(b.data), max(1, len(b.data) // 60)):
            yield f"seed {i} cut at {n}", bytes(b.data[:n])
        yield from one_number(f"seed {i}", b)
        yield from random_damage(f"seed {i}", b, 150, rng)
    # Larger files, whose header does not fit the buffer of the reader.
    words = [f"word {i}" * (i % 9) for i in range(20_000)]
    large = build([("w", 9, Array(STRING, words))], [Tensor(f"t{i}", (32, 3), 8) for i in range(300)])
    yield from random_damage("large", large, 40, rng)


def run(cases: list[Case], tmp_path: Path) -> dict[str, float]:
    bundle = tmp_path / "cases"
    with bundle.open("wb") as f:
        for name, data in cases:
            f.write(struct.pack("<I", len(name)) + name.encode() + struct.pack("<I", len(data)) + data)
    done = subprocess.run(
        [sys.executable, str(CHILD), str(bundle)], capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode != 0:
        pytest.fail(
            f"exit {done.returncode}; the end of its log:\n" + "\n".join(done.stderr.splitlines()[-20:])
        )
    result: dict[str, float] = json.loads(done.stdout)
    return result


def test_broken_files(tmp_path: Path) -> None:
    everything = list(cases())
    result = run(everything, tmp_path)
    assert len(everything) >= 2000
    assert result["opened"] + result["ModelFileError"] + result["UnsupportedModelError"] == len(everything)
    # The files are neither all sound nor all broken at their first byte.
    assert result["opened"] > 100 and result["ModelFileError"] > 1000 and result["UnsupportedModelError"] > 20
    # Most files have under 5 kB, the largest 700 kB: about 4 times that in the core, then Python's copy.
    assert result["grown"] < 16 << 20
    assert result["slowest"] < 2


def test_broken_parts(tmp_path: Path) -> None:
    """Two parts of a split model, one of them broken, opened through either."""
    parts = [
        build(
            [("split.no", 2, i), ("split.count", 2, 2), ("split.tensors.count", 5, 3)],
            [Tensor(f"t{i}", (4,)), Tensor("last", (2, 2))][: 2 - i],
        )
        for i in range(2)
    ]
    paths = [tmp_path / f"m-0000{i + 1}-of-00002.gguf" for i in range(2)]
    outcome = {True: 0, False: 0}
    for broken in range(2):
        paths[1 - broken].write_bytes(parts[1 - broken].data)
        rng = random.Random(broken)
        for i, (_, data) in enumerate(
            [*one_number("", parts[broken]), *random_damage("", parts[broken], 200, rng)]
        ):
            paths[broken].write_bytes(data)
            try:
                opened = GgufFile(paths[i % 2])
                outcome[True] += sum(len(opened.read(t.name)) == t.nbytes for t in opened.tensors) > 0
            except (ModelFileError, UnsupportedModelError):
                outcome[False] += 1
    assert outcome[True] > 20 and outcome[False] > 500


def test_harness_notices_memory_and_other_errors(tmp_path: Path) -> None:
    """A file that honestly needs more than the limit ends the child with an error, so nothing is hidden."""
    big = build([], [Tensor("t", (2**25,), data=bytes(2**27))])
    with pytest.raises(pytest.fail.Exception, match="MemoryError"):
        run([("big", bytes(big.data))], tmp_path)
