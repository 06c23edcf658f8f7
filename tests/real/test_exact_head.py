"""The exact head on real weights: the dense head's tokens, whatever the sidecar is worth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import real_model
from edgert.export.flash_head import Request, export_flash_head
from judge import DATA

from edgert.model import load

TOKENS, SEQUENCES = 128, 200
pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module", params=["smollm2-135m", "gemma-3-270m"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A link to the model, with a sidecar made for it beside it."""
    link = tmp_path_factory.mktemp("model") / "model.gguf"
    link.symlink_to(real_model(request.param))
    export_flash_head(link, Request(), None, print, lambda what, total: lambda n: None)
    return link


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_exact_is_dense(base: Path, temperature: float) -> None:
    prompts = [json.loads(line)["text"] for line in (DATA / "prompts.jsonl").read_text().splitlines()]
    essay = (DATA / "essay.txt").read_text().split(". ")
    prompts = (prompts + essay)[:SEQUENCES]
    with load(base, head="dense", context=1024) as dense, load(base, head="exact", context=1024) as exact:
        for i in range(SEQUENCES):
            options = {"max_tokens": TOKENS, "temperature": temperature, "seed": i}
            prompt = dense.encode(prompts[i % len(prompts)])[: 64 + i // len(prompts)]
            wanted, found = dense.generate(prompt, **options), exact.generate(prompt, **options)
            assert found.tokens == wanted.tokens, f"sequence {i}"
