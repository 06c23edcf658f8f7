"""What the matrices of a model meet: the second moments of the inputs of its products, on calibration text.

They are what rounding to four bits goes by (``export/quantise.py``). The model runs in float32, one layer
after the other, over all of the text, and only the weights and moments of that layer are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from edgert.export.calibration_text import Domain, load_domains
from edgert.export.quantise import Matrix
from edgert.export.torch_decoder import TorchDecoder
from torch import Tensor

from edgert import _native
from edgert.tokenizer import Tokenizer

MAIN = ("prose", "code", "chat")  # half of the text
TOKENS_MAIN, TOKENS_OTHER = 1000, 200  # of a domain
LONGEST = 256  # tokens of a piece
_SHARED = ("attn_k", "attn_v", "ffn_up")  # these have the input of attn_q and of ffn_gate


class Moments:
    """Of the GGUF model ``file``. Raises ModelFileError for a damaged one."""

    def __init__(self, file: _native.GgufFile) -> None:
        self._decoder = _Watched(file)
        tokenizer, vocab = Tokenizer.from_gguf(file.metadata), self._decoder.spec.vocab_size
        pieces = [piece for domain in load_domains(tokenizer) for piece in _some(domain)]
        with torch.no_grad():
            self._streams = [
                self._decoder.embed(torch.tensor([[t for t in piece if t < vocab]])) for piece in pieces
            ]
        self._decoder.forget()
        self._layers = 0  # that have run

    def of(self, name: str) -> Matrix:
        """The mean of x x^T, [cols, cols], over the inputs x of the product with the matrix ``name`` of a
        layer. Layers are to be asked for in their order."""
        layer = int(name.split(".")[1])
        while self._layers <= layer:
            self._run(self._layers)
            self._layers += 1
        total: Matrix = self._decoder.moments[name].numpy()
        mean: Matrix = total / np.float32(sum(stream.shape[1] for stream in self._streams))
        return mean

    @torch.no_grad()
    def _run(self, layer: int) -> None:
        self._decoder.forget()
        self._streams = [self._decoder.layer(layer, stream) for stream in self._streams]


class _Watched(TorchDecoder):
    """Sums x x^T of the inputs x of every product. Weights are read when they are wanted."""

    def _weights(self, file: _native.GgufFile) -> Mapping[str, Tensor]:
        self.moments: dict[str, Tensor] = {}
        self._read = _OnDemand(file, list(self.spec.tensor_shapes()))
        return self._read

    def forget(self) -> None:
        """Weights and moments so far."""
        self._read.there.clear()
        self.moments.clear()

    def _linear(self, x: Tensor, name: str) -> Tensor:
        if not name.endswith(_SHARED):
            flat, key = x.flatten(0, -2), name + ".weight"
            self.moments[key] = self.moments.get(key, 0) + flat.T @ flat
        return super()._linear(x, name)


class _OnDemand(Mapping[str, Tensor]):
    def __init__(self, file: _native.GgufFile, names: list[str]) -> None:
        self._file, self._names = file, names
        self.there: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if name not in self.there:
            self.there[name] = torch.from_numpy(self._file.dequantize(name))
        return self.there[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _some(domain: Domain) -> Iterator[list[int]]:
    left = TOKENS_MAIN if domain.name in MAIN else TOKENS_OTHER
    for piece in domain.fit:
        if left <= 0:
            return
        cut = piece[: min(LONGEST, max(left, 2))]
        left -= len(cut)
        yield cut
