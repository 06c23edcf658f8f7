"""How well a cheap choice of clusters finds what the whole head would: measured on held-out states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from edgert.export.clusters import Ids, Matrix, cluster_logits, merge

TOP = 10


@dataclass(frozen=True)
class Truth:
    """What the whole head says of the held-out states, cluster by cluster of 16 tokens.

    ``domain`` [n]: index into ``names``. ``maxima`` [n, clusters]: largest logit of each cluster;
    ``mass`` [n, clusters]: its share of the softmax; ``top`` [n, TOP]: clusters of the likeliest tokens,
    best first."""

    names: Sequence[str]
    domain: Ids
    maxima: Matrix
    mass: Matrix
    top: Ids

    def merged(self, factor: int) -> Truth:
        """The same for clusters of ``factor`` neighbours."""
        if factor == 1:
            return self
        n, clusters = self.maxima.shape
        mass = np.pad(self.mass, ((0, 0), (0, -clusters % factor))).reshape(n, -1, factor).sum(2)
        return Truth(self.names, self.domain, merge(self.maxima, factor), mass, self.top // factor)


def find_truth(
    rows: Matrix,
    tokens: Ids,
    size: int,
    states: dict[str, Matrix],
    progress: Callable[[int], None],
) -> Truth:
    """The truth for the held-out ``states`` of each domain."""
    names = list(states)
    domain = np.repeat(np.arange(len(names), dtype=np.int32), [len(s) for s in states.values()])
    everything = np.concatenate(list(states.values()))
    n = len(everything)
    maxima = np.empty((n, len(tokens) // size), np.float32)
    mass = np.empty_like(maxima)
    for at, logits in cluster_logits(rows, everything, tokens, size):
        part = slice(at, at + logits.shape[1])
        maxima[:, part] = logits.max(2)
        logits -= maxima[:, part, None]
        mass[:, part] = np.exp(logits, out=logits).sum(2)
        progress(logits.shape[1])
    mass *= np.exp(maxima - maxima.max(1, keepdims=True))
    mass /= mass.sum(1, keepdims=True)
    # The ten likeliest tokens lie in the ten clusters with the highest maxima.
    near = np.argpartition(maxima, -TOP, 1)[:, -TOP:]
    top = np.empty((n, TOP), np.int32)
    for i, state in enumerate(everything):
        members = tokens.reshape(-1, size)[near[i]].ravel()
        logits = np.where(members < 0, -np.inf, rows[members] @ state)
        top[i] = near[i, np.argsort(-logits, kind="stable")[:TOP] // size]
    return Truth(names, domain, maxima, mass, top)


class Ranking:
    """The clusters of each held-out state in the order of their ``scores`` [n, clusters]."""

    def __init__(self, truth: Truth, scores: Matrix) -> None:
        self._truth, self._scores = truth, scores
        at = np.take_along_axis(scores, truth.top, 1)
        # How many clusters are scored above that of each of the likeliest tokens.
        self._rank = np.stack([(scores > at[:, i : i + 1]).sum(1) for i in range(truth.top.shape[1])], 1)

    def probes_for(self, targets: dict[str, float], other: float) -> int:
        """The fewest clusters that reach each domain's target agreement (``other`` where it has none)."""
        probes = 1
        for i, name in enumerate(self._truth.names):
            ranks = np.sort(self._rank[self._truth.domain == i, 0])
            allowed = int((1 - targets.get(name, other)) * len(ranks) + 1e-9)
            probes = max(probes, int(ranks[len(ranks) - 1 - allowed]) + 1)
        return probes

    def quality(self, probes: Sequence[int]) -> dict[str, Any]:
        """For all positions and for each domain, by number of clusters: top-1 ``agreement``,
        ``recall_top10`` (of the ten likeliest tokens), softmax ``mass`` covered, mean ``regret`` in nats."""
        truth = self._truth
        clusters = self._scores.shape[1]
        groups = {"all": np.ones(len(self._rank), bool)}
        groups |= {name: truth.domain == i for i, name in enumerate(truth.names)}
        report: dict[str, Any] = {name: {"positions": int(where.sum())} for name, where in groups.items()}
        highest = truth.maxima.max(1)
        cuts = np.partition(self._scores, sorted({clusters - min(p, clusters) for p in probes}), 1)
        for p in probes:
            chosen = self._scores >= cuts[:, clusters - min(p, clusters), None]
            values = {
                "agreement": self._rank[:, 0] < p,
                "recall_top10": (self._rank < p).mean(1),
                "mass": np.where(chosen, truth.mass, 0).sum(1),
                "regret": highest - np.where(chosen, truth.maxima, -np.inf).max(1),
            }
            for name, where in groups.items():
                report[name][str(p)] = _means(values, where)
        return report


def _means(values: dict[str, npt.NDArray[Any]], where: npt.NDArray[np.bool_]) -> dict[str, float]:
    return {name: round(float(v[where].mean()), 6) for name, v in values.items()}
