"""``edgert export --flash-head``: clusters, routers and the sidecar that holds them.

Several recipes are tried and measured on held-out text; the one that reads the fewest bytes a token at
the agreement asked for is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from edgert.export.calibration_text import Domain, load_domains
from edgert.export.clusters import UNIT, Ids, Matrix, Metric, bisect, cluster_logits, fit_routers
from edgert.export.gguf_writer import Tensor, Value
from edgert.export.head_quality import Ranking, Truth, find_truth
from edgert.export.quantise import dequantise, q4_0, q4_0_for, q8_0, remedies
from edgert.export.sidecar_writer import write_part
from edgert.export.states import OWN_PREFIX, OWN_TOKENS, HeadInputs

from edgert import _native
from edgert.engines import open_engine
from edgert.engines.native import NativeEngine
from edgert.errors import UnsupportedModelError, UsageError
from edgert.locate import sidecar_path
from edgert.tokenizer import Tokenizer

SIZES, RANKS = (16, 32, 64), (128, 256)
MAIN = ("prose", "code", "chat")  # domains that get the agreement asked for
# Least agreement on own generations and on every other domain; what is promised of own words is 0.997, and
# they differ most from one sample to the next.
OWN, OTHER = 0.999, 0.98
FIT_MAIN, FIT_OTHER, HELD_MAIN, HELD_OTHER = 1500, 520, 700, 230  # states of a domain
OWN_FIT, OWN_HELD = 40, 24  # continuations
RIDGE = 1e-3

Note = Callable[[str], None]
# What is done, and a function that makes a progress callback for so many units of it.
Steps = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class Request:
    """``agreement``: top-1, on held-out prose, code and chat. None: search."""

    agreement: float = 0.995
    calibration: Sequence[Path] = ()
    cluster_size: int | None = None
    probes: int | None = None
    rank: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Recipe:
    """One way to choose rows, with its quantised ``tensors``, and the budget that reaches what was asked:
    ``probes`` clusters (0 without routers), ``keep`` units (0 without low-rank rows). ``nbytes`` are read a
    token."""

    size: int
    rank: int
    tensors: list[Tensor]
    probes: int
    keep: int
    nbytes: int

    @property
    def name(self) -> str:
        return "+".join([*["clusters"] * bool(self.probes), *["lowrank"] * bool(self.keep)])

    def __str__(self) -> str:
        parts = [f"{self.probes} clusters of {self.size} by {self.tensors[0].type}"] * bool(self.probes)
        parts += [f"{self.keep} units by rank {self.rank}"] * bool(self.keep)
        return ", ".join(parts)


@dataclass(frozen=True)
class Exported:
    """``quality`` is what the sidecar holds; ``tried`` has a line for each recipe."""

    path: Path
    quality: dict[str, Any]
    tried: list[str]


def export_flash_head(
    model: Path, request: Request, output: Path | None, note: Note, steps: Steps
) -> Exported:
    """Write the sidecar of ``model``. Raises UsageError, ModelFileError, UnsupportedModelError,
    OutputError; nothing is left half-written."""
    _check(request)
    target = output or sidecar_path(model)
    if not target.parent.is_dir():
        raise UsageError(f"no such directory: {target.parent}; create it or choose another --output")
    file = _native.GgufFile(str(model))
    engine = open_engine(model, "native")
    assert isinstance(engine, NativeEngine)
    name = "token_embd.weight" if engine.spec.tied_head else "output.weight"
    info = next(t for t in file.tensors if t.name == name)
    dim = engine.spec.dim
    if dim % 32 != 0:
        raise UnsupportedModelError(f"{model}: a FlashHead needs a width that is a multiple of 32, not {dim}")
    tokenizer = Tokenizer.from_gguf(file.metadata)
    fit, held, report = _states(
        engine, file, load_domains(tokenizer, request.calibration), request.seed, steps
    )
    engine.close()

    rows: Matrix = file.dequantize(name)
    metric = Metric(rows, fit)
    points = metric.points(rows, min(160, dim))
    tokens = bisect(
        points, np.random.default_rng(request.seed), steps("bisecting the vocabulary", -(-len(rows) // UNIT))
    )
    del points
    special = np.asarray(sorted(tokenizer.eos_ids), np.int32)
    head = _Head(rows, tokens, metric, fit, info.nbytes / info.shape[0], len(special), request, steps)
    recipes = head.search(held)
    best = min(recipes, key=lambda r: r.nbytes)
    tried = [
        f"{r!s:55s} {r.nbytes / 1e6:7.2f} MB a token, {head.dense_bytes / r.nbytes:.1f} times less than dense"
        for r in sorted(recipes, key=lambda r: r.nbytes)
    ]
    for line in tried:
        note(line)
    quality = head.quality(best, report)
    note(_agreements(quality, best))
    metadata: dict[str, Value] = {
        "edgert.head.recipe": best.name,
        "edgert.head.cluster_size": best.size,
        "edgert.head.probes": best.probes,
        "edgert.head.keep": best.keep,
        "edgert.head.tokens": head.padded(best.size),
        "edgert.head.special": special,
        "edgert.head.quality": json.dumps(quality),
    }
    tensors = [_whole(t, head.padded(best.size).size) for t in best.tensors]
    write_part(target, model, "head", metadata, tensors)
    return Exported(target, quality, tried)


def _check(request: Request) -> None:
    if not 0 < request.agreement < 1:
        raise UsageError(f"--agreement must lie between 0 and 1, not {request.agreement}")
    size, rank, probes = request.cluster_size, request.rank, request.probes
    if size is not None and (size < UNIT or size % UNIT or size > 4096):
        raise UsageError(f"--cluster-size must be a multiple of {UNIT} up to 4096, not {size}")
    if rank is not None and (rank < 32 or rank % 32):
        raise UsageError(f"--rank must be a multiple of 32, not {rank}")
    if probes is not None and probes < 1:
        raise UsageError(f"--probes must be at least 1, not {probes}")


States = dict[str, Matrix]  # by domain, own generations as "own"


def _states(
    engine: NativeEngine, file: _native.GgufFile, domains: Sequence[Domain], seed: int, steps: Steps
) -> tuple[Matrix, States, States]:
    """States to fit with, [n, dim], those that choose recipe and budget, and those that the result is
    reported on: three parts of the text."""
    inputs, rng = HeadInputs(engine, file), np.random.default_rng(seed)
    limits = [(FIT_MAIN, HELD_MAIN) if d.name in MAIN else (FIT_OTHER, HELD_OTHER) for d in domains]
    done = steps("reading the calibration text", sum(fit + 2 * held for fit, held in limits))
    fit: list[Matrix] = []
    held: States = {}
    report: States = {}
    for domain, (most_fit, most_held) in zip(domains, limits, strict=True):
        fit.append(inputs.of_text(domain.fit, most_fit, done))
        held[domain.name] = inputs.of_text(domain.held[::2], most_held, done)
        report[domain.name] = inputs.of_text(domain.held[1::2] or domain.held, most_held, done)
    # Own words follow what people write most: half of the beginnings are prose, code and chat.
    main = [d for d in domains if d.name in MAIN]
    rest = [d for d in domains if d.name not in MAIN]
    order = [d for pair in zip(main * OWN_FIT, rest * OWN_FIT, strict=False) for d in pair]
    beginnings = [_beginning(d.fit, i) for i, d in enumerate(order[:OWN_FIT])]
    beginnings += [_beginning(d.held, i) for i, d in enumerate(order[: 2 * OWN_HELD])]
    own = inputs.of_own(beginnings, rng, steps("the model's own words", len(beginnings) * OWN_TOKENS))
    flat = own.reshape(-1, own.shape[2])
    fit.append(flat[: OWN_FIT * OWN_TOKENS])
    held["own"], report["own"] = np.split(flat[OWN_FIT * OWN_TOKENS :], 2)
    return np.concatenate(fit), held, report


def _beginning(pieces: Sequence[list[int]], i: int) -> list[int]:
    return pieces[i % len(pieces)][:OWN_PREFIX]


@dataclass
class _Head:
    """The dense head in units of the bisection, and the search for what reads least of it."""

    rows: Matrix
    tokens: Ids
    metric: Metric
    fit: Matrix
    row_bytes: float
    special: int
    request: Request
    steps: Steps

    @property
    def dense_bytes(self) -> int:
        return int(len(self.rows) * self.row_bytes)

    def padded(self, size: int) -> Ids:
        """The tokens in whole clusters of ``size``."""
        return np.concatenate([self.tokens, np.full(-len(self.tokens) % size, -1, np.int32)])

    def search(self, held: States) -> list[Recipe]:
        """Every recipe asked for with the least budget that reaches the agreement asked for."""
        truth = self._truth(held, "scoring held-out text")
        states = np.concatenate(list(held.values()))
        routers = list(self._routers())
        recipes = []
        for factor, tensors in routers:
            ranking = self._ranking(truth, states, tensors, factor)
            if self.request.rank is None and (needed := self._needed(ranking, 0)):
                recipes.append(self._recipe(tensors, factor, self._probes(tensors, needed), 0))
        for rank in RANKS if self.request.rank is None else (self.request.rank,):
            if rank >= self.rows.shape[1]:
                continue
            low = self._low_rank(rank)
            units = self._unit_scores(low, states)
            if self.request.cluster_size is None and self.request.probes is None:
                needed = self._needed(Ranking(truth, None, units, 1), 0)
                recipes.append(self._recipe(low, 1, 0, _more(needed or len(self.tokens) // UNIT)))
            for factor, tensors in routers:
                if tensors[0].type != "Q4_0":
                    continue  # for a first sieve four bits are enough
                ranking = Ranking(truth, _cluster_scores(tensors, states), units, factor)
                recipes += self._both(tensors, low, ranking, factor)
        if not recipes:
            raise UsageError(f"--rank must be less than the model's width, {self.rows.shape[1]}")
        return recipes

    def quality(self, best: Recipe, report: States) -> dict[str, Any]:
        """What the sidecar says of the recipe: measured on text that had no part in the choice."""
        truth = self._truth(report, "measuring the result")
        ranking = self._ranking(truth, np.concatenate(list(report.values())), best.tensors, best.size // UNIT)
        first = best.probes or best.keep
        shares = [-(-first // 4), -(-first // 2), first, 2 * first]
        budgets = [(s if best.probes else 0, -(-best.keep * s // first)) for s in shares]
        domains = ranking.quality(budgets)
        return {
            "asked": self.request.agreement,
            "agreement": domains["all"][str(first)]["agreement"],
            "probes": first,
            "bytes_per_token": best.nbytes,
            "dense_bytes_per_token": self.dense_bytes,
            "domains": domains,
        }

    def _truth(self, states: States, what: str) -> Truth:
        return find_truth(self.rows, self.tokens, states, self.steps(what, len(self.tokens) // UNIT))

    def _routers(self) -> Iterator[tuple[int, list[Tensor]]]:
        """(units of a cluster, routers and biases) for each cluster size and type."""
        size = self.request.cluster_size
        factors = [s // UNIT for s in (SIZES if size is None else (size,))]
        done = self.steps("fitting routers", len(self.tokens) // UNIT)
        fitted = fit_routers(self.rows, self.fit, self.tokens, factors, RIDGE, done)
        factor = remedies(self.fit.T @ self.fit / len(self.fit))
        for units, (routers, bias) in zip(factors, fitted, strict=True):
            biases = Tensor("head.bias", "F32", bias.shape, bias.view(np.uint8))
            yield units, [Tensor("head.routers", "Q4_0", routers.shape, q4_0_for(routers, factor)), biases]
            yield units, [Tensor("head.routers", "Q8_0", routers.shape, q8_0(routers)), biases]

    def _low_rank(self, rank: int) -> list[Tensor]:
        low, projection = self.metric.low_rank(self.rows, rank)
        low = low[np.maximum(self.tokens, 0)]
        low[self.tokens < 0] = 0
        return [
            Tensor("head.projection", "Q8_0", projection.shape, q8_0(np.ascontiguousarray(projection))),
            Tensor("head.rows", "Q4_0", low.shape, q4_0(low)),
        ]

    def _both(self, routers: list[Tensor], low: list[Tensor], ranking: Ranking, factor: int) -> list[Recipe]:
        """Two stages: the routers' clusters, more of them than alone, by the low-rank rows."""
        alone = ranking.needed(ranking.cluster_ranks(), self._targets(), self._other())
        found = []
        for more in (1.0, 1.6):
            probes = self._probes(routers, int((alone or 1) * more))
            if keep := self._needed(ranking, probes):
                found.append(self._recipe([*routers, *low], factor, probes, _more(keep)))
        return [min(found, key=lambda r: r.nbytes)] if found else []

    def _targets(self) -> dict[str, float]:
        asked = self.request.agreement
        return {**dict.fromkeys(MAIN, asked), "own": max(OWN, asked)}

    def _other(self) -> float:
        return min(OTHER, self.request.agreement)

    def _needed(self, ranking: Ranking, probes: int) -> int | None:
        return ranking.needed(ranking.ranks(probes), self._targets(), self._other())

    def _probes(self, routers: list[Tensor], needed: int) -> int:
        return min(self.request.probes or _more(needed), len(routers[0].data))

    def _ranking(self, truth: Truth, states: Matrix, tensors: list[Tensor], factor: int) -> Ranking:
        names = {t.name for t in tensors}
        clusters = _cluster_scores(tensors, states) if "head.routers" in names else None
        units = self._unit_scores(tensors[-2:], states) if "head.rows" in names else None
        return Ranking(truth, clusters, units, factor)

    def _unit_scores(self, low: list[Tensor], states: Matrix) -> Matrix:
        """Of each state by the low-rank rows as quantised, [n, units]."""
        projection, rows = (dequantise(t.data, t.type, t.shape[1]) for t in low)
        count = len(self.tokens)
        done = self.steps(f"scoring with rank {rows.shape[1]}", count // UNIT)
        order = np.where(self.tokens < 0, -1, np.arange(count, dtype=np.int32))
        scores = np.empty((len(states), count // UNIT), np.float32)
        for at, logits in cluster_logits(rows, states @ projection.T, order):
            scores[:, at : at + logits.shape[1]] = logits.max(2)
            done(logits.shape[1])
        return scores

    def _recipe(self, tensors: list[Tensor], factor: int, probes: int, keep: int) -> Recipe:
        size, units = factor * UNIT, len(self.tokens) // UNIT
        by_name = {t.name: t for t in tensors}
        low = by_name.pop("head.rows", None)
        read: float = sum(t.data.size for t in by_name.values())
        candidates = min(probes * size // UNIT, units) if probes else units
        if low is not None:
            read += candidates * UNIT * low.data.shape[1]
            candidates = keep = min(keep, candidates)
        read += (candidates + self.special) * UNIT * self.row_bytes
        return Recipe(size, low.shape[1] if low else 0, tensors, probes, keep, int(read))


def _whole(tensor: Tensor, rows: int) -> Tensor:
    """The low-rank rows with zeros for the padding of the last cluster; any other tensor as it is."""
    if tensor.name != "head.rows":
        return tensor
    data = np.zeros((rows, tensor.data.shape[1]), np.uint8)
    data[: len(tensor.data)] = tensor.data
    return tensor._replace(shape=(rows, tensor.shape[1]), data=data)


def _cluster_scores(tensors: list[Tensor], states: Matrix) -> Matrix:
    routers, bias = tensors[:2]
    scores: Matrix = states @ dequantise(routers.data, routers.type, routers.shape[1]).T
    scores += bias.data.view(np.float32)
    return scores


def _more(needed: int) -> int:
    """Half more: the held-out text is a sample, and other text of the same kind misses more."""
    return -(-needed * 3 // 2)


def _agreements(quality: dict[str, Any], recipe: Recipe) -> str:
    key = str(recipe.probes or recipe.keep)
    agreement = {name: values[key]["agreement"] for name, values in quality["domains"].items()}
    parts = [f"{name} {agreement[name]:.2%}" for name in (*MAIN, "own", "user") if name in agreement]
    rest = {n: a for n, a in agreement.items() if n not in (*MAIN, "own", "user", "all")}
    if rest:
        worst = min(rest, key=lambda n: rest[n])
        parts.append(f"{worst} {rest[worst]:.1%}, the other {len(rest) - 1} more")
    return "agreement on text that chose nothing: " + ", ".join(parts)
