"""What a run of an ONNX export will cost: the plan of :mod:`edgert.planner` for a directory.

Memory (:mod:`edgert.onnx_memory`) and time (:mod:`edgert.onnx_time`) are those of ONNX Runtime on the CPU. Of
other execution providers nothing was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _native
from .engines.onnx_sparse import full_layers
from .errors import PlanError, UsageError
from .memory_left import memory_left
from .onnx_directory import QUANTS, TOKENIZER, OnnxDirectory
from .onnx_memory import parts
from .onnx_preflight import check_graph
from .onnx_sparse_plan import fewest_pages
from .onnx_time import decode_steps, faster_head, prefill_steps
from .placement import check_memory, longest, place, plan_session
from .planner import Part, Plan, Remedy, check_context, ranked
from .tokenizer_memory import tokenizer_bytes

if TYPE_CHECKING:
    from .onnx_wire import Graph
    from .placement import Regime
    from .plan_time import Step
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
    """An export, and the options that change what it costs. ``tokenizer``: bytes of that."""

    directory: OnnxDirectory
    graph: Graph
    threads: int
    head: str
    tokenizer: int
    chosen: int = 0  # slots that a step of sparse attention sees; 0: it sees everything
    slots: int = 0  # pages of its store in memory, the others on the disk; 0: all are

    @classmethod
    def read(
        cls,
        directory: OnnxDirectory,
        threads: int = 0,
        head: str = "auto",
        graph: Graph | None = None,
        chosen: int = 0,
        rates: Rates | None = None,
    ) -> OnnxCase:
        """``graph``: as pre-flight found it; None: it is read now. ``rates``: see :func:`choose_head`. Raises
        ModelFileError and UnsupportedModelError for one that is not edgert's, UsageError for a head that it
        has not, and for sparse attention where no layer sees everything."""
        from .platforms.detect import detect_threads

        if chosen and not full_layers(directory.spec):
            raise UsageError(
                f"all layers of {directory.path} have a window, so that there is nothing to choose: drop "
                "attention='sparse'"
            )
        check_has(directory, head)
        graph = graph or check_graph(directory).graph
        threads = threads or detect_threads()
        head = choose_head(directory, graph, head, threads, rates=rates)
        tokenizer, _, kept = tokenizer_bytes(_native.GgufFile(str(directory.path / TOKENIZER)))
        return cls(directory, graph, threads, head, tokenizer + kept, chosen)

    def memory(self, context: int, quant: str = "", kv: str = "") -> tuple[Part, ...]:
        """The terms of the peak with one session of ``context`` tokens, as the export is or would be in
        another ``quant`` or ``kv``."""
        return parts(self, context, quant, kv)

    def needed(self, context: int, quant: str = "", kv: str = "") -> int:
        return sum(part.bytes for part in self.memory(context, quant, kv))

    def fewest_pages(self, context: int) -> int:
        """Of the store in memory where others are on the disk."""
        return fewest_pages(self.directory.spec, context)

    def decode(self, rates: Rates, length: int) -> tuple[Step, ...]:
        """The parts of a step with ``length`` tokens in the cache."""
        return decode_steps(self, rates, length)

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
        if self.chosen:
            if not self.slots and (on_disk := place(self, context, available)).slots:
                text = f"keys and values on the disk (--attention sparse --memory {available})"
                found.append((text, needed - on_disk.needed(context)))
            saves = needed - replace(self, chosen=0, slots=0).needed(context)
            found.append(("full attention, which has no store beside its slots (--attention full)", saves))
        for quant in QUANTS:
            if (saves := needed - self.needed(context, quant)) > 0:
                found.append((f"an export with weights in {quant} (edgert export --quant {quant})", saves))
        if (saves := needed - self.needed(context, kv="f16")) > 0:
            found.append(("an export with keys and values in f16 (edgert export --kv f16)", saves))
        return ranked(found, needed, available)

    def plan(self, context: int, rates: Rates, available: int, limit: str, *, to_disk: bool = False) -> Plan:
        """``to_disk``: with sparse attention, keys and values that do not fit may go to the disk."""
        return plan_session(
            self, context, self.directory.spec.context_length, rates, available, limit, to_disk
        )

    def plan_as_placed(
        self,
        context: int,
        rates: Rates,
        available: int,
        limit: str,
        max_context: int,
        regimes: tuple[Regime, ...] = (),
    ) -> Plan:
        directory = self.directory
        return Plan(
            model=directory.name,
            path=str(directory.path),
            context=context,
            trained_context=directory.spec.context_length,
            kv=directory.kv,
            attention="sparse" if self.chosen else "full",
            chosen=self.chosen,
            slots=self.slots,
            head=self.head,
            threads=self.threads,
            platform=rates.name,
            memory=self.memory(context),
            available=available,
            limit=limit,
            max_context=max_context,
            regimes=regimes,
            decode=self.decode(rates, context),
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
    from .model_onnx import refuse_options, sparse_slots
    from .rates import rates_for

    check_head(head, 0)
    check_memory(memory, "onnx")
    chosen = sparse_slots(path, "cpu", others)
    refuse_options(path, others)
    directory = OnnxDirectory.open(path)
    check_context(context, directory.spec.context_length)
    rates = rates_for(platform, threads)
    case = OnnxCase.read(directory, rates.threads, head, chosen=chosen, rates=rates)
    if memory is not None:
        available, limit = memory, "the limit asked for (--memory)"
    elif platform is not None:
        available, limit = rates.usable_memory, f"{rates.name}"
    else:
        available, limit = memory_left(rates.threads)
    context = context or directory.context
    return case.plan(context, rates, available, limit, to_disk=memory is not None)


def needed_bytes(directory: OnnxDirectory, context: int, threads: int = 0, head: str = "auto") -> int:
    """Bytes at the peak of a process with one session of ``context`` tokens."""
    return OnnxCase.read(directory, threads, head).needed(context)


def fitting(case: OnnxCase, context: int, memory: int | None = None) -> OnnxCase:
    """The case as a session of ``context`` tokens fits the memory there is for this process, with ``memory``
    of it at most: only then pages of a store may go to the disk. Raises PlanError, with what to change, when
    it does not fit."""
    from .download import size_text

    available, limit = memory_left(case.threads)
    if memory is not None:
        if memory < available:
            available, limit = memory, "the limit asked for (--memory)"
        case = place(case, context, available)
    needed = case.needed(context)
    if needed <= available:
        return case
    remedies = [remedy.text for remedy in case.remedies(context, available)]
    raise PlanError(
        f"{case.directory.path} with a context of {context} tokens needs {size_text(needed)} of memory and "
        f"{limit} leaves {size_text(max(available, 0))}; what would help: {'; or '.join(remedies)}",
        needed,
        available,
        remedies,
    )
