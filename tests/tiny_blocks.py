"""Random blocks of the tensor types that the gguf package can read but not make."""

from __future__ import annotations

import gguf
import numpy as np

Quant = gguf.GGMLQuantizationType

# Offsets of the float16 scale and minimum in a block, and the ratio of minimum to scale that centres
# the weights on zero.
SUPER_BLOCKS: dict[Quant, tuple[int, int | None, float]] = {
    Quant.Q2_K: (80, 82, 1.5),
    Quant.Q3_K: (108, None, 0.0),
    Quant.Q4_K: (0, 2, 7.5),
    Quant.Q5_K: (0, 2, 15.5),
    Quant.Q6_K: (208, None, 0.0),
    Quant.IQ4_NL: (0, None, 0.0),
    Quant.IQ4_XS: (0, None, 0.0),
}


def random_blocks(kind: Quant, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random blocks of ``kind`` whose weights have about the spread of a layer that keeps the size of
    what it multiplies."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    at, minimum_at, ratio = SUPER_BLOCKS[kind]
    data = rng.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)

    def set_scale(scale: float) -> None:
        data[..., at : at + 2] = np.array([scale], dtype=np.float16).view(np.uint8)
        if minimum_at is not None:
            minimum = np.array([scale * ratio], dtype=np.float16)
            data[..., minimum_at : minimum_at + 2] = minimum.view(np.uint8)

    set_scale(1.0)
    spread = gguf.quants.dequantize(data.reshape(shape[0], -1), kind).std()
    set_scale(float(shape[1] ** -0.5 / spread))
    return data.reshape(shape[0], -1)
