"""A row of the results: one test in one setting of one engine, with everything it depends on."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.bench.quiet import DISTURBED
from edgert.bench.settings import Setting, Test
from edgert.bench.stats import summarise
from edgert.models import load_spec

from edgert import _native
from edgert.cost import kv_bytes, weight_bytes

if TYPE_CHECKING:
    from edgert.bench.suite import Samples


@dataclass(frozen=True)
class Facts:
    """What the rows of one test share. ``bandwidth``: bytes a second that this machine read between the
    turns, None where a test does not depend on it. ``others``: share of the processors that other
    processes took."""

    test: Test
    threads: int
    bandwidth: float | None
    others: float
    context: dict[str, Any]


def make_row(
    facts: Facts, samples: Samples, peak: int, agreement: tuple[str, int, int] | None, model: Path
) -> dict[str, Any]:
    """Times in seconds, sizes in bytes, rates a second, energy in joules. Names that llama-bench has are
    its own (``n_prompt``, ``avg_ts``, ``samples_ts`` and so on)."""
    test, setting = facts.test, samples.worker.setting
    summary = summarise(samples.rates)
    first = statistics.median(test.prompt / rate for rate in samples.rates) if test.prompt else None
    row: dict[str, Any] = {
        "test": test.name,
        "label": setting.label,
        "engine": setting.engine,
        "head": setting.head,
        "variant": setting.variant,
        "kv": setting.kv,
        "attention": setting.attention,
        "heads": setting.heads,
        "threads": facts.threads,
        "n_prompt": test.prompt,
        "n_gen": test.generate,
        "n_depth": test.depth,
        "median_ts": summary.median,
        "avg_ts": summary.mean,
        "p5_ts": summary.p5,
        "p95_ts": summary.p95,
        "stddev_ts": summary.deviation,
        "samples_ts": samples.rates,
        "warmups_ts": samples.warmups,
        "time_to_first_token": samples.about.pop("fill_seconds") if first is None else first,
        "peak_memory": peak,
        **_reading(facts, samples, summary.median, model),
        "reference": agreement and agreement[0],
        "same": agreement and agreement[1],
        "compared": agreement and agreement[2],
        "agreement": agreement and agreement[1] / agreement[2],
        "energy_per_token": _median(samples.joules),
        "others": facts.others,
        "warnings": _warnings(facts),
        "times_dense": None,
        "times_peer": None,
        **samples.about,
        **facts.context,
    }
    return row


def _reading(facts: Facts, samples: Samples, rate: float, model: Path) -> dict[str, Any]:
    """What a generated token reads, and how fast that is beside the machine."""
    nbytes = samples.last["step_bytes"]
    if nbytes is None and facts.test.generate:
        nbytes = _file_bytes(samples.worker.setting, facts.test, model)
    reached = None if nbytes is None else nbytes * rate
    share = reached / facts.bandwidth if reached is not None and facts.bandwidth else None
    return {
        "bytes_per_token": nbytes,
        "read_bytes_per_second": reached,
        "machine_bytes_per_second": facts.bandwidth,
        "share_of_machine": share,
    }


def _file_bytes(setting: Setting, test: Test, model: Path) -> int | None:
    """What llama.cpp must read for a token: the file's own bytes, and keys and values in f16."""
    if setting.engine != "llamacpp":
        return None
    file = _native.GgufFile(str(model))
    tensors = file.tensors
    spec = load_spec(file.metadata, {t.name: t.shape for t in tensors})
    return int(weight_bytes(tensors).per_token + kv_bytes(spec, test.before + test.generate / 2))


def _median(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def _warnings(facts: Facts) -> list[str]:
    found = []
    if facts.others > DISTURBED:
        found.append(
            f"the machine was not quiet: other processes took {facts.others:.0%} of the processors; "
            "do not quote this figure"
        )
    cores = facts.context["cores"]
    if facts.threads > cores:
        found.append(f"{facts.threads} threads on {cores} cores")
    return found


def relate(rows: Sequence[dict[str, Any]]) -> None:
    """Add to the rows of one test how many times as fast they are as edgert's dense head with full
    attention, and as the peer's better setting: medians of the ratios turn by turn, in which the machine's
    speed drops out."""
    plain = ("edgert", "dense", "full")
    dense = next((r for r in rows if (r["engine"], r["head"], r["attention"]) == plain), None)
    peers = [r for r in rows if r["engine"] != "edgert"]
    peer = max(peers, key=lambda r: float(r["median_ts"])) if peers else None
    for row in rows:
        row["times_dense"] = _times(row, dense)
        row["times_peer"] = _times(row, peer)


def _times(row: dict[str, Any], base: dict[str, Any] | None) -> float | None:
    if base is None or base is row:
        return None
    pairs = zip(row["samples_ts"], base["samples_ts"], strict=True)
    return float(statistics.median(a / b for a, b in pairs))
