"""edgert's native core"""

from collections.abc import Sequence
from typing import Annotated

import numpy
from numpy.typing import NDArray

class Sampler:
    """Logits to tokens; see native/sampler.h for the order of the steps."""

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
    def observe(self, tokens: Sequence[int]) -> None:
        """Tokens of the prompt, for the repetition penalty."""

    def accept(self, token: int) -> None:
        """A token of the reply, for all penalties."""

    def sample(
        self,
        logits: Annotated[
            NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)
        ],
        position: int,
    ) -> int:
        """
        The token at `position`; a function of seed, position, logits and the tokens observed and accepted.
        """

    def logprobs(
        self,
        logits: Annotated[
            NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)
        ],
        token: int,
        top: int = 0,
    ) -> tuple[float, list[tuple[int, float]]]:
        """
        (log probability of `token`, the `top` best as (id, log probability)), of the plain softmax.
        """

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
