"""Native on real weights, against llama.cpp and against float32 transformers on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing

import numpy as np
import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("transformers")

from judge import CONTINUATION, Judge

from edgert.engines import open_engine

Report = Callable[..., None]

# Everything is computed by the first test that asks; a busy machine may need long for it.
pytestmark = [pytest.mark.alone, pytest.mark.timeout(3600)]

# Two tokens are a tie when float32 separates them by less than this many standard deviations of
# llama.cpp's own error on such gaps; 3,264 positions a model are looked at.
TIE = 4.0


@pytest.fixture(scope="module", params=["smollm2-135m", "gemma-3-270m"])
def judge(request: pytest.FixtureRequest) -> Iterator[Judge]:
    judge = Judge(request.param)
    yield judge
    judge.close()


def test_greedy_continuations_are_llama_cpps(judge: Judge, report: Report) -> None:
    found = judge.continuations
    prompts = found.positions // CONTINUATION
    assert prompts >= 50
    report(
        f"{judge.name}: {prompts - len(found.first_divergences)} of {prompts} continuations are llama.cpp's, "
        f"{len(found.divergences)} of {found.positions} positions differ",
        f"  error of a gap between two tokens, standard deviation: llama.cpp {found.noise:.3f}, "
        f"native {np.std(found.native_gap_errors):.3f}; a tie is below {TIE * found.noise:.3f}",
        *(f"  {one}" for one in found.divergences),
    )
    beyond = [str(one) for one in found.divergences if one.reference_gap >= TIE * found.noise]
    assert not beyond, f"noise {found.noise:.3f}, no tie:\n" + "\n".join(beyond)
    assert len(found.divergences) < 0.05 * found.positions


def test_divergence_of_single_steps_from_float32(judge: Judge, report: Report) -> None:
    found, n = judge.continuations, judge.continuations.positions
    native, peer = np.mean(found.native_kl), np.mean(found.peer_kl)
    report(f"{judge.name}: KL from float32, mean of {n} steps: {native:.2e}; llama.cpp {peer:.2e}")
    assert native < 2e-3
    assert native <= peer


def test_divergence_on_a_text_from_float32(judge: Judge, report: Report) -> None:
    (native, peer), n = (score.kl for score in judge.essay_scores), len(judge.essay)
    report(f"{judge.name}: KL from float32, mean of {n} tokens of text: {native:.2e}; llama.cpp {peer:.2e}")
    assert native < 2e-3
    assert native <= peer


def test_perplexity_is_transformers(judge: Judge, report: Report) -> None:
    assert len(judge.essay) >= 2000
    native, peer = judge.essay_scores
    ours, exact = native.perplexity, native.reference_perplexity
    report(f"{judge.name}: perplexity {ours:.4f}, transformers {exact:.4f}, llama.cpp {peer.perplexity:.4f}")
    assert ours == pytest.approx(exact, rel=0.005)


def test_chunked_prefill_is_token_by_token_decode(judge: Judge) -> None:
    """Bitwise, across the boundaries of chunks, pages and Gemma's window of 512."""
    tokens = judge.essay[:600]
    with closing(open_engine(judge.path, "native", threads=2)) as engine:
        single = engine.session(len(tokens))
        expected = np.stack([single.step(token).copy() for token in tokens]).view(np.uint32)
        for sizes in ((600,), (1, 7, 64, 528), (300, 300)):
            session, at = engine.session(len(tokens)), 0
            for size in sizes:
                got = session.score(tokens[at : at + size]).view(np.uint32)
                assert np.array_equal(got, expected[at : at + size]), f"from {at} on, {size} at once"
                at += size
            session.close()
        last = engine.session(len(tokens)).prefill(tokens).view(np.uint32)
        assert np.array_equal(last, expected[-1])


def test_any_number_of_threads_gives_the_same_logits(judge: Judge) -> None:
    tokens = judge.essay[:96]
    results = []
    for threads in (1, 2, 3):
        engine = open_engine(judge.path, "native", threads=threads)
        session = engine.session(len(tokens) + 8)
        rows = [session.score(tokens), *(session.step(token)[None].copy() for token in tokens[:8])]
        results.append(np.concatenate(rows))
        session.close()
        engine.close()
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
