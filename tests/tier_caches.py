"""Caches with a tier, for the tests of what steps read of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert import _native

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
LENGTH, BUDGET = 2100, 64
SLOTS = 75  # of 132 pages; 71 are the fewest


def cache(model: _native.Model, directory: Path, slots: int = SLOTS, **options: Any) -> _native.Cache:
    return _native.Cache(
        model, 4096, options.pop("kv", "f16"), BUDGET, slots=slots, directory=str(directory), **options
    )


def read(model: _native.Model, into: _native.Cache, ids: Ids) -> Floats:
    for at in range(0, len(ids), 256):
        logits = model.forward(into, ids[at : at + 256], full=True)
    return logits


def steps(model: _native.Model, into: _native.Cache, ids: Ids) -> Floats:
    return np.stack([model.forward(into, ids[i : i + 1]) for i in range(len(ids))])


def assert_saved_goes_on_alike(model: _native.Model, ids: Ids, directory: Path) -> None:
    """A cache that was saved behind a few steps and loaded into another one gives the same logits."""
    tiered = cache(model, directory)
    read(model, tiered, ids[:LENGTH])
    steps(model, tiered, ids[LENGTH : LENGTH + 4])
    state = tiered.save()
    expected = steps(model, tiered, ids[LENGTH + 4 :])
    again = cache(model, directory)
    again.load(state)
    np.testing.assert_array_equal(steps(model, again, ids[LENGTH + 4 :]), expected)
