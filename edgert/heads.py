"""The choice of a vocabulary head, and of the sidecar it needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UsageError
from .locate import find_sidecar

if TYPE_CHECKING:
    from .sidecar import Sidecar

HEADS = ("auto", "dense", "flash", "exact")
LONGEST = 16  # tokens of a block of the exact head: so many are scored on one way through the head's rows


def check_head(head: str, probes: int) -> None:
    """Raises UsageError for a head or a number of probes that does not exist."""
    if head not in HEADS:
        raise UsageError(f"unknown head {head!r}: expected one of {', '.join(HEADS)}")
    if isinstance(probes, bool) or not isinstance(probes, int) or not 0 <= probes <= 2**20:
        raise UsageError(f"probes must be 0 (the sidecar's number) to {2**20}, not {probes!r}")


def choose_sidecar(path: str, head: str, engine: str) -> Sidecar | None:
    """The sidecar to use for ``head``, opened; None for the dense head. Raises UsageError when one is needed
    and there is none, ModelFileError when it is damaged or belongs to another file than ``path``."""
    found = None if head == "dense" or engine == "llamacpp" else find_sidecar(Path(path))
    if found is not None:
        from .sidecar import Sidecar

        sidecar = Sidecar(found, Path(path))
        if sidecar.recipe:
            return sidecar
    if head in ("flash", "exact"):
        if engine == "llamacpp":
            raise UsageError(f"head={head!r} needs the native engine; drop engine='llamacpp'")
        raise UsageError(
            f"{path} has no sidecar with a FlashHead, which head={head!r} needs: make one with "
            f"`edgert export {path} --flash-head`, or use head='dense'"
        )
    return None


def choose_retrieval(path: str, chosen: int, memory: int | None) -> Sidecar | None:
    """The sidecar whose retrieval head to use, opened: where keys and values may go to a disk, which takes
    sparse attention (``chosen``) and a limit of ``memory``, and the sidecar of ``path`` has one that chooses
    better than past votes. Raises ModelFileError when it is damaged or belongs to another file."""
    found = find_sidecar(Path(path)) if chosen and memory is not None else None
    if found is None:
        return None
    from .sidecar import Sidecar

    sidecar = Sidecar(found, Path(path))
    return sidecar if sidecar.predictor == "head" else None
