"""What the working set of an ONNX export reads from a disk: ``python -m edgert.bench.onnx_sparse_disk DIR``.

A text is read once, in memory. From there a session for each number of pages in memory takes the same steps
along it, and what they gave must have the same bits. Also told is how many of the pages that enter would have
been read ahead, had as many of the most promising ones outside the set been read during the step before.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
from edgert.bench.context import build, machine
from edgert.bench.measure import put, say
from edgert.bench.plan_check_sparse import text_of

from edgert.engines.onnx import OnnxEngine
from edgert.engines.onnx_sparse import PAGE, full_layers
from edgert.engines.onnx_sparse_session import SparseSession
from edgert.locate import cache_dir
from edgert.onnx_directory import OnnxDirectory
from edgert.tier import IN_MEMORY, Tier

WARM = 8  # steps, the first of which fills the slots
AHEAD = (2, 4, 8, 16, 32, 64)
COUNTED = ("bytes_read", "read_seconds", "waited_seconds")
HEADINGS = (
    *("tokens", "pages in memory", "a step", "before its run", "pages enter"),
    *("of these from the disk", "bytes", "reading", "waits"),
)


@dataclass
class Taken:
    """``ranks`` of the pages that entered: among those outside the set, by what they were worth a step
    earlier, from 0 on."""

    slots: int
    steps: list[float] = field(default_factory=list)  # seconds
    of_set: list[float] = field(default_factory=list)  # of these: what comes before the run
    ranks: list[int] = field(default_factory=list)
    disk: dict[str, float] = field(default_factory=dict)
    bits: str = ""


def take(session: SparseSession, tokens: Sequence[int], slots: int) -> Taken:
    taken, digest, working_set = Taken(slots), hashlib.sha256(), session.working_set
    arrange, before = working_set.step, dict.fromkeys(COUNTED, 0.0)

    def timed() -> int:
        began = time.perf_counter()
        filled = arrange()
        taken.of_set.append(time.perf_counter() - began)
        return filled

    working_set.step = timed  # type: ignore[method-assign]
    earlier = working_set.worth
    for i, token in enumerate(tokens):
        if i == WARM:
            before, taken = dict(session.tier or before), Taken(slots)
        inside, worth = set(working_set.pages), working_set.worth
        began = time.perf_counter()
        digest.update(session.step(token).tobytes())
        taken.steps.append(time.perf_counter() - began)
        outside = [int(page) for page in np.argsort(-earlier) if page not in inside]
        came = set(working_set.pages) - inside
        taken.ranks += [rank for rank, page in enumerate(outside) if page in came]
        earlier = worth
    after = session.tier or before
    taken.disk = {name: after[name] - before[name] for name in COUNTED}
    taken.bits = digest.hexdigest()
    return taken


def cells(length: int, taken: Taken, page_bytes: int) -> list[str]:
    n, disk = len(taken.steps), taken.disk
    return [
        f"{length:,}",
        f"{taken.slots or 'all'}",
        f"{1e3 * median(taken.steps):.2f} ms",
        f"{1e3 * sum(taken.of_set) / n:.2f} ms",
        f"{len(taken.ranks) / n:.2f}",
        f"{disk['bytes_read'] / n / page_bytes:.2f}",
        f"{disk['bytes_read'] / n / 1e6:.2f} MB",
        f"{1e3 * disk['read_seconds'] / n:.2f} ms",
        f"{1e3 * disk['waited_seconds'] / n:.2f} ms",
    ]


class Bench:
    def __init__(self, directory: OnnxDirectory, threads: int, budget: int, pages: Path) -> None:
        self._directory, self._threads, self._budget, self._pages = directory, threads, budget, pages

    def session(self, slots: int, context: int) -> SparseSession:
        tier = Tier(slots, str(self._pages)) if slots else IN_MEMORY
        engine = OnnxEngine(self._directory, threads=self._threads, slots=self._budget, tier=tier)
        opened = engine.session(context)
        assert isinstance(opened, SparseSession)
        return opened

    def measure(self, length: int, steps: int, pages: Sequence[int]) -> list[Taken]:
        """First with all in memory, then with so many ``pages``."""
        text = text_of(self._directory.metadata, length + steps)
        first = self.session(0, len(text) + 1)
        first.prefill(text[:length])
        state = first.snapshot()
        first.close()
        found: list[Taken] = []
        for slots in (0, *pages):
            opened = self.session(slots, len(text) + 1)
            opened.restore(state)
            found.append(take(opened, text[length:], slots))
            opened.close()
            say(f"{length} tokens, {slots or 'all'} pages: {1e3 * median(found[-1].steps):.2f} ms")
            if found[-1].bits != found[0].bits:
                raise SystemExit(f"with {slots} pages in memory the steps have other bits")
        return found


def report(directory: OnnxDirectory, budget: int, steps: int, found: dict[int, list[Taken]]) -> str:
    spec = directory.spec
    heads = sum(spec.layers[i].n_kv_heads for i in full_layers(spec))
    page_bytes = 4 * PAGE * heads * spec.head_dim  # float16 keys and values
    rows = [cells(length, taken, page_bytes) for length, each in found.items() for taken in each]
    ahead = []
    for length, (first, *_) in found.items():
        ranks = np.array(first.ranks)
        shares = ", ".join(f"{(ranks < n).mean():.0%} of the best {n}" for n in AHEAD)
        ahead.append(f"- {length:,} tokens: {shares}")
    lines = [
        "# Pages on a disk behind the slots of ONNX Runtime",
        "",
        f"`python -m edgert.bench.onnx_sparse_disk`: {directory.name}, {directory.quant}, keys and values "
        f"{directory.kv}, {budget:,} slots, {steps - WARM} steps each, pages of {page_bytes / 1e6:.2f} MB. "
        f"{machine()['cpu']}, edgert build {build()}. All steps of a length have the same bits.",
        "",
        *(f"| {' | '.join(row)} |" for row in (HEADINGS, ["---"] * len(HEADINGS), *rows)),
        "",
        "How many of the pages that enter were, a step earlier, among those outside the set that were worth "
        "most:",
        "",
        *ahead,
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m edgert.bench.onnx_sparse_disk", description=__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--lengths", default="4000,7900", metavar="N,…", help="tokens in front of the steps")
    parser.add_argument("--steps", type=int, default=224)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--pages", default="68,128", metavar="N,…", help="in memory, of all layers")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--page-directory", type=Path, default=cache_dir() / "pages")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.md", help="default: stdout")
    args = parser.parse_args()
    directory = OnnxDirectory.open(args.directory)
    bench = Bench(directory, args.threads, args.budget, args.page_directory)
    lengths, pages = ([int(word) for word in text.split(",")] for text in (args.lengths, args.pages))
    found = {length: bench.measure(length, args.steps, pages) for length in lengths}
    put(report(directory, args.budget, args.steps, found), args.output)


if __name__ == "__main__":
    main()
