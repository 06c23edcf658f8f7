"""edgert's native core"""

def probe_read_bandwidth(threads: int, seconds: float) -> float:
    """
    Bytes per second that `threads` threads read together from memory, over about `seconds`.
    """

def isa_levels() -> list[str]:
    """Instruction-set levels this CPU and OS offer, best first."""

def isa_selected() -> str:
    """
    The level in use: EDGERT_ISA when set, else the best. Raises EngineError for a bad EDGERT_ISA.
    """
