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
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

class Sampler:
    def __init__(
        self,
        vocab_size: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int = 0,
        bias: Sequence[tuple[int, float]] = [],
    ) -> None: ...
    def observe(self, tokens: Sequence[int]) -> None: ...
    def accept(self, token: int) -> None: ...
    def sample(self, logits: npt.NDArray[np.float32], position: int) -> int: ...
    def logprobs(
        self, logits: npt.NDArray[np.float32], token: int, top: int = 0
    ) -> tuple[float, list[tuple[int, float]]]: ...
