"""What full attention does along a sequence, in the terms of a choice of pages: the queries and keys of every
head that sees everything, and what each page is worth to each token.

The worth of a page is computed as the runtime does it (``native/sparse.h``): keys at two bits a channel, the
best token of a page, a share of what a query gives to all pages and to the first and last tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from edgert.export.torch_decoder import TorchDecoder
from edgert.models import ModelSpec
from torch import Tensor

PAGE, BLOCK, RECENT = 16, 256, 128  # tokens of a page, of a block of the index, and that are always read
LOG2E = 1.4426950408889634


def full_layers(spec: ModelSpec) -> list[int]:
    """The layers whose keys and values lie in pages."""
    return [i for i, layer in enumerate(spec.layers) if layer.kind == "attention" and not layer.window]


def sealed_pages(positions: Tensor) -> Tensor:
    """How many pages a step at each position may choose from."""
    return (positions + 1 - RECENT).clamp(min=0) // BLOCK * (BLOCK // PAGE)


@dataclass
class Trace:
    """Of one sequence of T tokens. Heads are those of full layers, L of them."""

    inputs: Tensor  # [T, 2 * dim] embedding of a token, normed final state of the one before; f16
    queries: Tensor  # [L, T, heads, head_dim] in front of their rotation; f16
    keys: Tensor  # [L, kv_heads, T, head_dim] rotated; f16
    votes: Tensor  # [T, P] what pages are worth, summed over heads
    effect: Tensor  # [T, P] the same, each head times its share of what its layer adds to the stream
    ahead: Tensor  # [T, P] votes of queries that each layer would make of the stream one layer earlier


class Tracer:
    def __init__(self, decoder: TorchDecoder) -> None:
        self.decoder, self.spec = decoder, decoder.spec
        self.layers = full_layers(self.spec)
        first = self.spec.layers[self.layers[0]]
        self.kv = first.n_kv_heads
        self.group = self.spec.n_heads // self.kv

    @torch.no_grad()
    def trace(self, ids: list[int], ahead: bool = False) -> Trace:
        """``ahead``: fill Trace.ahead too, which costs as much again as the votes."""
        spec, decoder = self.spec, self.decoder
        n = len(ids)
        positions = torch.arange(n)
        pages = int(sealed_pages(positions[-1:]))
        votes, effect, early = (torch.zeros(n, pages) for _ in range(3))
        queries: list[Tensor] = []
        keys: list[Tensor] = []
        stream: list[Tensor] = []  # before the present layer and the one before it

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
            layer = spec.layers[i]
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k.repeat_interleave(self.group, 1), v.repeat_interleave(self.group, 1), is_causal=True,
                scale=spec.attn_scale,
            )  # fmt: skip
            queries.append(self.decoder.rotate(layer, q[0], positions, back=True).transpose(0, 1).half())
            keys.append(k[0].half())
            weights = self._effects(i, out[0])
            scanned = self.indexed(keys[-1].float(), pages)
            shares = self.shares(q[0], keys[-1].float(), scanned, positions)
            votes.add_(shares.sum(0))
            effect.add_((shares * weights[..., None]).sum(0))
            if ahead and len(stream) > 1:
                x = decoder._norm(stream[-2], f"blk.{i}.attn_norm")
                early.add_(self.shares(decoder.qkv(i, x)[0][0], keys[-1].float(), scanned, positions).sum(0))
            return out

        x = decoder.embed(torch.tensor([ids]))
        embedded = x[0]
        for i, layer in enumerate(spec.layers):
            stream = [*stream[-1:], x]
            x = decoder.layer(i, x, attend if i in self.layers else None)
            del layer
        final = decoder.normed(x)[0]
        before = torch.cat([torch.zeros(1, spec.dim), final[:-1]])
        inputs = torch.cat([embedded, before], 1).half()
        return Trace(inputs, torch.stack(queries), torch.stack(keys), votes, effect, early)

    def _effects(self, i: int, out: Tensor) -> Tensor:
        """How much each KV head's group adds to the stream, over the mean of all: [kv_heads, T] of ``out``
        [heads, T, head_dim]."""
        w = self.decoder._w[f"blk.{i}.attn_output.weight"].view(self.spec.dim, self.spec.n_heads, -1)
        gram = torch.einsum("dhc,dhe->hce", w, w)
        norm = torch.einsum("htc,hce,hte->ht", out, gram, out).clamp(min=0).sqrt()
        each = norm.view(self.kv, self.group, -1).sum(1)
        result: Tensor = each / each.mean(0).clamp(min=1e-9)
        return result

    @staticmethod
    def indexed(keys: Tensor, pages: int) -> Tensor:
        """``keys`` [H, T, head_dim] of the first ``pages`` as the two-bit index has them."""
        blocks = keys[:, : pages * PAGE].reshape(len(keys), -1, BLOCK, keys.shape[2])
        mean = blocks.mean(2, keepdim=True)
        step = blocks.var(2, unbiased=False, keepdim=True).sqrt()
        base = mean - 1.5 * step
        codes = ((blocks - base) / step.clamp(min=1e-12)).round().clamp(0, 3)
        result: Tensor = (base + codes * step).flatten(1, 2)
        return result

    def shares(self, q: Tensor, keys: Tensor, scanned: Tensor, positions: Tensor) -> Tensor:
        """The share of each page, [H, n, P], for rotated queries ``q`` [H * group, n, head_dim] of tokens at
        ``positions`` [n]; ``keys`` [H, T, head_dim] and what :meth:`indexed` makes of them."""
        heads, n, pages = len(keys), len(positions), scanned.shape[1] // PAGE
        q = q.view(heads, self.group, n, -1) * (self.spec.attn_scale * LOG2E)
        last = positions[:, None] - torch.arange(PAGE)
        near = keys[:, last.clamp(min=0)]  # [H, n, 16, head_dim]
        always = torch.cat(
            [q @ keys[:, None, :PAGE].transpose(-1, -2), torch.einsum("hgnc,hnkc->hgnk", q, near)], -1
        )
        level = torch.logsumexp(always / LOG2E, -1) * LOG2E
        scores = (q @ scanned[:, None].transpose(-1, -2)).view(heads, self.group, n, pages, PAGE).amax(-1)
        weights = (scores - level[..., None]).amax(1).clamp(-16, 16).exp2()
        known = torch.arange(pages) < sealed_pages(positions)[:, None]
        weights = weights * known
        result: Tensor = weights / (1 + weights.sum(-1, keepdim=True))
        return result
