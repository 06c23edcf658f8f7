"""The tokenizer of a GGUF file as ``tokenizer.json``, for tools that read Hugging Face's format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HfTokenizer
from tokenizers.models import BPE

from edgert.tokenizer_bpe import PRE_TOKENIZERS, pre_tokenizer_name
from edgert.tokenizer_spm import SPACE
from edgert.tokenizer_vocab import BYTE, Vocab, read_list, read_vocab


def tokenizer_json(metadata: Mapping[str, Any]) -> str:
    """The text of ``tokenizer.json`` for the GGUF ``metadata``. Raises TokenizerError.

    SentencePiece's pieces have scores, this format ranked merges: a piece is merged from every two pieces
    that give it, in the order of the scores. Where scores are equal, a text may get other tokens than edgert
    gives it."""
    spm = metadata["tokenizer.ggml.model"] == "llama"
    tokenizer, vocab = _sentencepiece(metadata) if spm else _byte_level(metadata)
    special = sorted(vocab.control | vocab.user_defined)
    tokenizer.add_tokens(
        [AddedToken(vocab.pieces[i], special=i in vocab.control, normalized=False) for i in special]
    )
    before = vocab.pieces[vocab.bos_id] if vocab.add_bos and vocab.bos_id is not None else ""
    after = vocab.pieces[vocab.eos_id] if vocab.add_eos and vocab.eos_id is not None else ""
    if before or after:
        around = [(piece, vocab.ids[piece]) for piece in dict.fromkeys((before, after)) if piece]
        single = [*[before] * bool(before), "$A", *[after] * bool(after)]
        pair = [*single, *(part.replace("$A", "$B") for part in single)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=around
        )
    text: str = tokenizer.to_str()
    return text


def _byte_level(metadata: Mapping[str, Any]) -> tuple[HfTokenizer, Vocab]:
    pre = pre_tokenizer_name(metadata)
    expressions, whole_words, adds_bos = PRE_TOKENIZERS[pre]
    vocab = read_vocab(metadata, "gpt2", adds_bos)
    merges = []
    for line in read_list(metadata, "merges", {str}):
        left, _, right = line.partition(" ")
        merges.append((left, right))
    tokenizer = HfTokenizer(BPE(vocab=vocab.ids, merges=merges, ignore_merges=whole_words))
    splits = [pre_tokenizers.Split(Regex(e), "isolated") for e in expressions]
    to_chars = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_chars])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, vocab


def _sentencepiece(metadata: Mapping[str, Any]) -> tuple[HfTokenizer, Vocab]:
    vocab = read_vocab(metadata, "llama", True)
    scores = read_list(metadata, "scores", {float, int}, len(vocab.pieces))
    ranked = []
    for i, piece in enumerate(vocab.pieces):
        if i in vocab.control or vocab.types[i] == BYTE:
            continue
        for at in range(1, len(piece)):
            left, right = vocab.ids.get(piece[:at]), vocab.ids.get(piece[at:])
            if left is not None and right is not None:
                ranked.append((-scores[i], i, left, right, at))
    ranked.sort()
    merges = [(vocab.pieces[left], vocab.pieces[right]) for _, _, left, right, _ in ranked]
    unknown = None if vocab.unk_id is None else vocab.pieces[vocab.unk_id]
    tokenizer = HfTokenizer(
        BPE(vocab=vocab.ids, merges=merges, byte_fallback=True, fuse_unk=True, unk_token=unknown)
    )
    steps: list[Any] = [normalizers.Replace(" ", SPACE)]
    back: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocab.add_space_prefix:
        steps.insert(0, normalizers.Prepend(SPACE))
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer, vocab
