"""How fast an answer came, beside what this machine's memory allows."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from edgert.download import size_text
from edgert.errors import EngineError
from edgert.machine import load_measured

if TYPE_CHECKING:
    from edgert.generate import Stats
    from edgert.model import Model
    from edgert.planner import Plan

QUICK_PROBE = 0.15  # seconds of reading; setting up the probe's memory costs about as much again


def read_bandwidth(threads: int, reached: float = 0.0) -> float:
    """Bytes per second ``threads`` threads can read: what the doctor measured, else a quick probe now.
    A measurement below what was ``reached`` was taken at a bad moment and does not count."""
    measured = load_measured()
    rate = measured.read.get(threads, 0.0) if measured else 0.0
    if rate > reached:
        return rate
    from edgert import _native

    return _native.probe_read_bandwidth(threads, QUICK_PROBE)


def bytes_per_token(model: Model, stats: Stats, planned: Plan | None = None) -> float:
    """What a decode step of this answer read on average: weights, and keys and values at the mean length,
    or as ``planned`` where a step does not read them all. A model native does not know counts its weights
    alone."""
    from edgert.cost import kv_bytes

    spec = getattr(model.engine, "spec", None)
    # Packed weights may be larger or smaller than those of the file; native says what it reads.
    weights = stats.bytes_per_token
    if spec is None or weights is None:
        from edgert import _native
        from edgert.cost import weight_bytes
        from edgert.models import BadModelMetadata, UnsupportedArchitecture, load_spec

        file = _native.GgufFile(model.path)
        tensors = file.tensors
        weights = weight_bytes(tensors).per_token
        try:
            spec = load_spec(file.metadata, {t.name: t.shape for t in tensors})
        except (BadModelMetadata, UnsupportedArchitecture):
            return float(weights)
    seen = stats.prompt_tokens + stats.generated_tokens / 2
    if model.engine.name == "onnx" and model.chosen:  # the slots of a step
        seen = min(seen, model.chosen)
    full = kv_bytes(spec, seen, model.kv)
    if not model.chosen or planned is None:
        return float(weights) + full
    exact = model.attention == "exact"
    steps = (_planned(model, stats, "sparse") or planned) if exact else planned
    step = sum(step.bytes for step in steps.decode if step.name == "attention")
    if exact:
        read = stats.drafts * step + stats.passes * full
        return float(weights) + read / max(stats.generated_tokens - 1, 1)
    return float(weights) + step


def speed_report(model: Model, stats: Stats) -> dict[str, Any]:
    """Everything the stats line says, as numbers: times in seconds, sizes in bytes, rates a second.
    Call it after the generation: it may probe the memory, but for a model with a limit of it."""
    engine = model.engine.describe()
    report: dict[str, Any] = {
        "prompt_tokens": stats.prompt_tokens,
        "reused_tokens": stats.reused_tokens,
        "generated_tokens": stats.generated_tokens,
        "prompt_tokens_per_second": stats.prompt_tps,
        "generation_tokens_per_second": stats.generation_tps,
        "time_to_first_token": stats.time_to_first_token,
        "peak_memory": stats.peak_memory,
        "seed": stats.seed,
        "engine": engine,
    }
    if stats.passes:
        report |= {"drafts": stats.drafts, "agreed": stats.agreed, "passes": stats.passes}
    planned = _planned(model, stats, model.attention)
    if planned is not None:
        report["planned_peak_memory"] = planned.needed
        report["planned_generation_tokens_per_second"] = 1 / planned.decode_seconds
    threads = engine.get("threads")
    if stats.generation_tps > 0 and isinstance(threads, int) and threads > 0:
        step = bytes_per_token(model, stats, planned)
        reached = step * stats.generation_tps
        report["bytes_per_token"] = int(step)
        report["read_bytes_per_second"] = reached
        if model.memory_limit is not None:
            return report
        with contextlib.suppress(EngineError):  # no memory left for a probe: the answer still stands
            limit = read_bandwidth(threads, reached)
            report["machine_bytes_per_second"] = limit
            report["share_of_machine"] = reached / limit
    return report


def _planned(model: Model, stats: Stats, attention: str) -> Plan | None:
    """What a plan for this very length says; None for a model that native does not know."""
    if model.engine.name != "native":
        return None
    from edgert.planner import plan

    return plan(
        model.path,
        context=max(2, stats.prompt_tokens + stats.generated_tokens),
        threads=model.engine.describe()["threads"],
        kv=model.kv,
        head=model.head,
        probes=model.probes,
        attention=attention,
        budget=model.chosen,
        memory=model.memory_limit,
    )


def speed_line(report: dict[str, Any]) -> str:
    """The report in one line."""
    engine = report["engine"]
    reused = f" ({report['reused_tokens']} reused)" if report["reused_tokens"] else ""
    parts = [
        f"prompt {report['prompt_tokens']} tokens{reused} {report['prompt_tokens_per_second']:.1f} tok/s",
        f"generation {report['generated_tokens']} tokens {report['generation_tokens_per_second']:.1f} tok/s",
        f"first token {report['time_to_first_token']:.2f} s",
        f"peak memory {size_text(report['peak_memory'])}",
    ]
    if report.get("drafts"):
        share = report["agreed"] / report["drafts"]
        parts.append(f"{share:.0%} of {report['drafts']} drafts agreed, {report['passes']} passes")
    if "share_of_machine" in report:
        parts.append(
            f"{size_text(report['bytes_per_token'])} a token = "
            f"{report['read_bytes_per_second'] / 1e9:.1f} of the "
            f"{report['machine_bytes_per_second'] / 1e9:.1f} GB/s this machine reads "
            f"({report['share_of_machine']:.0%})"
        )
    if "planned_peak_memory" in report:
        parts.append(
            f"planned {report['planned_generation_tokens_per_second']:.0f} tok/s and "
            f"{size_text(report['planned_peak_memory'])}"
        )
    # llama.cpp lists every feature it was built for; one name tells enough here.
    isa = str(engine.get("isa") or "").split()
    best = next((name for name in ("AVX512_VNNI", "AVX512", "AVX2", "DOTPROD", "NEON") if name in isa), "")
    about = f"{engine['engine']} {best or ' '.join(isa[:1]) or engine.get('provider', '')}".strip()
    threads = engine.get("threads")
    parts.append(f"{about}, {threads} threads" if threads else about)
    return " | ".join(parts)
