"""A sequence read once by the torch decoder, from which its end is computed again and again with other heads
streaming.

The end sees keys and values that full attention left of what lies before it. So the layers below the first
head that streams need not be computed, and the others only at the last positions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from edgert.export.torch_decoder import TorchDecoder
from torch import Tensor

from edgert.head_classes import SINKS

Head = tuple[int, int]  # layer, KV head
# What queries of an attention layer, [H, S, hd], do with all its keys [KV, T, hd].
Look = Callable[[int, Tensor, Tensor], None]


@dataclass
class Trace:
    """``start``: the first position of the end. Of each layer: its input at the end and, for a convolution,
    as many positions before as it reaches back, [n, dim]; its keys and values at all positions, [KV, T,
    hd]."""

    decoder: TorchDecoder
    start: int
    length: int
    inputs: list[Tensor]
    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    log_probabilities: Tensor  # [S, vocab] that full attention gives

    @property
    def positions(self) -> int:
        return self.length - self.start


@torch.no_grad()
def read(decoder: TorchDecoder, ids: Sequence[int], end: int, look: Look | None = None) -> Trace:
    """Read ``ids``, the last ``end`` of which are the trace's end."""
    length, start = len(ids), len(ids) - end
    x = decoder.embed(torch.tensor([ids]))
    inputs: list[Tensor] = []
    keys: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        keys[i], values[i] = k[0], v[0]
        if look:
            look(i, q[0, :, start:], k[0])
        return full_attention(decoder, i, q, k, v)

    for i in range(decoder.spec.n_layers):
        inputs.append(x[0, max(start - _reach(decoder, i), 0) :].clone())
        x = decoder.layer(i, x, attend)
    logits = decoder.logits(x[0, start:])
    return Trace(decoder, start, length, inputs, keys, values, logits.log_softmax(-1))


def full_attention(decoder: TorchDecoder, i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the decoder itself computes."""
    window, n, group = decoder.spec.layers[i].window, q.shape[2], q.shape[1] // k.shape[1]
    mask = seen(0, n, window) if 0 < window < n else None
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=decoder.spec.attn_scale
    )


def seen(start: int, length: int, window: int = 0, sinks: int = 0) -> Tensor:
    """[S, T], true where a position from ``start`` on may see another: a ``window`` (0: all) and
    ``sinks``."""
    at, other = torch.arange(start, length)[:, None], torch.arange(length)[None, :]
    near = (at - other < window) | (other < sinks) if window else torch.tensor(True)
    return (at >= other) & near


@torch.no_grad()
def again(trace: Trace, streaming: Sequence[Collection[Head]], window: int) -> Tensor:
    """Log probabilities at the end, [B, S, vocab], for each of B sets of heads that stream there: they see
    the first SINKS positions and the last ``window``."""
    decoder, start, batch = trace.decoder, trace.start, len(streaming)
    spec = decoder.spec
    first = min((layer for heads in streaming for layer, _ in heads), default=0)
    stream = seen(start, trace.length, window, SINKS)
    x = trace.inputs[first][-trace.positions :].expand(batch, -1, -1)

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        kv = k.shape[1]
        k = torch.cat([trace.keys[i][:, :start].expand(batch, -1, -1, -1), k], 2)
        v = torch.cat([trace.values[i][:, :start].expand(batch, -1, -1, -1), v], 2)
        mask = seen(start, trace.length, spec.layers[i].window).expand(batch, kv, -1, -1)
        if any(layer == i for heads in streaming for layer, _ in heads):
            mask = mask.clone()
            for b, heads in enumerate(streaming):
                for layer, head in heads:
                    if layer == i:
                        mask[b, head] = stream
        return _grouped(q, k, v, mask, spec.attn_scale)

    for i in range(first, spec.n_layers):
        back = min(_reach(decoder, i), start)
        if back:
            x = torch.cat([trace.inputs[i][:back].expand(batch, -1, -1), x], 1)
        x = decoder.layer(i, x, attend, start - back)[:, back:]
    return decoder.logits(x).log_softmax(-1)


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention where the query heads of a KV head share its mask, [B, KV, S, T]: as rows of one matrix they
    also share its keys."""
    b, h, s, hd = q.shape
    kv = k.shape[1]
    group = h // kv
    q = q.view(b, kv, group * s, hd)
    rows = mask.unsqueeze(2).expand(b, kv, group, s, -1).reshape(b, kv, group * s, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=rows, scale=scale).reshape(b, h, s, hd)


def divergence(trace: Trace, found: Tensor) -> Tensor:
    """KL(full attention || ``found``), [..., S] in nats."""
    full = trace.log_probabilities
    return (full.exp() * (full - found)).sum(-1)


def _reach(decoder: TorchDecoder, i: int) -> int:
    return decoder.spec.conv_kernel - 1 if decoder.spec.layers[i].kind == "conv" else 0
