"""The tier of KV pages: what a step reads depends on the tokens alone, whatever lies on the disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tier_caches import BUDGET, LENGTH, Ids, assert_saved_goes_on_alike, cache, read, steps
from tiny_models import kv_types, prompt, tiny

from edgert import _native
from edgert.errors import EngineError

STEPS = 40


@pytest.fixture(scope="module", params=["llama", "gemma3", "lfm2"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def open_model(name: str, threads: int = 2) -> _native.Model:
    made = tiny(name)
    return _native.Model(_native.GgufFile(str(made.path)), made.spec.as_dict(), threads)


@pytest.fixture(scope="module")
def model(name: str) -> _native.Model:
    return open_model(name)


@pytest.fixture(scope="module")
def ids(name: str) -> Ids:
    return np.array(prompt(tiny(name), LENGTH + STEPS), dtype=np.int32)


def tier(c: _native.Cache) -> dict[str, Any]:
    found = c.tier
    assert found is not None
    return dict(found)


def test_prompts_are_read_in_full(name: str, model: _native.Model, ids: Ids, tmp_path: Path) -> None:
    for kv in kv_types(name):
        whole, tiered = _native.Cache(model, 4096, kv, 0), cache(model, tmp_path, kv=kv)
        np.testing.assert_array_equal(read(model, tiered, ids), read(model, whole, ids))
        assert tier(tiered)["sections_read"] > 0


def test_the_disk_is_not_touched_while_pages_fit(model: _native.Model, ids: Ids, tmp_path: Path) -> None:
    plain = _native.Cache(model, 4096, "f16", BUDGET)
    tiered = cache(model, tmp_path, slots=300)
    for c in (plain, tiered):
        read(model, c, ids[:LENGTH])
    np.testing.assert_array_equal(steps(model, tiered, ids[LENGTH:]), steps(model, plain, ids[LENGTH:]))
    assert tier(tiered)["bytes_written"] == tier(tiered)["bytes_read"] == 0


def test_timing_changes_nothing(model: _native.Model, ids: Ids, tmp_path: Path) -> None:
    found = []
    for delay in (0, 3000):
        tiered = cache(model, tmp_path, read_delay_us=delay)
        read(model, tiered, ids[:LENGTH])
        found.append(steps(model, tiered, ids[LENGTH:]))
        assert tier(tiered)["pages_read"] > 0
    np.testing.assert_array_equal(found[0], found[1])


def test_threads_change_nothing(name: str, ids: Ids, tmp_path: Path) -> None:
    found = []
    for threads in (1, 3):
        other = open_model(name, threads)
        tiered = cache(other, tmp_path)
        read(other, tiered, ids[:LENGTH])
        found.append(steps(other, tiered, ids[LENGTH:]))
    np.testing.assert_array_equal(found[0], found[1])


def test_a_saved_session_goes_on_alike(model: _native.Model, ids: Ids, tmp_path: Path) -> None:
    assert_saved_goes_on_alike(model, ids, tmp_path)


def test_a_tier_and_memory_load_each_others_sessions(model: _native.Model, ids: Ids, tmp_path: Path) -> None:
    tiered, plain = cache(model, tmp_path), _native.Cache(model, 4096, "f16", BUDGET)
    for c in (tiered, plain):
        read(model, c, ids[:LENGTH])
    into_plain, into_tier = _native.Cache(model, 4096, "f16", BUDGET), cache(model, tmp_path)
    into_plain.load(tiered.save())
    into_tier.load(plain.save())
    expected = steps(model, plain, ids[LENGTH:])
    np.testing.assert_array_equal(steps(model, into_plain, ids[LENGTH:]), expected)
    # A full pass over it proves that every page arrived.
    next_tokens = ids[LENGTH : LENGTH + 2]
    np.testing.assert_array_equal(
        model.forward(into_tier, next_tokens, full=True), model.forward(tiered, next_tokens, full=True)
    )


@pytest.mark.parametrize("back", [1, 40, 700])
def test_rewinding_brings_pages_back(model: _native.Model, ids: Ids, tmp_path: Path, back: int) -> None:
    tiered, plain = cache(model, tmp_path), _native.Cache(model, 4096, "f16", 0)
    for c in (tiered, plain):
        read(model, c, ids[:LENGTH])
    steps(model, tiered, ids[LENGTH:])
    kept = plain.rewind(LENGTH - back)
    assert tiered.rewind(LENGTH - back) in (kept, 0)  # a step more may have left the ring of a window
    start = tiered.length
    plain.rewind(start)
    np.testing.assert_array_equal(read(model, tiered, ids[start:]), read(model, plain, ids[start:]))


def test_far_back_with_the_fewest_slots(model: _native.Model, ids: Ids, tmp_path: Path) -> None:
    """The pages whose index goes fill all slots but that of the first page, which every pass needs."""
    first, last, back = 255, 2047, 639  # where the most pages have no index: after a pass, and to go back to
    tiered, plain = cache(model, tmp_path, slots=71), _native.Cache(model, 4096, "f16", 0)
    for c in (tiered, plain):
        read(model, c, ids[:first])
        read(model, c, ids[first:last])
        if c.rewind(back) != back:
            assert c.rewind(0) == 0
            read(model, c, ids[:back])
    more = ids[back : back + 300]
    np.testing.assert_array_equal(read(model, tiered, more), read(model, plain, more))
    assert np.isfinite(steps(model, tiered, ids[:3])).all()


def test_a_session_of_another_budget_is_chosen_anew(model: _native.Model, ids: Ids, tmp_path: Path) -> None:
    small = cache(model, tmp_path)
    read(model, small, ids[:LENGTH])
    steps(model, small, ids[LENGTH : LENGTH + 2])
    slots = 110
    wide = _native.Cache(model, 4096, "f16", 640, slots=slots, directory=str(tmp_path))
    wide.load(small.save())
    logits = steps(model, wide, ids[LENGTH + 2 : LENGTH + 5])
    assert np.isfinite(logits).all()
    assert tier(wide)["pages_read"] > 0


def test_too_few_slots_are_refused(model: _native.Model, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="needs memory for 71 pages"):
        cache(model, tmp_path, slots=70)
    with pytest.raises(EngineError, match="only sparse attention"):
        _native.Cache(model, 4096, "f16", 0, slots=90, directory=str(tmp_path))


def test_a_disk_cap_keeps_what_was_read(model: _native.Model, ids: Ids, tmp_path: Path) -> None:
    tiered = cache(model, tmp_path, disk_bytes=0)
    with pytest.raises(EngineError, match="may not outgrow"):
        read(model, tiered, ids)
    length = tiered.length
    assert 0 < length < LENGTH
    assert tiered.rewind(length - 20) == length - 20
    plain = _native.Cache(model, 4096, "f16", 0)
    expected = read(model, plain, ids[: length - 10])
    np.testing.assert_array_equal(read(model, tiered, ids[length - 20 : length - 10]), expected)


def test_a_damaged_file_is_an_error(model: _native.Model, ids: Ids, tmp_path: Path) -> None:
    tiered = cache(model, tmp_path)
    read(model, tiered, ids[:LENGTH])
    for entry in Path("/proc/self/fd").iterdir():
        if entry.exists() and str(entry.readlink()).startswith(str(tmp_path)):
            with entry.open("r+b", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                for at in range(0, size, 4096):
                    try:
                        file.seek(at)
                        file.write(b"\xa5" * 64)
                    except OSError as error:
                        assert error.errno == errno.EINVAL
    length = tiered.length
    with pytest.raises(EngineError, match="damaged"):
        model.forward(tiered, ids[LENGTH : LENGTH + 2], full=True)
    assert tiered.length == length
