"""Float matrices to the two GGUF types a sidecar uses, in GGUF's own layout.

A row is blocks of 32 values: an f16 scale d, then the codes. Q8_0: int8, value = d * code. Q4_0: nibbles,
value = d * (code - 8); byte j holds value j in its low and value j + 16 in its high half.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]

BLOCK = 32
# Scales tried for Q4_0, as the code the largest value of a block is given: -8 itself and beside it.
_TRIED = np.linspace(-9.0, -6.0, 13, dtype=np.float32)


def q8_0(x: Matrix) -> Codes:
    """``x`` [rows, cols], cols a multiple of 32, as bytes [rows, cols / 32 * 34]."""
    blocks = x.reshape(-1, BLOCK)
    d = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
    codes = np.clip(np.rint(blocks * _inverse(d)), -127, 127).astype(np.int8)
    return np.concatenate([d.view(np.uint8), codes.view(np.uint8)], 1).reshape(len(x), -1)


def q4_0(x: Matrix) -> Codes:
    """``x`` [rows, cols], cols a multiple of 32, as bytes [rows, cols / 32 * 18]. Of several scales a block
    takes the one with the least squared error."""
    out = np.empty((len(x), x.shape[1] // BLOCK * 18), np.uint8)
    step = max(1, 2**22 // x.shape[1])  # rows at a time: a dozen temporaries of this size exist at once
    for at in range(0, len(x), step):
        out[at : at + step] = _q4_0(x[at : at + step])
    return out


def remedies(moment: Matrix) -> Matrix:
    """What :func:`q4_0_for` wants to know of the vectors that the rows will meet, upper triangular [cols,
    cols], of their second moment ``moment`` [cols, cols]."""
    cols = len(moment)
    damped = moment.astype(np.float64)
    damped[np.diag_indices(cols)] += 0.01 * max(np.trace(damped) / cols, 1e-30)
    factor: Matrix = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
    return factor


def q4_0_for(x: Matrix, factor: Matrix) -> Codes:
    """Like :func:`q4_0`, for rows that will meet vectors for which :func:`remedies` gave ``factor``: each
    column is rounded in turn and what that costs is made good in the columns to come (GPTQ, arXiv
    2210.17323), so that the products suffer least, not the entries."""
    cols = x.shape[1]
    rest = x.copy()
    out = np.empty((len(x), cols // BLOCK, 18), np.uint8)
    for at in range(0, cols, BLOCK):
        block = rest[:, at : at + BLOCK].copy()
        d = _best_scales(block)
        wide, codes = d.astype(np.float32)[:, 0], np.empty(block.shape, np.uint8)
        errors = np.empty_like(block)
        for i in range(BLOCK):
            code = _codes(block[:, i : i + 1], d)[:, 0]
            codes[:, i] = code
            errors[:, i] = (block[:, i] - (code - 8) * wide) / factor[at + i, at + i]
            block[:, i + 1 :] -= np.outer(errors[:, i], factor[at + i, at + i + 1 : at + BLOCK])
        rest[:, at + BLOCK :] -= errors @ factor[at : at + BLOCK, at + BLOCK :]
        out[:, at // BLOCK] = _packed(d, codes)
    return out.reshape(len(x), -1)


def _q4_0(x: Matrix) -> Codes:
    blocks = x.reshape(-1, BLOCK)
    d = _best_scales(blocks)
    return _packed(d, _codes(blocks, d).astype(np.uint8)).reshape(len(x), -1)


def _packed(d: npt.NDArray[np.float16], codes: Codes) -> Codes:
    return np.concatenate([d.view(np.uint8), codes[:, :16] | codes[:, 16:] << 4], 1)


def _best_scales(blocks: Matrix) -> npt.NDArray[np.float16]:
    """The scale tried that gives each of ``blocks`` [n, 32] the least squared error, [n, 1]."""
    top = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    best_d = np.zeros((len(blocks), 1), np.float16)
    best_error = np.full((len(blocks), 1), np.inf, np.float32)
    for code in _TRIED:
        d = (top / code).astype(np.float16)
        error = blocks - (_codes(blocks, d) - 8) * d.astype(np.float32)
        error = np.square(error).sum(1, keepdims=True)
        better = error < best_error
        best_d, best_error = np.where(better, d, best_d), np.where(better, error, best_error)
    return best_d


def _codes(blocks: Matrix, d: npt.NDArray[np.float16]) -> Matrix:
    codes: Matrix = np.clip(np.rint(blocks * _inverse(d)) + 8, 0, 15)
    return codes


def _inverse(d: npt.NDArray[np.float16]) -> Matrix:
    wide = d.astype(np.float32)
    return np.divide(1, wide, out=np.zeros_like(wide), where=wide != 0)


def dequantise(codes: Codes, type: str, cols: int) -> Matrix:
    """What ``codes`` of :func:`q4_0` or :func:`q8_0` stand for, [rows, cols]."""
    size = 18 if type == "Q4_0" else 34
    blocks = codes.reshape(-1, size)
    d = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    if type == "Q8_0":
        values = np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32)
    else:
        values = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1).astype(np.float32) - 8
    return (values * d).reshape(-1, cols)
