"""The sidecar of a model: what edgert derived from it, in a GGUF file of its own.

``<model>.edgert.gguf`` lies beside the model or in edgert's cache. Its keys:

    edgert.version              u32, :data:`VERSION`
    edgert.base.bytes           u64, size of the model file
    edgert.base.fingerprint     string, :func:`edgert.session_file.fingerprint` of it
    edgert.base.sha256          string, of the whole of it
    edgert.head.recipe          string, "clusters" or "lowrank"
    edgert.head.cluster_size    u32
    edgert.head.probes          u32, clusters scored by default
    edgert.head.tokens          i32 array, token of each row of the head in cluster order, -1: padding
    edgert.head.special         i32 array, tokens whose clusters are always scored
    edgert.head.quality         string, JSON: what was measured on held-out text

and its tensors are ``head.routers`` [clusters, dim] with ``head.bias`` [clusters], or for "lowrank"
``head.projection`` [rank, dim] with ``head.rows`` [rows, rank]; ``FlashHead`` in ``native/decoder.h`` says
what they mean, and ``native/weights.cpp`` checks them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import _native
from .errors import ModelFileError
from .session_file import fingerprint

VERSION = 1


class Sidecar:
    """An open sidecar that belongs to the model at ``base``. Raises ModelFileError for any other."""

    def __init__(self, path: Path, base: Path) -> None:
        self.path = path
        self.file = _native.GgufFile(str(path))
        self._metadata = self.file.metadata
        version = self._read("edgert.version", int)
        if version != VERSION:
            raise self._refuse(
                "edgert.version", f"this edgert reads version {VERSION}, the file has {version}"
            )
        size, found = self._read("edgert.base.bytes", int), base.stat().st_size
        if size != found or self._read("edgert.base.fingerprint", str) != fingerprint(base):
            raise self._refuse("edgert.base.fingerprint", f"it was made for another file than {base}")
        self.probes: int = self._read("edgert.head.probes", int)
        self.cluster_size: int = self._read("edgert.head.cluster_size", int)
        self.recipe: str = self._read("edgert.head.recipe", str)
        if self.probes < 1:
            raise self._refuse("edgert.head.probes", f"expected at least 1, found {self.probes}")
        if self.recipe not in ("clusters", "lowrank"):
            raise self._refuse(
                "edgert.head.recipe", f"expected clusters or lowrank, found {self.recipe[:40]!r}"
            )

    @property
    def quality(self) -> dict[str, Any]:
        """What the exporter measured on held-out text."""
        try:
            quality = json.loads(self._read("edgert.head.quality", str))
        except ValueError:
            quality = None
        if not isinstance(quality, dict):
            raise self._refuse("edgert.head.quality", "expected a JSON object")
        return quality

    @property
    def agreement(self) -> float | None:
        """Share of held-out positions where flash, with the default number of clusters, chose the dense
        head's token; None when the sidecar does not say."""
        value = self.quality.get("agreement")
        return value if isinstance(value, float) and 0 <= value <= 1 else None

    def _read(self, key: str, kind: type) -> Any:
        value = self._metadata.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            found = "nothing" if value is None else type(value).__name__
            raise self._refuse(key, f"expected {kind.__name__}, found {found}")
        return value

    def _refuse(self, key: str, what: str) -> ModelFileError:
        return ModelFileError(
            f"{self.path}: {key}: {what}; export the sidecar again, or use the dense head (--head dense)",
            str(self.path),
            -1,
            key,
        )
