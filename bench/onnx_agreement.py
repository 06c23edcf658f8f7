"""How often the FlashHead of an exported graph has the dense head's token first: ``python -m
edgert.bench.onnx_agreement DIR``.

Both heads score the same states of one graph, on prose and code that no calibration saw, or on the text in
``--file``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from edgert.bench.eval_texts import make_documents
from edgert.bench.onnx_run import Run

from edgert import _native
from edgert.tokenizer import Tokenizer

LENGTH, SKIPPED = 128, 8  # tokens of a sequence, and how many at its beginning are not scored
TOGETHER = 8  # states that the FlashHead scores in one pass: each needs megabytes of gathered rows


def texts(tokenizer: Tokenizer, file: Path | None) -> Iterator[tuple[str, list[int]]]:
    for document in make_documents(tokenizer, 1024, file):
        for at in range(0, len(document.tokens), LENGTH):
            piece = document.tokens[at : at + LENGTH]
            yield document.source, [*document.tokens[:1] * (at > 0), *piece]


def best(run: Run, hidden: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """The FlashHead's first token for each of the states ``hidden`` [1, n, dim]."""
    found = []
    for at in range(0, hidden.shape[1], TOGETHER):
        states, outputs = hidden[:, at : at + TOGETHER], ("flash_ids", "flash_logits")
        ids, logits = run([0], 0, outputs, [], flash=np.array(True), more_states=states)
        found.append(np.take_along_axis(ids[0], logits[0].argmax(-1)[:, None], 1)[:, 0])
    return np.concatenate(found)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m edgert.bench.onnx_agreement")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--file", type=Path, help="a text of at least 256 tokens instead")
    args = parser.parse_args()
    file = _native.GgufFile(str(args.directory / "tokenizer.gguf"))
    run = Run(args.directory / "model.onnx", 2 * LENGTH, 2 * LENGTH, 2)
    counts: dict[str, list[bool]] = {}
    for name, tokens in texts(Tokenizer.from_gguf(file.metadata), args.file):
        rows = list(range(SKIPPED, len(tokens)))
        logits, hidden = run(tokens, 0, ("logits", "hidden"), rows)
        found = best(run, hidden)
        counts.setdefault(name, []).extend((found == logits[0].argmax(-1)).tolist())
    about = json.loads((args.directory / "edgert.json").read_text())["flash_head"]
    print(f"{about['tokens']} tokens scored; the sidecar's agreement: {about['quality'].get('agreement')}\n")
    print("| text | positions | agreement |\n|---|---|---|")
    for name, same in counts.items():
        print(f"| {name} | {len(same)} | {np.mean(same):.2%} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
