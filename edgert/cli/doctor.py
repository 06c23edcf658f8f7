"""`edgert doctor`: what this machine is, what it can do, and what limits it."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgert.cli.findings import Examined, OnnxRuntime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    examined = examine()
    facts = describe(examined)
    if args.json:
        import json

        print(json.dumps(facts, indent=2))
    else:
        _print(facts)
    return 0


def examine() -> Examined:
    """Look at this machine, measure it and store that. Raises EngineError when EDGERT_ISA names a level
    this machine lacks."""
    from edgert import _native
    from edgert.cli.findings import Examined
    from edgert.locate import cache_dir
    from edgert.machine import store
    from edgert.platforms.detect import detect
    from edgert.platforms.recognise import detect_platform
    from edgert.platforms.state import detect_disk, detect_modes, detect_swap
    from edgert.probe import probe

    machine = detect()
    try:
        measured = probe(machine, _progress)
    finally:
        _progress("")
    return Examined(
        machine=machine,
        here=detect_platform(),
        modes=detect_modes(),
        swap=detect_swap(),
        disk=detect_disk(_existing(cache_dir())),
        levels=_native.isa_levels(),
        engines=_engines(),
        onnxruntime=_onnxruntime(),
        measured=measured,
        not_stored=store(measured),
    )


def describe(e: Examined) -> dict[str, Any]:
    """Everything the doctor says, as plain values; sizes in bytes."""
    from edgert.cli.findings import findings
    from edgert.locate import cache_dir

    cache, board = cache_dir(), e.here.platform
    facts: dict[str, Any] = {
        **asdict(e.machine),
        "threads": e.machine.threads,
        "available_memory": e.machine.available_memory,
        "python": sys.version.split()[0],
        "board": {
            "name": board.name if board else None,
            "title": board.title if board else None,
            "reason": e.here.reason,
            "guessed": e.here.guessed,
            "mode": e.here.mode,
            "l4t": e.here.l4t,
            "clocks": asdict(e.here.clocks),
            "power": asdict(e.here.power),
        },
        "swap": asdict(e.swap),
        "isa": {"selected": e.measured.isa, "available": e.levels},
        "measured": {**asdict(e.measured), "stored": e.not_stored is None},
        "engines": dict(e.engines),
        "onnxruntime": asdict(e.onnxruntime) if e.onnxruntime else None,
        "cache": {"directory": str(cache), "free": shutil.disk_usage(_existing(cache)).free, "disk": e.disk},
        "findings": findings(e),
    }
    facts["cpu"]["last_level_cache"] = e.machine.cpu.last_level_cache
    return facts


def _progress(what: str) -> None:
    """One line on a terminal, redrawn, in the end empty."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what and f'measuring {what} ...'}", end="", file=sys.stderr, flush=True)


def _engines() -> dict[str, str | None]:
    """Engine -> version, None where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {"native": version("edgert"), "llamacpp": None}
    with contextlib.suppress(PackageNotFoundError):
        found["llamacpp"] = version("llama-cpp-python")
    return found


def _onnxruntime() -> OnnxRuntime | None:
    """Without the seconds that its import takes; None where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec

    from edgert.cli.findings import ONNX_PACKAGES, OnnxRuntime

    found = find_spec("onnxruntime")
    if found is None or not found.submodule_search_locations:
        return None
    packages = {}
    for name in ONNX_PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    libraries = Path(found.submodule_search_locations[0], "capi").glob("libonnxruntime_providers_*.so")
    names = {library.stem.removeprefix("libonnxruntime_providers_") for library in libraries}
    return OnnxRuntime(packages, ("cpu", *sorted(names - {"shared"})))


def _existing(path: Path) -> Path:
    """``path`` or the nearest parent of it that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def _print(facts: dict[str, Any]) -> None:
    from edgert.download import size_text

    def row(label: str, text: object) -> None:
        print(f"{label:<12}{text}")

    cpu, memory, limits, board = facts["cpu"], facts["memory"], facts["limits"], facts["board"]
    measured = facts["measured"]
    row("system", f"{facts['system']}, {cpu['arch']}, Python {facts['python']}")
    title = f"taken for {board['title']}" if board["guessed"] else board["title"] or "none that edgert knows"
    row("board", f"{title} ({board['reason']})")
    if board["mode"]:
        row("power mode", board["mode"])
    row("processor", cpu["model"])
    row("cores", f"{cpu['cores']} cores, {cpu['logical']} processors, {cpu['usable']} usable")
    clocks = board["clocks"]
    if clocks["cpu_allowed"]:
        row("clocks", f"up to {clocks['cpu_allowed'] / 1e6:.0f} MHz, governor {clocks['governor']}")
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
    for n, rate in measured["read"].items():
        row("bandwidth", f"{rate / 1e9:.1f} GB/s read by {n} thread{'s' if n > 1 else ''}")
    threads = measured["threads"]
    # In multiply-adds of all threads: weights times the tokens that share them.
    for name, rates in measured["matmul"].items():
        each = [f"{n * rate * threads / 1e9:.0f} with {n}" for n, rate in rates.items()]
        row("arithmetic", f"{name}: {', '.join(each)} tokens at once, G multiply-adds/s")
    if measured["fp32"]:
        row("arithmetic", f"float32: {measured['fp32'] * threads / 1e9:.0f} G multiply-adds/s")
    for key, rate in measured["attend"].items():
        if key.endswith("x4"):
            kv, size = key.split()
            row("attention", f"{size[:-2]} wide heads, {kv}: {rate * threads / 1e6:.0f} M positions/s")
    for one, deep in zip(measured["disk"][::2], measured["disk"][1::2], strict=True):
        row(
            "disk",
            f"{one['rate'] / 1e6:.0f} MB/s in requests of {one['request'] >> 10} KiB, "
            f"{deep['rate'] / 1e6:.0f} with {deep['depth']} in flight",
        )
    for name, version in facts["engines"].items():
        row("engine", f"{name} {version}" if version else f"{name} not installed")
    if runtime := facts["onnxruntime"]:
        packages = ", ".join(f"{name} {version}" for name, version in runtime["packages"].items())
        row("engine", f"onnx: {packages or 'of unknown version'}, for {', '.join(runtime['providers'])}")
    else:
        row("engine", "onnx not installed")
    row("cache", f"{facts['cache']['directory']}, {size_text(facts['cache']['free'])} free")
    print()
    for sentence in facts["findings"]:
        print(f"- {sentence}")
