"""Saved sessions.

Layout, integers little-endian:

    magic   8 bytes   b"EDGERTS1"
    header  u32 length, then that many bytes of JSON: "model" (what the cache belongs to),
            "tokens" and "state" (their counts: ids, bytes)
    tokens  i32 each
    state   the engine's snapshot of its KV cache
    digest  SHA-256 of all before it
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path

import numpy as np

from .errors import ModelFileError, SessionFileError
from .whole_file import write_whole

MAGIC = b"EDGERTS1"
DIGEST_BYTES = 32


def write(path: str | PathLike[str], model: Mapping[str, str], tokens: Sequence[int], state: bytes) -> None:
    """Write a session. ``path`` is replaced only once all is on the disk: a crash leaves either the
    old file or the new one. Raises SessionFileError."""
    path = Path(path)
    header = json.dumps({"model": dict(model), "tokens": len(tokens), "state": len(state)}).encode()
    parts = (MAGIC, struct.pack("<I", len(header)), header, np.asarray(tokens, "<i4").tobytes(), state)

    def digested() -> Iterator[bytes]:
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
            yield part
        yield digest.digest()

    try:
        write_whole(path, digested())
    except OSError as error:
        raise SessionFileError(f"cannot save the session to {path}: {error.strerror}", str(path)) from error


def read(path: str | PathLike[str], model: Mapping[str, str]) -> tuple[list[int], bytes]:
    """Tokens and engine state of a session of ``model``. Raises SessionFileError when the file
    cannot be read, is no session, is damaged, or belongs to something else."""

    def refuse(why: str) -> SessionFileError:
        return SessionFileError(f"{path}: {why}", str(path))

    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise refuse(f"cannot read the session: {error.strerror}") from error
    if data[: len(MAGIC)] != MAGIC:
        raise refuse("not a saved session of edgert")
    body = memoryview(data)[:-DIGEST_BYTES]
    if len(data) < len(MAGIC) + 4 + DIGEST_BYTES or hashlib.sha256(body).digest() != data[-DIGEST_BYTES:]:
        raise refuse("damaged or incomplete (its checksum does not match); save the session again")
    try:
        (header_bytes,) = struct.unpack_from("<I", body, len(MAGIC))
        at = len(MAGIC) + 4 + header_bytes
        header = json.loads(bytes(body[len(MAGIC) + 4 : at]))
        saved, n_tokens, n_state = dict(header["model"]), int(header["tokens"]), int(header["state"])
        if min(n_tokens, n_state) < 0 or at + 4 * n_tokens + n_state != len(body):
            raise ValueError("sizes do not add up")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise refuse(f"its header makes no sense ({error})") from error
    for key in sorted({*saved, *model}):
        if saved.get(key) != model.get(key):
            raise refuse(
                f"saved with {key} {saved.get(key)!r}, but this model has {model.get(key)!r}: "
                "restore it with the model and settings that saved it"
            )
    tokens = np.frombuffer(body, "<i4", n_tokens, at).tolist()
    return tokens, bytes(body[at + 4 * n_tokens :])


def fingerprint(path: str | PathLike[str]) -> str:
    """What names a model file here: SHA-256 over the size of each of its parts, the first MiB and
    4 KiB of every 256 KiB. Reads 2 % of the file, and no tensor of a quarter MiB can differ
    throughout without being seen."""
    path = Path(path)
    split = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", path.name)
    names = [path.name]
    if split:
        names = [f"{split[1]}-{i:05d}-of-{split[2]}.gguf" for i in range(1, int(split[2]) + 1)]
    digest = hashlib.sha256()
    try:
        for name in names:
            with path.with_name(name).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(struct.pack("<Q", size))
                digest.update(file.read(1 << 20))
                for at in range(1 << 20, size, 1 << 18):
                    digest.update(os.pread(file.fileno(), 4096, at))
    except OSError as error:
        raise ModelFileError(f"{path}: cannot read the model file: {error.strerror}", str(path)) from error
    return digest.hexdigest()
