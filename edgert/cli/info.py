"""`edgert info`: what a model is, from its header alone."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from edgert.cli.options import add_model_arguments

if TYPE_CHECKING:
    from edgert.models import ModelSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    from edgert.cli import info_onnx
    from edgert.cli.progress import Bar
    from edgert.locate import model_path, onnx_export

    export = onnx_export(args.model)
    facts = info_onnx.describe(export) if export else describe(str(model_path(args.model, Bar)))
    if args.json:
        import json

        print(json.dumps(facts, ensure_ascii=False, indent=2))
    elif export:
        info_onnx.show(facts)
    else:
        _print(facts)
    return 0


def describe(path: str) -> dict[str, Any]:
    """Facts about a GGUF file; sizes in bytes. Raises ModelFileError."""
    from edgert import _native
    from edgert.cost import kv_bytes, weight_bytes
    from edgert.models import BadModelMetadata, UnsupportedArchitecture, load_spec

    file = _native.GgufFile(path)
    metadata, tensors = file.metadata, file.tensors
    types: Counter[str] = Counter()
    for tensor in tensors:
        types[tensor.type] += tensor.nbytes
    weights = weight_bytes(tensors)
    architecture = metadata.get("general.architecture")
    tokens = metadata.get("tokenizer.ggml.tokens")
    facts: dict[str, Any] = {
        "path": path,
        "file_bytes": file.file_bytes,
        "gguf_version": file.version,
        "architecture": architecture,
        "name": metadata.get("general.name"),
        "licence": metadata.get("general.license"),
        "parameters": sum(math.prod(t.shape) for t in tensors),
        "tensors": len(tensors),
        "bytes_by_type": dict(types.most_common()),
        "bytes_by_part": {"body": weights.body, "embedding": weights.embedding, "head": weights.head},
        "tied_head": weights.tied,
        "bytes_per_token": weights.per_token,
        "context_length": metadata.get(f"{architecture}.context_length"),
        "tokenizer": metadata.get("tokenizer.ggml.model"),
        "pre_tokenizer": metadata.get("tokenizer.ggml.pre"),
        "vocabulary": len(tokens) if isinstance(tokens, list) else None,
        "chat_template": "tokenizer.chat_template" in metadata,
    }
    try:
        spec = load_spec(metadata, {t.name: t.shape for t in tensors})
    except (UnsupportedArchitecture, BadModelMetadata) as e:
        return {**facts, "native": False, "why_not_native": str(e)}
    return {
        **facts,
        "native": True,
        **describe_spec(spec),
        "kv_bytes_per_position": int(kv_bytes(spec, 1)),
        "kv_bytes_full_context": int(kv_bytes(spec, spec.context_length)),
    }


def describe_spec(spec: ModelSpec) -> dict[str, Any]:
    """Sizes of the layers."""
    attention = [layer for layer in spec.layers if layer.kind == "attention"]
    return {
        "layers": spec.n_layers,
        "full_attention_layers": sum(layer.window == 0 for layer in attention),
        "sliding_window_layers": sum(layer.window > 0 for layer in attention),
        "window": max((layer.window for layer in attention), default=0) or None,
        "convolution_layers": spec.n_layers - len(attention),
        "heads": spec.n_heads,
        "kv_heads": max((layer.n_kv_heads for layer in attention), default=0),
        "head_dim": spec.head_dim,
        "dim": spec.dim,
        "ffn_dim": spec.ffn_dim,
    }


def row(label: str, *values: object) -> None:
    text = ", ".join(str(v) for v in values if v not in (None, ""))
    # A file's strings are not to be trusted with the terminal.
    print(f"{label:<15}" + "".join(c if c.isprintable() else "\ufffd" for c in text))


def show_layers(facts: dict[str, Any]) -> None:
    kinds = {
        "full attention": facts["full_attention_layers"],
        f"sliding window of {facts['window']}": facts["sliding_window_layers"],
        "short convolution": facts["convolution_layers"],
    }
    row("layers", facts["layers"], *(f"{n} {kind}" for kind, n in kinds.items() if n))
    row("heads", f"{facts['heads']} query, {facts['kv_heads']} key/value, {facts['head_dim']} wide")
    row("width", f"{facts['dim']}", f"{facts['ffn_dim']} in the feed-forward")


def _print(facts: dict[str, Any]) -> None:
    from edgert.download import size_text

    parts, total = facts["bytes_by_part"], sum(facts["bytes_by_part"].values())

    def share(n: int) -> str:
        return f"{size_text(n)} ({n / total:.0%})" if total else "none"

    row("file", facts["path"])
    row(
        "size",
        size_text(facts["file_bytes"]),
        f"GGUF v{facts['gguf_version']}",
        f"{facts['tensors']} tensors",
    )
    row(
        "model",
        facts["name"],
        f"architecture {facts['architecture']}",
        f"{facts['parameters'] / 1e6:.1f} M parameters",
    )
    row("licence", facts["licence"] or "not stated in the file")
    row("types", *(f"{name} {share(n)}" for name, n in facts["bytes_by_type"].items()))
    if facts["native"]:
        show_layers(facts)
    row("context", f"{facts['context_length']} tokens")
    pre = f"pre-tokenizer {facts['pre_tokenizer']}" if facts["pre_tokenizer"] else None
    row("tokenizer", facts["tokenizer"], pre, f"{facts['vocabulary']} tokens")
    row("chat template", "yes" if facts["chat_template"] else "no (a base model: it continues text)")
    row("body", share(parts["body"]))
    tied = " (also the head: the two are tied)" if facts["tied_head"] else ""
    row("embedding", share(parts["embedding"]) + tied)
    if not facts["tied_head"]:
        row("head", share(parts["head"]))
    row("a token reads", size_text(facts["bytes_per_token"]), "keys and values come on top")
    if facts["native"]:
        row(
            "keys, values",
            f"{size_text(facts['kv_bytes_per_position'])} a position",
            f"{size_text(facts['kv_bytes_full_context'])} at full context (f16)",
        )
    row("engine", "native" if facts["native"] else f"llamacpp only: {facts['why_not_native']}")
