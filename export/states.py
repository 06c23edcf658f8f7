"""The head's inputs on real text and on the model's own words, from the native engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from edgert import _native
from edgert.engines.native import NativeEngine

States = npt.NDArray[np.float32]
Progress = Callable[[int], None]

CONTEXT = 512
OWN_TOKENS = 48  # of a continuation
OWN_PREFIX = 24  # tokens of text it continues


class HeadInputs:
    """Runs a model for the sake of what its head sees: the residual after the last norm, [n, dim]."""

    def __init__(self, engine: NativeEngine, file: _native.GgufFile) -> None:
        self._model = engine._model
        self._norm = file.dequantize(engine.spec.output_norm)
        self._eps = engine.spec.norm_eps
        self._vocab = engine.vocab_size

    def of_text(self, pieces: Sequence[Sequence[int]], limit: int, progress: Progress) -> States:
        """States after each token but the last of each piece, at most ``limit`` of them."""
        states: list[States] = []
        count = 0
        for piece in pieces:
            tokens = list(piece[: CONTEXT + 1])[:-1][: limit - count]
            if not tokens:
                break
            cache = _native.Cache(self._model, len(tokens))
            states.append(self._normed(self._model.hidden(cache, np.asarray(tokens, np.int32))))
            count += len(tokens)
            progress(len(tokens))
        return np.concatenate(states)

    def of_own(
        self, prefixes: Sequence[Sequence[int]], rng: np.random.Generator, progress: Progress
    ) -> States:
        """States along one continuation of each prefix, by the whole head: every other greedy, the rest
        drawn at temperature 0.8. [len(prefixes), OWN_TOKENS, dim]."""
        rows = np.empty((len(prefixes), OWN_TOKENS, len(self._norm)), np.float32)
        for i, prefix in enumerate(prefixes):
            seed = int(rng.integers(2**63))
            sampler = _native.Sampler(self._vocab, temperature=0.8 if i % 2 else 0.0, seed=seed)
            tokens = list(prefix[:OWN_PREFIX])
            cache = _native.Cache(self._model, len(tokens) + OWN_TOKENS)
            state = self._model.hidden(cache, np.asarray(tokens, np.int32))[-1:]
            for j in range(OWN_TOKENS):
                rows[i, j] = state[0]
                token = sampler.sample(self._model.dense(state)[0], len(tokens) + j)
                if j + 1 < OWN_TOKENS:
                    state = self._model.hidden(cache, np.asarray([token], np.int32))
            progress(OWN_TOKENS)
        return self._normed(rows)

    def _normed(self, x: States) -> States:
        scale = 1 / np.sqrt(np.square(x).mean(-1, keepdims=True) + self._eps)
        result: States = x * scale * self._norm
        return result
