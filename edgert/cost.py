"""What a decode step must read: the bytes of a model by part, and of its KV cache by length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from edgert.errors import UsageError
from edgert.models.spec import ModelSpec

KV_ELEMENT_BYTES = {"f16": 2.0, "q8": 34 / 32, "f32": 4.0}  # q8: 32 codes and a scale; f32: ONNX Runtime
KV_CHANNELS = {"f16": 1, "q8": 32}  # what the channels of a head must be a multiple of


def check_kv(spec: ModelSpec, kv: str) -> None:
    """Raises UsageError when the heads of a model do not fit the type of keys and values."""
    if spec.head_dim % KV_CHANNELS[kv]:
        raise UsageError(
            f"kv={kv!r} needs heads of a multiple of {KV_CHANNELS[kv]} channels, this model's have "
            f"{spec.head_dim}: use kv='f16'"
        )


class SizedTensor(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class WeightBytes:
    """Bytes in the file. A tied model's one matrix counts under ``embedding``, and ``head`` is 0."""

    body: int
    embedding: int
    head: int

    @property
    def tied(self) -> bool:
        return self.head == 0

    @property
    def total(self) -> int:
        return self.body + self.embedding + self.head

    @property
    def per_token(self) -> int:
        """What one decode step reads: the body, and the matrix that serves as head. Of an embedding
        matrix of its own it reads one row, which is left out."""
        return self.body + (self.embedding if self.tied else self.head)


def weight_bytes(tensors: Iterable[SizedTensor]) -> WeightBytes:
    """Sizes by part, from the GGUF names of the tensors."""
    body = embedding = head = 0
    for tensor in tensors:
        if tensor.name == "token_embd.weight":
            embedding += tensor.nbytes
        elif tensor.name == "output.weight":
            head += tensor.nbytes
        else:
            body += tensor.nbytes
    return WeightBytes(body, embedding, head)


def page_bytes(spec: ModelSpec, kv: str, heads: int) -> int:
    """Bytes of a page of the disk tier: keys and values of 16 tokens in so many KV heads of all layers."""
    return round(16 * 2 * heads * spec.head_dim * KV_ELEMENT_BYTES[kv])


def kv_bytes(spec: ModelSpec, positions: float, kv: str = "f16") -> float:
    """Bytes of keys and values that a step reads with ``positions`` in the cache; a sliding-window
    layer reads its window at most."""
    element = KV_ELEMENT_BYTES[kv]
    return sum(
        2 * layer.n_kv_heads * spec.head_dim * element * min(positions, layer.window or positions)
        for layer in spec.layers
        if layer.kind == "attention"
    )
