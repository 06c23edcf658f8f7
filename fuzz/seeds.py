"""Writes the seed corpus, the small good files of the tests, into the directory given."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from gguf_files import seeds

directory = Path(sys.argv[1])
directory.mkdir(parents=True, exist_ok=True)
for i, built in enumerate(seeds()):
    (directory / f"seed{i}.gguf").write_bytes(built.data)
