"""The sidecar of a model: what edgert derived from it, in a GGUF file of its own.

``<model>.edgert.gguf`` lies beside the model or in edgert's cache. Its keys:

    edgert.version              u32, :data:`VERSION`
    edgert.base.bytes           u64, size of the model file
    edgert.base.fingerprint     string, :func:`edgert.session_file.fingerprint` of it
    edgert.base.sha256          string, of the whole of it
    edgert.head.recipe          string, "clusters", "lowrank" or "clusters+lowrank"
    edgert.head.cluster_size    u32
    edgert.head.probes          u32, clusters that routers choose by default; 0 without routers
    edgert.head.keep            u32, units of 16 rows that low-rank scores leave; 0 without such scores
    edgert.head.tokens          i32 array, token of each row of the head in cluster order, -1: padding
    edgert.head.special         i32 array, tokens that are always scored
    edgert.head.quality         string, JSON: what was measured on held-out text

and its tensors are ``head.routers`` [clusters, dim] with ``head.bias`` [clusters], for "lowrank"
``head.projection`` [rank, dim] with ``head.rows`` [rows, rank], and for both all four;
``FlashHead`` in ``native/decoder.h`` says what they mean, and ``native/weights.cpp`` checks them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import _native
from .errors import ModelFileError
from .session_file import fingerprint

VERSION = 2  # 1 had one stage
RECIPES = ("clusters", "lowrank", "clusters+lowrank")


class Sidecar:
    """An open sidecar that belongs to the model at ``base``. Raises ModelFileError for any other."""

    def __init__(self, path: Path, base: Path) -> None:
        self.path = path
        self.file = _native.GgufFile(str(path))
        names = {t.name for t in self.file.tensors}
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
        self.keep: int = self._read("edgert.head.keep", int)
        if self.recipe not in RECIPES:
            raise self._refuse(
                "edgert.head.recipe", f"expected one of {', '.join(RECIPES)}, found {self.recipe[:40]!r}"
            )
        for key, value, used in (("probes", self.probes, "clusters"), ("keep", self.keep, "lowrank")):
            if (value > 0) != (used in self.recipe.split("+")) or value > 2**31:
                raise self._refuse(f"edgert.head.{key}", f"{value} does not suit the recipe {self.recipe}")
            if (f"head.{'routers' if used == 'clusters' else 'rows'}" in names) != (value > 0):
                raise self._refuse("edgert.head.recipe", f"the tensors are not those of {self.recipe}")

    def budget(self, probes: int = 0) -> tuple[int, int]:
        """(clusters probed, units kept) when ``probes`` are asked for (0: as the sidecar says). Units kept
        change with the clusters probed; without routers they are what ``probes`` counts."""
        if not probes:
            return self.probes, self.keep
        if not self.probes:
            return 0, probes
        return probes, -(-self.keep * probes // self.probes)

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
        # One key at a time: as Python values the token of each row would take ten times its memory.
        value = self.file.get(key)
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
