"""Exact attention on tiny models of every family: the core's tokens and caches are, to the bit, those of full
attention, whatever sparse steps left there before."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_process import edgert as command
from edgert.export.gguf_writer import write_gguf
from edgert.models import FAMILIES
from flash_files import parts
from tiny_models import kv_types, prompt, tiny

from edgert import _native
from edgert.attention import choose_budget
from edgert.engines import native_spec
from edgert.engines.native import NativeEngine
from edgert.heads import LONGEST, choose_sidecar
from edgert.locate import sidecar_path
from edgert.model import Model
from edgert.tier import IN_MEMORY, Tier
from edgert.tokenizer import Tokenizer

BUDGET = 8  # so few that drafts are often wrong
CONTEXT = 2048
LENGTHS = [250, 380, 640, 895]  # the index of a block is made at 384, 640 and 896 tokens
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 0.8, "seed": 4},
    "filtered": {"temperature": 1.0, "seed": 5, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    "logprobs": {"logprobs": 2, "temperature": 0.7, "seed": 9},
    "bias": {"logit_bias": {7: 3.0, 9: -math.inf}, "temperature": 0.5, "seed": 1},
    "allowed": {"allowed": list(range(40, 120)), "temperature": 1.0, "seed": 2},
}


def open_model(base: Path, kv: str, head: str, attention: str, tier: Tier = IN_MEMORY) -> Model:
    """As ``load`` does, with a context that is longer than tiny models were made for."""
    chosen = choose_budget(attention, BUDGET if attention == "exact" else 0, "native")
    file = _native.GgufFile(str(base))
    sidecar = choose_sidecar(str(base), head, "native")
    engine = NativeEngine(file, native_spec(file, file.metadata), 2, sidecar, 0, kv, chosen, tier)
    return Model(
        engine,
        Tokenizer.from_gguf(file.metadata),
        path=str(base),
        context=CONTEXT,
        trained_context=CONTEXT,
        kv=kv,
        head=head,
        attention=attention,
        chosen=chosen,
    )


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_full_pass_over_drafts_leaves_the_cache_that_was_never_drafted_in(name: str) -> None:
    """Keys, values, index, windows and convolutions: blocks of every length are drafted with the tokens that
    are kept or with others, over the places where an index is made."""
    made = tiny(name)
    model = _native.Model(_native.GgufFile(str(made.path)), made.spec.as_dict(), 2)
    tokens, other = (np.array(prompt(made, CONTEXT, seed), dtype=np.int32) for seed in (0, 1))
    for kv in kv_types(name):
        plain, pure = _native.Cache(model, CONTEXT, kv), _native.Cache(model, CONTEXT, kv, BUDGET)
        cache = _native.Cache(model, CONTEXT, kv, BUDGET)
        for c in (plain, pure, cache):
            model.forward(c, tokens[:370], full=True)
        differ, at = 0, 370
        for i in range(40):
            length = 1 + (5 * i) % LONGEST
            block = tokens[at : at + length]
            source = tokens if i % 2 else other
            drafts = np.array([model.hidden(cache, source[p : p + 1])[0] for p in range(at, at + length)])
            assert cache.rewind(at) == at
            states = model.hidden(cache, block, full=True)
            # One by one, as full attention decodes; and once without drafts in a cache of the same kind.
            wanted = np.array([model.hidden(plain, block[p : p + 1])[0] for p in range(length)])
            assert np.array_equal(states, wanted)
            assert np.array_equal(states, model.hidden(pure, block, full=True))
            differ += i % 2 and not np.array_equal(states, drafts)
            kept = length - i % 3 if length > 3 else length
            for c in (plain, pure, cache):
                c.rewind(at + kept)
            at += kept
        assert differ > 10, "sparse steps should differ from full ones"
        # What later steps read is the same too, the index among it.
        assert at > 640
        steps = [
            np.array([model.forward(c, tokens[p : p + 1]) for p in range(at, at + 30)]) for c in (pure, cache)
        ]
        assert np.array_equal(*steps)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_tokens_are_those_of_full_attention(name: str) -> None:
    path = tiny(name).path
    for kv in kv_types(name):
        full, exact = (open_model(path, kv, "dense", attention) for attention in ("full", "exact"))
        rejected = 0
        with full, exact, full.session() as one, exact.session() as other:
            for i, (length, options) in enumerate(zip(LENGTHS * 2, OPTIONS.values(), strict=False)):
                ids = prompt(tiny(name), length, i)
                wanted = one.generate(ids, max_tokens=64, **options)
                reply = other.generate(ids, max_tokens=64, **options)
                assert (reply.tokens, reply.logprobs) == (wanted.tokens, wanted.logprobs)
                assert reply.finish_reason == wanted.finish_reason
                rejected += reply.stats.drafts - reply.stats.agreed
                # The session goes on from what it holds, and is the cache of a fresh prompt to the bit.
                longer = [*ids, *reply.tokens, 1]
                kept, reused = other.prefill(longer, lambda: False)
                assert reused >= length + len(reply.tokens) - 1
                assert np.array_equal(kept, one.prefill(longer, lambda: False)[0])
        assert rejected > 5, "drafts of so small a budget should often be wrong"


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2"])
@pytest.mark.parametrize("head", ["flash", "exact"])
def test_with_a_flash_head_too(name: str, head: str, tmp_path: Path) -> None:
    """One verification serves both; of the exact head the tokens are the dense head's."""
    base = tmp_path / "model.gguf"
    shutil.copy(tiny(name).path, base)
    write_gguf(sidecar_path(base), *parts(base))
    full = open_model(base, "f16", "dense" if head == "exact" else head, "full")
    exact = open_model(base, "f16", head, "exact")
    with full, exact:
        for length, options in zip(LENGTHS * 2, OPTIONS.values(), strict=False):
            ids = prompt(tiny(name), length)
            wanted = full.generate(ids, max_tokens=40, **options)
            reply = exact.generate(ids, max_tokens=40, **options)
            assert (reply.tokens, reply.logprobs) == (wanted.tokens, wanted.logprobs)


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2"])
def test_with_keys_and_values_on_the_disk(name: str, tmp_path: Path) -> None:
    """Drafts read what is in memory, blocks all that there is; going back brings pages back from the disk."""
    path, slots = tiny(name).path, 70
    full = open_model(path, "f16", "dense", "full")
    exact = open_model(path, "f16", "dense", "exact", Tier(slots, str(tmp_path)))
    with full, exact, exact.session() as session:
        for i, (length, options) in enumerate(zip([1500, 1900, 1300], OPTIONS.values(), strict=False)):
            ids = prompt(tiny(name), length, i // 2)
            reply = session.generate(ids, max_tokens=100, **options)
            assert reply.tokens == full.generate(ids, max_tokens=100, **options).tokens
        tier = session._sequence.tier
        assert tier["bytes_written"] > 0 < tier["sections_read"]


def test_a_saved_session_is_of_full_attention(tmp_path: Path) -> None:
    path, ids = tiny("lfm2").path, prompt(tiny("lfm2"), 640)
    full, exact = (open_model(path, "f16", "dense", attention) for attention in ("full", "exact"))
    with full, exact:
        with exact.session() as session:
            reply = session.generate(ids, max_tokens=30)
            session.save(tmp_path / "saved")
        with exact.session() as session:
            session.restore(tmp_path / "saved")
            again = session.generate([*ids, *reply.tokens], max_tokens=30)
        assert again.stats.reused_tokens >= len(ids) + len(reply.tokens) - 1
        assert reply.tokens + again.tokens == full.generate(ids, max_tokens=60).tokens


def test_the_command_line() -> None:
    path = str(tiny("llama").path)
    text = "a " * 80
    results = []
    for attention in ("full", "exact"):
        budget = ["--budget", "8"] if attention == "exact" else []
        done = command("run", path, text, "--attention", attention, *budget, "--max-tokens", "40", "--json")
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    assert results[0]["tokens"] == results[1]["tokens"]
    plain, stats = (result["stats"] for result in results)
    assert "drafts" not in plain
    assert stats["drafts"] >= stats["agreed"] > 0 < stats["passes"]
    assert stats["agreed"] + stats["passes"] == stats["generated_tokens"] - 1
    done = command("run", path, text, "--attention", "exact", "--max-tokens", "20")
    assert "drafts agreed" in done.stderr
    done = command("plan", path, "--attention", "exact", "--budget", "32")
    assert "exact attention, drafts read 32 tokens" in done.stdout
