"""The time of an ONNX export in ONNX Runtime on the CPU, part by part: an estimate, from what the doctor
measured of this machine's memory and of edgert's own kernels, and the share of that which ONNX Runtime
reached."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .engines.onnx import CHUNK, bytes_of_a_step, chosen_row_bytes
from .onnx_memory import BLOCK_BYTES, all_nodes, kv_bytes, slots_in_use
from .onnx_sparse_plan import working_set_steps
from .plan_time import OVERLAP, Step

if TYPE_CHECKING:
    from .onnx_directory import OnnxDirectory
    from .onnx_plan import OnnxCase
    from .onnx_wire import Graph
    from .rates import Rates

# Shares that ONNX Runtime 1.32 reached on one core of an AMD EPYC: of edgert's kernels in products with one
# token and with many, and of the float32 rate in attention.
STEP = {"int4": 0.41, "int8": 0.61, "f16": 1.0, "f32": 1.0}
PROMPT = {"int4": 0.30, "int8": 0.37, "f16": 2.3, "f32": 2.3}
STEP_ATTENTION = {"f32": 0.07, "f16": 0.05}  # float16 is made float32 anew for every query head
PROMPT_ATTENTION = 0.70
NODE = 2.3e-6  # seconds of a node in a step, whatever it computes
# Of a FlashHead: seconds of a node, most of which have thousands of values; for each token of the vocabulary,
# of which it takes the best; and bytes a second of low-rank rows, which one thread gathers.
FLASH_NODE, CHOICE, GATHERED = 6e-6, 2.5e-9, 13e9
WORTH = 0.5
KINDS = {"int4": "Q4_0", "int8": "Q8_0", "f16": "F32", "f32": "F32"}  # float16 is made float32
# Bytes of a weight as it is stored, with its part of a scale, and as it is packed.
STORED = {"int4": 20 / 32, "int8": 36 / 32, "f16": 4, "f32": 4}
PACKED = {"int4": (16 + BLOCK_BYTES) / 32, "int8": (32 + BLOCK_BYTES) / 32, "f16": 4, "f32": 4}


def decode_steps(case: OnnxCase, rates: Rates, length: int) -> tuple[Step, ...]:
    """One token with ``length`` positions in the cache."""
    spec = case.directory.spec
    body, dense, _ = bytes_of_a_step(case.graph, case.directory)
    kv, seen = case.directory.kv, min(length, case.chosen or length)
    kept = {**kv_bytes(spec, kv, length), 0: kv_bytes(spec, kv, seen).get(0, 0)}
    read = sum(kept.values())
    attention = _pairs(case, length, seen) / (STEP_ATTENTION[kv] * rates.fp32)
    steps = [
        _product(case.directory.quant, "body", body, rates, 1),
        Step("attention", attention, read, "arithmetic"),
        Step("fixed", NODE * len(case.graph.nodes), 0, "fixed"),
        *head_steps(case.directory, case.graph, case.head, rates),
    ]
    if case.chosen:
        steps += working_set_steps(case, rates, length, kept[0] // seen)
    return tuple(_exact(case, rates, steps, dense) if case.head == "exact" else steps)


def head_steps(directory: OnnxDirectory, graph: Graph, head: str, rates: Rates) -> list[Step]:
    """The head's part of one token, of "exact" that of a draft."""
    _, dense, flash = bytes_of_a_step(graph, directory)
    quant = _of_head(directory.quant)
    if head == "dense":
        return [_product(quant, "head", dense, rates, 1)]
    rows = chosen_row_bytes(graph, directory)
    nodes = sum(1 for _ in all_nodes(graph)) - len(graph.nodes)
    return [
        _product(quant, "head", flash - rows, rates, 1),
        Step("sieve", rows / GATHERED, rows, "memory"),
        Step("choice", CHOICE * directory.spec.vocab_size + FLASH_NODE * nodes, 0, "fixed"),
    ]


def faster_head(directory: OnnxDirectory, graph: Graph, rates: Rates) -> str:
    """The head to take: "flash" where there is one and its part of a step is expected to be at most
    :data:`WORTH` times the dense head's, which never misses a token."""
    if not directory.flash_head:
        return "dense"

    def seconds(head: str) -> float:
        return sum(step.seconds for step in head_steps(directory, graph, head, rates))

    return "flash" if seconds("flash") < WORTH * seconds("dense") else "dense"


def prefill_steps(case: OnnxCase, rates: Rates, length: int) -> tuple[Step, ...]:
    """A prompt of ``length`` tokens, up to the logits after the last."""
    body, dense, _ = bytes_of_a_step(case.graph, case.directory)
    tokens = min(length, CHUNK)
    quant = case.directory.quant
    one = _product(quant, "body", body, rates, tokens)
    passes = length / tokens
    # Position i attends to i positions, or to the slots of a window.
    pairs = sum(_pairs(case, n, n) * tokens for n in range(tokens // 2, length, tokens))
    return (
        Step("body", one.seconds * passes, round(one.bytes * passes), one.limit),
        Step("attention", pairs / (PROMPT_ATTENTION * rates.fp32), 0, "arithmetic"),
        Step("fixed", NODE * len(case.graph.nodes) * passes, 0, "fixed"),
        _product(_of_head(quant), "head", dense, rates, 1),
    )


def _of_head(quant: str) -> str:
    """How the head's matrix is stored."""
    return "int8" if quant == "int4" else quant


def _product(quant: str, name: str, stored: int, rates: Rates, tokens: int) -> Step:
    """Of matrices that are ``stored`` bytes, with the states of ``tokens`` tokens."""
    weights = stored / STORED[quant]
    packed = round(weights * PACKED[quant])
    share = (STEP if tokens == 1 else PROMPT)[quant]
    memory = packed / rates.bandwidth
    arithmetic = weights / (share * rates.weights(KINDS[quant], tokens))
    seconds = (memory**OVERLAP + arithmetic**OVERLAP) ** (1 / OVERLAP)
    return Step(name, seconds, packed, "memory" if memory >= arithmetic else "arithmetic")


def _pairs(case: OnnxCase, length: int, seen: int) -> int:
    """Multiply-adds of attention for one token after ``length``, of which layers that see everything have
    ``seen`` in slots. ONNX Runtime's operator goes through all slots in use, also those that lie before the
    window."""
    spec = case.directory.spec
    return sum(
        2 * spec.n_heads * spec.head_dim * slots_in_use(spec, layer.window, length if layer.window else seen)
        for layer in spec.layers
        if layer.kind == "attention"
    )


def _exact(case: OnnxCase, rates: Rates, drafts: list[Step], dense: int) -> list[Step]:
    """With agreement a, a block of L drafts gives (1 - a**L) / (1 - a) tokens; the states of all of them go
    through the dense head at once."""
    from .heads import LONGEST

    quality = (case.directory.flash_head or {}).get("quality", {})
    found = quality.get("agreement")
    agreement = found if isinstance(found, float) and 0 < found < 1 else 0.99
    tokens = (1 - agreement**LONGEST) / (1 - agreement)
    share = LONGEST / tokens
    whole = _product(_of_head(case.directory.quant), "confirming", dense, rates, LONGEST)
    return [
        *(Step(s.name, s.seconds * share, round(s.bytes * share), s.limit) for s in drafts),
        Step(whole.name, whole.seconds / tokens, round(whole.bytes / tokens), whole.limit),
    ]
