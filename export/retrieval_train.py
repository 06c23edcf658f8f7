"""Gradient training of a retrieval head on what its choice costs: the worth of pages that are left out, each
head of attention counted by what it adds to the stream."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from edgert.export.retrieval_fit import Head, faded
from edgert.export.retrieval_trace import Trace, Tracer
from torch import Tensor

from edgert.whole_file import write_whole

POSITIONS = 48  # of a step, all of one sequence
SET = 0.3  # share of the pages with an index that the set of a step holds
SOFT = 0.3  # width of the soft choice, in logarithms of worth
RATE = 2e-3  # of the weights' own size
SAVED_EVERY = 25  # steps


class Sequences:
    """Traces with what training asks of them at every step."""

    def __init__(self, tracer: Tracer, traces: list[Trace], places: list[tuple[int, int]]) -> None:
        self.tracer = tracer
        self.items = []
        for trace in traces:
            pages = trace.votes.shape[1]
            keys = [trace.keys[layer, head : head + 1].float() for layer, head in places]
            scanned = [tracer.indexed(k, pages) for k in keys]
            positions = (trace.votes.sum(1) > 0).nonzero()[:, 0]
            if len(positions):
                self.items.append((trace, keys, scanned, faded(trace.votes), positions))

    def values(self, head: Head, n: int, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For some positions of sequence ``n``: what the head says pages are worth, what past votes say, and
        what they are, [positions, P] each."""
        trace, keys, scanned, past, _ = self.items[n]
        inputs = trace.inputs[positions].float()
        return (
            head.worth(self.tracer, inputs, keys, scanned, positions),
            past[positions],
            trace.effect[positions],
        )


def lost(value: Tensor, effect: Tensor) -> Tensor:
    """The share of ``effect`` [n, P] that lies outside of a soft set of the pages of the largest ``value``.
    The set holds SET of the pages whatever the values are: pages come in only where others go."""
    wanted = ((effect > 0).sum(1, keepdim=True) * SET).clamp(min=1)
    log = (value + 1e-9).log()
    edge = _edge(log.detach(), wanted)
    # One step of Newton's method, which is zero, and whose gradient is the edge's.
    soft = torch.sigmoid((log - edge) / SOFT)
    slope = (soft * (1 - soft)).detach().sum(1, keepdim=True).clamp(min=1e-9)
    edge = edge + (soft.sum(1, keepdim=True) - wanted) * SOFT / slope
    inside = torch.sigmoid((log - edge) / SOFT)
    result: Tensor = ((1 - inside) * effect).sum(1) / effect.sum(1).clamp(min=1e-9)
    return result.mean()


def _edge(log: Tensor, wanted: Tensor) -> Tensor:
    """Where a soft set of ``log`` [n, P] begins that holds ``wanted`` [n, 1] pages, by bisection."""
    low, high = log.amin(1, keepdim=True) - 20 * SOFT, log.amax(1, keepdim=True) + 20 * SOFT
    for _ in range(40):
        middle = (low + high) / 2
        many = torch.sigmoid((log - middle) / SOFT).sum(1, keepdim=True) > wanted
        low, high = torch.where(many, middle, low), torch.where(many, high, middle)
    return (low + high) / 2


@torch.no_grad()
def evaluate(head: Head, sequences: Sequences) -> tuple[float, float]:
    """What is lost with the head and with past votes alone, over all sequences."""
    with_head, without = 0.0, 0.0
    for n, item in enumerate(sequences.items):
        positions = item[-1][:: max(1, len(item[-1]) // POSITIONS)]
        own, past, effect = sequences.values(head, n, positions)
        with_head += float(lost(past + own, effect))
        without += float(lost(past, effect))
    return with_head / len(sequences.items), without / len(sequences.items)


def train(
    head: Head, sequences: Sequences, steps: int, seed: int, checkpoint: Path, progress: Callable[[int], None]
) -> None:
    """Train ``head`` in place. Goes on from ``checkpoint`` if there is one; an interrupted training gives
    what one without a break does."""
    groups = [
        {"params": [p], "lr": RATE * float(p.detach().square().mean().sqrt().clamp(min=1e-3))}
        for p in (head.down, head.up, head.bias)
    ]
    groups.append({"params": [head.log_worth], "lr": 10 * RATE})
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    rates = [group["lr"] for group in optimizer.param_groups]
    done = 0
    if checkpoint.exists():
        state: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["done"]
        progress(done)
    for step in range(done, steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        n = int(torch.randint(len(sequences.items), (1,), generator=generator))
        all_positions = sequences.items[n][-1]
        picked = torch.randperm(len(all_positions), generator=generator)[:POSITIONS]
        own, past, effect = sequences.values(head, n, all_positions[picked.sort().values])
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        torch.autograd.backward(lost(past + own, effect))
        optimizer.step()
        progress(1)
        if (step + 1) % SAVED_EVERY == 0 and step + 1 < steps:
            save(
                checkpoint, {"head": head.state_dict(), "optimizer": optimizer.state_dict(), "done": step + 1}
            )


def save(path: Path, state: Any) -> None:
    """Write ``path`` whole or not at all. Raises OSError."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, [buffer.getbuffer()])
