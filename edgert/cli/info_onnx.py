"""`edgert info` of an ONNX export: what its description and its graph say. No weight is read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgert.onnx_wire import Graph


def describe(path: Path) -> dict[str, Any]:
    """Facts about a directory; sizes in bytes. Raises ModelFileError and UnsupportedModelError for one that
    edgert did not write."""
    from edgert.cli.info import describe_spec
    from edgert.engines.onnx import bytes_of_a_step
    from edgert.onnx_directory import OnnxDirectory
    from edgert.onnx_memory import kv_bytes
    from edgert.onnx_plan import choose_head
    from edgert.onnx_preflight import check_graph

    directory = OnnxDirectory.open(path)
    graph, spec = check_graph(directory).graph, directory.spec
    body, dense, flash = bytes_of_a_step(graph, directory)
    return {
        "path": str(path),
        "format": "onnx",
        "file_bytes": sum(file.bytes for file in directory.files.values()),
        "weight_bytes": directory.weight_bytes,
        "sha256": directory.sha256,
        "architecture": spec.family,
        "name": directory.name,
        "quant": directory.quant,
        "kv": directory.kv,
        "operators": dict(Counter(_operators(graph)).most_common()),
        "flash_head": directory.flash_head,
        "head": choose_head(directory, graph, "auto"),
        "bytes_per_token": body + dense,
        "flash_bytes_per_token": body + flash if directory.flash_head else None,
        "context": directory.context,
        "context_length": spec.context_length,
        "vocabulary": spec.vocab_size,
        "chat_template": directory.tokenizer["has_chat_template"],
        **describe_spec(spec),
        "kv_bytes_per_position": sum(kv_bytes(spec, directory.kv, 1).values()),
        "kv_bytes_full_context": sum(kv_bytes(spec, directory.kv, spec.context_length).values()),
    }


def _operators(graph: Graph) -> list[str]:
    """Of every node, also those in branches; those of ONNX Runtime itself with their domain."""
    found = []
    for node in graph.nodes:
        found.append(f"{node.domain}.{node.op}" if node.domain else node.op)
        for branch in node.attributes.values():
            found += _operators(branch) if branch else []
    return found


def show(facts: dict[str, Any]) -> None:
    from edgert.cli.info import row, show_layers
    from edgert.download import size_text

    row("directory", facts["path"])
    row("size", size_text(facts["file_bytes"]), "ONNX", f"weights {facts['quant']}")
    row("model", facts["name"], f"architecture {facts['architecture']}")
    contrib = sum(n for name, n in facts["operators"].items() if "." in name)
    row("graph", f"{sum(facts['operators'].values())} nodes", f"{contrib} of ONNX Runtime's own operators")
    show_layers(facts)
    row("context", f"{facts['context']} tokens", f"{facts['context_length']} at most")
    row("tokenizer", f"{facts['vocabulary']} tokens")
    row("chat template", "yes" if facts["chat_template"] else "no (a base model: it continues text)")
    head = facts["flash_head"]
    if head:
        agreement = head["quality"].get("agreement")
        told = f"{agreement:.2%} of the dense head's tokens" if isinstance(agreement, float) else ""
        row("FlashHead", head["recipe"], f"scores {head['tokens']} tokens", told)
        slower = "" if facts["head"] == "flash" else "; the FlashHead is not expected to be faster here"
        row("head", f"{facts['head']} (what --head auto takes on this machine's CPU{slower})")
    flash = facts["flash_bytes_per_token"]
    with_flash = f"{size_text(flash)} with the FlashHead" if flash else ""
    row("a token reads", size_text(facts["bytes_per_token"]), with_flash, "keys and values come on top")
    row(
        "keys, values",
        f"{size_text(facts['kv_bytes_per_position'])} a position",
        f"{size_text(facts['kv_bytes_full_context'])} at full context ({facts['kv']})",
    )
    row("engine", "onnx")
