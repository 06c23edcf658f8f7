"""Predicted decode speeds beside published ones: ``python -m edgert.bench.published [-o FILE.md]``.

A prediction is what a token reads, by the same shapes and sums as the planner's, over the bandwidth of the
board, times one efficiency for each runtime. Half of the published rows fit it, the other half judge it.
Nothing is run here: `published.toml` has the rows, with their sources.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from edgert.bench.measure import put
from edgert.models.spec import LayerSpec, ModelSpec
from edgert.platforms.board_file import load_platform
from edgert.platforms.fields import RATE

from edgert.cost import kv_bytes, weight_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DATA = Path(__file__).with_name("published.toml")
TARGET = 0.20  # median error on the judging half
FIXED_STEP = 0.5e-3  # seconds; the fixed cost is a multiple of it, less than the quickest token takes
# Bits a weight, with the scales of its block.
BITS = {
    "F32": 32.0,
    "Q8_0": 8.5,
    "Q6_K": 6.5625,
    "Q5_0": 5.5,
    "Q5_1": 6.0,
    "Q5_K": 5.5,
    "Q4_0": 4.5,
    "Q4_K": 4.5,
    "IQ4_NL": 4.5,
    "q4f16_1": 4.5,  # MLC: groups of 32 with a half-precision scale, embedding and head too
}
# What llama.cpp takes for a tensor whose rows are not whole blocks of 256.
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True)
class Row:
    """One published figure: ``speed`` in tokens a second, ``bytes`` that a token reads; ``peak`` and
    ``sustained`` are the bandwidth of the device in its power mode. ``fits``: of the fitting half."""

    device: str
    runtime: str
    quant: str
    model: str
    speed: float
    source: str
    bytes: float
    peak: float
    sustained: float
    fits: bool


class Tensor(NamedTuple):
    name: str
    nbytes: int


def on_gpu(row: Row) -> bool:
    return row.runtime.endswith("GPU")


# Which bandwidth a prediction divides by. The one with the least error on the fitting half is taken.
RULES: dict[str, Callable[[Row], float]] = {
    "the peak": lambda row: row.peak,
    "what the CPU sustains": lambda row: row.sustained,
    "the peak for a GPU, what the CPU sustains for a CPU": lambda row: (
        row.peak if on_gpu(row) else row.sustained
    ),
}


def spec_of(name: str, model: Mapping[str, Any]) -> ModelSpec:
    """The shape of a model. What moves no weights (rope, norms' details, biases) is left at nothing."""
    shape, windows = model["shape"], model.get("windows", [0])
    return ModelSpec(
        family="",
        name=name,
        dim=shape["dim"],
        n_heads=shape["heads"],
        head_dim=shape["head_dim"],
        ffn_dim=shape["ffn"],
        vocab_size=shape["vocab"],
        context_length=0,
        norm_eps=0.0,
        layers=tuple(
            LayerSpec(n_kv_heads=shape["kv_heads"], window=windows[i % len(windows)])
            for i in range(shape["layers"])
        ),
        rope_dims=shape["head_dim"],
        rope_style="half",
        tied_head=shape["tied"],
    )


def tensor_type(name: str, shape: Sequence[int], spec: ModelSpec, quant: str) -> str:
    """The type of a tensor in a file of that quantisation, as llama.cpp's llama-quant.cpp mixes them."""
    if len(shape) == 1:
        return "F32"
    if quant in ("Q8_0", "q4f16_1"):
        return quant
    kind = quant.removesuffix("_M")
    n, block = spec.n_layers, re.match(r"blk\.(\d+)\.(attn_v|ffn_down)\.", name)
    if name == ("token_embd.weight" if spec.tied_head else "output.weight"):
        kind = "Q6_K"
    elif block and quant == "Q4_K_M":
        i = int(block[1])
        if i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2:
            kind = "Q6_K"
    elif block and quant == "IQ4_NL":
        grouped = spec.n_heads >= 4 * spec.layers[0].n_kv_heads
        if grouped if block[2] == "attn_v" else int(block[1]) < n // 8:
            kind = "Q5_K"
    return FALLBACK.get(kind, kind) if shape[-1] % 256 else kind


def tensors(spec: ModelSpec, quant: str) -> list[Tensor]:
    found = []
    for name, shape in spec.tensor_shapes().items():
        bits = math.prod(shape) * BITS[tensor_type(name, shape, spec, quant)]
        found.append(Tensor(name, round(bits / 8)))
    return found


def bytes_per_token(spec: ModelSpec, quant: str, context: int) -> float:
    return weight_bytes(tensors(spec, quant)).per_token + kv_bytes(spec, context)


def load(path: Path = DATA) -> tuple[list[Row], dict[str, Any]]:
    """The rows in the order of their source, and the whole file. Of each runtime the first row fits, the
    second judges, and so on."""
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    specs = {name: spec_of(name, model) for name, model in data["models"].items()}
    rows: list[Row] = []
    for raw in data["rows"]:
        if raw["device"] in data["devices"]:
            device = data["devices"][raw["device"]]
            title, peak, sustained = device["title"], RATE(device["peak"]), RATE(device["sustained"])
        else:
            board = load_platform(raw["device"])
            if "mode" in raw:
                board = board.in_mode(raw["mode"])
            title, peak, sustained = board.title, board.memory.peak, board.memory.sustained
        rows.append(
            Row(
                device=f"{title}, {raw['mode']}" if "mode" in raw else title,
                runtime=raw["runtime"],
                quant=raw["quant"],
                model=raw["model"],
                speed=raw["speed"],
                source=raw["source"],
                bytes=bytes_per_token(specs[raw["model"]], raw["quant"], data["context"]),
                peak=peak,
                sustained=sustained,
                fits=sum(row.runtime == raw["runtime"] for row in rows) % 2 == 0,
            )
        )
    return rows, data


@dataclass(frozen=True)
class Fit:
    """What the fitting half chose: the rule for the bandwidth, the seconds that a token costs a GPU whatever
    it reads, and of each runtime the share of the bandwidth that it reaches."""

    rule: str
    fixed: float
    efficiency: Mapping[str, float]

    def seconds(self, row: Row) -> float:
        read = row.bytes / RULES[self.rule](row)
        return read / self.efficiency[row.runtime] + (self.fixed if on_gpu(row) else 0.0)

    def error(self, row: Row) -> float:
        return 1 / self.seconds(row) / row.speed - 1


def fit(rows: Iterable[Row], rule: str, fixed: float) -> Fit:
    """The efficiency of a runtime is the median over its rows."""
    shares: dict[str, list[float]] = {}
    for row in rows:
        left = 1 / row.speed - (fixed if on_gpu(row) else 0.0)
        shares.setdefault(row.runtime, []).append(row.bytes / RULES[rule](row) / left)
    return Fit(rule, fixed, {runtime: statistics.median(found) for runtime, found in shares.items()})


def loss(rows: Sequence[Row], rule: str, fixed: float) -> float:
    """How far off each row is when the others predict it: the mean of |log(predicted / published)|, which no
    single row can rule. Rows without another of their runtime are passed over."""
    off = []
    for row in rows:
        others = fit([other for other in rows if other is not row], rule, fixed)
        if row.runtime in others.efficiency:
            off.append(abs(math.log(1 + others.error(row))))
    return statistics.mean(off)


def choose(rows: Sequence[Row]) -> Fit:
    """The rule and the fixed cost with the least loss on these rows, with their efficiencies."""
    quickest = min(1 / row.speed for row in rows if on_gpu(row))
    fixed = [step * FIXED_STEP for step in range(math.ceil(quickest / FIXED_STEP))]
    _, rule, cost = min((loss(rows, rule, cost), rule, cost) for rule in RULES for cost in fixed)
    return fit(rows, rule, cost)


def median_error(found: Fit, rows: Iterable[Row]) -> float:
    return statistics.median(abs(found.error(row)) for row in rows)


def table(rows: Sequence[Row], data: Mapping[str, Any]) -> str:
    """Markdown: what was fitted, the errors, every row, and what is left out."""
    fitting, judging = [r for r in rows if r.fits], [r for r in rows if not r.fits]
    chosen = choose(fitting)
    known = {(row.runtime, row.model) for row in fitting}
    unseen = [row for row in judging if (row.runtime, row.model) not in known]
    plain = fit(fitting, min(RULES, key=lambda rule: loss(fitting, rule, 0.0)), 0.0)
    worst = max(abs(chosen.error(row)) for row in judging)
    efficiency = ", ".join(f"{name} {share:.2f}" for name, share in chosen.efficiency.items())
    lines = [
        "# Published decode speeds beside those predicted",
        "",
        "`python -m edgert.bench.published` writes this from `bench/published.toml`. Predicted: the bytes a "
        f"token reads (weights, and keys and values of {data['context']} tokens in 16 bits) over the "
        "bandwidth, times one efficiency for each runtime, and a fixed cost of each token on a GPU. Of each "
        "runtime the rows, in the order of their source, fit and judge in turn. The rule for the bandwidth "
        "and the fixed cost are those with the least error on the fitting half, each row predicted from the "
        "others.",
        "",
        f"- judging half, {len(judging)} rows: off by **{median_error(chosen, judging):.1%}** at the median "
        f"(target {TARGET:.0%}), {worst:.0%} at worst",
        f"- of it the {len(unseen)} rows whose model is new to the runtime, not the same one in another "
        f"power mode or on another device: {median_error(chosen, unseen):.1%}",
        f"- fitting half, {len(fitting)} rows: {median_error(chosen, fitting):.1%}",
        f"- the halves swapped, everything fitted anew: {median_error(choose(judging), fitting):.1%}",
        f"- without the fixed cost: {median_error(plain, judging):.1%} on the judging half",
        f"- fitted: bandwidth is {chosen.rule}; a token costs a GPU {chosen.fixed * 1e3:.1f} ms; "
        f"efficiencies {efficiency}",
        "",
        "| half | device | runtime | model | quantisation | read a token | GB/s | published | predicted "
        "| off | source |",
        "|---|---|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        lines.append(
            f"| {'fits' if row.fits else 'judges'} | {row.device} | {row.runtime} | {row.model} "
            f"| {row.quant} | {row.bytes / 1e6:,.0f} MB | {RULES[chosen.rule](row) / 1e9:.1f} "
            f"| {row.speed:g} | {1 / chosen.seconds(row):.1f} | {chosen.error(row):+.0%} | {row.source} |"
        )
    lines += ["", "Speeds in tokens a second. Sources by name:", ""]
    lines += [f"- {name}: {source}" for name, source in data["sources"].items()]
    lines += ["", "Bandwidths are those of the platform files, but for these devices, which have none:", ""]
    lines += [
        f"- {device['title']}: {device['peak']} at its peak, {device['sustained']} for the CPU; "
        f"{device['source']}"
        for device in data["devices"].values()
    ]
    lines += [
        "",
        f"Bits a weight, scales included: {', '.join(f'{kind} {bits:g}' for kind, bits in BITS.items())}. "
        "Tensors are mixed as llama.cpp does it; over all that a token reads that is:",
        "",
    ]
    lines += _mixtures(rows, data)
    lines += ["", "Left out, none for its error:", ""]
    lines += [f"- {gone['rows']}: {gone['why']}" for gone in data["left_out"]]
    return "\n".join(lines) + "\n"


def _mixtures(rows: Iterable[Row], data: Mapping[str, Any]) -> list[str]:
    """A line for each model and quantisation."""
    lines = []
    for name, quant in dict.fromkeys((row.model, row.quant) for row in rows):
        model = data["models"][name]
        spec = spec_of(name, model)
        weights = weight_bytes(Tensor(n, math.prod(shape)) for n, shape in spec.tensor_shapes().items())
        bits = 8 * weight_bytes(tensors(spec, quant)).per_token / weights.per_token
        lines.append(f"- {name}, {quant}: {bits:.2f} bits; shape from {model['source']}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m edgert.bench.published", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, help="file for the table; default: stdout")
    args = parser.parse_args()
    text = table(*load())
    put(text, args.output)


if __name__ == "__main__":
    main()
