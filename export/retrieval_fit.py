"""The closed form of a retrieval head: queries by ridge regression, heads by what their pages say of the
worth of pages, and the best map of low rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from edgert.export.retrieval_trace import Trace, Tracer
from torch import Tensor, nn

RIDGE = 1e-3  # of the inputs' mean square
FADE = 0.9  # native/tier.cpp
STRIDE = 8  # of the positions on which heads are chosen
LEAST = 0.05  # of the past votes' part in the worth: the head's part is measured in it


class Head(nn.Module):
    """The head in float: see ``native/retrieval.h``. ``places`` are (layer number among the full ones, KV
    head)."""

    def __init__(
        self, places: list[tuple[int, int]], down: Tensor, up: Tensor, bias: Tensor, worth: Tensor
    ) -> None:
        super().__init__()
        self.places = places
        self.down, self.up, self.bias = nn.Parameter(down), nn.Parameter(up), nn.Parameter(bias)
        self.log_worth = nn.Parameter(worth.clamp(min=1e-6).log())

    def queries(self, inputs: Tensor) -> Tensor:
        """[n, heads * group * head_dim] for inputs [n, 2 * dim], not rotated."""
        return inputs @ self.down.T @ self.up.T + self.bias

    def worth(
        self, tracer: Tracer, inputs: Tensor, keys: list[Tensor], scanned: list[Tensor], positions: Tensor
    ) -> Tensor:
        """What pages are worth, [n, P]; ``keys`` and what is ``scanned`` of them for each place, [1, T,
        head_dim]."""
        per = self.queries(inputs).view(len(inputs), len(self.places), tracer.group, -1)
        total = inputs.new_zeros(len(inputs), scanned[0].shape[1] // 16)
        for i, (layer, _) in enumerate(self.places):
            spec = tracer.spec.layers[tracer.layers[layer]]
            q = tracer.decoder.rotate(spec, per[:, i].transpose(0, 1), positions)
            total = total + self.log_worth[i].exp() * tracer.shares(q, keys[i], scanned[i], positions)[0]
        return total


def faded(votes: Tensor) -> Tensor:
    """What past votes [T, P] make a page worth before each step, [T, P]."""
    rows = [torch.zeros_like(votes[0])]
    for row in votes[:-1]:
        rows.append(torch.maximum(rows[-1] * FADE, row))
    return torch.stack(rows)


@dataclass
class Moments:
    """Sums over positions for the ridge regression; inputs have a 1 behind them."""

    xx: Tensor  # [2 * dim + 1, 2 * dim + 1]
    xy: Tensor  # [2 * dim + 1, L * heads * head_dim]
    count: int = 0

    @classmethod
    def empty(cls, tracer: Tracer) -> Moments:
        spec = tracer.spec
        width, out = 2 * spec.dim + 1, len(tracer.layers) * spec.n_heads * spec.head_dim
        return cls(torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, out))

    def add(self, trace: Trace) -> None:
        x = with_one(trace.inputs[1:].float())
        self.xx += (x.T @ x).double()
        self.xy += x.T @ trace.queries[:, 1:].float().permute(1, 0, 2, 3).flatten(1)
        self.count += len(x)

    def solve(self) -> Tensor:
        """[2 * dim + 1, L * heads * head_dim]."""
        ridge = RIDGE * self.xx.diagonal().mean() * torch.eye(len(self.xx), dtype=torch.float64)
        ridge[-1, -1] = 0
        result: Tensor = torch.linalg.solve(self.xx + ridge, self.xy.double()).float()
        return result


def with_one(inputs: Tensor) -> Tensor:
    return torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)


def choose_heads(
    tracer: Tracer, traces: list[Trace], full: Tensor, count: int
) -> tuple[list[tuple[int, int]], Tensor]:
    """The ``count`` heads whose predicted shares, with those weights that are returned, and the faded past
    votes say best what pages will be worth: least squares with no weight below zero, the least useful heads
    left out."""
    spec, layers = tracer.spec, len(tracer.layers)
    width = layers * tracer.kv + 1
    gram, target = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for trace in traces:
        positions = torch.arange(len(trace.votes) - 1, 1, -STRIDE)
        positions = positions[trace.votes[positions].sum(1) > 0]
        if not len(positions):
            continue
        q = (with_one(trace.inputs[positions].float()) @ full).view(-1, layers, spec.n_heads, spec.head_dim)
        features = []
        for i, layer in enumerate(tracer.layers):
            keys = trace.keys[i].float()
            turned = tracer.decoder.rotate(spec.layers[layer], q[:, i].transpose(0, 1), positions)
            features.append(
                tracer.shares(turned, keys, tracer.indexed(keys, trace.votes.shape[1]), positions)
            )
        past = faded(trace.votes)[positions]
        x = torch.cat([torch.cat(features).flatten(1), past.flatten()[None]]).double()
        gram += x @ x.T
        target += x @ trace.effect[positions].flatten().double()
    kept = torch.arange(width)
    while True:
        weights = nonnegative(gram[kept][:, kept], target[kept])
        if len(kept) - 1 <= count:
            break
        use = (weights * weights * gram.diagonal()[kept])[:-1]
        drop = max(1, (len(kept) - 1 - count) // 3)
        kept = torch.cat(
            [kept[:-1][use.argsort(descending=True)[: len(use) - drop]].sort().values, kept[-1:]]
        )
    worth = (weights[:-1] / weights[-1].clamp(min=LEAST)).float()
    return [(int(i) // tracer.kv, int(i) % tracer.kv) for i in kept[:-1]], worth


def nonnegative(gram: Tensor, target: Tensor, rounds: int = 300) -> Tensor:
    """x >= 0 with the least x' gram x - 2 target' x, by coordinate descent."""
    g, t = gram.numpy(), target.numpy()  # thousands of short sums, of which torch would make much work
    x = np.zeros_like(t)
    for _ in range(rounds):
        for i in range(len(x)):
            x[i] = max(0.0, x[i] + (t[i] - g[i] @ x) / max(g[i, i], 1e-12))
    return torch.from_numpy(x)


def reduced(
    tracer: Tracer,
    moments: Moments,
    full: Tensor,
    places: list[tuple[int, int]],
    worth: Tensor,
    rank: int,
    keys: list[Tensor],
) -> Head:
    """The map of ``rank`` that loses least of the scores of the chosen heads: singular vectors of the fitted
    queries, in the metric of the ``keys`` (second moments, [head_dim, head_dim], one of each place) that they
    will meet."""
    spec = tracer.spec
    hd, group = spec.head_dim, tracer.group
    columns = torch.cat(
        [torch.arange(group * hd) + layer * spec.n_heads * hd + head * group * hd for layer, head in places]
    )
    b = full[:, columns].double()
    mean = moments.xx[-1] / moments.count
    x = moments.xx / moments.count - torch.outer(mean, mean)
    root, back = _roots(torch.stack(keys).double())
    shape = (-1, len(places), group, hd)
    scaled = torch.einsum("xngc,nce->xnge", b[:-1].view(shape), root).flatten(1)
    left = torch.linalg.cholesky(x[:-1, :-1] + 1e-9 * x.diagonal().mean() * torch.eye(len(x) - 1)).T @ scaled
    _, vectors = torch.linalg.eigh(left @ left.T)
    v = left.T @ vectors[:, -rank:]
    v = v / v.norm(dim=0).clamp(min=1e-12)
    down = (scaled @ v).T
    up = torch.einsum("rngc,nce->rnge", v.T.reshape(shape), back).flatten(1).T
    scale = down.norm(dim=1, keepdim=True).clamp(min=1e-12)  # int8 wants rows alike
    return Head(places, (down / scale).float(), (up * scale.T).float(), b[-1].float(), worth)


def _roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """The square roots of ``moments`` [n, d, d] and their inverses."""
    d = moments.shape[-1]
    floor = 1e-3 * moments.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(d)
    values, vectors = torch.linalg.eigh(moments + floor)
    values = values.clamp(min=1e-12).sqrt()[:, None]
    return vectors * values @ vectors.mT, vectors / values @ vectors.mT
