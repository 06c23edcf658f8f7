"""What a run of an ONNX export will cost: the plan of :mod:`edgert.planner` for a directory.

Memory is that of ONNX Runtime on the CPU (:mod:`edgert.onnx_memory`). Of other execution providers nothing was
measured. Time is an estimate from what the doctor measured of this machine's memory and of edgert's own
kernels, with what ONNX Runtime reached of these on one machine (``bench/results``, plan_check_onnx).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import PlanError, UsageError
from .memory_left import memory_left
from .onnx_directory import QUANTS, OnnxDirectory
from .onnx_memory import count_nodes, held, kv_bytes, parts
from .onnx_preflight import check_graph
from .placement import longest
from .plan_time import Step
from .planner import Part, Plan, Remedy, check_context

if TYPE_CHECKING:
    from .onnx_wire import Graph
    from .rates import Rates

# Share of memory's bandwidth that a step reaches, of the doctor's rate of int8 kernels that a prompt does,
# and seconds of a node.
READS, PREFILL, NODE = 1.0, 1.0, 4e-6


@dataclass(frozen=True)
class OnnxCase:
    """An export, and the options that change what it costs."""

    directory: OnnxDirectory
    graph: Graph
    threads: int
    head: str

    @classmethod
    def read(cls, directory: OnnxDirectory, threads: int = 0, head: str = "auto") -> OnnxCase:
        """Raises ModelFileError and UnsupportedModelError for a graph that is not edgert's, UsageError for a
        head that it has not."""
        from .platforms.detect import detect_threads

        flash = directory.flash_head is not None
        if head == "auto":
            head = "flash" if flash else "dense"
        if head in ("flash", "exact") and not flash:
            raise UsageError(
                f"{directory.path} has no FlashHead, which head={head!r} needs: export the model again with "
                "--flash-head, or use head='dense'"
            )
        return cls(directory, check_graph(directory).graph, threads or detect_threads(), head)

    def memory(self, context: int, quant: str = "") -> tuple[Part, ...]:
        """The terms of the peak with one session of ``context`` tokens, as the export is or would be in
        another ``quant``."""
        return parts(self.directory, self.graph, context, self.head, quant)

    def needed(self, context: int, quant: str = "") -> int:
        return sum(part.bytes for part in self.memory(context, quant))

    def max_context(self, available: int) -> int:
        """The longest context that fits ``available`` bytes, at most what the model was made for."""
        return longest(self.directory.spec.context_length, lambda n: self.needed(n) <= available)

    def remedies(self, context: int, available: int) -> tuple[Remedy, ...]:
        """What to change when ``context`` tokens do not fit, what saves most first; none when they do."""
        needed = self.needed(context)
        if needed <= available:
            return ()
        from .download import size_text

        found: list[tuple[str, int]] = []
        if most := self.max_context(available):
            found.append((f"a context of {most} tokens (--context {most})", needed - self.needed(most)))
        for quant in QUANTS:
            if (saves := needed - self.needed(context, quant)) > 0:
                found.append((f"an export with weights in {quant} (edgert export --quant {quant})", saves))
        found.sort(key=lambda pair: -pair[1])
        remedies = [
            Remedy(f"{text} saves {size_text(saves)}", saves, needed - saves <= available)
            for text, saves in found
        ]
        short = needed - available
        remedies.append(Remedy(f"{size_text(short)} more memory, or a smaller model", short, True))
        return tuple(remedies)

    def decode(self, rates: Rates, length: int) -> tuple[Step, ...]:
        """One token with ``length`` positions in the cache."""
        body, dense, flash = self._weights()
        cache = sum(kv_bytes(self.directory.spec, length).values())
        speed = READS * rates.bandwidth

        def reading(name: str, read: int) -> Step:
            return Step(name, read / speed, read, "memory")

        return (
            reading("body", body),
            reading("attention", cache),
            reading("head", dense if self.head == "dense" else flash),
            Step("fixed", NODE * count_nodes(self.graph), 0, "fixed"),
        )

    def prefill(self, rates: Rates, length: int) -> tuple[Step, ...]:
        """A prompt of ``length`` tokens, up to the logits after the last."""
        spec = self.directory.spec
        kind = {"int4": "Q4_0", "int8": "Q8_0"}.get(self.directory.quant, "F32")
        inner = sum(
            rows * cols for name, rows, cols in matrices(spec) if name not in ("token_embd.weight", "output.weight")
        )
        tokens = min(length, MANY)
        body = length / tokens * inner / (PREFILL * rates.weights(kind, tokens))
        _, dense, _ = self._weights()
        return (
            Step("body", body, 0, "arithmetic"),
            Step("head", dense / (READS * rates.bandwidth), dense, "memory"),
        )

    def _weights(self) -> tuple[int, int, int]:
        """Bytes that a step reads of the layers, of the dense head, and of the FlashHead."""


def plan_export(
    path: Path,
    *,
    context: int | None,
    platform: str | None,
    memory: int | None,
    threads: int,
    head: str,
    others: Mapping[str, Any],
) -> Plan:
    """:func:`edgert.plan` for a directory."""
