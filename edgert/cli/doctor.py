"""`edgert doctor`: what this machine is, what it can do, and what limits it."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

PROBE_SECONDS = 0.25  # twice for each number of threads; the better one counts
BUSY_BELOW = 0.9  # share of the processors' time that a measurement worth keeping had


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    facts = examine()
    if args.json:
        import json

        print(json.dumps(facts, indent=2))
    else:
        _print(facts)
    return 0


def examine() -> dict[str, Any]:
    """Everything the doctor says, as plain values; sizes in bytes. Stores the measured bandwidth for
    `edgert run`. Raises EngineError when EDGERT_ISA names a level this machine lacks."""
    from edgert import _native
    from edgert.cli.speed import store_probe
    from edgert.locate import cache_dir
    from edgert.platforms.detect import detect

    machine = detect()
    levels = _native.isa_levels()
    # A machine with nothing but the portable level is refused by the engine, not by the doctor.
    portable = levels == ["scalar"] and not os.environ.get("EDGERT_ISA")
    selected = "scalar" if portable else _native.isa_selected()
    most = min(machine.cpu.usable, 1024)
    counts = sorted({1, machine.threads, most, *(2**i for i in range(1, most.bit_length()) if 2**i < most)})
    rates, share = _measure(counts)
    if share >= BUSY_BELOW:
        store_probe(rates)
    cache = cache_dir()
    facts: dict[str, Any] = {
        **asdict(machine),
        "threads": machine.threads,
        "available_memory": machine.available_memory,
        "python": sys.version.split()[0],
        "isa": {"selected": selected, "available": levels},
        "read_bytes_per_second": rates,
        "share_of_processors_while_measuring": share,
        "engines": _engines(),
        "cache": {"directory": str(cache), "free": shutil.disk_usage(_existing(cache)).free},
    }
    facts["cpu"]["last_level_cache"] = machine.cpu.last_level_cache
    facts["findings"] = _findings(facts)
    return facts


def _measure(counts: list[int]) -> tuple[dict[int, float], float]:
    """Bytes read per second by number of threads, and the least share of the processors' time that a
    measurement was given: below 1, other processes were busy."""
    from edgert import _native

    rates: dict[int, float] = {}
    least = 1.0
    for n in counts:
        best_share = 0.0
        for _ in range(2):
            wall, cpu = time.perf_counter(), time.process_time()
            rate = _native.probe_read_bandwidth(n, PROBE_SECONDS)
            given = (time.process_time() - cpu) / (n * (time.perf_counter() - wall))
            rates[n] = max(rate, rates.get(n, 0.0))
            best_share = max(best_share, min(given, 1.0))
        least = min(least, best_share)
    return rates, least


def _engines() -> dict[str, str | None]:
    """Engine -> version, None where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {"native": version("edgert"), "llamacpp": None}
    with contextlib.suppress(PackageNotFoundError):
        found["llamacpp"] = version("llama-cpp-python")
    return found


def _existing(path: Path) -> Path:
    """``path`` or the nearest parent of it that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def _findings(facts: dict[str, Any]) -> list[str]:
    """What limits this machine, in sentences."""
    from edgert.download import size_text

    cpu, limits, rates = facts["cpu"], facts["limits"], facts["read_bytes_per_second"]
    best = max(rates.values())
    threads = min(n for n, rate in rates.items() if rate >= 0.95 * best)
    found = [
        f"Memory gives {best / 1e9:.1f} GB/s, so a model that reads 100 MB a token cannot pass "
        f"{best / 1e8:.0f} tok/s, one of 1 GB {best / 1e9:.0f} tok/s."
    ]
    if threads < max(rates):
        found.append(
            f"{threads} threads already read as fast as {max(rates)}; more add little to generation."
        )
    if facts["isa"]["selected"] == "scalar":
        needs = "asimd, asimddp and asimdhp" if cpu["arch"] in ("aarch64", "arm64") else "AVX2, FMA and F16C"
        found.append(f"No vector kernels in use, which costs most of the speed; the fast ones need {needs}.")
    elif facts["isa"]["selected"] != facts["isa"]["available"][0]:
        found.append(
            f"EDGERT_ISA holds edgert at {facts['isa']['selected']}; unset it to use the best level."
        )
    if cpu["usable"] < cpu["logical"]:
        found.append(f"This process may use {cpu['usable']} of {cpu['logical']} processors (CPU affinity).")
    if limits["cpus"] is not None:
        found.append(
            f"A cgroup grants {limits['cpus']:g} CPUs; edgert starts {facts['threads']} threads, "
            "and more would only be throttled."
        )
    if limits["memory"] is not None:
        found.append(
            f"A cgroup caps memory at {size_text(limits['memory'])}, of which "
            f"{size_text(max(limits['memory'] - (limits['memory_used'] or 0), 0))} are left."
        )
    found.append(
        f"A model with its KV cache should stay below {size_text(0.9 * facts['available_memory'])} of memory."
    )
    if facts["engines"]["llamacpp"] is None:
        found.append(
            "Architectures that native does not know need llama.cpp: pip install 'edgert[llamacpp]'."
        )
    return found


def _print(facts: dict[str, Any]) -> None:
    from edgert.download import size_text

    def row(label: str, text: object) -> None:
        print(f"{label:<12}{text}")

    cpu, memory, limits = facts["cpu"], facts["memory"], facts["limits"]
    row("system", f"{facts['system']}, {cpu['arch']}, Python {facts['python']}")
    row("processor", cpu["model"])
    row("cores", f"{cpu['cores']} cores, {cpu['logical']} processors, {cpu['usable']} usable")
    row("features", " ".join(cpu["features"]) or "none of those edgert knows")
    others = [name for name in facts["isa"]["available"] if name != facts["isa"]["selected"]]
    row("isa", facts["isa"]["selected"] + (f" (also possible: {', '.join(others)})" if others else ""))
    caches = [
        f"L{c['level']} {c['kind']} {c['nbytes'] // 1024} KiB"
        + (f" in {c['instances']}" if c["instances"] > 1 else "")
        for c in cpu["caches"]
    ]
    row("caches", ", ".join(caches) or "unknown")
    row("memory", f"{size_text(memory['available'])} available of {size_text(memory['total'])}")
    cpus = "no CPU limit" if limits["cpus"] is None else f"{limits['cpus']:g} CPUs"
    cap = "no memory limit" if limits["memory"] is None else f"memory {size_text(limits['memory'])}"
    row("cgroup", f"v{limits['version']}: {cpus}, {cap}" if limits["version"] else "none")
    for threads, rate in facts["read_bytes_per_second"].items():
        row("bandwidth", f"{rate / 1e9:.1f} GB/s read by {threads} thread{'s' if threads > 1 else ''}")
    for name, version in facts["engines"].items():
        row("engine", f"{name} {version}" if version else f"{name} not installed")
    row("cache", f"{facts['cache']['directory']}, {size_text(facts['cache']['free'])} free")
    print()
    for sentence in facts["findings"]:
        print(f"- {sentence}")
