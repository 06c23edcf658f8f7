"""Text to token ids and back, as the metadata of a GGUF file describes it."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from .chat_template import ChatTemplate
from .errors import TokenizerError
from .tokenizer_vocab import BYTE, Vocab, read_vocab


class _Encoder(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def bytes_of(self, piece: str) -> bytes: ...


class Tokenizer:
    """The tokenizer of one model; gives the ids that llama.cpp gives. Safe to use from threads."""

    def __init__(self, vocab: Vocab, encoder: _Encoder, chat_template: ChatTemplate | None) -> None:
        self._vocab, self._encoder, self._template = vocab, encoder, chat_template
        self._bytes: dict[int, bytes] = {}
        special = [(vocab.pieces[i], i) for i in sorted(vocab.control | vocab.user_defined)]
        # Longest first, in bytes: where two special tokens overlap in a text, the longer wins.
        self._special = sorted(special, key=lambda pair: -len(pair[0].encode()))
        self._always = [pair for pair in self._special if pair[1] not in vocab.control]

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build from GGUF metadata (plain Python values). Raises TokenizerError when the tokenizer is
        of an unknown kind or its data is damaged."""
        model = metadata.get("tokenizer.ggml.model")
        vocab: Vocab
        encoder: _Encoder
        # The encoders are imported when needed: a start has no time for the one it does not use.
        if model == "gpt2":
            from . import tokenizer_bpe

            pre = tokenizer_bpe.pre_tokenizer_name(metadata)
            vocab = read_vocab(metadata, model, tokenizer_bpe.adds_bos(pre))
            encoder = tokenizer_bpe.ByteBPE(vocab, metadata, pre)
        elif model == "llama":
            from . import tokenizer_spm

            vocab = read_vocab(metadata, model, True)
            encoder = tokenizer_spm.SentencePieceBPE(vocab, metadata)
        else:
            found = "nothing" if model is None else repr(model)[:60]
            raise TokenizerError(
                f"unknown tokenizer (tokenizer.ggml.model): expected 'gpt2' or 'llama', found {found}; use a "
                "model with one of these, or engine='llamacpp'"
            )
        source = metadata.get("tokenizer.chat_template")
        template = None
        if source is not None:
            variables = {
                name: "" if token is None else vocab.pieces[token]
                for name, token in (("bos_token", vocab.bos_id), ("eos_token", vocab.eos_id))
            }
            template = ChatTemplate(source, variables)
        return cls(vocab, encoder, template)

    @property
    def vocab_size(self) -> int:
        return len(self._vocab.pieces)

    @property
    def bos_id(self) -> int | None:
        return self._vocab.bos_id

    @property
    def eos_id(self) -> int | None:
        return self._vocab.eos_id

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends a generation."""
        return self._vocab.eog_ids

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of ``text``. ``add_special`` puts BOS and EOS where the model wants them;
        ``parse_special`` lets the text of a control token (``<|im_end|>``) become that token."""
        ids = self._encode(text, parse_special, ())
        if add_special and self._vocab.add_bos and self._vocab.bos_id is not None:
            ids.insert(0, self._vocab.bos_id)
        if add_special and self._vocab.add_eos and self._vocab.eos_id is not None:
            ids.append(self._vocab.eos_id)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ``ids``, without control tokens unless asked; bytes that are no UTF-8 become
        U+FFFD. Raises TokenizerError for an id outside the vocabulary."""
        stream = self.stream(skip_special)
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self, skip_special: bool = True) -> StreamDecoder:
        """A decoder for one sequence of ids as they come."""
        return StreamDecoder(self, skip_special)

    def id_to_piece(self, token: int) -> str:
        """The token as the vocabulary writes it."""
        if not 0 <= token < len(self._vocab.pieces):
            raise TokenizerError(f"token id {token}: expected 0 to {len(self._vocab.pieces) - 1}")
        return self._vocab.pieces[token]

    def token_bytes(self, token: int) -> bytes:
        """What ``token`` adds to a text; may be part of a character."""
        found = self._bytes.get(token)
        if found is None:
            piece = self.id_to_piece(token)
            if token in self._vocab.control or token in self._vocab.user_defined:
                found = piece.encode()
            elif self._vocab.types[token] == BYTE and piece[:3] == "<0x":
                found = bytes.fromhex(piece[3:5])
            else:
                found = self._encoder.bytes_of(piece)
            self._bytes[token] = found
        return found

    def is_control(self, token: int) -> bool:
        """Whether ``token`` is no text: left out of a decoded text and never made from user text."""
        return token in self._vocab.control

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        parse_special: bool = False,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation, as the model's chat template writes it.

        Text that comes from ``messages`` or ``variables`` (``tools`` ...) never becomes a control token
        unless ``parse_special`` is set. Raises TokenizerError when the file has no template, or when
        the template fails, refuses the conversation or exceeds its limits."""
        if self._template is None:
            raise TokenizerError(
                "this model has no chat template (tokenizer.chat_template): use plain text generation, or "
                "an instruct model"
            )
        text, user_spans = self._template.render(messages, add_generation_prompt, variables)
        ids = self._encode(text, True, () if parse_special else user_spans)
        bos = self._vocab.bos_id
        if self._vocab.add_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids

    def _encode(self, text: str, parse_special: bool, user_spans: Sequence[tuple[int, int]]) -> list[int]:
        """Ids of ``text`` without BOS and EOS. Control tokens are matched when ``parse_special`` is
        set, except where they touch ``user_spans``, sorted ranges of characters."""
        out: list[int] = []
        spaced = self._vocab.add_space_prefix
        after_special = True
        for part in self._split_special(text, parse_special, user_spans):
            if isinstance(part, int):
                out.append(part)
                after_special = True
            else:
                part = _well_formed(part)
                out += self._encoder.encode(" " + part if spaced and after_special else part)
                after_special = False
        return out

    def _split_special(
        self, text: str, parse_special: bool, user_spans: Sequence[tuple[int, int]]
    ) -> list[str | int]:
        """``text`` cut at the special tokens: strings between them, and their ids."""
        control = self._vocab.control
        present = [pair for pair in (self._special if parse_special else self._always) if pair[0] in text]
        # Fragments are (start, end, -1) for text and (start, end, id) for a token.
        fragments = [(0, len(text), -1)] if text else []
        user = bytearray(len(text) if user_spans and present else 0)
        for start, end in user_spans if user else ():
            user[start:end] = b"\1" * (end - start)
        for piece, token in present:
            guarded = user if token in control else b""
            cut: list[tuple[int, int, int]] = []
            for start, end, known in fragments:
                if known < 0:
                    at = text.find(piece, start, end)
                    while at >= 0:
                        stop = at + len(piece)
                        if guarded and any(guarded[at:stop]):
                            at = text.find(piece, at + 1, end)
                            continue
                        if at > start:
                            cut.append((start, at, -1))
                        cut.append((at, stop, token))
                        start = stop
                        at = text.find(piece, start, end)
                if known >= 0 or start < end:
                    cut.append((start, end, known))
            fragments = cut
        return [text[start:end] if known < 0 else known for start, end, known in fragments]


class StreamDecoder:
    """Turns ids into text one at a time. The pieces joined are what ``decode`` gives for all ids;
    none ends within a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._after_bos = False

    def push(self, token: int) -> str:
        """The text that ``token`` completes; may be empty. TokenizerError for an unknown id."""
        tokenizer = self._tokenizer
        data = tokenizer.token_bytes(token)
        if self._after_bos:
            # The encoder put this space there.
            data = data.removeprefix(b" ")
        self._after_bos = token == tokenizer.bos_id and tokenizer._vocab.add_space_prefix
        if self._skip and tokenizer.is_control(token):
            return ""
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD when the last character is incomplete."""
        return self._utf8.decode(b"", final=True)


def _well_formed(text: str) -> str:
    """``text`` with surrogate pairs joined and lone surrogates replaced by U+FFFD."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
