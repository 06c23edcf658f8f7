"""``edgert export --flash-head``: clusters, routers and the sidecar that holds them.

Several recipes are tried and measured on held-out text; the one that reads the fewest bytes a token at
the agreement asked for is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from edgert.export.calibration_text import Domain, load_domains
from edgert.export.clusters import (
    Ids,
    Matrix,
    Metric,
    bisect,
    cluster_logits,
    fit_routers,
)
from edgert.export.gguf_writer import Tensor, TensorType, Value, write_gguf
from edgert.export.head_quality import Ranking, Truth, find_truth
from edgert.export.quantise import dequantise, q4_0, q4_0_for, q8_0
from edgert.export.states import OWN_PREFIX, OWN_TOKENS, HeadInputs

from edgert import _native
from edgert.download import file_sha256
from edgert.engines import open_engine
from edgert.engines.native import NativeEngine
from edgert.errors import UnsupportedModelError, UsageError
from edgert.locate import sidecar_path
from edgert.session_file import fingerprint
from edgert.sidecar import VERSION
from edgert.tokenizer import Tokenizer

TILE = 16  # tokens of the smallest cluster: the rows that every kernel reads together
SIZES, RANKS = (16, 32, 64), (256,)
MAIN = ("prose", "code", "chat")  # domains that get the agreement asked for
OWN, OTHER = 0.997, 0.98  # least agreement on own generations and on every other domain
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
    """One way to choose clusters, measured with its quantised tensors. ``quality`` is by domain and
    number of clusters; ``nbytes`` are read a token."""

    name: str  # "clusters" or "lowrank"
    size: int
    rank: int
    tokens: Ids
    tensors: list[Tensor]
    probes: int
    nbytes: int
    quality: dict[str, Any]


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
    fit, held = _states(engine, file, load_domains(tokenizer, request.calibration), request.seed, steps)
    engine.close()

    rows: Matrix = file.dequantize(name)
    metric = Metric(rows, fit)
    points = metric.points(rows, min(160, dim))
    done = steps("bisecting the vocabulary", -(-len(rows) // TILE))
    tokens = bisect(points, TILE, np.random.default_rng(request.seed), done)
    del points
    truth = find_truth(rows, tokens, TILE, held, steps("scoring held-out text", len(tokens) // TILE))
    row_bytes = info.nbytes / info.shape[0]
    head = _Head(rows, tokens, metric, fit, np.concatenate(list(held.values())), truth, row_bytes)
    special = np.asarray(sorted(tokenizer.eos_ids), np.int32)
    recipes = list(head.recipes(request, len(special), steps))
    best = min(recipes, key=lambda r: r.nbytes)
    tried = [_line(r, head.dense_bytes) for r in recipes]
    for recipe, line in zip(recipes, tried, strict=True):
        note(("* " if recipe is best else "  ") + line)
    quality = _quality(best, head.dense_bytes, request)
    metadata: dict[str, Value] = {
        "general.architecture": "edgert",
        "edgert.version": VERSION,
        "edgert.base.bytes": model.stat().st_size,
        "edgert.base.fingerprint": fingerprint(model),
        "edgert.base.sha256": file_sha256(model),
        "edgert.head.recipe": best.name,
        "edgert.head.cluster_size": best.size,
        "edgert.head.probes": best.probes,
        "edgert.head.tokens": best.tokens,
        "edgert.head.special": special,
        "edgert.head.quality": json.dumps(quality),
    }
    write_gguf(target, metadata, best.tensors)
    return Exported(target, quality, tried)


def _check(request: Request) -> None:
    if not 0 < request.agreement < 1:
        raise UsageError(f"--agreement must lie between 0 and 1, not {request.agreement}")
    size, rank, probes = request.cluster_size, request.rank, request.probes
    if size is not None and (size < TILE or size % TILE or size > 4096):
        raise UsageError(f"--cluster-size must be a multiple of {TILE} up to 4096, not {size}")
    if rank is not None and (rank < 32 or rank % 32):
        raise UsageError(f"--rank must be a multiple of 32, not {rank}")
    if probes is not None and probes < 1:
        raise UsageError(f"--probes must be at least 1, not {probes}")


def _states(
    engine: NativeEngine, file: _native.GgufFile, domains: Sequence[Domain], seed: int, steps: Steps
) -> tuple[Matrix, dict[str, Matrix]]:
    """States to fit with, [n, dim], and those held out by domain, own generations as "own"."""
    inputs, rng = HeadInputs(engine, file), np.random.default_rng(seed)
    total = sum(FIT_MAIN + HELD_MAIN if d.name in MAIN else FIT_OTHER + HELD_OTHER for d in domains)
    done = steps("reading the calibration text", total)
    fit: list[Matrix] = []
    held: dict[str, Matrix] = {}
    for domain in domains:
        most = (FIT_MAIN, HELD_MAIN) if domain.name in MAIN else (FIT_OTHER, HELD_OTHER)
        fit.append(inputs.of_text(domain.fit, most[0], done))
        held[domain.name] = inputs.of_text(domain.held, most[1], done)
    # Own words follow what people write most: half of the beginnings are prose, code and chat.
    main = [d for d in domains if d.name in MAIN]
    rest = [d for d in domains if d.name not in MAIN]
    order = [d for pair in zip(main * OWN_FIT, rest * OWN_FIT, strict=False) for d in pair]
    beginnings = [_beginning(d.fit, i) for i, d in enumerate(order[:OWN_FIT])]
    beginnings += [_beginning(d.held, i) for i, d in enumerate(order[:OWN_HELD])]
    own = inputs.of_own(beginnings, rng, steps("the model's own words", len(beginnings) * OWN_TOKENS))
    fit.append(own[:OWN_FIT].reshape(-1, own.shape[2]))
    held["own"] = own[OWN_FIT:].reshape(-1, own.shape[2])
    return np.concatenate(fit), held


def _beginning(pieces: Sequence[list[int]], i: int) -> list[int]:
    return pieces[i % len(pieces)][:OWN_PREFIX]


@dataclass
class _Head:
    rows: Matrix
    tokens: Ids  # in clusters of TILE
    metric: Metric
    fit: Matrix
    held: Matrix
    truth: Truth
    row_bytes: float

    @property
    def dense_bytes(self) -> int:
        return int(len(self.rows) * self.row_bytes)

    def recipes(self, request: Request, special: int, steps: Steps) -> Iterator[Recipe]:
        """The recipes asked for, each with the probes that reach the agreement asked for."""
        sizes = SIZES if request.cluster_size is None else (request.cluster_size,)
        if request.rank is None:
            factors = [size // TILE for size in sizes]
            done = steps("fitting routers", len(self.tokens) // TILE)
            fitted = fit_routers(self.rows, self.fit, self.tokens, TILE, factors, RIDGE, done)
            for factor, (routers, bias) in zip(factors, fitted, strict=True):
                moment = self.fit.T @ self.fit / len(self.fit)
                for kind, codes in (("Q4_0", q4_0_for(routers, moment)), ("Q8_0", q8_0(routers))):
                    tensor = Tensor("head.routers", cast(TensorType, kind), routers.shape, codes)
                    yield self._clusters(factor, tensor, bias, request, special)
        if request.cluster_size in (None, TILE):
            for rank in RANKS if request.rank is None else (request.rank,):
                if rank < self.rows.shape[1]:
                    yield self._lowrank(rank, request, special, steps)

    def _clusters(self, factor: int, routers: Tensor, bias: Matrix, request: Request, special: int) -> Recipe:
        scores = self.held @ dequantise(routers.data, routers.type, routers.shape[1]).T + bias
        tensors = [routers, Tensor("head.bias", "F32", bias.shape, bias.view(np.uint8))]
        # Neighbours of the bisection together.
        tokens = np.concatenate([self.tokens, np.full(-len(self.tokens) % (factor * TILE), -1, np.int32)])
        ranking = Ranking(self.truth.merged(factor), scores)
        return self._measured("clusters", factor * TILE, 0, tokens, tensors, ranking, request, special)

    def _lowrank(self, rank: int, request: Request, special: int, steps: Steps) -> Recipe:
        done = steps(f"low-rank rows of {rank}", len(self.tokens) // TILE)
        projection = self.metric.projection(rank)
        low = self.metric.points(self.rows, rank)[np.maximum(self.tokens, 0)]
        low[self.tokens < 0] = 0
        rows, to_low = q4_0(low), q8_0(projection)
        image = self.held @ dequantise(to_low, "Q8_0", projection.shape[1]).T
        order = np.where(self.tokens < 0, -1, np.arange(len(self.tokens), dtype=np.int32))
        scores = np.empty((len(self.held), len(self.tokens) // TILE), np.float32)
        for at, logits in cluster_logits(dequantise(rows, "Q4_0", rank), image, order, TILE):
            scores[:, at : at + logits.shape[1]] = logits.max(2)
            done(logits.shape[1])
        tensors = [
            Tensor("head.projection", "Q8_0", projection.shape, to_low),
            Tensor("head.rows", "Q4_0", low.shape, rows),
        ]
        ranking = Ranking(self.truth, scores)
        return self._measured("lowrank", TILE, rank, self.tokens, tensors, ranking, request, special)

    def _measured(
        self,
        name: str,
        size: int,
        rank: int,
        tokens: Ids,
        tensors: list[Tensor],
        ranking: Ranking,
        request: Request,
        special: int,
    ) -> Recipe:
        targets = {**dict.fromkeys(MAIN, request.agreement), "own": max(OWN, request.agreement)}
        clusters = len(tokens) // size
        needed = ranking.probes_for(targets, min(OTHER, request.agreement))
        # A tenth more: the held-out text is a sample.
        probes = min(request.probes or -(-needed * 11 // 10), clusters)
        grid = sorted({min(n, clusters) for n in (-(-probes // 4), -(-probes // 2), probes, 2 * probes)})
        read = (probes + special) * size * self.row_bytes + sum(t.data.size for t in tensors)
        return Recipe(name, size, rank, tokens, tensors, probes, int(read), ranking.quality(grid))


def _line(recipe: Recipe, dense: int) -> str:
    what = f"rank {recipe.rank}" if recipe.rank else f"clusters of {recipe.size}, {recipe.tensors[0].type}"
    key = str(recipe.probes)
    agreement = {name: values[key]["agreement"] for name, values in recipe.quality.items()}
    parts = [f"{name} {agreement[name]:.2%}" for name in (*MAIN, "own") if name in agreement]
    rest = {n: a for n, a in agreement.items() if n not in (*MAIN, "own", "all")}
    if rest:
        worst = min(rest, key=lambda n: rest[n])
        parts.append(f"{worst} {rest[worst]:.1%}, the other {len(rest) - 1} more")
    return (
        f"{what:20s} {recipe.probes:6d} probes {recipe.nbytes / 1e6:7.2f} MB a token, "
        f"{dense / recipe.nbytes:4.1f} times less than dense: {', '.join(parts)}"
    )


def _quality(recipe: Recipe, dense: int, request: Request) -> dict[str, Any]:
    return {
        "asked": request.agreement,
        "agreement": recipe.quality["all"][str(recipe.probes)]["agreement"],
        "probes": recipe.probes,
        "bytes_per_token": recipe.nbytes,
        "dense_bytes_per_token": dense,
        "domains": recipe.quality,
    }
