"""What a run will cost, before it is paid: :func:`plan` and the :class:`Plan` it makes.

Memory is exact arithmetic: the core's own sums over the headers of the files (``_native.Sizes``), and
measured constants for Python, its libraries and the tokenizer. Time is an estimate: see
:mod:`edgert.plan_time`. No weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _native
from .errors import PlanError, UsageError
from .head_classes import ALL_INDEXED, INDEXED, NAMES, SINKS, HeadClasses, choose_heads
from .locate import model_path, onnx_export
from .memory_left import PYTHON_BYTES, memory_left
from .placement import check_memory, longest, longest_placed, place, plan_session
from .tokenizer_memory import tokenizer_bytes

if TYPE_CHECKING:
    from .models import ModelSpec
    from .placement import Regime
    from .plan_time import Step
    from .rates import Rates
    from .sidecar import Sidecar

LONG_ARRAY = 4096  # elements; what describes layers is shorter
READ_AHEAD = 1 << 18  # bytes of the file that each thread holds while it packs weights
LEAST_CONTEXT = 256  # a load that may choose its context is refused below this


@dataclass(frozen=True)
class Part:
    """One term of the memory: resident ``bytes``. ``note`` says what it is, for people."""

    name: str
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class Remedy:
    """Something to change, and the bytes it saves; ``enough`` when it alone makes the run fit."""

    text: str
    saves: int
    enough: bool


@dataclass(frozen=True)
class Plan:
    """The predicted cost of running a model with one session of ``context`` tokens.

    ``memory`` are the terms of the peak, ``available`` the bytes that ``limit`` leaves. ``decode`` are the
    parts of one step at ``context`` tokens, ``prefill`` of a prompt of that length, in seconds.
    ``max_context`` is the longest that fits, 0 when none does. ``regimes`` say where keys and values lie as a
    sequence grows, of sparse and exact attention; what is longer than the last is refused.
    """

    model: str
    path: str
    context: int
    trained_context: int
    kv: str
    attention: str
    chosen: int
    slots: int
    head: str
    threads: int
    platform: str
    memory: tuple[Part, ...]
    available: int
    limit: str
    max_context: int
    regimes: tuple[Regime, ...]
    decode: tuple[Step, ...]
    prefill: tuple[Step, ...]
    remedies: tuple[Remedy, ...]

    @property
    def needed(self) -> int:
        """Bytes at the peak."""
        return sum(part.bytes for part in self.memory)

    @property
    def fits(self) -> bool:
        return self.needed <= self.available

    @property
    def decode_seconds(self) -> float:
        return sum(step.seconds for step in self.decode)

    @property
    def prefill_seconds(self) -> float:
        return sum(step.seconds for step in self.prefill)

    def bytes_of(self, name: str) -> int:
        """Bytes of the part of that name, 0 when the plan has none."""
        return next((part.bytes for part in self.memory if part.name == name), 0)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values: sizes in bytes, times in seconds."""
        from dataclasses import asdict

        return {
            **asdict(self),
            "needed": self.needed,
            "fits": self.fits,
            "decode_seconds": self.decode_seconds,
            "decode_tokens_per_second": 1 / self.decode_seconds,
            "prefill_seconds": self.prefill_seconds,
            "prefill_tokens_per_second": self.context / self.prefill_seconds,
        }


def plan(
    model: str | PathLike[str],
    *,
    context: int | None = None,
    platform: str | None = None,
    memory: int | None = None,
    threads: int = 0,
    kv: str = "f16",
    head: str = "auto",
    probes: int = 0,
    attention: str = "full",
    budget: int = 0,
    heads: str | PathLike[str] = "none",
) -> Plan:
    """The cost of running ``model`` (as in :func:`edgert.load`) with the native engine, from the headers of
    its files, or of an ONNX export with ONNX Runtime.

    ``context``: tokens of prompt and answer together (None: what the model was made for). ``platform``: a
    board edgert describes, or the path of a platform file; None is this machine, as `edgert doctor`
    measured it. ``memory``: bytes there are for the process (None: what the platform has, or this machine
    can give now); with sparse or exact attention, keys and values that do not fit into them go to the
    disk. The other options are those of :func:`edgert.load`.

    Raises UsageError, ModelFileError and UnsupportedModelError as load does. A run that does not fit is no
    error here: see :attr:`Plan.fits`.
    """
    from .attention import choose_budget
    from .engines import check_options
    from .heads import check_head, choose_retrieval, choose_sidecar
    from .rates import rates_for

    if export := onnx_export(model):
        from .onnx_plan import plan_export

        others = {"kv": kv, "probes": probes, "attention": attention, "budget": budget, "heads": heads}
        return plan_export(export, context, platform, memory, threads, head, others)
    check_options("native", threads, kv)
    check_memory(memory, "native")
    chosen = choose_budget(attention, budget, "native")
    rates = rates_for(platform, threads)
    check_head(head, probes)
    file = _native.GgufFile(str(model_path(model)))
    sidecar = choose_sidecar(file.path, head, "native")
    retrieval = choose_retrieval(file.path, chosen, memory)
    case = Case.read(
        file, sidecar, rates.lanes, rates.threads, kv, head, probes, chosen, attention, heads, retrieval
    )
    check_context(context, case.trained_context)
    context = context or case.trained_context
    if memory is not None:
        available, limit = memory, "the limit asked for (--memory)"
    elif platform is not None:
        available, limit = rates.usable_memory, f"{rates.name}"
    else:
        available, limit = memory_left(rates.threads)
    return case.plan(context, rates, available, limit, to_disk=memory is not None)


class Header(Mapping[str, Any]):
    """The metadata of a file, each value converted when it is asked for. Of a long array, such as a
    vocabulary, there is the length alone (a range): its values would take longer than all else of a plan."""

    def __init__(self, file: _native.GgufFile) -> None:
        self._file, self._keys = file, file.metadata_keys

    def __getitem__(self, key: str) -> Any:
        if key not in self._keys:
            raise KeyError(key)
        n = self._file.count(key)
        return range(n) if n > LONG_ARRAY else self._file.get(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


@dataclass(frozen=True)
class Case:
    """A model, and the options that change what it costs; from it plans at any length are made."""

    file: _native.GgufFile
    spec: ModelSpec
    sizes: _native.Sizes
    tensors: tuple[tuple[str, str, int], ...]  # (name, type, weights)
    sidecar: Sidecar | None
    budget: tuple[int, int]
    threads: int
    kv: str
    head: str
    chosen: int  # past tokens that a step chooses for each KV head; 0: it reads all
    attention: str
    heads: HeadClasses = ALL_INDEXED  # what each KV head keeps and reads
    slots: int = 0  # pages of keys and values in memory, the others on the disk; 0: all are
    predicted: int = 0  # heads whose queries a retrieval head predicts where pages lie on the disk

    @classmethod
    def read(
        cls,
        file: _native.GgufFile,
        sidecar: Sidecar | None,
        lanes: int,
        threads: int,
        kv: str,
        head: str,
        probes: int,
        chosen: int = 0,
        attention: str = "full",
        heads: str | PathLike[str] = "none",
        retrieval: Sidecar | None = None,
    ) -> Case:
        """Options are checked by the caller; ``lanes`` and ``threads`` 0 are those that would run here.
        Raises ModelFileError, UnsupportedModelError; UsageError when ``kv`` cannot hold the heads or
        ``heads`` are not this model's."""
        from .cost import check_kv
        from .engines import native_spec
        from .platforms.detect import detect_threads

        threads = threads or detect_threads()
        spec = native_spec(file, Header(file))
        check_kv(spec, kv)
        if head == "auto":
            head = "flash" if sidecar else "dense"
        tensors = tuple((t.name, t.type, math.prod(t.shape)) for t in file.tensors)
        sizes = _native.Sizes(
            file,
            spec.as_dict(),
            threads,
            sidecar.file if sidecar else None,
            lanes,
            retrieval.file if retrieval else None,
        )
        budget = sidecar.budget(probes) if sidecar else (0, 0)
        classes = choose_heads(heads, file.path, spec, attention)
        predicted = retrieval.predicted_heads if retrieval else 0
        return cls(
            file,
            spec,
            sizes,
            tensors,
            sidecar,
            budget,
            threads,
            kv,
            head,
            chosen,
            attention,
            classes,
            predicted=predicted,
        )

    @property
    def trained_context(self) -> int:
        return self.spec.context_length

    @property
    def indexed_heads(self) -> list[int]:
        """By layer, the KV heads that sparse attention chooses tokens for."""
        if self.heads.classes:
            return [row.count(INDEXED) for row in self.heads.classes]
        seeing = [layer.kind == "attention" and not layer.window for layer in self.spec.layers]
        return [layer.n_kv_heads * sees for layer, sees in zip(self.spec.layers, seeing, strict=True)]

    def memory(self, context: int) -> tuple[Part, ...]:
        """The terms of the peak with one session that holds ``context`` tokens."""
        sizes, spec = self.sizes, self.spec
        weights = sizes.weights()
        tied = "it is the head too" if spec.tied_head else ""
        parts = [
            Part("body", weights["body"], "weights of the layers"),
            Part("embedding", weights["embedding"], tied),
            Part("head", weights["head"]),
            Part("sidecar", weights["flash_head"], "FlashHead: routers, low-rank rows, tables"),
            Part(
                "retrieval head",
                weights["retrieval_head"],
                "of the sidecar: it chooses pages of the disk tier",
            ),
            *self._kv(context),
            Part("activations", self._activations(context), "buffers of a pass"),
            Part("logits", self._logits(), "of the tokens that are scored at once"),
        ]
        parts.append(Part("padding", sizes.padding_bytes, "of the buffer that holds all weights"))
        tokenizer, metadata, kept = tokenizer_bytes(self.file)
        parts.append(Part("tokenizer", tokenizer + kept, "with the file's metadata"))
        # While a model loads there is more of the metadata, and there are no keys and values yet.
        grows = sum(p.bytes for p in parts if p.name.startswith(("KV", "logits", "convolution")))
        loading = metadata - kept + self.threads * READ_AHEAD
        parts.append(Part("loading", max(loading - grows, 0), "on top while the model loads"))
        parts.append(Part("Python", PYTHON_BYTES, "and its libraries"))
        return tuple(p for p in parts if p.bytes)

    def _activations(self, context: int) -> int:
        # What confirms with the whole head is that of the exact head.
        head = "exact" if self.attention == "exact" and self.head == "dense" else self.head
        return self.sizes.activations(context, head, *self.budget, self.kv, self.chosen, self.heads)

    def _kv(self, context: int) -> list[Part]:
        shares, index, conv = self.sizes.kv(context, context, self.kv, self.chosen, self.heads)
        layers = [layer.window for layer in self.spec.layers if layer.kind == "attention"]
        parts = []
        for window, size, kind, heads in shares:
            n = layers.count(window)
            what = f"{n} layers with a window of {window}" if window else f"{n} full layers"
            note = self.kv
            if heads:
                what = f"{heads} {NAMES[kind]} heads"
            if heads and window:
                note += f", the first {SINKS} tokens and the last {window}"
            if self.slots and not window and kind == INDEXED:
                size, _ = self.sizes.tier(context, self.kv, self.chosen, self.slots, self.heads)
                note += f", {self.slots} pages of 16 tokens; the others on the disk"
            parts.append(Part(f"KV cache, {what}", size, note))
        parts.append(Part("KV cache, index", index, "two bits a channel"))
        return [*parts, Part("convolution state", conv)]

    def _logits(self) -> int:
        """Floats that go to Python: one token's, or those of a block in the exact modes."""
        from .heads import LONGEST

        return 4 * self.spec.vocab_size * (LONGEST if "exact" in (self.head, self.attention) else 1)

    def needed(self, context: int) -> int:
        return sum(part.bytes for part in self.memory(context))

    def fewest_pages(self, context: int) -> int:
        """Of keys and values in memory with which a step can choose, others being on the disk; 0 where no
        head chooses what it reads."""
        if self.heads.classes and not self.heads.count(INDEXED):
            return 0
        return self.sizes.tier(context, self.kv, self.chosen, 1, self.heads)[1]

    def decode(self, rates: Rates, length: int) -> tuple[Step, ...]:
        """The parts of a step with ``length`` tokens in the cache."""
        from .plan_time import decode_steps

        return decode_steps(self, rates, length)

    def max_context(self, available: int) -> int:
        """The longest context that fits ``available`` bytes, at most what the model was made for."""
        return longest(self.trained_context, lambda n: self.needed(n) <= available)

    def plan(self, context: int, rates: Rates, available: int, limit: str, *, to_disk: bool = False) -> Plan:
        """``to_disk``: keys and values that do not fit may go to the disk."""
        return plan_session(self, context, self.trained_context, rates, available, limit, to_disk)

    def plan_as_placed(
        self,
        context: int,
        rates: Rates,
        available: int,
        limit: str,
        max_context: int,
        regimes: tuple[Regime, ...] = (),
    ) -> Plan:
        from .plan_time import prefill_steps

        memory = self.memory(context)
        return Plan(
            model=str(self.file.get("general.name") or Path(self.file.path).name),
            path=self.file.path,
            context=context,
            trained_context=self.trained_context,
            kv=self.kv,
            attention=self.attention,
            chosen=self.chosen,
            slots=self.slots,
            head=self.head,
            threads=self.threads,
            platform=rates.name,
            memory=memory,
            available=available,
            limit=limit,
            max_context=max_context,
            regimes=regimes,
            decode=self.decode(rates, context),
            prefill=prefill_steps(self, rates, context),
            remedies=self.remedies(context, available),
        )

    def remedies(self, context: int, available: int) -> tuple[Remedy, ...]:
        """What to change when ``context`` tokens do not fit, what saves most first; none when they do."""
        from .attention import DEFAULT_BUDGET
        from .cost import KV_CHANNELS
        from .engines import KV_TYPES

        needed = self.needed(context)
        if needed <= available:
            return ()
        from dataclasses import replace

        found: list[tuple[str, int]] = []
        if most := self.max_context(available):
            found.append((f"a context of {most} tokens (--context {most})", needed - self.needed(most)))
        for kv in KV_TYPES:
            if self.spec.head_dim % KV_CHANNELS[kv]:
                continue
            if (saves := needed - replace(self, kv=kv).needed(context)) > 0:
                found.append((f"keys and values in {kv} (--kv {kv})", saves))
        if not self.slots:
            sparse = self if self.chosen else replace(self, chosen=DEFAULT_BUDGET, attention="sparse")
            if (on_disk := place(sparse, context, available)).slots:
                found.append(
                    (
                        f"sparse attention with keys and values on the disk (--attention {sparse.attention} "
                        f"--memory {available})",
                        needed - on_disk.needed(context),
                    )
                )
        if self.sidecar:
            saves = self.sizes.weights()["flash_head"] + self._logits() - 4 * self.spec.vocab_size
            found.append(("the dense head without its sidecar (--head dense)", saves))
        return ranked(found, needed, available)


def ranked(found: list[tuple[str, int]], needed: int, available: int) -> tuple[Remedy, ...]:
    """Remedies of what to change and the bytes that it saves, what saves most first; the last one is more
    memory."""
    from .download import size_text

    short = needed - available
    return (
        *(
            Remedy(f"{text} saves {size_text(saves)}", saves, needed - saves <= available)
            for text, saves in sorted(found, key=lambda pair: -pair[1])
        ),
        Remedy(f"{size_text(short)} more memory, or a smaller model", short, True),
    )


def check_context(context: int | None, trained: int) -> None:
    """Raises UsageError for a context that a model made for ``trained`` positions cannot have."""
    if context is None:
        return
    if isinstance(context, bool) or not isinstance(context, int) or not 2 <= context <= trained:
        raise UsageError(f"context must be 2 to {trained}, which the model was made for, not {context!r}")


def choose_context(case: Case, context: int | None, memory: int | None = None) -> tuple[int, int]:
    """The context to load a model with: the one asked for, or (None) the longest that memory allows, at
    most what the model was made for; and the pages of keys and values that lie in memory, 0 for all. Only
    with a limit of ``memory`` bytes do others go to the disk. Raises PlanError, with what to change, when
    that does not fit."""
    available, limit = memory_left(case.threads)
    asked = context or case.trained_context
    if memory is not None:
        if memory < available:
            available, limit = memory, "the limit asked for (--memory)"
        case = place(case, asked, available)
    if case.needed(asked) <= available:
        return asked, case.slots
    if context is None:
        most = case.trained_context
        found = case.max_context(available) if memory is None else longest_placed(case, most, available)
        if found >= LEAST_CONTEXT:
            return found, 0 if memory is None else place(case, found, available).slots
        asked = min(LEAST_CONTEXT, asked)
    raise refusal(case, asked, available, limit)


def refusal(case: Case, context: int, available: int, limit: str) -> PlanError:
    """The error for a run of ``context`` tokens that needs more than ``available``."""
    from .download import size_text

    needed = case.needed(context)
    remedies = [remedy.text for remedy in case.remedies(context, available)]
    return PlanError(
        f"{case.file.path} with a context of {context} tokens needs {size_text(needed)} of memory and "
        f"{limit} leaves {size_text(max(available, 0))}; what would help: {'; or '.join(remedies)}",
        needed,
        available,
        remedies,
    )
