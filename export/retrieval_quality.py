"""What a retrieval head is worth beside the predictors that need no training: recall of pages on traces, and
the loss of the native engine's steps end to end."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from edgert.export.retrieval_fit import FADE, Head
from edgert.export.retrieval_trace import PAGE, sealed_pages
from edgert.export.retrieval_train import SET, Sequences
from edgert.models import ModelSpec
from torch import Tensor

from edgert import _native

ENTERING = 8  # native/tier.cpp
TAIL = 51  # pages outside of the set: the first and those without an index
BUDGET = 512
SCORED = 256  # last tokens of a sequence


def page_sets(value: Tensor, pages: Tensor, size: int) -> Tensor:
    """The set of each step, [n, P]: ``value`` [n, P] of the first ``pages`` [n], of which ENTERING change."""
    inside = torch.zeros(value.shape[1], dtype=torch.bool)
    rows = []
    for row, known in zip(value, pages.tolist(), strict=True):
        row = row.clone()
        row[known:] = -1
        order = row.argsort(descending=True)[: min(size, known)]
        new = [int(page) for page in order if not inside[page]]
        new = new[: ENTERING if inside.any() else None]
        room = size - int(inside.sum())
        for page in new:
            if room > 0:
                room -= 1
            else:
                worst = int(torch.where(inside, row, torch.inf).argmin())
                if row[worst] >= row[page]:
                    break
                inside[worst] = False
            inside[page] = True
        rows.append(inside.clone())
    return torch.stack(rows)


@torch.no_grad()
def recall(head: Head, sequences: Sequences) -> dict[str, float]:
    """The share of what pages are worth that lies in the sets of each predictor, at the same size of the
    set."""
    found: dict[str, list[float]] = {"votes": [], "previous layer": [], "head": [], "true queries": []}
    for n, (trace, _, _, past, positions) in enumerate(sequences.items):
        at = positions[-SCORED:]
        pages = sealed_pages(at)
        size = max(1, int(pages[-1] * SET))
        own = torch.cat([sequences.values(head, n, at[i : i + 64])[0] for i in range(0, len(at), 64)])
        votes = trace.votes[at]
        values = {
            "votes": past[at],
            "previous layer": torch.maximum(past[at] * FADE, trace.ahead[at]),
            "head": past[at] + own,
            "true queries": torch.maximum(past[at] * FADE, votes),
        }
        for name, value in values.items():
            inside = page_sets(value, pages, size)
            found[name].append(float((votes * inside).sum() / votes.sum()))
    return {name: round(float(np.mean(shares)), 4) for name, shares in found.items()}


@dataclass
class Loss:
    """Against full attention, over scored positions."""

    kl: float  # nats
    agreement: float  # share of positions with the same likeliest token


def measure(
    file: _native.GgufFile,
    spec: ModelSpec,
    sidecars: Mapping[str, _native.GgufFile | None],
    sequences: Sequence[Sequence[int]],
    budget: int,
    progress: Callable[[int], None],
) -> dict[str, Loss]:
    """What steps lose whose pages are chosen by past votes alone (None) or by the head of a sidecar as well:
    the same number of pages in memory."""
    found = {}
    full: list[Any] = []
    for name, retrieval in sidecars.items():
        model = _native.Model(file, spec.as_dict(), 0, None, retrieval)
        kl: list[float] = []
        agreed = 0
        with tempfile.TemporaryDirectory(prefix="edgert-export-") as directory:
            for n, ids in enumerate(sequences):
                start = len(ids) - SCORED
                if len(full) == n:
                    full.append(_log_probabilities(_full(model, ids, start)))
                pages = int(sealed_pages(torch.tensor([len(ids)]))[0])
                slots = max(least_slots(budget), TAIL + int(pages * SET))
                cache = _native.Cache(model, len(ids), "f16", budget, slots, directory)
                _read(model, cache, ids[:start])
                for i, token in enumerate(ids[start:]):
                    q = _log_probabilities(model.forward(cache, np.array([token], np.int32)))
                    p = full[n][i]
                    kl.append(float((np.exp(p) * (p - q)).sum()))
                    agreed += int(p.argmax() == q.argmax())
                    progress(1)
                del cache
        found[name] = Loss(max(0.0, float(np.mean(kl))), agreed / len(kl))
    return found


def least_slots(budget: int) -> int:
    return -(-budget // PAGE) + 2 * ENTERING + TAIL


def _full(model: _native.Model, ids: Sequence[int], start: int) -> Any:
    cache = _native.Cache(model, len(ids))
    _read(model, cache, ids[:start])
    return model.forward(cache, np.asarray(ids[start:], np.int32), all_logits=True)


def _read(model: _native.Model, cache: _native.Cache, ids: Sequence[int]) -> None:
    for at in range(0, len(ids), 256):
        model.forward(cache, np.asarray(ids[at : at + 256], np.int32), full=True)


def _log_probabilities(logits: Any) -> Any:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
