"""`edgert export DIRECTORY`: checkpoints as transformers saves them, converted and run against transformers
and llama.cpp; tokenizers against the `tokenizers` package; and what a directory can have wrong with it."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_tokenizer
import torch
from cli_process import edgert
from edgert.export.checkpoint import Checkpoint
from edgert.export.gguf_writer import Streamed, write_gguf
from edgert.export.hf_directory import convert
from edgert.export.hf_tokenizer import _GPT2, _LLAMA3, tokenizer_keys
from edgert.export.hf_weights import Weight, encoded
from edgert.models import load_spec
from safetensors.numpy import load_file, save_file
from tiny_models import NAMES, prompt, tiny
from tokenizer_corpus import corpus
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HfTokenizer
from tokenizers.models import BPE, WordPiece
from tokenizers.trainers import BpeTrainer

import edgert as package
from edgert import _native
from edgert.cli import main
from edgert.engines import open_engine
from edgert.errors import EdgertError, ModelFileError, TokenizerError, UnsupportedModelError, UsageError
from edgert.locate import model_path, sidecar_path
from edgert.sidecar import Sidecar
from edgert.tokenizer import Tokenizer

TEXTS = [tiny_tokenizer._TEXT] * 4
SPECIAL = ["<pad>", "<bos>", "<eos>"]
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"


def nothing(_: int) -> None: ...


def steps(_: str, __: int) -> Callable[[int], None]:
    return nothing


def run(directory: Path, quant: str = "f32", output: Path | None = None) -> Path:
    return convert(directory, quant, output, str, steps)


def byte_level(size: int, splits: Sequence[Any] = (), use_regex: bool = True) -> HfTokenizer:
    """A small byte-level BPE tokenizer."""
    tokenizer = HfTokenizer(BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, last]) if splits else last
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS,
        BpeTrainer(vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


def add_tokenizer(directory: Path, tokenizer: HfTokenizer, **settings: Any) -> Path:
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": {"content": "<pad>"}, **settings}
    (directory / "tokenizer_config.json").write_text(json.dumps(named))
    return directory


def save(name: str, directory: Path, **options: Any) -> Path:
    """What `save_pretrained` makes of a tiny model, and a tokenizer of fewer tokens than it has rows."""
    tiny(name).model.save_pretrained(directory, **options)
    return add_tokenizer(directory, byte_level(280), chat_template=CHAT)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("saved"))


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    """A directory to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def spec_of(file: Any) -> Any:
    return load_spec(file.metadata, {t.name: tuple(t.shape) for t in file.tensors}).as_dict() | {"name": ""}


def logits(path: Path, tokens: list[int], engine: str = "native") -> np.ndarray:
    opened = open_engine(path, engine, threads=1)
    try:
        return opened.session(64).score(tokens).copy()
    finally:
        opened.close()


def rms(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


# --- models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_family(name: str, tmp_path: Path) -> None:
    """As float32: the very tensors and the description of the file that tiny_models converts on its own, and
    transformers' logits (keys and values are float16, so 2^-11 grown by a few layers). In 8 bits: nearly."""
    model, directory = tiny(name), save(name, tmp_path)
    path = run(directory)
    assert path == directory / f"{directory.name}.F32.gguf" and path.stat().st_mode & 0o777 == 0o644
    ours, theirs = _native.GgufFile(str(path)), _native.GgufFile(str(model.path))
    assert spec_of(ours) == spec_of(theirs)
    assert {t.name for t in ours.tensors} == {t.name for t in theirs.tensors}
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(ours.dequantize(tensor.name), theirs.dequantize(tensor.name))
    tokens = prompt(model, 40)
    expected = model.logits(tokens)
    assert np.abs(logits(path, tokens) - expected).max() < 5e-3 * np.abs(expected).max()
    int8 = run(directory, "int8", tmp_path / "int8.gguf")
    assert rms(logits(int8, tokens), expected) < 0.08
    kinds = {t.name: t.type for t in _native.GgufFile(str(int8)).tensors}
    for tensor in theirs.tensors:
        matrix = len(tensor.shape) == 2 and "shortconv.conv" not in tensor.name
        kind = "F32" if not matrix else "F16" if tensor.shape[1] % 32 else "Q8_0"
        assert kinds[tensor.name] == kind, tensor.name


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2", "qwen3", "gemma3", "lfm2"])
def test_llama_cpp_runs_it(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    path = run(save(name, tmp_path), "int8")
    tokens = prompt(tiny(name), 24)
    assert rms(logits(path, tokens), logits(path, tokens, "llamacpp")) < 0.08


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints(dtype: torch.dtype, directory: Path) -> None:
    weights = {
        k: torch.from_numpy(v).to(dtype) for k, v in load_file(directory / "model.safetensors").items()
    }
    from safetensors.torch import save_file as save_torch

    save_torch(weights, directory / "model.safetensors")
    file = _native.GgufFile(str(run(directory)))
    np.testing.assert_array_equal(
        file.dequantize("token_embd.weight"), weights["model.embed_tokens.weight"].float().numpy()
    )
    np.testing.assert_array_equal(
        file.dequantize("blk.1.ffn_norm.weight"),
        weights["model.layers.1.post_attention_layernorm.weight"].float().numpy(),
    )


@pytest.mark.parametrize(("quant", "kind", "error"), [("f16", "F16", 1e-3), ("int4", "Q4_0", 0.12)])
def test_other_types(quant: str, kind: str, error: float, directory: Path) -> None:
    path = run(directory, quant)
    assert path.name == f"model.{kind}.gguf"
    file = _native.GgufFile(str(path))
    assert {t.name: t.type for t in file.tensors}["blk.0.ffn_down.weight"] == kind
    expected = load_file(directory / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert rms(file.dequantize("blk.0.ffn_down.weight"), expected) < error


def test_shards_give_the_same_file(saved: Path, tmp_path: Path) -> None:
    sharded = save("llama", tmp_path / "sharded", max_shard_size="300KB")
    assert len(list(sharded.glob("model-*-of-*.safetensors"))) > 2
    paths = [run(d, "int8", tmp_path / f"{d.name}.gguf") for d in (saved, sharded)]
    files = [_native.GgufFile(str(p)) for p in paths]
    for tensor in files[0].tensors:
        np.testing.assert_array_equal(*(f.dequantize(tensor.name) for f in files))


def test_what_other_checkpoints_store_besides_is_left_out(directory: Path) -> None:
    """A tied head stored all the same, and the frequencies of rope."""
    first = run(directory).read_bytes()
    path = directory / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(weights, path)
    assert run(directory).read_bytes() == first


def test_layers_of_gemma_in_another_pattern(tmp_path: Path) -> None:
    directory = save("gemma3", tmp_path)
    change(
        directory, "config.json", layer_types=["full_attention", "sliding_attention"] * 3 + ["full_attention"]
    )
    file = _native.GgufFile(str(run(directory)))
    assert [layer["window"] for layer in spec_of(file)["layers"]] == [0, 11, 0, 11, 0, 11, 0]


def test_memory_does_not_hold_a_tensor(tmp_path: Path) -> None:
    """64 MB of float32, converted within a quarter of that."""
    save_file({"x": np.ones((16384, 1024), np.float32)}, tmp_path / "model.safetensors")
    weight = Weight("x", "x", "Q8_0", (16384, 1024), 0, 0.0)
    tracemalloc.start()
    with Checkpoint(tmp_path) as checkpoint, ThreadPoolExecutor(2) as pool:
        parts = encoded(weight, checkpoint, pool, nothing)
        tensor = Streamed("x", "Q8_0", weight.shape, lambda: parts)
        write_gguf(tmp_path / "x.gguf", {}, [tensor])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 48e6
    assert (tmp_path / "x.gguf").stat().st_size > 16384 * 1024


# --- the writer --------------------------------------------------------------------------------------


def test_every_kind_of_value_reads_back(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "yes": True,
        "number": 0.5,
        "texts": ["a", "", "ä"],
        "integers": [3, -1],
        "numbers": [0.25, -2.0],
        "flags": [True, False],
        "empty": [],
    }
    write_gguf(tmp_path / "x.gguf", values, [])
    found = _native.GgufFile(str(tmp_path / "x.gguf")).metadata
    assert found == values and [type(v) for v in found.values()] == [type(v) for v in values.values()]


def test_a_stream_of_the_wrong_length_is_refused(tmp_path: Path) -> None:
    short = Streamed("x", "F32", (4,), lambda: [np.zeros(12, np.uint8)])
    with pytest.raises(ValueError, match="x: expected 16 bytes of F32, found 12"):
        write_gguf(tmp_path / "x.gguf", {}, [short])
    assert list(tmp_path.iterdir()) == []


# --- tokenizers --------------------------------------------------------------------------------------


def keys_of(directory: Path, size: int = 320, ends: Sequence[int] = (2,), family: str = "llama") -> Any:
    return tokenizer_keys(directory, size, ends, family, str)


def llama3_split(digits: str) -> Any:
    return pre_tokenizers.Split(Regex(_LLAMA3 % digits), "isolated")


@pytest.mark.parametrize(
    ("pre", "family", "tokenizer"),
    [
        ("gpt-2", "llama", lambda: byte_level(320)),
        ("smollm", "llama", lambda: byte_level(320, [pre_tokenizers.Digits(True)])),
        ("llama-bpe", "llama", lambda: byte_level(320, [llama3_split("{1,3}")], False)),
        ("lfm2", "lfm2", lambda: byte_level(320, [llama3_split("{1,3}")], False)),
        ("qwen2", "qwen2", lambda: byte_level(320, [llama3_split("")], False)),
        ("gpt-2", "llama", lambda: byte_level(320, [pre_tokenizers.Split(Regex(_GPT2), "isolated")], False)),
    ],
)
def test_byte_level_tokenizers(
    pre: str, family: str, tokenizer: Callable[[], HfTokenizer], tmp_path: Path
) -> None:
    original = tokenizer()
    original.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    keys = keys_of(add_tokenizer(tmp_path, original), 330, family=family)
    assert keys["tokenizer.ggml.pre"] == pre
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.padding_token_id"]) == (1, 0)
    assert keys["tokenizer.ggml.tokens"][325] == "[PAD325]" and keys["tokenizer.ggml.token_type"][325] == 5
    ours = Tokenizer.from_gguf(keys)
    for text in [*corpus(400), "a <tool> b<eos>"]:
        assert ours.encode(text, parse_special=True) == original.encode(text).ids, text
    assert ours.decode(ours.encode("naïve Größe 12")) == "naïve Größe 12"


def sentencepiece(size: int, prefix: bool) -> HfTokenizer:
    """BPE with byte fallback whose merges are all pairs that make a piece, as converters of SentencePiece
    models write them."""
    steps = [normalizers.Replace(" ", "▁")]
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if prefix else steps)
    trained = HfTokenizer(BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    names = ["<unk>", "<bos>", "<eos>", *(f"<0x{b:02X}>" for b in range(256))]
    trained.train_from_iterator(TEXTS, BpeTrainer(vocab_size=size, special_tokens=names, show_progress=False))
    vocab = trained.get_vocab()
    pieces = sorted(vocab, key=lambda piece: vocab[piece])
    merges = [
        (p[:i], p[i:]) for p in pieces[259:] for i in range(1, len(p)) if {p[:i], p[i:]} <= vocab.keys()
    ]
    tokenizer = HfTokenizer(
        BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(["<unk>", "<bos>", "<eos>"])
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    return tokenizer


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizers(prefix: bool, tmp_path: Path) -> None:
    original = sentencepiece(380, prefix)
    keys = keys_of(add_tokenizer(tmp_path, original, pad_token=None), 380)
    assert keys["tokenizer.ggml.model"] == "llama" and keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.ggml.add_space_prefix"] is prefix
    assert keys["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    ours = Tokenizer.from_gguf(keys)
    for text in [*corpus(400), "a <eos> b<bos>"]:
        assert ours.encode(text, parse_special=True) == original.encode(text).ids, text


def test_ends_of_a_generation(tmp_path: Path) -> None:
    """Those the file names by id, and two more; a third is more than GGUF has names for."""
    directory = add_tokenizer(tmp_path, byte_level(320))
    assert Tokenizer.from_gguf(keys_of(directory, ends=[2, 40, 41])).eos_ids == {2, 40, 41}
    with pytest.raises(TokenizerError, match=r"ends at \[40, 41, 42\]"):
        keys_of(directory, ends=[40, 41, 42])
    (directory / "tokenizer_config.json").unlink()
    assert keys_of(directory, ends=[40, 41])["tokenizer.ggml.eos_token_id"] == 40


def test_where_chat_templates_are_found(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "one"}]
    directory = add_tokenizer(tmp_path, byte_level(300), chat_template=several)
    assert keys_of(directory)["tokenizer.chat_template"] == "one"
    (directory / "chat_template.jinja").write_text(CHAT)
    ours = Tokenizer.from_gguf(keys_of(directory))
    assert (
        ours.decode(ours.apply_chat_template([{"role": "user", "content": "Hi"}]), False) == "<|user|>Hi<eos>"
    )
    (directory / "chat_template.jinja").unlink()
    for wrong in (7, "\ud800"):
        add_tokenizer(tmp_path, byte_level(300), chat_template=wrong)
        with pytest.raises(ModelFileError, match=r"chat_template: expected text, found (7|'.ud800')"):
            keys_of(directory)


def test_tokens_without_a_row_are_left_out_and_said(tmp_path: Path) -> None:
    lines: list[str] = []
    tokenizer = byte_level(300)
    tokenizer.add_special_tokens(["<image>"])
    keys = tokenizer_keys(add_tokenizer(tmp_path, tokenizer), 300, [2], "llama", lines.append)
    assert "<image>" not in keys["tokenizer.ggml.tokens"]  # type: ignore[operator]
    assert lines[0].endswith("<image> have no row in the model and are left out")
    with pytest.raises(TokenizerError, match=r"token 29., .* has no row in the model, which has 290"):
        keys_of(tmp_path, 290)


def lowercased() -> HfTokenizer:
    tokenizer = byte_level(300)
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def stripping() -> HfTokenizer:
    tokenizer = byte_level(300)
    tokenizer.add_special_tokens([AddedToken("<greedy>", lstrip=True, rstrip=True)])
    return tokenizer


def two_after() -> HfTokenizer:
    tokenizer = byte_level(300)
    tokenizer.post_processor = processors.TemplateProcessing("$A <eos> <eos>", special_tokens=[("<eos>", 2)])
    return tokenizer


def no_bytes() -> HfTokenizer:
    return HfTokenizer(BPE(vocab={"a": 0, "<unk>": 1}, merges=[], byte_fallback=True, unk_token="<unk>"))


def prefixed() -> HfTokenizer:
    tokenizer = byte_level(300)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (lowercased, "cannot be expressed faithfully in GGUF: "),
        (stripping, "cannot be expressed faithfully in GGUF: 'a <greedy> b"),
        (two_after, "special tokens around a text"),
        (no_bytes, "expected tokens for all 256 bytes, found 0"),
        (prefixed, "unknown pre-tokenizer ByteLevel"),
        (lambda: byte_level(300, [pre_tokenizers.Whitespace()]), "unknown pre-tokenizer Whitespace then"),
        (lambda: HfTokenizer(WordPiece({"a": 0}, unk_token="a")), "model.type 'WordPiece'"),
        (
            lambda: HfTokenizer(BPE(vocab={"a": 0}, merges=[], end_of_word_suffix="</w>")),
            "model.end_of_word_suffix = '</w>'",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_expressed(
    tokenizer: Callable[[], HfTokenizer], message: str, tmp_path: Path
) -> None:
    add_tokenizer(tmp_path, tokenizer(), bos_token=None, eos_token=None, pad_token=None)
    with pytest.raises(TokenizerError) as caught:
        keys_of(tmp_path)
    assert message in str(caught.value) and "use a GGUF file of this model" in str(caught.value)


# --- damage ------------------------------------------------------------------------------------------


def change(directory: Path, file: str, **values: Any) -> None:
    path = directory / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


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


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture
def few_states(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"FIT_MAIN": 60, "FIT_OTHER": 30, "HELD_MAIN": 30, "HELD_OTHER": 10, "OWN_FIT": 3, "OWN_HELD": 2}
    for name, size in sizes.items():
        monkeypatch.setattr(f"edgert.export.flash_head.{name}", size)


def test_export_of_a_directory_with_a_head(
    directory: Path, few_states: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(directory), "--flash-head", "--agreement", "0.9", "--seed", "1"]) == 0
    base = directory / "model.Q8_0.gguf"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{base}: 0.") and lines[1].startswith(f"{sidecar_path(base)}: ")
    assert Sidecar(sidecar_path(base), base).quality["agreement"] >= 0.9
    with package.load(directory) as model:
        assert model.head == "flash"
        assert model.chat([{"role": "user", "content": "Hi"}], max_tokens=3).stats.prompt_tokens > 3


def test_export_says_what_it_wrote(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.gguf"
    assert main(["export", str(directory), "--quant", "int4", "-o", str(path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"path": str(path), "quant": "int4", "bytes": path.stat().st_size}
    assert not list(directory.glob("*.gguf"))


def test_the_command_as_a_process(directory: Path) -> None:
    done = edgert("export", directory, "--quant", "f16")
    assert done.returncode == 0 and done.stdout.endswith("MB, f16\n"), done.stderr
    done = edgert("run", directory, "The river", "--max-tokens", 4)
    assert done.returncode == 0 and done.stdout.strip()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{gguf}", "--quant", "int8"], "--quant is for a Hugging Face model directory"),
        (["smollm2-135m", "--quant", "int8"], "--quant is for a Hugging Face model directory"),
        (["{gguf}"], "nothing to export; add --flash-head, or give a Hugging Face model directory"),
        (["{dir}", "--quant", "int3"], "invalid choice: 'int3'"),
        (["{dir}", "-o", "{dir}/no/x.gguf"], "no such directory"),
        (["{dir}", "-o", "{dir}/model.safetensors"], "expected the name of a .gguf file"),
    ],
)
def test_wrong_use(words: list[str], says: str, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {"dir": directory, "gguf": tiny("llama").path}
    assert main(["export", *(word.format(**paths) for word in words)]) == 2
    assert says in capsys.readouterr().err


def test_a_directory_is_the_one_model_in_it(directory: Path) -> None:
    with pytest.raises(
        UsageError, match=rf"is a directory; give a \.gguf file; `edgert export {directory}` makes"
    ):
        model_path(directory)
    path = run(directory)
    (directory / "model.F32.edgert.gguf").touch()
    assert model_path(directory) == model_path(str(directory)) == path
    (directory / "other-00002-of-00002.gguf").touch()
    assert model_path(directory) == path
    (directory / "other-00001-of-00002.gguf").touch()
    with pytest.raises(UsageError, match=r"give the file itself, such as .*model\.F32\.gguf"):
        model_path(directory)
