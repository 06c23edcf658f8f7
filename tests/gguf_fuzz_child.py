"""Opens every file of a list written by test_gguf_fuzz.py under limits of address space and time, and
prints one line of JSON: how many opened, how many were refused and how, and how memory grew.

Usage: python gguf_fuzz_child.py FILE, where FILE holds (name length, name, data length, data) records.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy  # noqa: F401  # dequantize() would import it after the limit is set

from edgert._native import GgufFile
from edgert.errors import ModelFileError, UnsupportedModelError

ADDRESS_SPACE = 96 << 20  # bytes above what the interpreter has mapped at the start
SECONDS_A_FILE = 5


def records(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as f:
        while head := f.read(4):
            name = f.read(struct.unpack("<I", head)[0]).decode()
            yield name, f.read(struct.unpack("<I", f.read(4))[0])


def read_everything(path: Path) -> None:
    file = GgufFile(path)
    assert set(file.metadata) == set(file.metadata_keys)
    for t in file.tensors:
        assert len(file.read(t.name)) == t.nbytes
        assert file.dequantize(t.name).shape == t.shape


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status. (ru_maxrss would be that of the parent if it was larger.)"""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    limit = memory("VmSize") + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    fd = os.memfd_create("gguf")
    path = Path(f"/proc/self/fd/{fd}")
    outcome: Counter[str] = Counter()
    slowest, before = 0.0, 0
    for name, data in records(Path(sys.argv[1])):
        os.truncate(fd, 0)
        os.pwrite(fd, data, 0)
        print(name, file=sys.stderr)  # the last line names the file that killed or hung the process
        signal.alarm(SECONDS_A_FILE)
        start = time.process_time()
        try:
            read_everything(path)
            outcome["opened"] += 1
        except (ModelFileError, UnsupportedModelError) as e:
            outcome[type(e).__name__] += 1
        signal.alarm(0)
        slowest = max(slowest, time.process_time() - start)
        if not before and outcome["opened"] == 8:  # the seeds, which come first, have warmed up everything
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
            before = memory("VmRSS")
    grown = memory("VmHWM") - before
    print(json.dumps({**outcome, "grown": grown, "slowest": slowest}))


main()
