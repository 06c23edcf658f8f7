"""`edgert export`: makes a GGUF file of a Hugging Face directory, the sidecar of a model, or a directory for
ONNX Runtime. Figures go to stderr, the result to stdout."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from edgert.cli.progress import Steps
from edgert.errors import UsageError

QUANT = "int8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="name, path of a .gguf file, hf:owner/repo/file.gguf, or a Hugging Face model directory, "
        "which becomes a .gguf file in it",
    )
    parser.add_argument(
        "--format",
        choices=("gguf", "onnx"),
        default="gguf",
        help="onnx: a directory for ONNX Runtime, named by --output; default: gguf",
    )
    parser.add_argument(
        "--quant",
        choices=("f32", "f16", "int8", "int4"),
        help=f"type of matrices: of an ONNX export, of a directory's in a .gguf file (default: {QUANT})",
    )
    parser.add_argument(
        "--flash-head",
        action="store_true",
        help="cluster the vocabulary head (FlashHead) into the sidecar; with --format onnx: into the graph, "
        "from the sidecar, which is made when there is none",
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="--format onnx: positions a session has by default; default: 4096, or what the model was made "
        "for where that is less",
    )
    parser.add_argument(
        "--kv",
        choices=("f32", "f16"),
        help="--format onnx: type of keys and values and of attention; f16 takes half the memory and is what "
        "CUDA has, on an x86 processor its steps are slower; default: f32",
    )
    parser.add_argument(
        "--retrieval-head",
        action="store_true",
        help="train what chooses pages of the disk tier (sparse attention with --memory) into the sidecar; "
        "goes on where an interrupted run stopped",
    )
    parser.add_argument(
        "--agreement",
        type=float,
        default=0.995,
        metavar="A",
        help="share of the dense head's tokens to reach on prose, code and chat; default: 0.995",
    )
    parser.add_argument(
        "--calibration", type=Path, nargs="+", default=[], metavar="FILE", help="text of yours to add"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="PATH",
        help="the ONNX directory, else the sidecar where one is asked for, else the .gguf file; default for "
        "the last two: beside the model",
    )
    parser.add_argument("--cluster-size", type=int, metavar="N", help="tokens a cluster; default: searched")
    parser.add_argument("--probes", type=int, metavar="N", help="clusters scored; default: what reaches A")
    parser.add_argument("--rank", type=int, metavar="N", help="score low-rank rows of this width instead")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON")


def main(args: argparse.Namespace) -> int:
    if args.seed < 0:
        raise UsageError(f"--seed must not be negative: {args.seed}")
    directory = _directory(args.model)
    if args.format == "onnx":
        return _onnx(directory, args)
    if args.context is not None:
        raise UsageError("--context is for --format onnx; a .gguf file keeps the context of its model")
    if args.kv is not None:
        raise UsageError("--kv is for --format onnx; `edgert run --kv` chooses it for a .gguf file")
    if args.quant and not directory:
        raise UsageError(
            f"--quant is for a Hugging Face model directory, and {args.model} is none (it has no config.json)"
        )
    if not directory and not args.flash_head and not args.retrieval_head:
        raise UsageError(
            "nothing to export; add --flash-head or --retrieval-head, or give a Hugging Face model directory"
        )
    model = _convert(directory, args) if directory else _file(args.model)
    if args.flash_head:
        _flash_head(model, args)
    if args.retrieval_head:
        _retrieval_head(model, args)
    return 0


def _directory(model: str) -> Path | None:
    """The Hugging Face model directory that ``model`` means; None for what means a GGUF file."""
    from edgert.models.catalogue import find

    path = Path(model).expanduser()
    return None if model.startswith("hf:") or find(model) or not (path / "config.json").exists() else path


def _file(model: str) -> Path:
    from edgert.cli.progress import Bar
    from edgert.locate import model_path

    return model_path(model, Bar)


def _onnx(directory: Path | None, args: argparse.Namespace) -> int:
    from edgert.export.onnx_directory import KV, QUANT, Request, export_directory

    if args.output is None:
        raise UsageError("--format onnx writes a directory: name it with --output")
    if args.retrieval_head:
        raise UsageError("--retrieval-head goes into the sidecar of a .gguf file; leave out --format onnx")
    source = directory or _file(args.model)
    request = Request(source, args.quant or QUANT, args.context, args.flash_head, args.kv or KV)

    def make_head(model: Path) -> None:
        from edgert.export.flash_head import export_flash_head

        export_flash_head(model, _head_request(args), None, _note, Steps())

    made = export_directory(request, args.output, make_head, _note, Steps())
    size = sum(path.stat().st_size for path in made.iterdir())
    if args.json:
        import json

        print(json.dumps({"path": str(made), "quant": request.quant, "kv": request.kv, "bytes": size}))
    else:
        print(f"{made}: {size / 1e6:.1f} MB, {request.quant}, keys and values {request.kv}")
    return 0


def _sidecar(args: argparse.Namespace) -> bool:
    return bool(args.flash_head or args.retrieval_head)


def _convert(directory: Path, args: argparse.Namespace) -> Path:
    from edgert.export.hf_directory import convert

    quant = args.quant or QUANT
    path = convert(directory, quant, None if _sidecar(args) else args.output, _note, Steps())
    size = path.stat().st_size
    if not args.json:
        print(f"{path}: {size / 1e6:.1f} MB, {quant}")
    elif not _sidecar(args):  # else one object for both
        import json

        print(json.dumps({"path": str(path), "quant": quant, "bytes": size}))
    return path


def _head_request(args: argparse.Namespace) -> Any:
    from edgert.export.flash_head import Request

    return Request(args.agreement, args.calibration, args.cluster_size, args.probes, args.rank, args.seed)


def _flash_head(model: Path, args: argparse.Namespace) -> None:
    from edgert.export.flash_head import export_flash_head

    done = export_flash_head(model, _head_request(args), args.output, _note, Steps())
    quality = done.quality
    if args.json:
        import json

        print(json.dumps({"path": str(done.path), "model": str(model), **quality}))
    else:
        print(
            f"{done.path}: {quality['bytes_per_token'] / 1e6:.1f} MB a token instead of "
            f"{quality['dense_bytes_per_token'] / 1e6:.1f}, {quality['agreement']:.2%} of dense's tokens"
        )


def _retrieval_head(model: Path, args: argparse.Namespace) -> None:
    from edgert.export.retrieval_head import Request, export_retrieval_head

    done = export_retrieval_head(model, Request(args.calibration, args.seed), args.output, _note, Steps())
    head, votes = done.quality["head"], done.quality["votes"]
    if args.json:
        import json

        print(
            json.dumps(
                {"path": str(done.path), "model": str(model), "predictor": done.predictor, **done.quality}
            )
        )
    else:
        print(
            f"{done.path}: {done.quality['parameters']:,} parameters; KL {head['kl']:.4f} with the head, "
            f"{votes['kl']:.4f} by past votes alone: {done.predictor} will choose pages"
        )


def _note(line: str) -> None:
    print(line, file=sys.stderr)
