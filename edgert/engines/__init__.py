"""The choice of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from os import PathLike
from typing import TYPE_CHECKING, Any

from edgert import _native
from edgert.errors import EngineError, ModelFileError, UnsupportedModelError, UsageError
from edgert.head_classes import ALL_INDEXED, HeadClasses
from edgert.platforms.detect import detect_threads
from edgert.tier import IN_MEMORY, Tier

if TYPE_CHECKING:
    from edgert.models import ModelSpec
    from edgert.sidecar import Sidecar

    from .base import Engine

ENGINES = ("auto", "native", "llamacpp", "onnx")
KV_TYPES = ("f16", "q8")


def check_options(engine: str, threads: int, kv: str) -> None:
    """Raises UsageError for an engine, a number of threads or a type of keys and values that there is not."""
    if engine not in ENGINES:
        raise UsageError(f"unknown engine {engine!r}: expected one of {', '.join(ENGINES)}")
    if kv not in KV_TYPES:
        raise UsageError(f"unknown kv type {kv!r}: expected one of {', '.join(KV_TYPES)}")
    if isinstance(threads, bool) or not isinstance(threads, int) or not 0 <= threads <= 1024:
        raise UsageError(f"threads must be 0 (as many as the machine has cores) to 1024, not {threads!r}")


def check_file(path: str | PathLike[str], engine: str, provider: str = "cpu") -> None:
    """Raises UsageError for what a .gguf file cannot be run with."""
    if engine == "onnx":
        what = "engine='onnx'"
    elif provider != "cpu":
        what = f"provider={provider!r}"
    else:
        return
    raise UsageError(
        f"{what} is for a directory that `edgert export MODEL --format onnx` wrote, which {path} is not: "
        "export the model and give the directory"
    )


def open_engine(
    path: str | PathLike[str],
    engine: str = "auto",
    threads: int = 0,
    kv: str = "f16",
    context: int | None = None,
) -> Engine:
    """Load the GGUF model at ``path`` into an engine; see :func:`engine_for`."""
    file = _native.GgufFile(str(path))
    return engine_for(file, file.metadata, engine, threads, kv, context)


def engine_for(
    file: _native.GgufFile,
    metadata: Mapping[str, Any],
    engine: str,
    threads: int,
    kv: str,
    context: int | None,
    sidecar: Sidecar | None = None,
    probes: int = 0,
    chosen: int = 0,
    tier: Tier = IN_MEMORY,
    heads: HeadClasses = ALL_INDEXED,
    retrieval: Sidecar | None = None,
) -> Engine:
    """Load an open file, whose ``metadata`` the caller has at hand, into an engine.

    "auto" is native for what native knows, else llamacpp if it is installed. ``context`` is the
    longest session that will be asked for (None: what the model was made for). ``sidecar`` and
    ``probes`` (0: the sidecar's own number), ``chosen`` (past tokens that a step chooses; 0: it reads all),
    ``tier`` (where keys and values lie), ``heads`` (what KV heads keep) and ``retrieval`` (what chooses
    pages) are for native alone. Raises UsageError, UnsupportedModelError, ModelFileError or EngineError.
    """
    check_options(engine, threads, kv)
    check_file(file.path, engine)
    threads = threads or detect_threads()
    if engine == "llamacpp":
        return _open_llamacpp(file.path, threads, context, kv)
    try:
        return _open_native(file, metadata, threads, sidecar, probes, kv, chosen, tier, heads, retrieval)
    except UnsupportedModelError as error:
        what = f"{file.path}: the native engine cannot run this model: {error}"
        if chosen:
            raise UnsupportedModelError(f"{what}, and no other has attention='sparse'") from error
        if engine == "native":
            raise UnsupportedModelError(f"{what}; try engine='llamacpp', which knows more models") from error
        if find_spec("llama_cpp") is None:
            raise UnsupportedModelError(
                f"{what}; install the engine that may: pip install 'edgert[llamacpp]'"
            ) from error
    try:
        return _open_llamacpp(file.path, threads, context, kv)
    except EngineError as error:
        raise UnsupportedModelError(f"{what}, nor can the llamacpp engine: {error}") from error


def _open_llamacpp(path: str, threads: int, context: int | None, kv: str) -> Engine:
    from . import llamacpp  # here alone: whoever asks for a plan has no use for numpy

    return llamacpp.open(path, threads, context, kv=kv)


def _open_native(
    file: _native.GgufFile,
    metadata: Mapping[str, Any],
    threads: int,
    sidecar: Sidecar | None,
    probes: int,
    kv: str,
    chosen: int,
    tier: Tier,
    heads: HeadClasses,
    retrieval: Sidecar | None,
) -> Engine:
    from .native import NativeEngine

    spec = native_spec(file, metadata)
    return NativeEngine(file, spec, threads, sidecar, probes, kv, chosen, tier, heads, retrieval)


def native_spec(file: _native.GgufFile, metadata: Mapping[str, Any]) -> ModelSpec:
    """What the model in an open file is. Raises UnsupportedModelError, ModelFileError."""
    from edgert.models import BadModelMetadata, UnsupportedArchitecture, load_spec

    try:
        return load_spec(metadata, {t.name: tuple(t.shape) for t in file.tensors})
    except UnsupportedArchitecture as error:
        raise UnsupportedModelError(str(error)) from error
    except BadModelMetadata as error:
        raise ModelFileError(f"{file.path}: {error}", file.path) from error
