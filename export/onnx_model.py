"""The decoder of any :class:`ModelSpec` as one ONNX graph, for prompts and for single steps.

Inputs:

    input_ids     int64 [1, T]      the new tokens
    positions     int64 [1, T]      their positions in the text, increasing by 1
    filled        int32 [1]         slots in use; the new tokens take the T after them. -1: as many as
                                    there are positions before the first new token
    rows          int64 [R]         tokens of this pass whose logits are wanted, 0 .. T - 1, or -1: the last
    more_states   float32 [1, E, dim]   final states of earlier passes to be scored too; E may be 0
    flash         bool []           whether the FlashHead scores instead of the dense head; only in graphs
                                    with one
    window_start  int32 [1]         positions before this one have left the caches of windowed layers, else 0;
                                    only in graphs with such layers
    k.i, v.i      float32 or float16 [1, KV heads, slots, head dim]   cache of attention layer i, of the type
                                    that the export was given; in windowed layers window_slots in place of
                                    slots
    conv.i        float32 [1, dim, taps - 1]   what convolution layer i saw last; zeros at the start

Outputs:

    logits        float32 [1, R + E, vocab]    by the dense head; [1, 0, vocab] where ``flash`` is true
    hidden        float32 [1, R, dim]          final states of ``rows``, normalised: what the heads see
    queries       float32 [1, R, layers * heads * head dim]   rotated queries of ``rows``, of the layers that
                                               see everything in their order; only in graphs with such
                                               layers
    flash_ids     int64   [1, R + E, N]        the tokens that the FlashHead scored, each once, first those it
                                               always scores; [1, 0, N] where ``flash`` is false
    flash_logits  float32 [1, R + E, N]        their logits; -inf, with id 0, where fewer were found
    k_out.i, v_out.i, conv_out.i               the caches after the pass

``k_out.i`` is to be bound to the memory of ``k.i``, and so are the others: then T rows of each cache are
written and nothing is copied. Bound elsewhere the whole cache is.

Keys are stored rotated to their positions, so full attention does not care which position lies in which slot.
Every slot below ``filled`` is seen by every new token, and new tokens see those before them. Caches of
windowed layers hold the positions from ``window_start`` to that of the first new token, in order: slot s has
position ``window_start + s``. Going back is a smaller ``filled``; of a convolution, the state that was saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO

import onnx
from edgert.export.onnx_flash import Flash, common_tokens
from edgert.export.onnx_graph import Graph
from edgert.export.onnx_heads import add_heads
from edgert.export.onnx_layers import add_body, norm
from edgert.export.onnx_weights import Weights
from edgert.models import ModelSpec

from edgert import _native
from edgert.sidecar import Sidecar
from edgert.tokenizer import Tokenizer

PRODUCER = "edgert"


def build(
    file: _native.GgufFile,
    spec: ModelSpec,
    quant: str,
    kv: str,
    sidecar: Sidecar | None,
    data: BinaryIO,
    location: str,
    done: Callable[[int], None],
) -> tuple[onnx.ModelProto, Flash | None]:
    """The graph of the GGUF model ``file`` with its matrices as ``quant`` and its caches as ``kv``, f32 or
    f16, and its FlashHead where ``sidecar`` is given. Weights are written to ``data``, which the graph calls
    ``location``; ``done`` counts the tensors that are. Raises ModelFileError for a damaged file, and
    OSError."""
    g = Graph(data, location)
    w = Weights(file, quant, g, done)
    g.input("input_ids", "int64", (1, "T"))
    g.input("positions", "int64", (1, "T"))
    g.input("rows", "int64", ("R",))
    g.input("more_states", "float32", (1, "E", spec.dim))
    flash = None
    if sidecar:
        flash = Flash.of(sidecar, common_tokens(Tokenizer.from_gguf(file.metadata), spec.vocab_size))
    table = w.matrix(["token_embd.weight"], by_row=True)
    x = add_body(g, w, spec, kv, w.rows(table, "input_ids", (1, "T", spec.dim)))
    wanted = g.node("Gather", x, "rows", axis=1)
    hidden = g.node("Identity", norm(g, w, spec, wanted, spec.output_norm), name="hidden")
    g.output("hidden", "float32", (1, "R", spec.dim))
    states = g.node("Concat", hidden, "more_states", axis=1)
    head = table if spec.tied_head else w.matrix(["output.weight"], by_row=flash is not None)
    add_heads(g, w, spec, head, states, flash)
    return g.model(PRODUCER), flash
