"""``edgert export MODEL --format onnx -o DIR``: a model as a directory for ONNX Runtime.

model.onnx          the graph (export/onnx_model.py has its interface)
model.onnx.data     its weights
edgert.json         what all this is: see :func:`_description`
tokenizer.gguf      the keys ``tokenizer.*`` of the model, from which edgert makes its tokenizer
tokenizer.json      the same tokenizer for other tools
genai.onnx, genai_config.json, tokenizer_config.json   the graph for onnxruntime-genai, on the same weights;
not for
                    models with convolutions
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.export.gguf_writer import OutputError, write_gguf

from edgert import _native
from edgert.download import file_sha256
from edgert.engines import native_spec
from edgert.errors import EdgertError, EngineError, UsageError
from edgert.locate import find_sidecar
from edgert.onnx_directory import FORMAT
from edgert.sidecar import Sidecar
from edgert.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgert.export.onnx_flash import Flash
    from edgert.models import ModelSpec

QUANT, KV, CONTEXT = "int8", "f32", 4096
GRAPH, DATA, ABOUT, TOKENIZER = "model.onnx", "model.onnx.data", "edgert.json", "tokenizer.gguf"

Note = Callable[[str], None]
Steps = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class Request:
    """``source``: the model, a .gguf file or a Hugging Face directory. ``context``: positions a session has
    by default; None: :data:`CONTEXT`, or what the model was made for where that is less. ``kv``: type of keys
    and values, f32 or f16."""

    source: Path
    quant: str = QUANT
    context: int | None = None
    flash_head: bool = False
    kv: str = KV


def export_directory(
    request: Request, target: Path, make_head: Callable[[Path], None], note: Note, steps: Steps
) -> Path:
    """Write the directory ``target``, whole or not at all; an export that is there is replaced. ``make_head``
    makes the sidecar of a .gguf file that has none, beside it. Raises UsageError, ModelFileError,
    UnsupportedModelError, TokenizerError, EngineError (the package onnx is missing) and OutputError."""
    if find_spec("onnx") is None:
        raise EngineError("--format onnx needs the package onnx: pip install 'edgert[export]'")
    _check_target(target)
    try:
        with _whole_directory(target) as directory:
            source = directory / "source"
            model = _gguf(request, source, note, steps)
            _fill(directory, model, request, make_head, steps)
    except OSError as error:
        raise OutputError(
            f"cannot write {target}: {error.strerror}; choose another place with --output"
        ) from error
    return target


def _check_target(target: Path) -> None:
    if not target.parent.is_dir():
        raise UsageError(f"no such directory: {target.parent}; create it or choose another --output")
    if target.exists() and not (target.is_dir() and ((target / ABOUT).exists() or not any(target.iterdir()))):
        raise UsageError(f"{target} is something else than an ONNX export; choose another --output")


@contextmanager
def _whole_directory(target: Path) -> Iterator[Path]:
    """A directory that takes the place of ``target`` once all went well. What a killed process left is
    removed by the next one."""
    new, old = (target.with_name(f".{target.name}.edgert-{what}") for what in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        for path in new.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        new.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        raise


def _gguf(request: Request, made: Path, note: Note, steps: Steps) -> Path:
    """The model as a .gguf file: itself, or one in the new directory ``made``, of a Hugging Face directory in
    float32."""
    if not request.source.is_dir():
        return request.source
    from edgert.export.hf_directory import convert

    made.mkdir()
    return convert(request.source, "f32", made / "model.gguf", note, steps)


def _fill(
    directory: Path, model: Path, request: Request, make_head: Callable[[Path], None], steps: Steps
) -> None:
    import onnx
    from edgert.export.onnx_genai import write_genai
    from edgert.export.onnx_model import build

    file = _native.GgufFile(str(model))
    spec = native_spec(file, file.metadata)
    context = _context(request, spec)
    tokenizer = Tokenizer.from_gguf(file.metadata)
    sidecar = _sidecar(model, make_head) if request.flash_head else None
    done = steps(f"writing {DATA}", len(spec.tensor_shapes()))
    with (directory / DATA).open("wb") as data:
        graph, flash = build(file, spec, request.quant, request.kv, sidecar, data, DATA, done)
    (directory / GRAPH).write_bytes(graph.SerializeToString())
    onnx.checker.check_model(str(directory / GRAPH), full_check=True)
    _tokenizer(directory, file.metadata, tokenizer, request.source)
    if not spec.conv_kernel:
        write_genai(directory, graph, spec, context, tokenizer)
    about = _description(model, request, spec, context, tokenizer, flash)
    del file
    if request.source.is_dir():
        shutil.rmtree(model.parent)
    about["files"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(directory.iterdir())
    }
    (directory / ABOUT).write_text(json.dumps(about, indent=1))


def _context(request: Request, spec: ModelSpec) -> int:
    context = request.context or min(CONTEXT, spec.context_length)
    if not 1 <= context <= spec.context_length:
        raise UsageError(
            f"--context {context}: expected 1 to {spec.context_length}, what the model was made for"
        )
    return context


def _sidecar(model: Path, make_head: Callable[[Path], None]) -> Sidecar:
    """The sidecar with ``model``'s FlashHead; one that is damaged or of another file counts for nothing."""
    found = _flash_head_of(model)
    if found is None:
        make_head(model)
        found = _flash_head_of(model)
    if found is None:
        raise UsageError(f"{model} has no FlashHead; run: edgert export {model} --flash-head")
    return found


def _flash_head_of(model: Path) -> Sidecar | None:
    path = find_sidecar(model)
    try:
        sidecar = Sidecar(path, model) if path else None
    except EdgertError:
        return None
    return sidecar if sidecar and sidecar.recipe else None


def _tokenizer(directory: Path, metadata: Mapping[str, Any], tokenizer: Tokenizer, source: Path) -> None:
    from edgert.export.onnx_tokenizer import tokenizer_json

    keys = {k: v for k, v in metadata.items() if k.startswith("tokenizer.")}
    write_gguf(directory / TOKENIZER, {"general.architecture": "edgert", **keys}, [])
    if source.is_dir():
        shutil.copyfile(source / "tokenizer.json", directory / "tokenizer.json")
    else:
        (directory / "tokenizer.json").write_text(tokenizer_json(metadata), encoding="utf-8")


def _description(
    model: Path,
    request: Request,
    spec: ModelSpec,
    context: int,
    tokenizer: Tokenizer,
    flash: Flash | None,
) -> dict[str, Any]:
    """The object in ``edgert.json``, which then gets ``files``: size and SHA-256 of every other file.
    ``flash_head`` is null or what the graph's FlashHead is: the sidecar's recipe and quality, ``tokens``
    scored a step."""
    head = None
    if flash:
        head = {
            "recipe": flash.sidecar.recipe,
            "tokens": flash.count,
            "rare": flash.rare,
            "clusters": flash.clusters,
            "quality": flash.sidecar.quality,
        }
    names = ("bos_id", "eos_id")
    return {
        "format": FORMAT,
        "model": {"name": spec.name, "bytes": model.stat().st_size, "sha256": file_sha256(model)},
        "spec": spec.as_dict(),
        "quant": request.quant,
        "kv": request.kv,
        "context": context,
        "flash_head": head,
        "tokenizer": {
            **{name: getattr(tokenizer, name) for name in names},
            "eos_ids": sorted(tokenizer.eos_ids),
            "has_chat_template": tokenizer.has_chat_template,
        },
    }
