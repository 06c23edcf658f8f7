"""How well a cheap choice of clusters finds what the whole head would: measured on held-out states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from edgert.export.clusters import Ids, Matrix, cluster_logits

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
        pad = -clusters % factor
        maxima = np.pad(self.maxima, ((0, 0), (0, pad)), constant_values=-np.inf)
        mass = np.pad(self.mass, ((0, 0), (0, pad)))
        return Truth(
            self.names,
            self.domain,
            maxima.reshape(n, -1, factor).max(2),
            mass.reshape(n, -1, factor).sum(2),
            self.top // factor,
        )


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
    sums = np.empty_like(maxima)  # of exp(logit - maximum of the cluster)
    best = np.full((n, TOP), -np.inf, np.float32)
    top = np.zeros((n, TOP), np.int32)
    for at, logits in cluster_logits(rows, everything, tokens, size):
        width = logits.shape[1]
        high = logits.max(2)
        maxima[:, at : at + width] = high
        sums[:, at : at + width] = np.exp(logits - high[:, :, None]).sum(2)
        flat = logits.reshape(n, -1)
        found = np.argpartition(flat, -TOP, 1)[:, -TOP:].astype(np.int32)
        both = np.concatenate([best, np.take_along_axis(flat, found, 1)], 1)
        where = np.concatenate([top, at + found // size], 1)
        keep = np.argsort(-both, 1, kind="stable")[:, :TOP]
        best, top = np.take_along_axis(both, keep, 1), np.take_along_axis(where, keep, 1)
        progress(width)
    mass = sums
    mass *= np.exp(maxima - best[:, :1])
    mass /= mass.sum(1, keepdims=True)
    return Truth(names, domain, maxima, mass, top)


class Ranking:
    """The clusters of each held-out state in the order of their ``scores`` [n, clusters]."""

    def __init__(self, truth: Truth, scores: Matrix) -> None:
        self._truth = truth
        self._scores = scores
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
        report: dict[str, Any] = {"all": {"positions": len(self._rank)}}
        for i, name in enumerate(self._truth.names):
            report[name] = {"positions": int((self._truth.domain == i).sum())}
        for p in probes:
            values = self._values(p)
            report["all"][str(p)] = _means(values, np.ones(len(self._rank), bool))
            for i, name in enumerate(self._truth.names):
                report[name][str(p)] = _means(values, self._truth.domain == i)
        return report

    def _values(self, probes: int) -> dict[str, npt.NDArray[Any]]:
        truth, k = self._truth, min(probes, self._scores.shape[1])
        chosen = np.argpartition(-self._scores, k - 1, 1)[:, :k]
        best = np.take_along_axis(truth.maxima, chosen, 1).max(1)
        return {
            "agreement": self._rank[:, 0] < probes,
            "recall_top10": (self._rank < probes).mean(1),
            "mass": np.take_along_axis(truth.mass, chosen, 1).sum(1),
            "regret": truth.maxima.max(1) - best,
        }


def _means(values: dict[str, npt.NDArray[Any]], where: npt.NDArray[np.bool_]) -> dict[str, float]:
    return {name: round(float(v[where].mean()), 6) for name, v in values.items()}
