"""Which operators ONNX Runtime runs well on the CPU: ``python -m edgert.export.onnx_operators``.

Small graphs, timed in the process's time on the CPU with one thread, so that a busy machine does not count.
What the exporter chose, and why, is in docs/onnx.md.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from edgert.export.onnx_graph import Graph

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 30, 9, 3, 64  # SmolLM2-135M's attention
VOCAB, DIM, BLOCK = 262144, 640, 32  # Gemma-3-270M's head
CLUSTER, CHOSEN, RANK = 64, 495, 256  # its FlashHead: tokens of a cluster, clusters chosen
SWEPT = np.ones(24_000_000, np.float32)  # larger than the caches
Feeds = Mapping[str, npt.NDArray[Any]]


def session(make: Callable[[Graph], None], opset: int = 24) -> onnxruntime.InferenceSession:
    """A session of one thread on the graph that ``make`` fills."""
    with tempfile.TemporaryDirectory() as name:
        with (Path(name) / "data").open("wb") as data:
            graph = Graph(data, "data")
            make(graph)
            model = graph.model("edgert")
        model.opset_import[0].version = opset
        path = Path(name) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def timed(run: Callable[[], object], repeats: int, cold: bool = False) -> str:
    taken = []
    for _ in range(repeats + 1):
        if cold:
            SWEPT.sum()
        began = time.process_time()
        run()
        taken.append(1000 * (time.process_time() - began))
    return f"{min(taken[1:]):.2f} | {statistics.median(taken[1:]):.2f}"


def attention(g: Graph, standard: bool) -> None:
    """Attention alone, layer upon layer, with caches that are inputs and outputs."""
    width, kv_width = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    g.input("q", "float32", (1, "T", width))
    g.input("new_k", "float32", (1, KV_HEADS, "T", HEAD_DIM) if standard else (1, "T", kv_width))
    g.input("new_v", "float32", (1, KV_HEADS, "T", HEAD_DIM) if standard else (1, "T", kv_width))
    g.input("filled", "int64" if standard else "int32", (1,))
    g.input("total", "int64" if standard else "int32", (1,) if standard else ())
    x = "q"
    for i in range(LAYERS):
        for c in "kv":
            shape = (1, KV_HEADS, "slots", HEAD_DIM)
            g.input(f"{c}.{i}", "float32", shape)
            g.output(f"{c}_out.{i}", "float32", shape)
        if standard:
            for c in "kv":
                g.node("TensorScatter", f"{c}.{i}", f"new_{c}", "filled", name=f"{c}_out.{i}")
            apart = g.node("Reshape", x, g.constant(np.array([1, -1, HEADS, HEAD_DIM])))
            q = g.node("Transpose", apart, perm=[0, 2, 1, 3])
            found = g.node("Attention", q, f"k_out.{i}", f"v_out.{i}", "", "", "", "total", is_causal=1)
            back = g.node("Transpose", found, perm=[0, 2, 1, 3])
            x = g.node("Reshape", back, g.constant(np.array([1, -1, width])))
        else:
            x = g.contrib(
                "GroupQueryAttention",
                *(x, "new_k", "new_v", f"k.{i}", f"v.{i}", "filled", "total"),
                shape=(1, "T", width),
                outputs=(f"k_out.{i}", f"v_out.{i}"),
                num_heads=HEADS,
                kv_num_heads=KV_HEADS,
            )
    g.node("Identity", x, name="y")
    g.output("y", "float32", (1, "T", width))


def attention_table() -> None:
    print(f"| attention of {LAYERS} layers | slots | filled | new | ms: least | median |")
    print("|---|---|---|---|---|---|")
    for standard, name in ((False, "GroupQueryAttention"), (True, "TensorScatter, Attention")):
        s = session(partial(attention, standard=standard))
        for slots, filled, new in ((2048, 512, 1), (8192, 512, 1), (8192, 2048, 1), (2048, 512, 128)):
            rng = np.random.default_rng(0)
            kv = (1, KV_HEADS, new, HEAD_DIM) if standard else (1, new, KV_HEADS * HEAD_DIM)
            kind = np.int64 if standard else np.int32
            feeds: Feeds = {
                "q": rng.standard_normal((1, new, HEADS * HEAD_DIM), np.float32),
                "new_k": rng.standard_normal(kv, np.float32),
                "new_v": rng.standard_normal(kv, np.float32),
                # GroupQueryAttention wants the last slot that is in use after the pass.
                "filled": np.array([filled if standard else filled + new - 1], kind),
                "total": np.array([filled + new] if standard else filled + new, kind),
            }
            binding = s.io_binding()
            for i in range(LAYERS):
                for c in "kv":
                    values = rng.standard_normal((1, KV_HEADS, slots, HEAD_DIM), np.float32)
                    cache = onnxruntime.OrtValue.ortvalue_from_numpy(values)
                    binding.bind_ortvalue_input(f"{c}.{i}", cache)
                    binding.bind_ortvalue_output(f"{c}_out.{i}", cache)
            for key, value in feeds.items():
                binding.bind_cpu_input(key, value)
            binding.bind_output("y")
            figures = timed(partial(s.run_with_iobinding, binding), 15 if new == 1 else 3)
            print(f"| {name} | {slots} | {filled} | {new} | {figures} |", flush=True)


def quantised(g: Graph, name: str, rows: int, cols: int, bits: int) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (rows, cols * bits // 8), np.uint8)
    g.store(name, "uint8", [codes])
    scales = rng.random((rows, cols // BLOCK), np.float32) / 100
    g.weight(name + ".scales", "float32", scales.shape, [scales])


def product(g: Graph, x: str, name: str, rows: int, cols: int, bits: int, level: int, out: str) -> None:
    blocks = g.view(name, (rows, cols // BLOCK, BLOCK * bits // 8))
    shape = (1, "T", rows)
    sizes: dict[str, Any] = {"K": cols, "N": rows, "bits": bits, "block_size": BLOCK, "accuracy_level": level}
    g.contrib("MatMulNBits", x, blocks, name + ".scales", shape=shape, name=out, **sizes)
    g.output(out, "float32", shape)


def one_product(g: Graph, rows: int, cols: int, bits: int, level: int) -> None:
    g.input("x", "float32", (1, "T", cols))
    quantised(g, "w", rows, cols, bits)
    product(g, "x", "w", rows, cols, bits, level, "y")


def product_table() -> None:
    print("\n| MatMulNBits | new | ms: least | median |\n|---|---|---|---|")
    cases = [(4096, DIM, bits, level, new) for bits in (4, 8) for level in (4, 0) for new in (1, 128)]
    cases += [(VOCAB, DIM, 4, 4, 1), (VOCAB, 256, 4, 4, 1), (VOCAB, 128, 4, 4, 1)]
    for rows, cols, bits, level, new in cases:
        s = session(partial(one_product, rows=rows, cols=cols, bits=bits, level=level))
        x = np.random.default_rng(1).standard_normal((1, new, cols), np.float32)
        figures = timed(partial(s.run, ["y"], {"x": x}), 12)
        print(f"| {rows} x {cols}, {bits} bits, accuracy_level {level} | {new} | {figures} |", flush=True)


def sieve(g: Graph, way: str) -> None:
    """Low-rank scores of ``CHOSEN`` clusters of ``CLUSTER`` tokens each, or of all tokens."""
    rng, clusters = np.random.default_rng(0), VOCAB // CLUSTER
    if way == "all, int4":
        one_product(g, VOCAB, RANK, 4, 4)
        return
    g.input("best", "int64", (1, CHOSEN))
    if way == "rows":
        codes = rng.integers(0, 128, (clusters, CLUSTER, RANK), np.uint8)
        g.input("x", "int8", (1, RANK, 1))
        found = g.node("Gather", g.weight("w", "uint8", codes.shape, [codes]), "best")
        flat = g.node("Reshape", found, g.constant(np.array([1, -1, RANK], np.int64)))
        g.node("MatMulInteger", flat, "x", name="y")
        g.output("y", "int32", (1, CHOSEN * CLUSTER, 1))
    else:
        by_axis = rng.integers(-63, 64, (clusters, RANK, CLUSTER), np.int8)
        g.input("x", "int8" if way == "axis by axis, signed state" else "uint8", (1, 1, 1, RANK))
        found = g.node("Gather", g.weight("w", "int8", by_axis.shape, [by_axis]), "best")
        g.node("MatMulInteger", "x", found, name="y")
        g.output("y", "int32", (1, CHOSEN, 1, CLUSTER))


def sieve_table() -> None:
    """Ways to score tokens by low-rank rows, with other data in the caches before each run."""
    print(f"\n| low-rank scores, rank {RANK} | ms: least | median |\n|---|---|---|")
    rng = np.random.default_rng(1)
    best = rng.permutation(VOCAB // CLUSTER)[None, :CHOSEN].astype(np.int64)
    state: Feeds = {
        "all, int4": rng.standard_normal((1, 1, RANK), np.float32),
        "rows": rng.integers(-63, 64, (1, RANK, 1), np.int8),
        "axis by axis": rng.integers(0, 128, (1, 1, 1, RANK), np.uint8),
        "axis by axis, signed state": rng.integers(-63, 64, (1, 1, 1, RANK), np.int8),
    }
    for way, x in state.items():
        s = session(partial(sieve, way=way))
        feeds = {"x": x} if way == "all, int4" else {"x": x, "best": best}
        name = "all tokens" if way == "all, int4" else f"{CHOSEN} of {VOCAB // CLUSTER} clusters, int8, {way}"
        print(f"| {name} | {timed(partial(s.run, ['y'], feeds), 15, cold=True)} |", flush=True)


def outputs_table() -> None:
    """Whether a run that asks for one output computes the other."""

    def make(g: Graph) -> None:
        g.input("x", "float32", (1, "T", DIM))
        quantised(g, "w", VOCAB, DIM, 4)
        product(g, "x", "w", VOCAB, DIM, 4, 4, "large")
        quantised(g, "v", 256, DIM, 4)
        product(g, "x", "v", 256, DIM, 4, 4, "small")

    s = session(make)
    x = np.random.default_rng(1).standard_normal((1, 1, DIM), np.float32)
    print("\n| a large and a small product in one graph; asked for | ms: least | median |\n|---|---|---|")
    only = onnxruntime.RunOptions()
    only.only_execute_path_to_fetches = True
    for name, options in (("both", None), ("small", None), ("small, only_execute_path_to_fetches", only)):
        wanted = ["large", "small"] if name == "both" else ["small"]
        figures = timed(partial(s.run, wanted, {"x": x}, options), 12)
        print(f"| {name} | {figures} |", flush=True)


def main() -> int:
    attention_table()
    product_table()
    sieve_table()
    outputs_table()
    return 0


if __name__ == "__main__":
    sys.exit(main())
