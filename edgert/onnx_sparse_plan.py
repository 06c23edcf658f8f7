"""What a working set of an ONNX export costs beside the graph: terms of the memory and of the time of
:mod:`edgert.engines.onnx_sparse`.

A prompt sees everything and has slots for it while it is read, as many as with full attention. Behind them is
the store with its index, of which ``slots`` pages lie in memory.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from . import _native
from .engines.onnx_sparse import PAGE, VOTERS, full_layers, seeing_all
from .plan_time import FROM_DISK, SCAN, Step
from .planner import Part
from .rates import PAGE_READS, TOKEN

if TYPE_CHECKING:
    from .models import ModelSpec
    from .onnx_plan import OnnxCase
    from .rates import Rates

# As they were measured on an AMD EPYC: seconds of a vote and of a choice, the scan of the index in times of
# the native engine's, and bytes a second that are copied.
VOTING, CHOOSING, SCANS, COPIES = 0.15e-3, 0.2e-3, 1.6, 12e9
ENTERING = 4.5  # pages that enter the set of a step
TAIL = 30  # pages in memory that a step sees anyhow: the first one, and those without an index


def store_parts(case: OnnxCase, context: int) -> list[Part]:
    """What lies behind the slots of ``context`` tokens."""
    spec, slots = case.directory.spec, case.slots
    layers = full_layers(spec)
    heads = sum(spec.layers[i].n_kv_heads for i in layers)
    votes = heads * (context // PAGE) + len(layers) * spec.n_heads * spec.head_dim
    note = f", {slots} pages of {PAGE} tokens; the others on the disk" if slots else ""
    return [
        Part("KV store", _store(spec, context, slots)[0], f"float16, and an index{note}"),
        Part("votes", 4 * VOTERS * votes, "for pages, of the last tokens of a prompt"),
    ]


def fewest_pages(spec: ModelSpec, context: int) -> int:
    """Of the store in memory where others are on the disk."""
    return _store(spec, context, 0)[1]


def working_set_steps(case: OnnxCase, rates: Rates, length: int, row: int) -> list[Step]:
    """What comes between two steps with ``length`` tokens in the cache: votes, and pages that enter the set.
    ``row``: bytes of a slot of all layers that have the set."""
    spec = case.directory.spec
    layers = full_layers(spec)
    heads = sum(spec.layers[i].n_kv_heads for i in layers)
    group = len(layers) * spec.n_heads // heads
    scan = SCANS * SCAN * heads * group * length / rates.pairs("f16", spec.head_dim, group)
    steps = [Step("votes", VOTING + scan, 0, "arithmetic")]
    if length <= case.chosen:
        return steps
    record = PAGE * 4 * heads * spec.head_dim  # float16 keys and values
    copied = round(ENTERING * (record + PAGE * row))
    steps.append(Step("pages", CHOOSING + copied / COPIES, copied, "memory"))
    if case.slots and -(-length // PAGE) > case.slots:
        # Those that left last are in memory: it has the more of the next ones the more it has room for.
        entering = ENTERING * math.exp(-PAGE * (case.slots - TAIL) / case.chosen)
        read = round(entering * record)
        # They are asked for when the step before ends, and others are copied meanwhile.
        behind = TOKEN + copied / COPIES
        waits = max(rates.disk_seconds(entering, record, PAGE_READS) - behind, 0.0)
        steps.append(Step("disk", waits + read * FROM_DISK, read, "disk"))
    return steps


@lru_cache(maxsize=8)
def _layers(spec: ModelSpec) -> dict[str, Any]:
    return seeing_all(spec).as_dict()


def _store(spec: ModelSpec, context: int, slots: int) -> tuple[int, int]:
    return _native.slot_store_bytes(_layers(spec), context, slots)
