"""The tables of `bench.capped` and `bench.plan_check_sparse`, and their limits of memory."""

from __future__ import annotations

from pathlib import Path

from conftest import real_model
from edgert.bench.capped import Result, report
from edgert.bench.plan_check_sparse import SparseRow, limit_for, table

from edgert import _native
from edgert.placement import place
from edgert.planner import Case


def row(**changes: float) -> SparseRow:
    values = {
        "planned_bytes": 103_000_000,
        "measured_bytes": 100_000_000,
        "planned_seconds": 0.0055,
        "measured_seconds": 0.005,
        "bandwidth": 3e10,
        "budget": 512,
        "slots": 0,
        "limit": 0,
        "planned_disk": 0,
        "measured_disk": 0,
        "hidden": None,
        "waited": 0.0,
    }
    return SparseRow(model="m.gguf", kv="f16", head="dense", context=4000, **{**values, **changes})


def test_the_table_says_what_holds() -> None:
    on_disk = row(
        slots=100,
        planned_disk=1_000_000,
        measured_disk=500_000,
        hidden=0.9,
        waited=4e-4,
        measured_bytes=50_000_000,
    )
    text = table([row(), on_disk, row(planned_seconds=0.004)], "a machine")
    assert "within 3% + 8 MB: 2 of 3 rows" in text
    assert "off by 10.0% at the median (target 15%), 20.0% at worst" in text
    assert "| 100 of 250 | 103.0 MB | 50.0 MB | +106.0% (!) |" in text
    assert "| +10.0% | 1.00 MB | 0.50 MB | 90% | 0.40 ms | 30.0 |" in text and "| all |" in text


def test_a_limit_lies_between_the_least_and_all() -> None:
    path = real_model("smollm2-135m")

    def case(budget: int) -> Case:
        file = _native.GgufFile(str(path))
        return Case.read(file, None, 0, 2, "f16", "dense", 0, budget, "sparse", "none")

    limit = limit_for(case(512), 4000)
    assert limit is not None and limit < case(512).needed(4000)
    assert 99 < place(case(512), 4000, limit).slots < 250
    assert limit_for(case(1024), 1500) is None


def test_the_report_compares_medians(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF")
    result = Result(
        cap=400_000_000,
        kv=98_000_000,
        slots=256,
        context=32000,
        peak=390_000_000,
        group_peak=None,
        free_peak=480_000_000,
        reading=(60.0, 50.0),
        capped=[0.010, 0.0125, 0.5],
        free=[0.010, 0.010, 0.010],
        disk_bytes=400_000,
        hidden=0.95,
        planned=0.011,
        planned_free=0.010,
    )
    text = report({model: result}, 1024, 0.25, "the command")
    assert "| 256 of 2000 | 12.50 ms | 10.00 ms | 80% | 0.4 MB | 95% | 11.00 ms | 10.00 ms |" in text
    assert "`the command`" in text and "25% of these" in text
