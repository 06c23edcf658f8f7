"""How much of a session's keys and values lies in memory, and where the rest is."""

from __future__ import annotations

from typing import NamedTuple


class Tier(NamedTuple):
    """``slots``: pages of 16 tokens in memory, 0 for all of them; the others are in a file in ``directory``
    of at most ``disk_bytes``."""

    slots: int = 0
    directory: str = ""
    disk_bytes: int = 2**64 - 1


IN_MEMORY = Tier()
