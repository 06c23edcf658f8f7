"""Writes what the targets start from: ``python seeds.py DIRECTORY BASE``.

``DIRECTORY/gguf`` gets the small good files of the tests, ``DIRECTORY/sidecar`` one sidecar for each recipe
and type of its tensors, and ``BASE`` becomes the model those sidecars belong to.
"""

from __future__ import annotations

import random
import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from gguf_files import (
    ARRAY,
    BLOCKS,
    I32,
    STRING,
    TYPE_F16,
    TYPE_F32,
    TYPE_Q4_0,
    TYPE_Q4_K,
    TYPE_Q8_0,
    U32,
    Array,
    Built,
    Tensor,
    build,
    seeds,
)

# base_spec() of fuzz_sidecar.cpp. 256 columns have room for every type.
DIM, VOCAB, RANK = 256, 101, 32


def matrix(rng: random.Random, name: str, type: int, rows: int, cols: int) -> Tensor:
    """A tensor of random finite weights."""
    block, nbytes = BLOCKS[type]
    count = rows * cols // block
    if type in (TYPE_F32, TYPE_F16):
        letter = "f" if type == TYPE_F32 else "e"
        data = struct.pack(f"<{count}{letter}", *(rng.gauss(0, 1) for _ in range(count)))
    else:
        scales = 2 if type == TYPE_Q4_K else 1  # of a block, f16 in front of the rest
        head = struct.pack(f"<{scales}e", *[0.01] * scales)
        data = b"".join(head + rng.randbytes(nbytes - len(head)) for _ in range(count))
    return Tensor(name, (cols, rows), type, data)


def base_model(rng: random.Random) -> Built:
    norm = Tensor("output_norm.weight", (DIM,), TYPE_F32, struct.pack(f"<{DIM}f", *[1.0] * DIM))
    embedding = matrix(rng, "token_embd.weight", TYPE_Q8_0, VOCAB, DIM)
    return build([("general.architecture", STRING, "llama")], [embedding, norm])


def sidecar(rng: random.Random, recipe: str, size: int, scores: int, rows: int) -> Built:
    """Random clusters of ``size`` tokens with tensors of the types ``scores`` and ``rows``: right in form,
    of no use."""
    stages = recipe.split("+")
    clusters = -(-VOCAB // size)
    tokens = [*range(VOCAB), *[-1] * (clusters * size - VOCAB)]
    rng.shuffle(tokens)
    metadata = [
        ("general.architecture", STRING, "edgert"),
        ("edgert.head.recipe", STRING, recipe),
        ("edgert.head.cluster_size", U32, size),
        ("edgert.head.probes", U32, 2 if "clusters" in stages else 0),
        ("edgert.head.keep", U32, 2 if "lowrank" in stages else 0),
        ("edgert.head.tokens", ARRAY, Array(I32, tokens)),
        ("edgert.head.special", ARRAY, Array(I32, [3, 60])),
    ]
    tensors = []
    if "clusters" in stages:
        bias = matrix(rng, "head.bias", TYPE_F32, 1, clusters)
        bias.dims = (clusters,)
        tensors += [matrix(rng, "head.routers", scores, clusters, DIM), bias]
    if "lowrank" in stages:
        tensors += [
            matrix(rng, "head.projection", scores, RANK, DIM),
            matrix(rng, "head.rows", rows, len(tokens), RANK),
        ]
    return build(metadata, tensors)


def write(directory: Path, files: list[Built]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for i, built in enumerate(files):
        (directory / f"seed{i}.gguf").write_bytes(built.data)


rng = random.Random(1)
directory, base = Path(sys.argv[1]), Path(sys.argv[2])
base.write_bytes(base_model(rng).data)
write(directory / "gguf", seeds())
write(
    directory / "sidecar",
    [
        sidecar(rng, recipe, size, scores, rows)
        for recipe, size in (("clusters", 16), ("lowrank", 16), ("clusters+lowrank", 32))
        for scores, rows in ((TYPE_Q4_0, TYPE_Q4_0), (TYPE_Q4_K, TYPE_Q8_0), (TYPE_F16, TYPE_F16))
    ],
)
