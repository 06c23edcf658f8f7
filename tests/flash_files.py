"""Sidecars for tests, written beside a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from edgert.export.gguf_writer import Tensor, Value
from edgert.export.quantise import q4_0, q8_0
from edgert.models import load_spec

from edgert import _native
from edgert.session_file import fingerprint
from edgert.sidecar import VERSION

SIZE, SPECIAL = 16, 3


def spec_of(base: Path) -> Any:
    file = _native.GgufFile(str(base))
    return load_spec(file.metadata, {t.name: t.shape for t in file.tensors})


def parts(base: Path, recipe: str = "clusters", seed: int = 0) -> tuple[dict[str, Value], list[Tensor]]:
    """A sidecar of random clusters and routers: right in form, of no use."""
    spec, rng = spec_of(base), np.random.default_rng(seed)
    size = 2 * SIZE if "+" in recipe else SIZE
    clusters = -(-spec.vocab_size // size)
    tokens = np.full(clusters * size, -1, np.int32)
    tokens[rng.permutation(clusters * size)[: spec.vocab_size]] = rng.permutation(spec.vocab_size)
    metadata: dict[str, Value] = {
        "general.architecture": "edgert",
        "edgert.version": VERSION,
        "edgert.base.bytes": base.stat().st_size,
        "edgert.base.fingerprint": fingerprint(base),
        "edgert.base.sha256": "",
        "edgert.head.recipe": recipe,
        "edgert.head.cluster_size": size,
        "edgert.head.probes": 2 if "clusters" in recipe else 0,
        "edgert.head.keep": 2 if "lowrank" in recipe else 0,
        "edgert.head.tokens": tokens,
        "edgert.head.special": np.array([SPECIAL], np.int32),
        "edgert.head.quality": json.dumps({"agreement": 0.5}),
    }

    def matrix(name: str, rows: int, cols: int, type: Any) -> Tensor:
        values = rng.standard_normal((rows, cols)).astype(np.float32)
        return Tensor(name, type, (rows, cols), (q4_0 if type == "Q4_0" else q8_0)(values))

    tensors = []
    if "clusters" in recipe:
        bias = rng.standard_normal(clusters).astype(np.float32)
        tensors += [
            matrix("head.routers", clusters, spec.dim, "Q4_0"),
            Tensor("head.bias", "F32", (clusters,), bias.view(np.uint8)),
        ]
    if "lowrank" in recipe:
        tensors += [
            matrix("head.projection", 32, spec.dim, "Q8_0"),
            matrix("head.rows", len(tokens), 32, "Q4_0"),
        ]
    return metadata, tensors
