"""GGUF files byte by byte, with a map of where each number lies, so that tests can break one on purpose."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = {
    U8: "B",
    I8: "b",
    U16: "H",
    I16: "h",
    U32: "I",
    I32: "i",
    F32: "f",
    BOOL: "B",
    U64: "Q",
    I64: "q",
    F64: "d",
}
TYPE_F32, TYPE_F16, TYPE_Q4_0, TYPE_Q8_0, TYPE_Q4_K, TYPE_MXFP4 = 0, 1, 2, 8, 12, 39
# Elements and bytes of a block.
BLOCKS = {
    TYPE_F32: (1, 4),
    TYPE_F16: (1, 2),
    TYPE_Q4_0: (32, 18),
    TYPE_Q8_0: (32, 34),
    TYPE_Q4_K: (256, 144),
    TYPE_MXFP4: (32, 17),
}


@dataclass
class Array:
    """A metadata array: its element type and values (arrays again if that is ARRAY)."""

    type: int
    values: Sequence[Any]


@dataclass
class Tensor:
    name: str | bytes
    dims: tuple[int, ...]  # GGUF order, the contiguous one first
    type: int = TYPE_F32
    data: bytes | None = None  # None: bytes counted up
    offset: int | None = None  # None: after the tensor before it

    def content(self) -> bytes:
        if self.data is not None:
            return self.data
        block, nbytes = BLOCKS.get(self.type, (1, 1))
        n = nbytes
        for d in self.dims:
            n *= d
        return bytes(i * 7 % 251 for i in range(n // block))


@dataclass
class Number:
    """A number in the file that the reader depends on."""

    label: str
    offset: int
    format: str  # of struct, one letter


@dataclass
class Built:
    data: bytearray = field(default_factory=bytearray)
    numbers: list[Number] = field(default_factory=list)

    def put(self, label: str, fmt: str, value: Any) -> None:
        self.numbers.append(Number(label, len(self.data), fmt))
        self.data += struct.pack("<" + fmt, value)

    def put_string(self, label: str, text: str | bytes) -> None:
        raw = text if isinstance(text, bytes) else text.encode()
        self.put(f"{label}.length", "Q", len(raw))
        self.data += raw

    def put_value(self, label: str, kind: int, value: Any) -> None:
        if kind == STRING:
            self.put_string(label, value)
        elif kind == ARRAY:
            self.put(f"{label}.element_type", "I", value.type)
            self.put(f"{label}.count", "Q", len(value.values))
            for i, v in enumerate(value.values):
                self.put_value(f"{label}[{i}]", value.type, v)
        else:
            self.put(label, FORMATS[kind], value)

    def at(self, label: str) -> int:
        """The offset of the number called `label`."""
        return next(n.offset for n in self.numbers if n.label == label)

    def change(self, label: str, value: int) -> bytes:
        """A copy of the file with one number changed."""
        number = next(n for n in self.numbers if n.label == label)
        copy = bytearray(self.data)
        struct.pack_into("<" + number.format, copy, number.offset, value)
        return bytes(copy)


def build(
    metadata: Sequence[tuple[str | bytes, int, Any]],
    tensors: Sequence[Tensor] = (),
    *,
    version: int = 3,
    alignment: int = 32,
) -> Built:
    """A file. `alignment` only places the data; the key general.alignment is up to `metadata`."""
    b = Built()
    b.data += b"GGUF"
    b.put("version", "I", version)
    b.put("tensor_count", "Q", len(tensors))
    b.put("kv_count", "Q", len(metadata))
    for i, (key, kind, value) in enumerate(metadata):
        b.put_string(f"kv{i}.key", key)
        b.put(f"kv{i}.type", "I", kind)
        b.put_value(f"kv{i}", kind, value)
    at = 0
    for i, t in enumerate(tensors):
        b.put_string(f"tensor{i}.name", t.name)
        b.put(f"tensor{i}.n_dims", "I", len(t.dims))
        for j, d in enumerate(t.dims):
            b.put(f"tensor{i}.dim{j}", "Q", d)
        b.put(f"tensor{i}.type", "I", t.type)
        b.put(f"tensor{i}.offset", "Q", at if t.offset is None else t.offset)
        at += -(-len(t.content()) // alignment) * alignment
    for t in tensors:
        b.data += bytes(-len(b.data) % alignment) + t.content()
    return b


MODEL_METADATA: list[tuple[str | bytes, int, Any]] = [
    ("general.architecture", STRING, "llama"),
    ("general.alignment", U32, 64),
    ("llama.context_length", U32, 8192),
    ("llama.rope.freq_base", F32, 10000.0),
    ("tokenizer.ggml.tokens", ARRAY, Array(STRING, ["<s>", "</s>", "é", "\u2581the", "", "🙂"])),
    ("tokenizer.ggml.scores", ARRAY, Array(F32, [0.0, -1.5, 2.0, 3.0, 4.0, 5.0])),
    ("tokenizer.ggml.token_type", ARRAY, Array(I32, [3, 3, 1, 1, 1, 1])),
    ("tokenizer.ggml.add_bos_token", BOOL, 1),
]

EVERY_TYPE: list[tuple[str | bytes, int, Any]] = [
    ("u8", U8, 255), ("i8", I8, -128), ("u16", U16, 65535), ("i16", I16, -32768), ("u32", U32, 2**32 - 1),
    ("i32", I32, -(2**31)), ("f32", F32, 0.5), ("bool", BOOL, 1), ("string", STRING, "grüß"),
    ("u64", U64, 2**64 - 1), ("i64", I64, -(2**63)), ("f64", F64, 0.1),
    *[(f"a{kind}", ARRAY, Array(kind, [1, 0, 1])) for kind in FORMATS],
    ("strings", ARRAY, Array(STRING, ["a", "", "ccc"])),
    ("empty", ARRAY, Array(STRING, [])),
    ("nested", ARRAY,
     Array(ARRAY, [Array(U8, [1, 2]), Array(ARRAY, [Array(STRING, ["x"])]), Array(BOOL, [])])),
]  # fmt: skip


def seeds() -> list[Built]:
    """Small good files that between them hold every part of the format, in both versions."""
    tensors = [
        Tensor("token_embd.weight", (32, 6), TYPE_Q8_0),
        Tensor("blk.0.attn_q.weight", (64, 2), TYPE_Q4_0),
        Tensor("blk.0.ffn.weight", (256, 1), TYPE_Q4_K),
        Tensor("blk.0.norm.weight", (8,), TYPE_F32),
        Tensor("experts", (32, 2, 2, 2), TYPE_MXFP4),
        Tensor("half", (3, 5), TYPE_F16),
    ]
    return [
        b
        for version in (2, 3)
        for b in (
            build(MODEL_METADATA, tensors, version=version, alignment=64),
            build(EVERY_TYPE, tensors[3:4], version=version),
            build(MODEL_METADATA[:1], version=version),
            build([], version=version),
        )
    ]
