"""Loading the directory of an ONNX export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .engines.onnx import OnnxEngine
from .engines.onnx_providers import check_provider
from .errors import UsageError
from .model import Model
from .onnx_directory import OnnxDirectory
from .planner import check_context
from .tokenizer import Tokenizer

# What load() takes and an export does not, with the default, and why.
_FIXED: dict[str, tuple[Any, str]] = {
    "kv": ("f16", "its keys and values are float32"),
    "probes": (0, "what its FlashHead scores was fixed when it was exported"),
    "attention": ("full", "its steps read all of the past"),
    "budget": (0, "its steps read all of the past"),
    "heads": ("none", "its steps read all of the past"),
    "memory": (None, "its keys and values all lie in memory"),
    "page_directory": (None, "its keys and values all lie in memory"),
    "page_limit": (None, "its keys and values all lie in memory"),
}


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
    alone. Raises UsageError, ModelFileError, UnsupportedModelError, TokenizerError or EngineError."""
    if engine not in ("auto", "onnx"):
        raise UsageError(
            f"{path} is an ONNX export, which engine={engine!r} does not run: use engine='onnx', or give the "
            ".gguf file it was made of"
        )
    check_provider(provider)
    for name, given in others.items():
        default, why = _FIXED[name]
        if given != default:
            raise UsageError(f"{name}={given!r} is not for {path}, an ONNX export: {why}; drop it")
    directory = OnnxDirectory.open(path)
    if head in ("flash", "exact") and directory.flash_head is None:
        raise UsageError(
            f"{path} has no FlashHead, which head={head!r} needs: export the model again with --flash-head, or "
            "use head='dense'"
        )
    check_context(context, directory.spec.context_length)
    loaded = OnnxEngine(directory, provider, threads)
    if head == "auto":
        head = "flash" if directory.flash_head else "dense"
    return Model(
        loaded,
        Tokenizer.from_gguf(directory.metadata),
        path=str(path),
        context=context or directory.context,
        trained_context=directory.spec.context_length,
        kv="f32",
        head=head,
        fingerprint=directory.sha256,
    )
