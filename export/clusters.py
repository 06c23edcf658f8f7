"""Balanced clusters of the rows of a vocabulary head, and the routers that score them.

FlashHead (arXiv 2603.14591) clusters by cosine with k-means. Here the rows are compared as real inputs
of the head see them: in the metric of the inputs' second moment, in which the difference of two rows
is the mean square of the difference of their logits. Recursive bisection at the median of the leading
direction gives clusters of one size in seconds. A router is not the mean of its rows: what should rank
the clusters is the largest logit in each, and a ridge regression fits that directly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]
Progress = Callable[[int], None]

DIRECTIONS = 160  # of the metric: the rest adds time and no agreement
POWER_STEPS = 6
UNIT = 16  # rows that every kernel reads together: the smallest cluster
ROTATED = 32  # low-rank axes turned together: a block of the quantised types


class Metric:
    """The second moment of ``states`` [n, dim], in the directions in which ``rows`` [vocab, dim] vary.

    With moment = R R^T, row . h = (row R) . (R^-1 h), and R^-1 h has the identity as second moment; the
    leading principal axes of the rows R then lose least of all logits. Rows are taken without their
    mean: it adds the same to every logit, and it would fill the first axis."""

    def __init__(self, rows: Matrix, states: Matrix) -> None:
        values, vectors = np.linalg.eigh((states.T @ states / len(states)).astype(np.float64))
        root = np.sqrt(np.maximum(values, values[-1] * 1e-9))
        image = (vectors * root).astype(np.float32)
        self._mean = rows.mean(0)
        gram = np.zeros((rows.shape[1], rows.shape[1]))
        for part in _blocks(len(rows)):
            y = (rows[part] - self._mean) @ image
            gram += y.T @ y
        axes = np.linalg.eigh(gram)[1][:, ::-1]
        self._to_rows = np.asarray((vectors * root) @ axes, np.float32)  # [dim, dim]
        self._to_states = np.asarray(axes.T @ (vectors / root).T, np.float32)

    def points(self, rows: Matrix, k: int) -> Matrix:
        """``rows`` in the ``k`` leading axes, [vocab, k]."""
        return self._in(rows, self._to_rows[:, :k])

    def low_rank(self, rows: Matrix, k: int) -> tuple[Matrix, Matrix]:
        """(points [vocab, k], projection [k, dim]): points @ (projection @ h) approximates rows @ h up to a
        number that is the same for all rows. Each block of axes is turned so that its axes vary alike:
        a block has one scale when it is quantised."""
        turn = np.kron(np.eye(k // ROTATED, dtype=np.float32), _hadamard(ROTATED))
        return self._in(rows, self._to_rows[:, :k] @ turn), turn.T @ self._to_states[:k]

    def _in(self, rows: Matrix, basis: Matrix) -> Matrix:
        return np.concatenate([(rows[part] - self._mean) @ basis for part in _blocks(len(rows))])


def _hadamard(n: int) -> Matrix:
    """The orthogonal matrix of entries +-1 / sqrt(n), n a power of 2."""
    result = np.ones((1, 1), np.float32)
    while len(result) < n:
        result = np.block([[result, result], [result, -result]])
    turned: Matrix = result / np.float32(np.sqrt(n))
    return turned


def bisect(points: Matrix, rng: np.random.Generator, progress: Progress) -> Ids:
    """The rows of ``points`` [n, k] in the order of units, [units * UNIT]; -1 is padding."""
    n = len(points)
    clusters = -(-n // UNIT)
    order = np.arange(n, dtype=np.int32)
    start = rng.standard_normal(points.shape[1], np.float32)
    todo = [(0, n, clusters)]
    while todo:
        lo, hi, count = todo.pop()
        if count == 1:
            progress(1)
            continue
        members = order[lo:hi]
        x = points[members]
        x -= x.mean(0)
        axis = start
        for _ in range(POWER_STEPS):
            axis = x.T @ (x @ axis)
            axis /= np.linalg.norm(axis) + 1e-30
        left = count // 2
        cut = left * UNIT
        order[lo:hi] = members[np.argpartition(x @ axis, cut - 1)]
        todo += [(lo, lo + cut, left), (lo + cut, hi, count - left)]
    return np.concatenate([order, np.full(clusters * UNIT - n, -1, np.int32)])


def cluster_logits(
    rows: Matrix, states: Matrix, tokens: Ids, together: int = 1
) -> Iterator[tuple[int, Matrix]]:
    """(first unit, logits [n, units, UNIT]) block by block, each but the last of a multiple of
    ``together`` units; padding is -inf."""
    least = UNIT * together
    step = max(1, 2**25 // len(states) // least) * least  # 128 MB of logits at a time
    for at in range(0, len(tokens), step):
        part = tokens[at : at + step]
        logits = states @ rows[np.maximum(part, 0)].T
        logits[:, part < 0] = -np.inf
        yield at // UNIT, logits.reshape(len(states), -1, UNIT)


def merge(values: Matrix, factor: int) -> Matrix:
    """The maximum over ``factor`` neighbours, [n, clusters] to [n, ceil(clusters / factor)]."""
    pad = -values.shape[1] % factor
    padded = np.pad(values, ((0, 0), (0, pad)), constant_values=-np.inf) if pad else values
    result: Matrix = padded.reshape(len(values), -1, factor).max(2)
    return result


def fit_routers(
    rows: Matrix,
    states: Matrix,
    tokens: Ids,
    factors: Sequence[int],
    ridge: float,
    progress: Progress,
) -> list[tuple[Matrix, Matrix]]:
    """For each of ``factors``, the routers [clusters, dim] and biases [clusters]
    of clusters of ``factor`` units: what predicts the largest logit in a cluster from the state with
    the least squared error plus ``ridge`` (a share of the states' mean square) times the routers' squares."""
    mean = states.mean(0)
    x = states - mean
    gram = (x.T @ x).astype(np.float64)
    gram[np.diag_indices_from(gram)] += ridge * np.trace(gram) / len(gram)
    counts = [-(-len(tokens) // (UNIT * f)) for f in factors]
    products = [np.empty((x.shape[1], n), np.float32) for n in counts]
    means = [np.empty(n, np.float32) for n in counts]
    for at, logits in cluster_logits(rows, states, tokens, math.lcm(*factors)):
        maxima = logits.max(2)
        for f, product, target in zip(factors, products, means, strict=True):
            merged = merge(maxima, f)
            where = slice(at // f, at // f + merged.shape[1])
            target[where] = merged.mean(0)
            product[:, where] = x.T @ merged  # x is centred, so the targets need not be
        progress(logits.shape[1])
    fitted = []
    for product, target in zip(products, means, strict=True):
        routers = np.linalg.solve(gram, product.astype(np.float64)).T.astype(np.float32)
        fitted.append((np.ascontiguousarray(routers), target - routers @ mean))
    return fitted


def _blocks(n: int, step: int = 32768) -> list[slice]:
    return [slice(at, at + step) for at in range(0, n, step)]
