"""Balanced clusters of the rows of a vocabulary head, and the routers that score them.

FlashHead (arXiv 2603.14591) clusters by cosine with k-means. Here the rows are compared as real inputs
of the head see them: in the metric of the inputs' second moment, in which the difference of two rows
is the mean square of the difference of their logits. Recursive bisection at the median of the leading
direction gives clusters of one size in seconds. A router is not the mean of its rows: what should rank
the clusters is the largest logit in each, and a ridge regression fits that directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]
Progress = Callable[[int], None]

DIRECTIONS = 160  # of the metric: the rest adds time and no agreement
POWER_STEPS = 6
MERGED = 4  # clusters that may be taken together as one larger cluster


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
        self._to_rows = np.asarray((vectors * root) @ axes, np.float32)  # [dim, dim]
        self._to_states = np.asarray(axes.T @ (vectors / root).T, np.float32)

    def points(self, rows: Matrix, k: int) -> Matrix:
        """``rows`` in the ``k`` leading axes, [vocab, k]."""
        basis = self._to_rows[:, :k]
        return np.concatenate([rows[part] @ basis for part in _blocks(len(rows))])

    def projection(self, k: int) -> Matrix:
        """[k, dim]: points(rows, k) @ (projection(k) @ h) approximates rows @ h."""
        return np.ascontiguousarray(self._to_states[:k])


def bisect(points: Matrix, size: int, rng: np.random.Generator, progress: Progress) -> Ids:
    """The rows of ``points`` [n, k] in cluster order, [clusters * size]; -1 pads the last cluster."""
    n = len(points)
    clusters = -(-n // size)
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
        cut = left * size
        order[lo:hi] = members[np.argpartition(x @ axis, cut - 1)]
        todo += [(lo, lo + cut, left), (lo + cut, hi, count - left)]
    return np.concatenate([order, np.full(clusters * size - n, -1, np.int32)])


def cluster_logits(rows: Matrix, states: Matrix, tokens: Ids, size: int) -> Iterator[tuple[int, Matrix]]:
    """(first cluster, logits [n, clusters, size]) block by block, multiples of :data:`MERGED` clusters but
    for the last; padding is -inf."""
    unit = size * MERGED
    step = max(1, 2**25 // len(states) // unit) * unit  # 128 MB of logits at a time
    for at in range(0, len(tokens), step):
        part = tokens[at : at + step]
        logits = states @ rows[np.maximum(part, 0)].T
        logits[:, part < 0] = -np.inf
        yield at // size, logits.reshape(len(states), -1, size)


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
    size: int,
    factors: Sequence[int],
    ridge: float,
    progress: Progress,
) -> list[tuple[Matrix, Matrix]]:
    """For each of ``factors`` (divisors of :data:`MERGED`), the routers [clusters, dim] and biases [clusters]
    of clusters of ``factor * size`` tokens: what predicts the largest logit in a cluster from the state with
    the least squared error plus ``ridge`` (a share of the states' mean square) times the routers' squares."""
    mean = states.mean(0)
    x = states - mean
    gram = (x.T @ x).astype(np.float64)
    gram[np.diag_indices_from(gram)] += ridge * np.trace(gram) / len(gram)
    counts = [-(-len(tokens) // (size * f)) for f in factors]
    products = [np.empty((x.shape[1], n), np.float32) for n in counts]
    means = [np.empty(n, np.float32) for n in counts]
    for at, logits in cluster_logits(rows, states, tokens, size):
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
