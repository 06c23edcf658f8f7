"""``edgert export --retrieval-head``: what predicts, before a step, which pages of keys and values it wants.

The head is fitted in closed form to what full attention does on text, on the model's own words and on
lookups, trained on what its choice costs, and measured on sequences that had no part in either, beside what
needs no training. The sidecar says which of them chooses better, and with what figures.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from edgert.export.calibration_text import Domain, load_domains
from edgert.export.gguf_writer import Tensor, Value
from edgert.export.quantise import Matrix, dequantise, q8_0
from edgert.export.retrieval_fit import Head, Moments, choose_heads, reduced
from edgert.export.retrieval_quality import BUDGET, SCORED, measure, recall
from edgert.export.retrieval_text import Ids, lookup_sequence, own_sequence, text_sequences
from edgert.export.retrieval_trace import Trace, Tracer, full_layers
from edgert.export.retrieval_train import Sequences, evaluate, save, train
from edgert.export.sidecar_writer import write_part
from edgert.export.torch_decoder import TorchDecoder

from edgert import _native
from edgert.engines import open_engine
from edgert.engines.native import NativeEngine
from edgert.errors import UnsupportedModelError, UsageError
from edgert.locate import sidecar_path
from edgert.session_file import fingerprint
from edgert.tokenizer import Tokenizer
from edgert.whole_file import write_whole

MAIN = ("prose", "code", "chat")
SHARE = 0.1  # of the parameters of a draft layer and the embedding, that the head may have
RANK, HEADS = 256, 24
# Of what the head says beside past votes. Training, which looks at the mean, would have it outweigh them, and
# steps that need a page for a long time lose it.
SCALES = (1.0, 0.3, 0.1, 0.03)

Note = Callable[[str], None]
Steps = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class Request:
    """How much of everything: the defaults suit a model of a few hundred million parameters."""

    calibration: Sequence[Path] = ()
    seed: int = 0
    length: int = 2048  # tokens of a sequence
    texts: int = 12  # sequences of text,
    others: int = 3  # of own words, and of lookups
    steps: int = 2000  # of training
    rank: int = RANK
    heads: int = HEADS
    budget: int = BUDGET  # tokens that a step chooses where the loss is measured


@dataclass(frozen=True)
class Exported:
    """``quality`` is what the sidecar holds."""

    path: Path
    predictor: str
    quality: dict[str, Any]


def export_retrieval_head(
    model: Path, request: Request, output: Path | None, note: Note, steps: Steps
) -> Exported:
    """Write the retrieval head of ``model`` into its sidecar. What is done is kept beside it until the end,
    and an interrupted export goes on from there. Raises UsageError, ModelFileError, UnsupportedModelError,
    OutputError."""
    target = output or sidecar_path(model)
    if not target.parent.is_dir():
        raise UsageError(f"no such directory: {target.parent}; create it or choose another --output")
    file = _native.GgufFile(str(model))
    decoder = TorchDecoder(file)
    spec = decoder.spec
    layers = full_layers(spec)
    if not layers or len({spec.layers[i].n_kv_heads for i in layers}) > 1 or spec.dim % 32:
        raise UnsupportedModelError(
            f"{model}: a retrieval head needs layers that see everything, all with as many heads, and a "
            "width that is a multiple of 32"
        )
    tracer = Tracer(decoder)
    work = _Work(target, model, request, note)
    fit, held = _sequences(model, file, work, steps)
    traces = _traces(tracer, fit, "fit", work, steps)
    moments = Moments.empty(tracer)
    done = steps("fitting queries", len(traces))
    for trace in traces:
        moments.add(trace)
        done(1)
    full = moments.solve()
    rank, count = _size(tracer, request)
    places, worth = choose_heads(tracer, traces[::2], full, count)
    keys = [_moment(traces, layer, head) for layer, head in places]
    head = reduced(tracer, moments, full, places, worth, rank, keys)
    del moments, full
    checkpoint, done = work.path("training"), steps("training", request.steps)
    train(head, Sequences(tracer, traces, places), request.steps, request.seed, checkpoint, done)
    _round(head)
    metadata: dict[str, Value] = {
        "edgert.retrieval.layers": np.asarray([tracer.layers[layer] for layer, _ in places], np.int32),
        "edgert.retrieval.heads": np.asarray([h for _, h in places], np.int32),
        "edgert.retrieval.predictor": "head",
        "edgert.retrieval.quality": "{}",
    }

    def trial(name: str) -> _native.GgufFile:
        path = work.path(f"trial-{name}.gguf")
        write_part(path, model, "retrieval", metadata, _tensors(head))
        return _native.GgufFile(str(path))

    n = request.others
    kinds = [fit[-2 * n - 1], fit[-n - 1], fit[-1]]  # a text, own words, lookups
    done = steps("weighing it beside past votes", len(SCALES) * SCORED * len(kinds))
    trials = {}
    trained = head.log_worth.detach().clone()
    for scale in SCALES:
        head.log_worth.data = trained + math.log(scale)
        trials[str(scale)] = trial(str(scale))
    tried = measure(file, spec, trials, kinds, request.budget, done)
    scale = float(min(tried, key=lambda name: tried[name].kl))
    head.log_worth.data = trained + math.log(scale)
    unknown = Sequences(tracer, _traces(tracer, held, "held", work, steps, ahead=True), places)
    lost, without = evaluate(head, unknown)
    shares = recall(head, unknown)
    parameters = sum(p.numel() for p in head.parameters())
    done = steps("measuring the result", 2 * SCORED * len(held))
    losses = measure(file, spec, {"votes": None, "head": trial("best")}, held, request.budget, done)
    better = "head" if losses["head"].kl < losses["votes"].kl else "votes"
    quality: dict[str, Any] = {
        "parameters": parameters,
        "share_of_draft_layer_and_embedding": round(parameters / _draft_parameters(tracer), 4),
        "worth_left_out": {"head": round(lost, 4), "votes": round(without, 4)},
        "page_recall": shares,
        "scale": scale,
        **{name: {k: round(v, 5) for k, v in vars(loss).items()} for name, loss in losses.items()},
        "tokens": [len(ids) for ids in held],
        "budget": request.budget,
    }
    metadata["edgert.retrieval.predictor"] = better
    metadata["edgert.retrieval.quality"] = json.dumps(quality)
    write_part(target, model, "retrieval", metadata, _tensors(head))
    work.remove()
    return Exported(target, better, quality)


class _Work:
    """The directory beside the sidecar where an export keeps what it has done."""

    def __init__(self, target: Path, model: Path, request: Request, note: Note) -> None:
        self.request = request
        self._directory = target.parent / f".{target.name}.work"
        key = f"{fingerprint(model)} {request}"
        stamp = self._directory / "request"
        if self._directory.exists() and (not stamp.exists() or stamp.read_text() != key):
            shutil.rmtree(self._directory)
        if self._directory.exists():
            note(f"resuming from what {self._directory} holds")
        self._directory.mkdir(exist_ok=True)
        stamp.write_text(key)

    def path(self, name: str) -> Path:
        return self._directory / name

    def remove(self) -> None:
        shutil.rmtree(self._directory)


def _sequences(model: Path, file: _native.GgufFile, work: _Work, steps: Steps) -> tuple[list[Ids], list[Ids]]:
    """The sequences to fit to, and those that have no part in it."""
    saved = work.path("sequences.json")
    if saved.exists():
        fit, held = json.loads(saved.read_text())
        return fit, held
    request, tokenizer = work.request, Tokenizer.from_gguf(file.metadata)
    domains = load_domains(tokenizer, request.calibration)
    domains.sort(key=lambda d: ("user", *MAIN).index(d.name) if d.name in ("user", *MAIN) else len(MAIN) + 1)
    engine = open_engine(model, "native")
    assert isinstance(engine, NativeEngine)
    n = request.others
    progress = steps("the model's own words", (n + 1) * request.length)
    main = [d for d in domains if d.name in MAIN]
    own = [
        own_sequence(engine, _prefix(main, i), request.length, request.seed + i, progress)
        for i in range(n + 1)
    ]
    engine.close()
    filler = [token for piece in main[0].fit for token in piece]
    lookups = [lookup_sequence(tokenizer, filler, request.length, request.seed + i) for i in range(n)]
    filler = [token for piece in main[0].held for token in piece]
    lookups.append(lookup_sequence(tokenizer, filler, request.length, request.seed + n))
    fit = [*text_sequences(domains, request.length, False)[: request.texts], *own[:n], *lookups[:n]]
    held = [*text_sequences([_joined(main)], request.length, True)[:2], own[n], lookups[n]]
    write_whole(saved, [json.dumps([fit, held]).encode()])
    return fit, held


def _joined(domains: Sequence[Domain]) -> Domain:
    return Domain("main", [], [piece for d in domains for piece in d.held])


def _prefix(domains: Sequence[Domain], i: int) -> list[int]:
    pieces = domains[i % len(domains)].fit
    return pieces[i % len(pieces)]


def _traces(
    tracer: Tracer, sequences: Sequence[Ids], name: str, work: _Work, steps: Steps, ahead: bool = False
) -> list[Trace]:
    done = steps(f"reading text ({'to fit to' if name == 'fit' else 'held out'})", sum(map(len, sequences)))
    traces = []
    for i, ids in enumerate(sequences):
        path = work.path(f"{name}-{i}")
        if path.exists():
            traces.append(Trace(**torch.load(path, weights_only=True)))
        else:
            traces.append(tracer.trace(ids, ahead))
            save(path, vars(traces[-1]))
        done(len(ids))
    return traces


def _moment(traces: Sequence[Trace], layer: int, head: int) -> torch.Tensor:
    keys = torch.cat([trace.keys[layer, head].float() for trace in traces])
    return keys.T @ keys / len(keys)


def _draft_parameters(tracer: Tracer) -> int:
    """Of one layer with attention, and of the embedding."""
    prefix = f"blk.{tracer.layers[0]}."
    shapes = tracer.spec.tensor_shapes()
    return sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if name.startswith(prefix) or name == "token_embd.weight"
    )


def _size(tracer: Tracer, request: Request) -> tuple[int, int]:
    """Rank and number of heads: those asked for, or less where the head would be too large."""
    spec = tracer.spec
    most = len(tracer.layers) * tracer.kv
    rank, heads = min(request.rank, spec.dim // 32 * 32), min(request.heads, most)
    limit = SHARE * _draft_parameters(tracer)

    def parameters() -> int:
        rows = heads * tracer.group * spec.head_dim
        return rank * (2 * spec.dim + rows) + rows + heads

    while parameters() >= limit and (rank > 32 or heads > 1):
        rank, heads = (rank - 32, heads) if rank > 32 else (rank, heads - 1)
    return rank, heads


def _tensors(head: Head) -> list[Tensor]:
    def quantised(name: str, x: torch.Tensor) -> Tensor:
        rows: Matrix = np.ascontiguousarray(x.detach().numpy())
        return Tensor(name, "Q8_0", rows.shape, q8_0(rows))

    def floats(name: str, x: torch.Tensor) -> Tensor:
        values = np.ascontiguousarray(x.detach().numpy().astype(np.float32))
        return Tensor(name, "F32", values.shape, values.view(np.uint8))

    return [
        quantised("retrieval.down", head.down),
        quantised("retrieval.up", head.up),
        floats("retrieval.bias", head.bias),
        floats("retrieval.worth", head.log_worth.exp()),
    ]


def _round(head: Head) -> None:
    """Give ``head`` the numbers that the file will hold."""
    down, up, *_ = _tensors(head)
    with torch.no_grad():
        for parameter, t in ((head.down, down), (head.up, up)):
            parameter.copy_(torch.from_numpy(dequantise(t.data, t.type, t.shape[1])))
