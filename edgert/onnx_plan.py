"""What a run of an ONNX export will cost: the plan of :mod:`edgert.planner` for a directory.

Memory (:mod:`edgert.onnx_memory`) and time (:mod:`edgert.onnx_time`) are those of ONNX Runtime on the CPU. Of
other execution providers nothing was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import PlanError, UsageError
from .memory_left import memory_left
from .onnx_directory import QUANTS, OnnxDirectory
from .onnx_memory import parts
from .onnx_preflight import check_graph
from .onnx_time import decode_steps, faster_head, prefill_steps
from .placement import longest
from .planner import Part, Plan, Remedy, check_context, ranked

if TYPE_CHECKING:
    from .onnx_wire import Graph
    from .rates import Rates


def check_has(directory: OnnxDirectory, head: str) -> None:
    """Raises UsageError for a head that the export has not."""
    if head not in ("auto", "dense") and not directory.flash_head:
        raise UsageError(
            f"{directory.path} has no FlashHead, which head={head!r} needs: export the model again with "
            "--flash-head, or use head='dense'"
        )


def choose_head(
    directory: OnnxDirectory,
    graph: Graph,
    head: str,
    threads: int = 0,
    provider: str = "cpu",
    rates: Rates | None = None,
) -> str:
    """``head``, with "auto" decided: the head whose steps are expected to be shorter at ``rates`` (None: of
    this machine). Of other providers than the CPU nothing was measured: a FlashHead that somebody had
    exported is used there."""
    from .rates import rates_for

    if head != "auto" or not directory.flash_head:
        return "dense" if head == "auto" else head
    if provider != "cpu":
        return "flash"
    return faster_head(directory, graph, rates or rates_for(None, threads))


@dataclass(frozen=True)
class OnnxCase:
    """An export, and the options that change what it costs."""

    directory: OnnxDirectory
    graph: Graph
    threads: int
    head: str

    @classmethod
    def read(
        cls,
        directory: OnnxDirectory,
        threads: int = 0,
        head: str = "auto",
        graph: Graph | None = None,
        rates: Rates | None = None,
    ) -> OnnxCase:
        """``graph``: as pre-flight found it; None: it is read now. ``rates``: see :func:`choose_head`. Raises
        ModelFileError and UnsupportedModelError for one that is not edgert's, UsageError for a head that it
        has not."""
        from .platforms.detect import detect_threads

        check_has(directory, head)
        graph = graph or check_graph(directory).graph
        threads = threads or detect_threads()
        return cls(directory, graph, threads, choose_head(directory, graph, head, threads, rates=rates))

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
        found: list[tuple[str, int]] = []
        if most := self.max_context(available):
            found.append((f"a context of {most} tokens (--context {most})", needed - self.needed(most)))
        for quant in QUANTS:
            if (saves := needed - self.needed(context, quant)) > 0:
                found.append((f"an export with weights in {quant} (edgert export --quant {quant})", saves))
        return ranked(found, needed, available)

    def plan(self, context: int, rates: Rates, available: int, limit: str) -> Plan:
        directory = self.directory
        return Plan(
            model=directory.name,
            path=str(directory.path),
            context=context,
            trained_context=directory.spec.context_length,
            kv="f32",
            attention="full",
            chosen=0,
            slots=0,
            head=self.head,
            threads=self.threads,
            platform=rates.name,
            memory=self.memory(context),
            available=available,
            limit=limit,
            max_context=self.max_context(available),
            regimes=(),
            decode=decode_steps(self, rates, context),
            prefill=prefill_steps(self, rates, context),
            remedies=self.remedies(context, available),
        )


def plan_export(
    path: Path,
    context: int | None,
    platform: str | None,
    memory: int | None,
    threads: int,
    head: str,
    others: Mapping[str, Any],
) -> Plan:
    """:func:`edgert.plan` for a directory; ``others`` are its arguments that are for .gguf files alone."""
    from .heads import check_head
    from .model_onnx import refuse_options
    from .placement import check_memory
    from .rates import rates_for

    check_head(head, 0)
    check_memory(memory, "onnx")
    refuse_options(path, others)
    directory = OnnxDirectory.open(path)
    check_context(context, directory.spec.context_length)
    rates = rates_for(platform, threads)
    case = OnnxCase.read(directory, rates.threads, head, rates=rates)
    if memory is not None:
        available, limit = memory, "the limit asked for (--memory)"
    elif platform is not None:
        available, limit = rates.usable_memory, f"{rates.name}"
    else:
        available, limit = memory_left(rates.threads)
    return case.plan(context or directory.context, rates, available, limit)


def needed_bytes(directory: OnnxDirectory, context: int, threads: int = 0, head: str = "auto") -> int:
    """Bytes at the peak of a process with one session of ``context`` tokens."""
    return OnnxCase.read(directory, threads, head).needed(context)


def check_fits(
    directory: OnnxDirectory,
    context: int,
    threads: int = 0,
    head: str = "auto",
    graph: Graph | None = None,
) -> None:
    """Raises PlanError, with what to change, when a session of ``context`` tokens does not fit the memory
    there is for this process. ``graph``: see :meth:`OnnxCase.read`."""
    from .download import size_text

    case = OnnxCase.read(directory, threads, head, graph)
    available, limit = memory_left(case.threads)
    needed = case.needed(context)
    if needed <= available:
        return
    remedies = [remedy.text for remedy in case.remedies(context, available)]
    raise PlanError(
        f"{directory.path} with a context of {context} tokens needs {size_text(needed)} of memory and "
        f"{limit} leaves {size_text(max(available, 0))}; what would help: {'; or '.join(remedies)}",
        needed,
        available,
        remedies,
    )
