"""Exact attention on real weights: 100 sequences of 64 tokens after 4,000 to 8,000 have the tokens of full
attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import real_model
from edgert.bench.eval_texts import make_documents

from edgert.model import load

TOKENS, SEQUENCES = 64, 100
LENGTHS = [8100, 7300, 6400, 5200, 4100]
APART = 37  # tokens between the ends of the prompts of one text: each has a reply of its own
pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


@pytest.mark.parametrize("kv", ["f16", "q8"])
def test_exact_attention_is_full_attention(kv: str, report: Callable[..., None]) -> None:
    """A prompt is the beginning of the one before, which both sessions hold: they are rewound, not read
    again. Every other sequence is drawn, the others are greedy."""
    path = real_model("smollm2-135m")
    differ, drafts, agreed, passes = 0, 0, 0, 0
    with (
        load(path, kv=kv, head="dense", context=8192) as full,
        load(path, kv=kv, head="dense", context=8192, attention="exact") as exact,
    ):
        documents = {d.source: d.tokens for d in make_documents(full.tokenizer, LENGTHS[0])}
        for source, ids in documents.items():
            with full.session() as one, exact.session() as other:
                for i in range(SEQUENCES // 2):
                    length = LENGTHS[i * len(LENGTHS) // (SEQUENCES // 2)] - i % 10 * APART
                    options = {"max_tokens": TOKENS, "temperature": 0.8 * (i % 2), "seed": i}
                    wanted = one.generate(ids[:length], **options)
                    reply = other.generate(ids[:length], **options)
                    assert reply.tokens == wanted.tokens, f"sequence {i} of {source}, {length} tokens"
                    assert len(reply.tokens) == TOKENS or reply.finish_reason == "stop"
                    if i:
                        assert reply.stats.reused_tokens >= length - 1
                    drafts += reply.stats.drafts
                    agreed += reply.stats.agreed
                    passes += reply.stats.passes
                    differ += reply.stats.drafts > reply.stats.agreed
    report(f"exact attention, {kv}: {agreed / drafts:.1%} of {drafts} drafts agreed in {passes} passes")
    # Else the drafts were full attention's themselves, and nothing was at stake.
    assert differ >= SEQUENCES // 4
    assert agreed > drafts / 2
