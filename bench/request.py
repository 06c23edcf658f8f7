"""From the words of the command line to what is to be measured."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from edgert.bench.settings import Setting, Test
from edgert.bench.suite import CHECKED, Request
from edgert.bench.text import prose

from edgert import _native
from edgert.attention import ATTENTIONS
from edgert.engines import KV_TYPES
from edgert.errors import EngineError, UsageError
from edgert.locate import find_sidecar
from edgert.onnx_directory import OnnxDirectory
from edgert.tokenizer import Tokenizer

HEADS = ("dense", "flash", "exact")
FORMATS = ("md", "csv", "json", "jsonl", "html")
MOST_THREADS, MOST_REPETITIONS = 1024, 1000
# Peer -> the packages it needs; for transformers, those that read GGUF files come last.
PEERS = {
    "llamacpp": ("llama-cpp-python",),
    "transformers": ("transformers", "torch", "gguf", "accelerate"),
    "onnx": ("onnxruntime",),
    "onnxruntime-genai": ("onnxruntime-genai",),
}
MADE_BY = {"onnx": "`edgert export --format onnx`", "onnxruntime-genai": "its model builder"}
MODULES = {"llama-cpp-python": "llama_cpp", "onnxruntime-genai": "onnxruntime_genai"}


def known(option: str, word: str, names: Sequence[str]) -> str:
    """``word``, if it is one of ``names``. Raises UsageError that names the nearest."""
    if word in names:
        return word
    near = difflib.get_close_matches(word, names, 1, 0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UsageError(f"{option}: unknown {word!r}: {hint}expected one of {', '.join(names)}")


def words(option: str, text: str) -> list[str]:
    """The parts of a list with commas, each once. Raises UsageError for an empty one."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UsageError(f"{option}: an element is missing in {text!r}")
    return list(dict.fromkeys(parts))


def numbers(option: str, text: str, least: int, most: int = 2**31) -> list[int]:
    """Raises UsageError for anything but numbers of ``least`` to ``most``, separated by commas."""
    found = []
    for word in words(option, text):
        # isdecimal takes every script's digits, and so does int
        if not word.isdecimal() or not least <= int(word) <= most:
            raise UsageError(
                f"{option} takes numbers from {least} on, separated by commas, such as {max(least, 1)},2048: "
                f"found {word[:40]!r}"
                if most == 2**31
                else f"{option} takes numbers of {least} to {most}, separated by commas: found {word[:40]!r}"
            )
        found.append(int(word))
    return found


def make_request(args: argparse.Namespace, model: Path) -> Request:
    """Checks everything that can be known before a model is loaded. Raises UsageError, EngineError for a
    peer that is not installed, ModelFileError."""
    if not 1 <= args.repetitions <= MOST_REPETITIONS:
        raise UsageError(f"-r must be 1 to {MOST_REPETITIONS}, not {args.repetitions}")
    tests = _tests(args)
    threads = numbers("-t", args.threads, 1, MOST_THREADS) if args.threads else [_default_threads()]
    kvs = [known("--kv", kv, KV_TYPES) for kv in words("--kv", args.kv)]
    heads = _heads(args.head, model)
    attentions = [known("--attention", a, ATTENTIONS) for a in words("--attention", args.attention)]
    classes = words("--heads", args.heads)
    if args.heads != "none" and "sparse" not in attentions:
        raise UsageError("--heads is of sparse attention: add --attention sparse")
    peers = [peer for word in args.peer or () for peer in words("--peer", word)]
    file = _native.GgufFile(str(model))
    _check_context(file, tests)
    reference = Setting("edgert", str(model), "dense", kvs[0], variant=head_type(file))
    settings = [
        Setting("edgert", str(model), head, kv, attention, some, reference.variant if head == "dense" else "")
        for kv in kvs
        for attention in attentions
        for some in (classes if attention == "sparse" else ["none"])
        for head in heads
    ]
    settings += [setting for peer in peers for setting in _peer(peer, model, args.head)]
    tokenizer = Tokenizer.from_gguf(file.metadata)
    longest = max(2, *(test.positions for test in tests))
    trained = file.metadata[f"{file.metadata['general.architecture']}.context_length"]
    wanted = min(max(longest, CHECKED), trained - 1)
    text = tokenizer.encode(prose(wanted))[:wanted]
    return Request(model, tuple(settings), reference, tuple(tests), tuple(threads), args.repetitions, text)


def head_type(file: _native.GgufFile) -> str:
    """The type of the matrix that serves as vocabulary head."""
    return next((t.type for name in HEAD_TENSORS for t in file.tensors if t.name == name), "")


HEAD_TENSORS = ("output.weight", "token_embd.weight")  # the second where the head is tied


def _tests(args: argparse.Namespace) -> list[Test]:
    prompts, generates = numbers("-p", args.n_prompt, 0), numbers("-n", args.n_gen, 0)
    tests = [
        test
        for depth in numbers("-d", args.n_depth, 0)
        for test in (*(Test(p, 0, depth) for p in prompts), *(Test(0, n, depth) for n in generates))
        if test.tokens
    ]
    if not tests:
        raise UsageError("nothing to measure: -p and -n are both 0")
    return tests


def _heads(given: str | None, model: Path) -> list[str]:
    sidecar = find_sidecar(model)
    if given is None:
        return list(HEADS) if sidecar else ["dense"]
    heads = [known("--head", head, HEADS) for head in words("--head", given)]
    if sidecar is None and heads != ["dense"]:
        raise UsageError(
            f"{model} has no sidecar, which --head {next(h for h in heads if h != 'dense')} needs: make one "
            f"with `edgert export {model} --flash-head`, or use --head dense"
        )
    return heads


def _check_context(file: _native.GgufFile, tests: Sequence[Test]) -> None:
    trained = file.metadata.get(f"{file.metadata.get('general.architecture')}.context_length")
    for test in tests:
        # The loader says it better when the file names no length.
        if isinstance(trained, int) and test.positions >= trained:
            raise UsageError(
                f"{test.name} needs {test.positions + 1} positions, and the model was made for {trained}: "
                "lower -d, -p or -n"
            )


def _default_threads() -> int:
    from edgert.platforms.detect import detect

    return detect().threads


def _peer(word: str, model: Path, heads: str | None) -> Iterator[Setting]:
    """The settings of a peer, ``name`` or ``name=DIRECTORY``. ``heads``: those that were asked for."""
    name, given, directory = word.partition("=")
    known("--peer", name, tuple(PEERS))
    needed = PEERS[name][:2] if given else PEERS[name]
    missing = [package for package in needed if find_spec(MODULES.get(package, package)) is None]
    if missing:
        raise EngineError(
            f"--peer {name} needs {' and '.join(missing)}, not installed: pip install {' '.join(missing)}"
        )
    if name == "llamacpp":
        if given:
            raise UsageError(f"--peer llamacpp reads the model itself: drop ={directory}")
        # Which is faster depends on the processor and the context, so both are measured.
        for flash in (True, False):
            variant = f"fa {'on' if flash else 'off'}"
            yield Setting(name, str(model), variant=variant, options={"flash_attn": flash})
        return
    if not given and name in MADE_BY:
        raise UsageError(f"--peer {name} needs the directory that {MADE_BY[name]} wrote: {name}=DIR")
    if name == "onnx":
        export = OnnxDirectory.open(Path(directory).expanduser().absolute())
        for head in HEADS if export.flash_head else HEADS[:1]:
            if heads is None or head in heads.split(","):
                yield Setting(name, str(export.path), head, kv="f32", variant=export.quant)
        return
    if given and not Path(directory).expanduser().is_dir():
        raise UsageError(f"--peer {name}: there is no directory {directory!r}")
    yield Setting(name, str(Path(directory).expanduser().absolute()) if given else str(model))
