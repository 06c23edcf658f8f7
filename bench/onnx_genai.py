"""Directories in onnxruntime-genai, in turns: ``python -m edgert.bench.onnx_genai DIR DIR ...``.

For comparing an export with what onnxruntime-genai's own builder makes of the same weights. Times are the
process's time on the CPU with one thread; ``--wall`` gives elapsed time with ``--threads``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai

PROMPT, STEPS, ROUNDS = 128, 40, 4


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m edgert.bench.onnx_genai")
    parser.add_argument("directory", type=Path, nargs="+")
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    clock = time.perf_counter if args.wall else time.process_time
    tokens = np.random.default_rng(0).integers(100, 5000, PROMPT).astype(np.int32)
    models: dict[Path, tuple[Any, list[float], list[float]]] = {}
    for directory in args.directory:
        config = genai.Config(str(directory))
        threads = {"intra_op_num_threads": args.threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        models[directory] = genai.Model(config), [], []
    for _ in range(ROUNDS):
        for model, prompts, steps in models.values():
            options = genai.GeneratorParams(model)
            options.set_search_options(max_length=512, min_length=512, do_sample=False)
            generator = genai.Generator(model, options)
            began = clock()
            generator.append_tokens(tokens)
            generator.generate_next_token()
            prompts.append(1000 * (clock() - began))
            for _ in range(STEPS):
                began = clock()
                generator.generate_next_token()
                steps.append(1000 * (clock() - began))
    print(f"| directory | prompt of {PROMPT}, ms: least | step, ms: least | median |\n|---|---|---|---|")
    for directory, (_, prompts, steps) in models.items():
        median = statistics.median(steps)
        print(f"| {directory.name} | {min(prompts):.1f} | {min(steps):.2f} | {median:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
