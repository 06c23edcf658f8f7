"""Directories of ONNX exports of tiny models, for tests that read or spoil them."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import onnx
from edgert.export.gguf_writer import write_gguf
from edgert.export.onnx_directory import Request, export_directory
from flash_files import parts
from tiny_models import tiny

_DIRECTORY = tempfile.TemporaryDirectory(prefix="edgert-onnx-")


@cache
def exported(name: str, quant: str = "int4", recipe: str = "", kv: str = "f32") -> Path:
    """The export of a tiny model, with a FlashHead where a ``recipe`` is given; not to be changed."""
    source = tiny(name).path
    if recipe:
        source = Path(_DIRECTORY.name) / f"{name}-{recipe}.gguf"
        shutil.copyfile(tiny(name).path, source)
        write_gguf(source.with_name(source.stem + ".edgert.gguf"), *parts(source, recipe))
    target = Path(_DIRECTORY.name) / f"{name}-{quant}-{recipe}-{kv}"

    def quiet(_: str, __: int = 0) -> Any:
        return lambda n: None

    request = Request(source, quant, None, bool(recipe), kv)
    return export_directory(request, target, lambda p: None, quiet, quiet)


def change_about(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "edgert.json"
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))


def seal(directory: Path) -> None:
    """Have edgert.json say what the files are now."""

    def now(about: dict[str, Any]) -> None:
        for name, said in about["files"].items():
            data = (directory / name).read_bytes()
            said.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    change_about(directory, now)


def change_graph(directory: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    """As somebody would who writes all of the directory."""
    path = directory / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    seal(directory)
