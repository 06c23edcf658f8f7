"""Balanced clusters of the rows of a vocabulary head, and the routers that score them.

FlashHead (arXiv 2603.14591) clusters by cosine with k-means. Here the rows are compared as real inputs
of the head see them: in the metric of the inputs' second moment, in which the difference of two rows
is the mean square of the difference of their logits. Recursive bisection at the median of the leading
direction gives clusters of one size in seconds. A router is not the mean of its rows: what should rank
the clusters is the largest logit in each, and a ridge regression fits that directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]
Progress = Callable[[int], None]

DIRECTIONS = 160  # of the metric: the rest adds time and no agreement
POWER_STEPS = 6


class Metric:
    """The second moment of ``states`` [n, dim], in the directions in which ``rows`` [vocab, dim] vary.

    With moment = R R^T, row . h = (row R) . (R^-1 h), and R^-1 h has the identity as second moment; the
    leading principal axes of the rows R then lose least of all logits."""

    def __init__(self, rows: Matrix, states: Matrix) -> None:
        values, vectors = np.linalg.eigh((states.T @ states / len(states)).astype(np.float64))
        root = np.sqrt(np.maximum(values, values[-1] * 1e-9))
        image = (vectors * root).astype(np.float32)
        gram = np.zeros((rows.shape[1], rows.shape[1]))
        for part in _blocks(len(rows)):
            y = rows[part] @ image
            gram += y.T @ y
        axes = np.linalg.eigh(gram)[1][:, ::-1]
        self._to_rows = (vectors * root) @ axes  # [dim, dim]
        self._to_states = axes.T @ (vectors / root).T

    def points(self, rows: Matrix, k: int) -> Matrix:
        """``rows`` in the ``k`` leading axes, [vocab, k]."""
        basis = self._to_rows[:, :k].astype(np.float32)
        return np.concatenate([rows[part] @ basis for part in _blocks(len(rows))])

    def projection(self, k: int) -> Matrix:
        """[k, dim]: points(rows, k) @ (projection(k) @ h) approximates rows @ h."""
        return self._to_states[:k].astype(np.float32)


def bisect(points: Matrix, size: int, rng: np.random.Generator, progress: Progress) -> Ids:
    """The rows of ``points`` [n, k] in cluster order, [clusters * size]; -1 pads the last cluster."""
    n = len(points)
    clusters = -(-n // size)
    order = np.arange(n, dtype=np.int32)
    start = rng.standard_normal(points.shape[1]).astype(np.float32)
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
        cut = left * size
        order[lo:hi] = members[np.argpartition(x @ axis, cut - 1)]
        todo += [(lo, lo + cut, left), (lo + cut, hi, count - left)]
    return np.concatenate([order, np.full(clusters * size - n, -1, np.int32)])


def cluster_maxima(rows: Matrix, states: Matrix, tokens: Ids, size: int, progress: Progress) -> Matrix:
    """The largest logit in each cluster for each state, [n, clusters]."""
    out = np.empty((len(states), len(tokens) // size), np.float32)
    for at, logits in cluster_logits(rows, states, tokens, size):
        out[:, at : at + logits.shape[1]] = logits.max(2)
        progress(logits.shape[1])
    return out


def cluster_logits(rows: Matrix, states: Matrix, tokens: Ids, size: int) -> Iterator[tuple[int, Matrix]]:
    """(first cluster, logits [n, clusters, size]) block by block; padding is -inf."""
    step = max(1, 2**25 // len(states) // size) * size  # 128 MB of logits at a time
    for at in range(0, len(tokens), step):
        part = tokens[at : at + step]
        logits = states @ rows[np.maximum(part, 0)].T
        logits[:, part < 0] = -np.inf
        yield at // size, logits.reshape(len(states), -1, size)


def fit_routers(states: Matrix, maxima: Matrix, ridge: float) -> tuple[Matrix, Matrix]:
    """Routers [clusters, dim] and biases [clusters] that predict ``maxima`` [n, clusters] from ``states``
    [n, dim] with the least squared error plus ``ridge`` (a share of the states' mean square) times the
    routers' squares."""
    mean, target = states.mean(0), maxima.mean(0)
    x = states - mean
    gram = x.T @ x
    gram[np.diag_indices_from(gram)] += ridge * np.trace(gram) / len(gram)
    routers = np.linalg.solve(gram.astype(np.float64), (x.T @ (maxima - target)).astype(np.float64))
    routers = routers.astype(np.float32)
    bias = (target - mean @ routers).astype(np.float32)
    return np.ascontiguousarray(routers.T), bias


def _blocks(n: int, step: int = 32768) -> list[slice]:
    return [slice(at, at + step) for at in range(0, n, step)]
