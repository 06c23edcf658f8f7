"""What the default budget of sparse attention loses on real weights at 8,000 tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import real_model
from edgert.bench.eval_attention import evaluate

from edgert.attention import DEFAULT_BUDGET
from edgert.model import load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_the_default_budget_at_8000_tokens(report: Callable[..., None]) -> None:
    with load(real_model("smollm2-135m"), engine="native", head="dense", context=8000) as model:
        full, sparse = evaluate(model, 8000, [DEFAULT_BUDGET], 2000, 100)
    text, lookup = sparse.text, sparse.lookup
    report(
        f"sparse {DEFAULT_BUDGET} at 8000: KL {text.kl:.4f}, {text.agreement:.2%}, "
        f"perplexity {text.perplexity_ratio - 1:+.2%}, lookups {lookup.right} for {full.lookup.right}"
    )
    assert set(sparse.texts) == {"prose", "code"} and text.positions >= 2000
    assert text.kl <= 0.010
    assert text.agreement >= 0.97
    assert text.perplexity_ratio <= 1.02
    assert lookup.asked >= 100 and full.lookup.right >= 50
    for kind, counts in sparse.lookups.items():
        assert counts.right >= full.lookups[kind].right - 3, kind
