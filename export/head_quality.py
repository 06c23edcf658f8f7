"""How well cheap scores find what the whole head would choose: measured on held-out states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from edgert.export.clusters import UNIT, Ids, Matrix, cluster_logits

TOP = 10
MISSED = np.iinfo(np.int32).max
BLOCK = 1024  # states looked at together: a mask of all units of each is 16 MB for a large vocabulary


@dataclass(frozen=True)
class Truth:
    """What the whole head says of held-out states, by unit of :data:`UNIT` rows.

    ``domain`` [n]: index into ``names``. ``maxima`` [n, units]: largest logit of each unit; ``mass`` [n,
    units]: its share of the softmax; ``top`` [n, TOP]: units of the likeliest tokens, best first."""

    names: Sequence[str]
    domain: Ids
    maxima: Matrix
    mass: Matrix
    top: Ids


def find_truth(
    rows: Matrix, tokens: Ids, states: dict[str, Matrix], progress: Callable[[int], None]
) -> Truth:
    """The truth for the held-out ``states`` of each domain."""
    names = list(states)
    domain = np.repeat(np.arange(len(names), dtype=np.int32), [len(s) for s in states.values()])
    everything = np.concatenate(list(states.values()))
    n = len(everything)
    maxima = np.empty((n, len(tokens) // UNIT), np.float32)
    mass = np.empty_like(maxima)
    for at, logits in cluster_logits(rows, everything, tokens):
        part = slice(at, at + logits.shape[1])
        maxima[:, part] = logits.max(2)
        logits -= np.where(np.isfinite(maxima[:, part, None]), maxima[:, part, None], 0)
        mass[:, part] = np.exp(logits, out=logits).sum(2)
        progress(logits.shape[1])
    mass *= np.exp(maxima - maxima.max(1, keepdims=True))
    mass /= mass.sum(1, keepdims=True)
    # The ten likeliest tokens lie in the ten units with the highest maxima.
    near = np.argpartition(maxima, -TOP, 1)[:, -TOP:]
    top = np.empty((n, TOP), np.int32)
    for i, state in enumerate(everything):
        members = tokens.reshape(-1, UNIT)[near[i]].ravel()
        logits = np.where(members < 0, -np.inf, rows[members] @ state)
        top[i] = near[i, np.argsort(-logits, kind="stable")[:TOP] // UNIT]
    return Truth(names, domain, maxima, mass, top)


class Ranking:
    """Held-out states with the cheap scores of one recipe: of ``clusters`` [n, clusters], each ``factor``
    units, of ``units`` [n, units], or of both in two stages."""

    def __init__(self, truth: Truth, clusters: Matrix | None, units: Matrix | None, factor: int) -> None:
        self._truth, self._clusters, self._units, self._factor = truth, clusters, units, factor

    def ranks(self, probes: int) -> Ids:
        """How many candidates of the last stage score above that of the likeliest token, [n]; :data:`MISSED`
        where its cluster is not among the ``probes`` best."""
        near = self._truth.top[:, :1]
        result = np.empty(len(near), np.int32)
        for part in self._blocks():
            if self._units is None:
                assert self._clusters is not None
                scores, own, chosen = self._clusters, near[part] // self._factor, None
            else:
                scores, own, chosen = self._units, near[part], self._probed(part, probes)
            above = scores[part] > np.take_along_axis(scores[part], own, 1)
            result[part] = (above if chosen is None else above & chosen).sum(1)
            if chosen is not None:
                result[part][~np.take_along_axis(chosen, own, 1)[:, 0]] = MISSED
        return result

    def cluster_ranks(self) -> Ids:
        """The same of the first stage alone."""
        return Ranking(self._truth, self._clusters, None, self._factor).ranks(0)

    def needed(self, ranks: Ids, targets: dict[str, float], other: float) -> int | None:
        """The fewest candidates that reach each domain's target agreement (``other`` where it has none)."""
        most = 0
        for i, name in enumerate(self._truth.names):
            own = np.sort(ranks[self._truth.domain == i])
            allowed = int((1 - targets.get(name, other)) * len(own) + 1e-9)
            most = max(most, int(own[len(own) - 1 - allowed]))
        return None if most == MISSED else most + 1

    def quality(self, budgets: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """For all positions and for each domain, by budget (clusters probed, units kept): top-1
        ``agreement``, ``recall_top10`` (of the ten likeliest tokens), softmax ``mass`` covered, mean
        ``regret`` in nats."""
        truth = self._truth
        groups = {"all": np.ones(len(truth.domain), bool)}
        groups |= {name: truth.domain == i for i, name in enumerate(truth.names)}
        report: dict[str, Any] = {name: {"positions": int(where.sum())} for name, where in groups.items()}
        highest = truth.maxima.max(1)
        for probes, keep in budgets:
            found = np.empty(truth.top.shape, bool)
            mass, best = np.empty(len(found), np.float32), np.empty(len(found), np.float32)
            for part in self._blocks():
                chosen = self._kept(part, probes, keep)
                found[part] = np.take_along_axis(chosen, truth.top[part], 1)
                mass[part] = np.where(chosen, truth.mass[part], 0).sum(1)
                best[part] = np.where(chosen, truth.maxima[part], -np.inf).max(1)
            values = {
                "agreement": found[:, 0],
                "recall_top10": found.mean(1),
                "mass": mass,
                "regret": highest - best,
            }
            for name, where in groups.items():
                report[name][str(probes or keep)] = _means(values, where)
        return report

    def _blocks(self) -> Iterator[slice]:
        for at in range(0, len(self._truth.domain), BLOCK):
            yield slice(at, at + BLOCK)

    def _probed(self, part: slice, probes: int) -> npt.NDArray[np.bool_] | None:
        """Which units lie in the clusters probed, [states, units]; None without routers."""
        if self._clusters is None:
            return None
        chosen = _highest(self._clusters[part], probes)
        return np.repeat(chosen, self._factor, 1)[:, : self._truth.maxima.shape[1]]

    def _kept(self, part: slice, probes: int, keep: int) -> npt.NDArray[np.bool_]:
        """Which units are scored exactly, [states, units]."""
        probed = self._probed(part, probes)
        if self._units is None:
            assert probed is not None
            return probed
        scores = self._units[part]
        return _highest(scores if probed is None else np.where(probed, scores, -np.inf), keep)


def _highest(scores: Matrix, count: int) -> npt.NDArray[np.bool_]:
    width = scores.shape[1]
    if count >= width:
        return np.isfinite(scores)
    cut = np.partition(scores, width - count, 1)[:, width - count, None]
    return (scores >= cut) & np.isfinite(scores)


def _means(values: dict[str, npt.NDArray[Any]], where: npt.NDArray[np.bool_]) -> dict[str, float]:
    return {name: round(float(v[where].mean()), 6) for name, v in values.items()}
