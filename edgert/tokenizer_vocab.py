"""The vocabulary of a GGUF file, checked: pieces, kinds of token, special ids and flags.

Everything a file can get wrong is refused here with a TokenizerError, so that the encoders can
trust what they are given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import TokenizerError

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# Files name one end-of-sequence id, models end their turn with others. These texts end a
# generation, whatever type the file gives them: the list llama.cpp works with.
_END_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<｜end▁of▁sentence｜>", "[e~[",
)  # fmt: skip
# Fill-in-the-middle tokens that a model emits instead of an end, by role; then the other roles.
_FIM_END_TEXTS = (
    ("fim_pad_token_id", ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]")),
    ("fim_rep_token_id", ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>")),
    ("fim_sep_token_id", ("<|file_sep|>",)),
)  # fmt: skip
_FIM_TEXTS = (
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
    "<|code_prefix|>", "<|prefix|>",
    "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
    "<|code_suffix|>", "<|suffix|>",
    "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
    "<|code_middle|>", "<|middle|>",
)  # fmt: skip
# Always part of the visible text (gpt-oss channels).
_VISIBLE_TEXTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


@dataclass(frozen=True)
class Vocab:
    """``pieces[id]`` is the text of a token as the file has it, ``ids`` its inverse.

    ``control`` tokens (with the unknown token) are matched in text only when the caller asks for
    special tokens; ``user_defined`` tokens always. A token can be both.
    """

    model: str
    pieces: list[str]
    ids: dict[str, int]
    types: list[int]
    control: frozenset[int]
    user_defined: frozenset[int]
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    eog_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool


def _fail(key: str, expected: str, found: object) -> TokenizerError:
    return TokenizerError(
        f"tokenizer.ggml.{key}: expected {expected}, found {found}; the model file is damaged or was "
        "converted wrongly, download or convert it again"
    )


def read_list(
    metadata: Mapping[str, Any], key: str, kinds: set[type], length: int | None = None
) -> list[Any]:
    """The array ``tokenizer.ggml.<key>`` with elements of ``kinds``; TokenizerError otherwise."""
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list):
        raise _fail(key, "an array", "nothing" if value is None else type(value).__name__)
    if length is not None and len(value) != length:
        raise _fail(key, f"{length} elements, one for each token", len(value))
    odd = set(map(type, value)) - kinds
    if odd:
        raise _fail(
            key, " or ".join(sorted(k.__name__ for k in kinds)), f"elements of type {odd.pop().__name__}"
        )
    return value


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, bool):
        raise _fail(key, "a boolean", repr(value)[:40])
    return value


def _id(metadata: Mapping[str, Any], key: str, size: int, default: int | None = None) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is None:
        return default if default is not None and default < size else None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < size:
        raise _fail(key, f"a token id below {size}", repr(value)[:40])
    return value


def read_vocab(metadata: Mapping[str, Any], model: str, adds_bos: bool) -> Vocab:
    """The vocabulary in ``metadata``; ``adds_bos`` is what the model kind does when the file is
    silent about it. Raises TokenizerError naming the key that is wrong."""
    pieces = [p or f"[EMPTY_{i}]" for i, p in enumerate(read_list(metadata, "tokens", {str}))]
    size = len(pieces)
    if not size:
        raise _fail("tokens", "at least one token", "none")
    ids = dict(zip(pieces, range(size), strict=True))
    if len(ids) != size:
        twice = next(p for i, p in enumerate(pieces) if ids[p] != i)
        raise _fail("tokens", "every token once", f"{twice[:40]!r} twice")
    if "tokenizer.ggml.token_type" in metadata:
        types = read_list(metadata, "token_type", {int}, size)
    else:
        types = [NORMAL] * size

    spm = model == "llama"
    bos = _id(metadata, "bos_token_id", size, 1 if spm else None)
    eos = _id(metadata, "eos_token_id", size, 2 if spm else None)
    unk = _id(metadata, "unknown_token_id", size, 0 if spm else None)
    add_bos = _flag(metadata, "add_bos_token", adds_bos)
    add_eos = _flag(metadata, "add_eos_token", False)
    for added, key, token in ((add_bos, "bos", bos), (add_eos, "eos", eos)):
        if added and token is None:
            raise _fail(f"{key}_token_id", f"an id, since add_{key}_token is set", "nothing")

    control = {i for i, t in enumerate(types) if t in (CONTROL, UNKNOWN)}
    user_defined = {i for i, t in enumerate(types) if t == USER_DEFINED}
    ends = {_id(metadata, f"{key}_token_id", size) for key in ("eot", "eom")} | {eos}
    for key, texts in _FIM_END_TEXTS:
        named = _id(metadata, key, size)
        found = [ids[t] for t in texts if t in ids] if named is None else [named]
        control.update(found)
        ends.update(found[:1])
    control.update(ids[t] for t in _FIM_TEXTS if t in ids)
    by_text = {ids[t] for t in _END_TEXTS if t in ids}
    control |= by_text
    ends |= by_text
    for text in _VISIBLE_TEXTS:
        if text in ids:
            control.discard(ids[text])
            user_defined.add(ids[text])
    end, calls = ids.get("<|end|>"), ids.keys() & {"<|call|>", "<|calls|>"}
    if end is not None and calls and ids.keys() & {"<|return|>", "<|flush|>"}:
        # In the harmony format <|end|> closes a message, not the turn.
        ends.discard(end)
        control.discard(end)
        user_defined.add(end)
    if "<|tool_response>" in ids and "</s>" in ids:
        ends.discard(ids["</s>"])
        control.discard(ids["</s>"])
    return Vocab(
        model=model,
        pieces=pieces,
        ids=ids,
        types=types,
        control=frozenset(control),
        user_defined=frozenset(user_defined),
        bos_id=bos,
        eos_id=eos,
        unk_id=unk,
        eog_ids=frozenset(i for i in ends if i is not None),
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=spm and _flag(metadata, "add_space_prefix", True),
    )
