"""Lines of text for comparing tokenizers: seed lines in many languages, multiplied by seeded
mutation, and lines of pure structure (runs of white space, digits, random code points)."""

from __future__ import annotations

import random
from pathlib import Path

SEED_LINES = (Path(__file__).parent / "data" / "tokenizer_seed.txt").read_text(encoding="utf-8").split("\n")

# Where scripts, symbols and trouble are: (first, last) code points.
_BLOCKS = [
    (0x0000, 0x001F), (0x0020, 0x007E), (0x007F, 0x00FF), (0x0100, 0x024F), (0x0300, 0x036F),
    (0x0370, 0x03FF), (0x0400, 0x04FF), (0x0590, 0x05FF), (0x0600, 0x06FF), (0x0900, 0x097F),
    (0x0E00, 0x0E7F), (0x1100, 0x11FF), (0x1E00, 0x1EFF), (0x2000, 0x206F), (0x2070, 0x20CF),
    (0x2100, 0x22FF), (0x2460, 0x24FF), (0x2580, 0x27BF), (0x3000, 0x30FF), (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3), (0xE000, 0xE0FF), (0xFB00, 0xFDFF), (0xFE00, 0xFFFF), (0x10000, 0x103FF),
    (0x1D400, 0x1D7FF), (0x1F1E6, 0x1F1FF), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF), (0xE0000, 0xE007F),
    (0x10FF00, 0x10FFFF),
]  # fmt: skip
_SPACES = [
    " ",
    "  ",
    "   ",
    "\t",
    "\t\t",
    "\n",
    "\n\n",
    "\r\n",
    "\r",
    "\u00a0",
    "\u3000",
    "\u2028",
    "\v",
    "\f",
    "\x85",
]
_GLUE = [
    *_SPACES,
    "",
    "",
    ".",
    ",",
    "'",
    '"',
    "-",
    "_",
    "/",
    "\u200d",
    "\u200b",
    "\ufe0f",
    "\u0301",
    "<|im_end|>",
    ">",
    "<",
]


def _random_text(rng: random.Random, length: int) -> str:
    first, last = rng.choice(_BLOCKS)
    out = []
    for _ in range(length):
        if rng.random() < 0.15:
            first, last = rng.choice(_BLOCKS)
        out.append(chr(rng.randint(first, last)))
    return "".join(out)


def _spaces(rng: random.Random) -> str:
    run = rng.choice(_SPACES) * rng.choice([1, 2, 3, 4, 7, 8, 15, 16, 31, 40])
    return run if rng.random() < 0.7 else run + rng.choice(_SPACES)


def _digits(rng: random.Random) -> str:
    text = "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 20)))
    return f"{int(text):,}" if rng.random() < 0.3 else text


def _mixed_line(rng: random.Random) -> str:
    """Pieces of seed lines, cut anywhere, glued with anything."""
    parts = []
    for _ in range(rng.randint(1, 4)):
        line = rng.choice(SEED_LINES)
        start = rng.randrange(max(1, len(line)))
        parts.append(line[start : start + rng.randint(1, 40)])
        parts.append(rng.choice(_GLUE))
    return "".join(parts)


def _changed_line(rng: random.Random) -> str:
    """A seed line with something put in, left out, repeated or in another case."""
    line = rng.choice(SEED_LINES)
    at = rng.randrange(len(line) + 1)
    kind = rng.randrange(6)
    if kind == 0:
        return line[:at] + _spaces(rng) + line[at:]
    if kind == 1:
        return line[:at] + _random_text(rng, rng.randint(1, 5)) + line[at:]
    if kind == 2:
        return line[:at] + line[at + 1 :]
    if kind == 3:
        return line[:at] + line[at : at + 1] * rng.randint(2, 40) + line[at:]
    if kind == 4:
        return line.upper() if at % 2 else line.title()
    return line[:at] + _digits(rng) + line[at:]


def _structure_line(rng: random.Random) -> str:
    return "".join(
        rng.choice([_spaces, _digits, lambda r: _random_text(r, r.randint(1, 8)), lambda r: r.choice(_GLUE)])(
            rng
        )
        for _ in range(rng.randint(1, 8))
    )


def corpus(lines: int, seed: int = 1) -> list[str]:
    """``lines`` distinct lines, the seed lines first; the same for the same arguments."""
    rng = random.Random(seed)
    found = dict.fromkeys(line for line in SEED_LINES if line)
    for size in (2, 7):
        found |= dict.fromkeys("\n".join(SEED_LINES[i : i + size]) for i in range(0, len(SEED_LINES), size))
    makers = [_mixed_line, _mixed_line, _changed_line, _changed_line, _structure_line]
    while len(found) < lines:
        line = rng.choice(makers)(rng) if rng.random() > 0.1 else _random_text(rng, rng.randint(1, 30))
        if line:
            found[line] = None
    return list(found)[:lines]
