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
    edgert.heads.window         u32, latest tokens that streaming heads read
    edgert.heads.classes        i32 array, class of each KV head (edgert/head_classes.py), layer by layer,
                                with as many columns as any layer has KV heads
    edgert.heads.quality        string, JSON: what was measured of them
    edgert.retrieval.layers     i32 array, layer of each head whose queries a retrieval head predicts
    edgert.retrieval.heads      i32 array, its number among the layer's heads of keys
    edgert.retrieval.predictor  string, "head" or "votes": what chooses pages better
    edgert.retrieval.quality    string, JSON: what was measured with either on held-out text

The keys of ``edgert.head``, a FlashHead, those of ``edgert.heads``, classes of KV heads, or those of
``edgert.retrieval``, a retrieval head, may be missing. The tensors of a FlashHead are ``head.routers``
[clusters, dim] with ``head.bias`` [clusters], for "lowrank" ``head.projection`` [rank, dim] with
``head.rows`` [rows, rank], and for both all four; ``FlashHead`` in ``native/decoder.h`` says what they
mean, and ``native/weights.cpp`` checks them. The retrieval head's are ``retrieval.down`` [rank, 2 * dim],
``retrieval.up`` [queries, rank], ``retrieval.bias`` [queries] and ``retrieval.worth`` [heads]:
``native/retrieval.h``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _native
from .errors import ModelFileError
from .head_classes import NAMES, SINKS, STREAMING, HeadClasses, seeing_all
from .session_file import fingerprint

if TYPE_CHECKING:
    from .models import ModelSpec

VERSION = 2  # 1 had one stage
RECIPES = ("clusters", "lowrank", "clusters+lowrank")
CLASSES = "edgert.heads.classes"
HEADS = "have all heads indexed (--heads none)"
PREDICTORS = ("head", "votes")
RETRIEVAL = "edgert.retrieval.predictor"


class Sidecar:
    """An open sidecar that belongs to the model at ``base``. Raises ModelFileError for any other. Without a
    FlashHead ``recipe`` is empty, without a retrieval head ``predictor``."""

    def __init__(self, path: Path, base: Path) -> None:
        self.path = path
        self.file = _native.GgufFile(str(path))
        version = self._read("edgert.version", int)
        if version != VERSION:
            raise self._refuse(
                "edgert.version", f"this edgert reads version {VERSION}, the file has {version}"
            )
        size, found = self._read("edgert.base.bytes", int), base.stat().st_size
        if size != found or self._read("edgert.base.fingerprint", str) != fingerprint(base):
            raise self._refuse("edgert.base.fingerprint", f"it was made for another file than {base}")
        self.probes = self.cluster_size = self.keep = 0
        self.recipe = self.predictor = ""
        self.predicted_heads = 0
        keys = self.file.metadata_keys
        if RETRIEVAL in keys:
            self._read_retrieval()
        others = CLASSES in keys or RETRIEVAL in keys
        if not others or any(key.startswith("edgert.head.") for key in keys):
            self._read_head()

    def _read_retrieval(self) -> None:
        self.predictor = self._read(RETRIEVAL, str)
        if self.predictor not in PREDICTORS:
            what = f"expected one of {', '.join(PREDICTORS)}, found {self.predictor[:40]!r}"
            raise self._refuse(RETRIEVAL, what, "remove it")
        self.predicted_heads = len(self._read("edgert.retrieval.heads", list))

    def _read_head(self) -> None:
        names = {t.name for t in self.file.tensors}
        self.probes = self._read("edgert.head.probes", int)
        self.cluster_size = self._read("edgert.head.cluster_size", int)
        self.recipe = self._read("edgert.head.recipe", str)
        self.keep = self._read("edgert.head.keep", int)
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
        """What the exporter measured of the FlashHead on held-out text."""
        return self._json("edgert.head.quality")

    @property
    def retrieval_quality(self) -> dict[str, Any]:
        """What the exporter measured of the retrieval head, and of choosing without it, on held-out text."""
        return self._json("edgert.retrieval.quality")

    @property
    def agreement(self) -> float | None:
        """Share of held-out positions where flash, with the default number of clusters, chose the dense
        head's token; None when the sidecar does not say."""
        value = self.quality.get("agreement")
        return value if isinstance(value, float) and 0 <= value <= 1 else None

    def heads(self, spec: ModelSpec) -> HeadClasses | None:
        """The classes of KV heads, None when there are none. Raises ModelFileError when they are not those of
        ``spec``."""
        if CLASSES not in self.file.metadata_keys:
            return None
        window, flat = self._read("edgert.heads.window", int), self._read(CLASSES, list)
        columns = max(layer.n_kv_heads for layer in spec.layers)
        if len(flat) != spec.n_layers * columns:
            raise self._refuse(
                CLASSES, f"expected {spec.n_layers} rows of {columns}, found {len(flat)} numbers", HEADS
            )
        if not all(isinstance(kind, int) and 0 <= kind < len(NAMES) for kind in flat):
            raise self._refuse(CLASSES, f"expected numbers from 0 to {STREAMING}", HEADS)
        if window < SINKS:
            raise self._refuse("edgert.heads.window", f"expected at least {SINKS}, found {window}", HEADS)
        full = set(seeing_all(spec))
        rows = [
            flat[i * columns : i * columns + layer.n_kv_heads] if i in full else []
            for i, layer in enumerate(spec.layers)
        ]
        return HeadClasses(window, rows)

    def _read(self, key: str, kind: type) -> Any:
        # One key at a time: as Python values the token of each row would take ten times its memory.
        value = self.file.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            found = "nothing" if value is None else type(value).__name__
            raise self._refuse(key, f"expected {kind.__name__}, found {found}")
        return value

    def _json(self, key: str) -> dict[str, Any]:
        try:
            value = json.loads(self._read(key, str))
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise self._refuse(key, "expected a JSON object")
        return value

    def _refuse(
        self, key: str, what: str, instead: str = "use the dense head (--head dense)"
    ) -> ModelFileError:
        return ModelFileError(
            f"{self.path}: {key}: {what}; export the sidecar again, or {instead}",
            str(self.path),
            -1,
            key,
        )
