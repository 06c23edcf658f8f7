"""Loading the directory of an ONNX export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .attention import choose_budget
from .engines.onnx import OnnxEngine
from .engines.onnx_providers import check_provider
from .engines.onnx_sparse import check_slots
from .errors import UsageError
from .model import Model
from .onnx_directory import OnnxDirectory
from .onnx_plan import OnnxCase, check_has, choose_head, fitting
from .onnx_preflight import preflight
from .placement import check_memory, make_tier
from .planner import check_context
from .tokenizer import Tokenizer

# What load() takes and an export does not, with the default, and why.
_FIXED: dict[str, tuple[Any, str]] = {
    "kv": ("f16", "the type of its keys and values was fixed when it was exported (edgert export --kv)"),
    "probes": (0, "what its FlashHead scores was fixed when it was exported"),
    "heads": ("none", "its heads all see the same"),
    "memory": (None, "with full attention its keys and values all lie in memory"),
    "page_directory": (None, "with full attention its keys and values all lie in memory"),
    "page_limit": (None, "with full attention its keys and values all lie in memory"),
}
# Those that go with sparse attention.
_SPARSE = frozenset(("memory", "page_directory", "page_limit"))


def load_export(
    path: Path,
    engine: str,
    provider: str,
    threads: int,
    context: int | None,
    head: str,
    others: Mapping[str, Any],
) -> Model:
    """What :func:`edgert.load` does for a directory; ``others`` are its arguments that are for .gguf files
    alone. Raises UsageError, ModelFileError, UnsupportedModelError, TokenizerError or EngineError; PlanError,
    before anything is allocated, when a session of ``context`` does not fit the memory there is."""
    if engine not in ("auto", "onnx"):
        raise UsageError(
            f"{path} is an ONNX export, which engine={engine!r} does not run: use engine='onnx', or give the "
            ".gguf file it was made of"
        )
    check_provider(provider)
    slots = sparse_slots(path, provider, others)
    refuse_options(path, {name: given for name, given in others.items() if not slots or name not in _SPARSE})
    check_memory(others["memory"], "onnx")
    directory = OnnxDirectory.open(path)
    check_has(directory, head)
    check_context(context, directory.spec.context_length)
    context = context or directory.context
    graph = preflight(directory).graph
    head = choose_head(directory, graph, head, threads, provider)
    pages = 0
    if provider == "cpu":  # nobody has measured what another takes
        case = OnnxCase.read(directory, threads, head, graph, slots)
        pages = fitting(case, context, others["memory"]).slots
    tier = make_tier(pages, others["page_directory"], others["page_limit"])
    loaded = OnnxEngine(directory, provider, threads, slots, tier, graph)
    return Model(
        loaded,
        Tokenizer.from_gguf(directory.metadata),
        path=str(path),
        context=context,
        trained_context=directory.spec.context_length,
        kv=directory.kv,
        head=head,
        attention=others["attention"],
        chosen=slots,
        memory_limit=others["memory"],
        fingerprint=directory.sha256,
    )


def sparse_slots(path: Path, provider: str, others: Mapping[str, Any]) -> int:
    """Slots of the working set that steps see under sparse attention, 0: they see everything. Raises
    UsageError."""
    attention = others["attention"]
    budget = choose_budget(attention, others["budget"], "onnx")
    if attention == "exact":
        raise UsageError(
            f"attention='exact' is not for {path}, an ONNX export: use attention='full' or 'sparse', or the "
            ".gguf file it was made of"
        )
    if not budget:
        return 0
    if provider != "cpu":
        raise UsageError(
            f"attention='sparse' on an ONNX export copies pages in this machine's memory, which provider="
            f"{provider!r} does not compute in: use attention='full' or provider='cpu'"
        )
    check_slots(budget)
    return budget


def refuse_options(path: Path, others: Mapping[str, Any]) -> None:
    """Raises UsageError for an option of .gguf files that was changed from its default."""
    for name, (default, why) in _FIXED.items():
        given = others.get(name, default)
        if given != default:
            raise UsageError(f"{name}={given!r} is not for {path}, an ONNX export: {why}; drop it")
