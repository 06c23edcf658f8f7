"""A Hugging Face tokenizer (``tokenizer.json`` and what lies beside it) as GGUF's tokenizer keys.

Two kinds can be written: byte-level BPE ("gpt2": tokens, merges and the name of a pre-tokenizer) and BPE over
characters with byte fallback, as SentencePiece makes it ("llama": tokens and scores; the earlier a piece is
merged, the higher its score). What is written is then read as the runtime reads it and compared with the
original on text of many kinds; a tokenizer that gives other ids is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgert.export.checkpoint import read_json
from edgert.export.gguf_writer import Value
from edgert.export.hf_tokenizer_check import compare
from tokenizers import Tokenizer as HfTokenizer

from edgert.errors import ModelFileError, TokenizerError
from edgert.tokenizer import Tokenizer
from edgert.tokenizer_spm import SPACE
from edgert.tokenizer_vocab import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The expressions of a byte-level pre-tokenizer -> its name in GGUF.
_PRE = {
    (_GPT2,): "gpt-2",
    (r"\p{N}", _GPT2): "smollm",
    (_LLAMA3 % "{1,3}",): "llama-bpe",
    (_LLAMA3 % "",): "qwen2",
}


def tokenizer_keys(
    directory: Path, vocab_size: int, ends: Sequence[int], family: str, note: Callable[[str], None]
) -> dict[str, Value]:
    """The ``tokenizer.*`` keys of the model in ``directory``, whose embedding has ``vocab_size`` rows and
    whose generation stops at the ids ``ends``. Raises ModelFileError for a file that is missing or damaged,
    TokenizerError for a tokenizer that GGUF or edgert cannot express."""
    path = directory / "tokenizer.json"
    if not path.exists():
        raise ModelFileError(
            f"{directory} has no tokenizer.json; download it, or make it with transformers: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)",
            str(path),
            -1,
            "tokenizer.json",
        )
    data = read_json(path, "tokenizer.json")
    try:
        original = HfTokenizer.from_file(str(path))
    except Exception as error:  # the library has no type of its own
        raise ModelFileError(
            f"{path}: {error}; the file is damaged, download it again", str(path), 0, "tokenizer"
        ) from error
    original.no_truncation()
    original.no_padding()
    settings_path = directory / "tokenizer_config.json"
    settings = read_json(settings_path, "tokenizer_config.json") if settings_path.exists() else {}
    writer = _Keys(path, data, original, vocab_size)
    keys = writer.model(family)
    keys |= writer.special(settings, ends)
    template = _chat_template(directory, settings)
    if template is not None:
        keys["tokenizer.chat_template"] = template
    if writer.without_row:
        note(f"{path}: {', '.join(writer.without_row)} have no row in the model and are left out")
    if _composes(data):
        note(f"{path}: characters are not composed (NFC) first; text in decomposed form gets other tokens")
    tokenizer = writer.with_ends(keys, ends)
    compare(path, original, tokenizer, _composes(data))
    return keys


class _Keys:
    def __init__(self, path: Path, data: Mapping[str, Any], original: HfTokenizer, vocab_size: int) -> None:
        self._path, self._original, self._size = path, original, vocab_size
        self._model: Mapping[str, Any] = data["model"]
        self._data = data
        self._ids: dict[str, int] = original.get_vocab(with_added_tokens=True)
        self._added: dict[int, Any] = original.get_added_tokens_decoder()
        self._pieces: list[str | None] = [None] * vocab_size
        self.without_row = []
        for piece, i in self._ids.items():
            if i < vocab_size:
                self._pieces[i] = piece
            elif i in self._added:
                self.without_row.append(piece)
            else:
                raise TokenizerError(
                    f"{path}: token {i}, {piece!r:.60}, has no row in the model, which has {vocab_size}; "
                    "use the tokenizer.json that belongs to these weights"
                )

    def _unsupported(self, what: str) -> TokenizerError:
        return TokenizerError(
            f"{self._path}: {what}; edgert converts byte-level BPE and SentencePiece BPE with byte fallback: "
            "use a GGUF file of this model instead"
        )

    def model(self, family: str) -> dict[str, Value]:
        kind = self._model.get("type", "BPE")
        if kind != "BPE":
            raise self._unsupported(f"model.type {kind!r} cannot be expressed")
        for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if self._model.get(name):
                raise self._unsupported(f"model.{name} = {self._model[name]!r} cannot be expressed")
        return self._sentencepiece() if self._model.get("byte_fallback") else self._byte_level(family)

    def _byte_level(self, family: str) -> dict[str, Value]:
        expressions = tuple(_expressions(self._data.get("pre_tokenizer")))
        if expressions not in _PRE:
            raise self._unsupported(f"unknown pre-tokenizer {' then '.join(expressions) or 'none'!s:.200}")
        pre = _PRE[expressions]
        merges = [f"{left} {right}" for left, right in self._merges()]
        if any(merge.count(" ") != 1 for merge in merges):
            raise self._unsupported("a merge with a space in it cannot be expressed")
        return {
            "tokenizer.ggml.model": "gpt2",
            # llama.cpp knows the same expressions by another name in this family.
            "tokenizer.ggml.pre": "lfm2" if family == "lfm2" and pre == "llama-bpe" else pre,
            "tokenizer.ggml.tokens": self._tokens(),
            "tokenizer.ggml.token_type": [self._type(i) for i in range(self._size)],
            "tokenizer.ggml.merges": merges,
        }

    def _sentencepiece(self) -> dict[str, Value]:
        order: dict[str, int] = {}
        for left, right in self._merges():
            order.setdefault(left + right, len(order))
        types = [self._type(i, byte_names=True) for i in range(self._size)]
        if types.count(BYTE) != 256:
            raise self._unsupported(f"expected tokens for all 256 bytes, found {types.count(BYTE)}")
        scores = [
            -1000.0 if t in (CONTROL, UNKNOWN, UNUSED) else -float(order.get(p or "", 0))
            for p, t in zip(self._pieces, types, strict=True)
        ]
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": self._tokens(),
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.add_space_prefix": _adds_space(self._data),
        }

    def _merges(self) -> Iterator[tuple[str, str]]:
        for merge in self._model["merges"]:
            left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
            yield left, right

    def _tokens(self) -> list[str]:
        """Every row of the embedding has a token; those that no text becomes are named as llama.cpp does."""
        return [f"[PAD{i}]" if p is None else p for i, p in enumerate(self._pieces)]

    def _type(self, i: int, byte_names: bool = False) -> int:
        piece = self._pieces[i]
        if piece is None:
            return UNUSED
        if byte_names and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return BYTE
        if piece == self._model.get("unk_token"):
            return UNKNOWN
        token = self._added.get(i)
        if token is None:
            return NORMAL
        if token.special or _looks_special(piece):
            return CONTROL
        # Text is matched before spaces become this character, so such a token is an ordinary piece.
        return NORMAL if byte_names and SPACE in piece else USER_DEFINED

    def special(self, settings: Mapping[str, Any], ends: Sequence[int]) -> dict[str, Value]:
        """Ids of the special tokens, and which are put around a text."""
        bare = self._original.encode("a", add_special_tokens=False).ids
        whole = self._original.encode("a").ids
        before, after = whole[:1], whole[-1:]
        adds_bos, adds_eos = whole[: len(bare) + 1] == before + bare, whole[-len(bare) - 1 :] == bare + after
        if not bare or whole != before * adds_bos + bare + after * adds_eos:
            raise self._unsupported(
                f"the special tokens around a text ({whole} for {bare}) cannot be expressed"
            )
        bos = before[0] if adds_bos else self._named(settings, "bos_token")
        eos = after[0] if adds_eos else self._named(settings, "eos_token")
        if eos is None and ends:
            eos = ends[0]
        named = {
            "bos": bos,
            "eos": eos,
            "unknown": self._named({"unk_token": self._model.get("unk_token")}, "unk_token"),
            "padding": self._named(settings, "pad_token"),
        }
        keys: dict[str, Value] = {
            f"tokenizer.ggml.{k}_token_id": i for k, i in named.items() if i is not None
        }
        keys["tokenizer.ggml.add_bos_token"] = adds_bos
        keys["tokenizer.ggml.add_eos_token"] = adds_eos
        return keys

    def _named(self, settings: Mapping[str, Any], name: str) -> int | None:
        """The id of a token that a file names by its text, None when it names none."""
        text = settings.get(name)
        if isinstance(text, dict):
            text = text.get("content")
        if text is None:
            return None
        found = self._ids.get(text) if isinstance(text, str) else None
        if found is None or found >= self._size:
            raise TokenizerError(
                f"{self._path}: tokenizer_config.json names {text!r:.60} as {name}, which is no token of the "
                "model; correct it there"
            )
        return found

    def with_ends(self, keys: dict[str, Value], ends: Sequence[int]) -> Tokenizer:
        """The runtime's tokenizer of ``keys``, after ids that end a generation without the runtime seeing it
        by their text were added to ``keys``."""
        free = ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"]
        tokenizer = Tokenizer.from_gguf(keys)
        missing = [i for i in ends if i not in tokenizer.eos_ids]
        if len(missing) > len(free):
            raise self._unsupported(f"generation ends at {list(ends)}, more tokens than can be expressed")
        if not missing:
            return tokenizer
        keys.update(zip(free, missing, strict=False))
        return Tokenizer.from_gguf(keys)


def _looks_special(piece: str) -> bool:
    """Whether llama.cpp's converter hides an added token from plain text though its file does not say so."""
    return piece in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        piece.startswith(a) and piece.endswith(b) for a, b in (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    )


def _expressions(pre: Mapping[str, Any] | None) -> Iterator[str]:
    """What a pre-tokenizer cuts text by; the name of a part in place of what is no plain expression."""
    kind = pre["type"] if pre else ""
    if pre and kind == "Sequence":
        for part in pre["pretokenizers"]:
            yield from _expressions(part)
    elif pre and kind == "ByteLevel" and not pre.get("add_prefix_space"):
        if pre.get("use_regex", True):
            yield _GPT2
    elif pre and kind == "Digits" and pre.get("individual_digits"):
        yield r"\p{N}"
    elif pre and kind == "Split" and pre.get("behavior") == "Isolated" and not pre.get("invert"):
        yield str(pre["pattern"].get("Regex", pre["pattern"]))
    elif kind:
        yield kind


def _adds_space(data: Mapping[str, Any]) -> bool:
    normalizer, pre = data.get("normalizer") or {}, data.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    scheme = pre.get("prepend_scheme", "always" if pre.get("add_prefix_space", True) else "never")
    return any(step.get("type") == "Prepend" for step in steps) or (
        pre.get("type") == "Metaspace" and scheme != "never"
    )


def _composes(data: Mapping[str, Any]) -> bool:
    return (data.get("normalizer") or {}).get("type") == "NFC"


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """The template of ``chat_template.jinja``, else of the tokenizer's settings, else None."""
    path = directory / "chat_template.jinja"
    found: Any = settings.get("chat_template")
    if path.exists():
        try:
            found = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelFileError(f"cannot read {path}: {error}", str(path), -1, "chat template") from error
    if isinstance(found, list):  # several by name
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    # JSON can hold halves of surrogate pairs, which are no text.
    if found is not None and (not isinstance(found, str) or re.search("[\ud800-\udfff]", found)):
        raise ModelFileError(
            f"{directory}: chat_template: expected text, found {found!r:.60}; correct it there",
            str(directory / "tokenizer_config.json"),
            -1,
            "chat_template",
        )
    return found
