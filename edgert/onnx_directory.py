"""A directory that ``edgert export --format onnx`` wrote (docs/onnx.md), read from its ``edgert.json``.

:meth:`OnnxDirectory.open` looks at that file and at the sizes of the others; ``edgert/onnx_preflight.py``
looks into them, before ONNX Runtime does.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from . import _native
from .errors import ModelFileError, UnsupportedModelError
from .models import BadModelMetadata, ModelSpec, UnsupportedArchitecture, spec_from_dict
from .models.reader import Reader

FORMAT = 2
QUANTS = ("f32", "f16", "int8", "int4")
KVS = ("f32", "f16")
GRAPH, DATA, ABOUT, TOKENIZER = "model.onnx", "model.onnx.data", "edgert.json", "tokenizer.gguf"
AGAIN = "export the model again (edgert export MODEL --format onnx -o DIR)"
_ABOUT_LIMIT = 1 << 20  # bytes of an edgert.json that is read; real ones have 10,000
_MOST_FILES = 100
_NO_EFFECT = ("model",)  # what the directory was made of


@dataclass(frozen=True)
class OnnxFile:
    """What edgert.json says of a file: size in bytes and SHA-256 in hexadecimal."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class OnnxDirectory:
    """``name``: of the model. ``quant``: one of :data:`QUANTS`, ``kv``, the type of keys and values: of
    :data:`KVS`. ``context``: positions a session has by
    default. ``flash_head``: None, or ``recipe``, ``tokens`` scored a step and ``quality``. ``tokenizer``:
    ``bos_id``, ``eos_id``, ``eos_ids``, ``has_chat_template``. ``files``: every other file of the directory.
    ``weight_bytes``: of model.onnx.data. ``sha256``: of edgert.json, which has the hashes of all else: the
    identity of the export."""

    path: Path
    name: str
    spec: ModelSpec
    quant: str
    kv: str
    context: int
    flash_head: Mapping[str, Any] | None
    tokenizer: Mapping[str, Any]
    files: Mapping[str, OnnxFile]
    sha256: str

    @property
    def graph(self) -> Path:
        return self.path / GRAPH

    @property
    def weight_bytes(self) -> int:
        return self.files[DATA].bytes

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The keys ``tokenizer.*``, as ``Tokenizer.from_gguf`` takes them; read anew each time. Raises
        ModelFileError."""
        return _native.GgufFile(str(self.path / TOKENIZER)).metadata

    @classmethod
    def open(cls, path: str | PathLike[str]) -> OnnxDirectory:
        """Raises ModelFileError for what is missing or damaged and UnsupportedModelError for what a later
        edgert wrote."""
        path = Path(path)
        about = path / ABOUT
        data = read_bounded(about, _ABOUT_LIMIT)
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise refuse(about, "", f"expected JSON ({error!s:.80})") from error
        if not isinstance(values, dict):
            raise refuse(about, "", f"expected a JSON object, found {values!r:.40}")
        try:
            return _read(path, values, hashlib.sha256(data).hexdigest())
        except UnsupportedArchitecture as error:
            raise UnsupportedModelError(
                f"{about}: {error}; use the edgert that wrote the directory, or {AGAIN}"
            ) from error
        except BadModelMetadata as error:
            raise refuse(
                about, str(error).split(":")[0], str(error).partition(": ")[2] or str(error)
            ) from error


def refuse(path: Path, key: str, what: str, offset: int = -1) -> ModelFileError:
    """The error of a file of the directory: ``what`` is wrong with ``key``."""
    return ModelFileError(f"{path}: {key + ': ' if key else ''}{what}; {AGAIN}", str(path), offset, key)


def read_bounded(path: Path, limit: int) -> bytes:
    """All of a regular file of at most ``limit`` bytes. Raises ModelFileError."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise refuse(path, "", "expected a regular file")
        if found.st_size > limit:
            raise refuse(path, "", f"expected at most {limit} bytes, found {found.st_size}")
        return path.read_bytes()
    except OSError as error:
        raise refuse(path, "", f"cannot read it: {error.strerror}") from error


def _read(path: Path, values: Mapping[str, Any], sha256: str) -> OnnxDirectory:
    reader = Reader(values)
    reader.expect("format", FORMAT)
    reader.integer("format")
    spec = spec_from_dict(reader.mapping("spec"))
    quant = _one_of(reader, "quant", QUANTS)
    kv = _one_of(reader, "kv", KVS, "f32")  # exports had no other type at first, and no such key
    context = reader.integer("context", high=spec.context_length)
    head = reader.mapping("flash_head")
    tokenizer = reader.mapping("tokenizer")
    files = _files(reader.mapping("files"))
    reader.no_effect(*_NO_EFFECT)
    reader.finish()
    _check_sizes(path, files)
    return OnnxDirectory(
        path=path,
        name=spec.name or path.name,
        spec=spec,
        quant=quant,
        kv=kv,
        context=context,
        flash_head=_flash_head(head, spec) if head else None,
        tokenizer=_tokenizer(tokenizer, spec),
        files=files,
        sha256=sha256,
    )


def _one_of(reader: Reader, name: str, known: tuple[str, ...], default: str | None = None) -> str:
    found = reader.text(name, default)
    if found not in known:
        raise UnsupportedArchitecture(f"{name}: expected one of {', '.join(known)}, found {found[:40]!r}")
    return found


def _keys(values: Mapping[str, Any], prefix: str) -> Reader:
    return Reader({prefix + key: value for key, value in values.items()}, prefix)


def _flash_head(values: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    reader = _keys(values, "flash_head.")
    tokens = reader.integer("tokens", high=2 * spec.vocab_size)
    head = {
        "recipe": reader.text("recipe"),
        "tokens": tokens,
        "rare": reader.integer("rare", high=tokens),
        "clusters": reader.integer("clusters", high=2 * spec.vocab_size),
        "quality": reader.mapping("quality"),
    }
    reader.finish()
    return head


def _tokenizer(values: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    reader, last = _keys(values, "tokenizer."), spec.vocab_size - 1
    ids: dict[str, Any] = {
        name: reader.integer(name, low=0, high=last) if name in reader else None
        for name in ("bos_id", "eos_id")
    }
    ends = reader.integers("eos_ids")
    if not all(0 <= end <= last for end in ends):
        raise BadModelMetadata(f"tokenizer.eos_ids: expected ids from 0 to {last}, found {ends!r:.60}")
    template = reader.flag("has_chat_template")
    reader.no_effect("bos_id", "eos_id")
    reader.finish()
    return {**ids, "eos_ids": ends, "has_chat_template": template}


def _files(values: Mapping[str, Any]) -> dict[str, OnnxFile]:
    if len(values) > _MOST_FILES:
        raise BadModelMetadata(f"files: expected at most {_MOST_FILES}, found {len(values)}")
    found = {}
    for name, said in values.items():
        # A name and no path: what is read stays inside the directory.
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
            raise BadModelMetadata(f"files: expected plain names of files, found {name[:60]!r}")
        if not isinstance(said, dict):
            raise BadModelMetadata(f"files.{name}: expected a table, found {said!r:.40}")
        reader = _keys(said, f"files.{name}.")
        size, digest = reader.integer("bytes", low=0, high=2**63 - 1), reader.text("sha256")
        reader.finish()
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise BadModelMetadata(
                f"files.{name}.sha256: expected 64 hexadecimal digits, found {digest[:70]!r}"
            )
        found[name] = OnnxFile(size, digest)
    missing = {GRAPH, DATA, TOKENIZER} - found.keys()
    if missing:
        raise BadModelMetadata(
            f"files: expected {', '.join(sorted(missing))} among them, found nothing of it"
        )
    return found


def _check_sizes(path: Path, files: Mapping[str, OnnxFile]) -> None:
    """Every file is there, is a file in this directory and no link out of it, and is as large as said."""
    inside = path.resolve()
    for name, said in files.items():
        file = path / name
        try:
            found = file.stat()
        except OSError as error:
            raise refuse(file, "", f"cannot read it: {error.strerror}") from error
        if not stat.S_ISREG(found.st_mode) or file.resolve().parent != inside:
            raise refuse(file, "", f"expected a file in this directory, found a link to {file.resolve()}")
        if found.st_size != said.bytes:
            what = f"expected {said.bytes} bytes, as {ABOUT} says, found {found.st_size}"
            raise refuse(file, f"files.{name}.bytes", what + "; copy the directory whole")
