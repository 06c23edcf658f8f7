"""What a Hugging Face directory can have wrong with it: a typed error that names it."""

from __future__ import annotations

import contextlib
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgert.export.hf_directory import convert
from hf_files import (
    change,
    run,
    save,
)
from safetensors.numpy import load_file, save_file

from edgert.errors import EdgertError, ModelFileError, TokenizerError, UnsupportedModelError, UsageError


def change_weights(directory: Path, **values: np.ndarray | None) -> None:
    path = directory / "model.safetensors"
    weights = {**load_file(path), **{k.replace("__", "."): v for k, v in values.items()}}
    save_file({k: v for k, v in weights.items() if v is not None}, path)


def change_header(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def cut(directory: Path, size: int) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])


def header_length(directory: Path, length: int) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])


def index(directory: Path, text: str) -> None:
    (directory / "model.safetensors").rename(directory / "part.safetensors")
    (directory / "model.safetensors.index.json").write_text(text)


NORM = "model.norm.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], type[EdgertError], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), UsageError, "has no config.json"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), ModelFileError, "is not JSON"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), ModelFileError, "found list"),
    "config too deep": (lambda d: (d / "config.json").write_text("[" * 99999), ModelFileError, "is not JSON"),
    "family": (lambda d: change(d, "config.json", model_type="phi3"), UnsupportedModelError, "'phi3'"),
    "no size": (
        lambda d: change(d, "config.json", hidden_size=None),
        ModelFileError,
        "hidden_size is missing",
    ),
    "shape": (
        lambda d: change(d, "config.json", vocab_size=16000000),
        ModelFileError,
        r"embed_tokens.weight: expected shape \[16000000, 96\] by config.json, found \[301, 96\]",
    ),
    "ends": (
        lambda d: change(d, "generation_config.json", eos_token_id=[2, 999]),
        ModelFileError,
        "eos_token_id: expected token ids below 301",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ModelFileError, "save_pretrained"),
    "empty": (lambda d: cut(d, 0), ModelFileError, "header length: expected 2 to 0 bytes in a file of 0"),
    "header cut": (lambda d: cut(d, 100), ModelFileError, "header length"),
    "data cut": (lambda d: cut(d, 200_000), ModelFileError, "found the end at 200000; .*download it again"),
    "a byte short": (
        lambda d: cut(d, (d / "model.safetensors").stat().st_size - 1),
        ModelFileError,
        "incomplete",
    ),
    "too long": (
        lambda d: (d / "model.safetensors").open("ab").write(b"1234"),
        ModelFileError,
        "found 4 bytes more",
    ),
    "absurd header": (lambda d: header_length(d, 2**60), ModelFileError, "found 1152921504606846976"),
    "header of no JSON": (lambda d: header_length(d, 50), ModelFileError, "header is not JSON"),
    "dtype unknown": (
        lambda d: change_header(d, lambda h: h[NORM].update(dtype="F31")),
        ModelFileError,
        "norm.weight: expected a dtype, one of F32, F16, BF16, found 'F31'",
    ),
    "dtype of other size": (
        lambda d: change_header(d, lambda h: h[NORM].update(dtype="F16")),
        ModelFileError,
        "expected 192 bytes for F16",
    ),
    "dtype not for weights": (
        lambda d: change_weights(d, model__norm__weight=np.ones(96, np.int32)),
        UnsupportedModelError,
        "model.norm.weight is I32; expected F32, F16, BF16",
    ),
    "shape negative": (
        lambda d: change_header(d, lambda h: h[NORM].update(shape=[-96])),
        ModelFileError,
        "expected a shape",
    ),
    "shape absurd": (
        lambda d: change_header(d, lambda h: h[NORM].update(shape=[2**62, 2**62])),
        ModelFileError,
        "expected 8507",
    ),
    "offsets of text": (
        lambda d: change_header(d, lambda h: h[NORM].update(data_offsets=["0", "9"])),
        ModelFileError,
        "two data_offsets",
    ),
    "overlap": (
        lambda d: change_header(d, lambda h: h[NORM].update(data_offsets=[0, 384])),
        ModelFileError,
        "overlap|bytes of no tensor",
    ),
    "offsets out of range": (
        lambda d: change_header(d, lambda h: h[NORM].update(data_offsets=[2**50, 2**50 + 384])),
        ModelFileError,
        "bytes of no tensor|data up to",
    ),
    "entry is no table": (
        lambda d: change_header(d, lambda h: h.update({NORM: 7})),
        ModelFileError,
        "expected a dtype",
    ),
    "tensor missing": (
        lambda d: change_weights(d, model__layers__1__mlp__up_proj__weight=None),
        ModelFileError,
        "lacks 1 tensors of this llama model: model.layers.1.mlp.up_proj.weight",
    ),
    "tensor unknown": (
        lambda d: change_weights(d, model__layers__0__self_attn__q_proj__bias=np.ones(96, np.float32)),
        UnsupportedModelError,
        "tensors not implemented for llama: model.layers.0.self_attn.q_proj.bias",
    ),
    "tensor of other shape": (
        lambda d: change_weights(d, model__norm__weight=np.ones(95, np.float32)),
        ModelFileError,
        r"expected shape \[96\] by config.json, found \[95\]",
    ),
    "not a number": (
        lambda d: change_weights(d, model__norm__weight=np.full(96, np.nan, np.float32)),
        ModelFileError,
        "found NaN or infinity; the weights are damaged",
    ),
    "too large a value": (
        lambda d: change_weights(d, model__embed_tokens__weight=np.full((301, 96), 1e9, np.float32)),
        ModelFileError,
        "found 1e\\+09; use --quant f32",
    ),
    "index without its files": (
        lambda d: index(d, '{"weight_map": {"model.norm.weight": "gone.safetensors"}}'),
        ModelFileError,
        "cannot read .*gone.safetensors",
    ),
    "index out of the directory": (
        lambda d: index(d, '{"weight_map": {"model.norm.weight": "../x.safetensors"}}'),
        ModelFileError,
        "names of .safetensors files beside it",
    ),
    "index of nothing": (lambda d: index(d, "{}"), ModelFileError, "weight_map"),
    "index of another model": (
        lambda d: index(d, '{"weight_map": {"model.norm": "part.safetensors"}}'),
        ModelFileError,
        "model.norm: expected it in this file",
    ),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), ModelFileError, "has no tokenizer.json"),
    "tokenizer of nothing": (lambda d: (d / "tokenizer.json").write_text("{}"), ModelFileError, "damaged"),
    "name of no token": (
        lambda d: change(d, "tokenizer_config.json", pad_token="<gone>"),
        TokenizerError,
        "names '<gone>' as pad_token",
    ),
    "scale of attention": (
        lambda d: save("gemma3", d) and change(d, "config.json", query_pre_attn_scalar=7),
        UnsupportedModelError,
        "GGUF cannot express attn_scale",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case: str, directory: Path) -> None:
    spoil, error, message = DAMAGE[case]
    spoil(directory)
    before = sorted(directory.iterdir())
    with pytest.raises(error, match=message) as caught:
        run(directory, "int8")
    assert sorted(directory.iterdir()) == before
    if isinstance(caught.value, ModelFileError):
        assert caught.value.path.startswith(str(directory)) and caught.value.field


def test_windows_that_gguf_has_no_key_for(tmp_path: Path) -> None:
    directory = save("qwen2", tmp_path)
    change(directory, "config.json", use_sliding_window=True, sliding_window=32, max_window_layers=1)
    change(directory, "config.json", layer_types=None)
    with pytest.raises(UnsupportedModelError, match=r"GGUF cannot express this model: qwen2.attention.slid"):
        run(directory)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_random_damage_raises_typed_errors_or_nothing(file: str, directory: Path) -> None:
    rng, path = random.Random(1), directory / file
    data = path.read_bytes()
    reach = 3000 if file == "model.safetensors" else len(data)
    for _ in range(40):
        spoilt = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(min(reach, len(spoilt)))
            spoilt[at : at + rng.randint(0, 2)] = bytes(
                rng.choice(b'0127-{}[]",:e\\xff') for _ in range(rng.randint(0, 3))
            )
        path.write_bytes(spoilt)
        with contextlib.suppress(EdgertError):
            run(directory)


def test_interrupted_it_leaves_what_was_there(directory: Path) -> None:
    first = run(directory).read_bytes()
    before = sorted(directory.iterdir())
    written = 0

    def stop(_: str, total: int) -> Callable[[int], None]:
        def progress(n: int) -> None:
            nonlocal written
            written += n
            if written > total // 2:
                raise KeyboardInterrupt

        return progress

    for output in (None, directory / "other.gguf"):
        written = 0
        with pytest.raises(KeyboardInterrupt):
            convert(directory, "f32", output, str, stop)
        assert sorted(directory.iterdir()) == before
    assert (directory / "model.F32.gguf").read_bytes() == first
