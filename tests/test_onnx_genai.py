"""onnxruntime-genai runs an exported directory and gives the tokens of the graph itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from edgert.export.onnx_directory import Request, export_directory
from onnx_runs import Run
from tiny_models import prompt, tiny

genai = pytest.importorskip("onnxruntime_genai")


def nothing(*_: Any) -> Any:
    return lambda n: None


@pytest.mark.parametrize(
    ("name", "kv"),
    [("llama", "f32"), ("qwen2", "f32"), ("qwen3", "f16"), ("gemma3", "f32"), ("gemma3", "f16")],
)
def test_greedy_tokens_are_those_of_the_graph(tmp_path: Path, name: str, kv: str) -> None:
    request = Request(tiny(name).path, "int4", 90, kv=kv)
    target = export_directory(request, tmp_path / "out", nothing, nothing, nothing)
    tokens = prompt(tiny(name), 20)
    run, expected = Run(target / "model.onnx"), list(tokens)
    expected.append(int(run(tokens, 0)[0][0, -1].argmax()))
    while len(expected) < 50:
        expected.append(int(run(expected[-1:], len(expected) - 1)[0][0, -1].argmax()))
    model = genai.Model(str(target))
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=50, do_sample=False)
    generator = genai.Generator(model, options)
    generator.append_tokens(tokens)
    found = list(tokens)
    while not generator.is_done() and len(found) < 50:
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    assert found == expected[: len(found)]
    ends = json.loads((target / "edgert.json").read_text())["tokenizer"]["eos_ids"]
    assert len(found) == 50 or found[-1] in ends
