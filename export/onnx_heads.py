"""The vocabulary heads of an ONNX graph: the dense one, and the FlashHead where there is one.

Both are branches of an ``If``: ONNX Runtime computes every output of a graph, whichever is asked for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from edgert.export.onnx_flash import Flash, add_choice, add_flash_head
from edgert.export.onnx_graph import Graph, value_info
from edgert.export.onnx_weights import Stored, Weights
from edgert.models import ModelSpec


def add_heads(g: Graph, w: Weights, spec: ModelSpec, head: Stored, states: str, flash: Flash | None) -> None:
    """``states`` [1, R + E, dim]: normalised. ``head`` [vocab, dim] lies by row where there is a
    FlashHead."""
    if flash is None:
        w.product(states, head, (1, "S"), name="logits")
    else:
        _alternatives(g, w, spec, head, states, flash)
        g.output("flash_ids", "int64", (1, "flash_rows", flash.count))
        g.output("flash_logits", "float32", (1, "flash_rows", flash.count))
    g.output("logits", "float32", (1, "dense_rows" if flash else "S", spec.vocab_size))


def _alternatives(g: Graph, w: Weights, spec: ModelSpec, head: Stored, states: str, flash: Flash) -> None:
    n, v = flash.count, spec.vocab_size
    g.input("flash", "bool", ())
    add_choice(g)
    branches: list[Any] = []
    with g.branch(branches, "flash_head") as outputs:
        ids, logits = add_flash_head(g, w, spec, head, states, flash)
        none = _empty(g, "float32", v)
        outputs += [value_info(ids, "int64", (1, "S", n)), value_info(logits, "float32", (1, "S", n))]
        outputs.append(value_info(none, "float32", (1, 0, v)))
    with g.branch(branches, "dense_head") as outputs:
        no_ids, no_logits = _empty(g, "int64", n), _empty(g, "float32", n)
        dense = w.product(states, head, (1, "S"))
        outputs += [value_info(no_ids, "int64", (1, 0, n)), value_info(no_logits, "float32", (1, 0, n))]
        outputs.append(value_info(dense, "float32", (1, "S", v)))
    names = ["flash_ids", "flash_logits", "logits"]
    g.nodes("If", ["flash"], names, then_branch=branches[0], else_branch=branches[1])


def _empty(g: Graph, dtype: str, size: int) -> str:
    """[1, 0, size]. What a branch gives has to come from a node."""
    return g.node("Concat", g.constant(np.zeros((1, 0, size), dtype)), axis=1)
