"""The choice of how much of the past a decode step reads."""

from __future__ import annotations

from .errors import UsageError

ATTENTIONS = ("full", "sparse", "exact")
DEFAULT_BUDGET = 1024
LARGEST_BUDGET = 2**20


def choose_budget(attention: str, budget: int, engine: str) -> int:
    """Tokens that a step chooses for each KV head, 0 for all of them. ``budget`` 0 is the default of sparse
    attention. Raises UsageError for options that make no sense."""
    if attention not in ATTENTIONS:
        raise UsageError(f"unknown attention {attention!r}: expected one of {', '.join(ATTENTIONS)}")
    if isinstance(budget, bool) or not isinstance(budget, int) or not 0 <= budget <= LARGEST_BUDGET:
        raise UsageError(f"budget must be 0 (the default) to {LARGEST_BUDGET} tokens, not {budget!r}")
    if attention == "full":
        if budget:
            raise UsageError("a budget is for sparse or exact attention: full attention reads every token")
        return 0
    if engine == "llamacpp":
        raise UsageError(f"attention={attention!r} needs the native engine; drop engine='llamacpp'")
    return budget or DEFAULT_BUDGET
