"""What the tests on real weights share: prompts, texts, and what each engine made of them.

Everything heavy is computed once a session: for every prompt, llama.cpp's greedy continuation, and the
logits of both engines and of the float32 reference along it; for the essay, the reference's hidden states.
Logits are reduced as they come ([positions, vocab] of all prompts would be gigabytes).
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from conftest import real_model
from hf_reference import Reference

from edgert.engines import llamacpp, open_engine
from edgert.engines.base import Engine

Rows = npt.NDArray[np.float32]  # logits, [positions, vocab]

DATA = Path(__file__).parent.parent / "data"
THREADS = 1  # of each engine and of torch: one core runs ahead, the other judges what it gave
CONTINUATION = 64
ESSAY_TOKENS = 2048
ROWS = 128  # of logits at a time


@dataclass(frozen=True)
class Divergence:
    """A position where native's likeliest token is not llama.cpp's. Gaps are logits: how far each side
    prefers its own token over the other's; ``reference_gap`` is |gap| of the two in float32."""

    prompt: int
    position: int
    native: int
    peer: int
    native_gap: float
    peer_gap: float
    reference_gap: float

    def __str__(self) -> str:
        return (
            f"prompt {self.prompt:2d} position {self.position:2d}: native {self.native} by "
            f"{self.native_gap:.3f}, llama.cpp {self.peer} by {self.peer_gap:.3f}; "
            f"float32 gap {self.reference_gap:.3f}"
        )


@dataclass
class Continuations:
    """Along llama.cpp's greedy continuations of all prompts, teacher-forced after a divergence."""

    positions: int = 0
    divergences: list[Divergence] = field(default_factory=list)
    first_divergences: set[int] = field(default_factory=set)  # prompts
    # Error of the gap between the reference's two likeliest tokens, llama.cpp minus float32.
    peer_gap_errors: list[float] = field(default_factory=list)
    native_gap_errors: list[float] = field(default_factory=list)
    native_kl: list[float] = field(default_factory=list)
    peer_kl: list[float] = field(default_factory=list)

    @property
    def noise(self) -> float:
        """Standard deviation of llama.cpp's gap errors: what quantised activations do to the choice
        between two tokens. Native has no part in it, so it cannot excuse itself."""
        return float(np.std(self.peer_gap_errors))


@dataclass
class EssayScore:
    """Sums over the positions of the essay; perplexities are of the tokens after the first."""

    kl: float
    perplexity: float
    reference_perplexity: float


class Judge:
    """One real model in native, llama.cpp and the reference."""

    def __init__(self, name: str) -> None:
        torch.set_num_threads(THREADS)
        self.name, self.path = name, real_model(name)
        self.peer = llamacpp.open(self.path, threads=THREADS)
        self.native: Engine = open_engine(self.path, "native", threads=THREADS)
        self.reference = Reference(self.path)
        self.essay = self.encode((DATA / "essay.txt").read_text())[:ESSAY_TOKENS]

    def encode(self, text: str, special: bool = False) -> list[int]:
        """llama.cpp's ids of ``text``, with the tokens the model wants at the beginning."""
        api, data = self.peer.api, text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        vocab = api.llama_model_get_vocab(self.peer.model)
        return list(ids[: api.llama_tokenize(vocab, data, len(data), ids, len(ids), True, special)])

    def prompts(self) -> Iterator[list[int]]:
        chat = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
        if self.name.startswith("gemma"):  # a base model
            chat = "Question: {}\nAnswer:"
        for line in (DATA / "prompts.jsonl").read_text().splitlines():
            entry = json.loads(line)
            is_chat = entry["kind"] == "chat"
            yield self.encode(chat.format(entry["text"]) if is_chat else entry["text"], special=is_chat)

    @cached_property
    def continuations(self) -> Continuations:
        out, prompts = Continuations(), list(self.prompts())
        with ThreadPoolExecutor(max_workers=1) as other_core:
            ahead = other_core.submit(self._greedy, prompts[0])
            for number, prompt in enumerate(prompts):
                continuation, peer = ahead.result()
                if number + 1 < len(prompts):
                    ahead = other_core.submit(self._greedy, prompts[number + 1])
                native = self._along(prompt, continuation)
                hidden = self.reference.hidden(prompt + continuation[:-1])[len(prompt) - 1 :]
                self._judge(out, number, native, peer, self.reference.logits(hidden).numpy())
        return out

    @cached_property
    def essay_scores(self) -> tuple[EssayScore, EssayScore]:
        """Native's and llama.cpp's."""
        sessions = [engine.session(len(self.essay)) for engine in (self.native, self.peer)]
        kl, nll, reference_nll = [0.0, 0.0], [0.0, 0.0], 0.0
        parts = [self.essay[at : at + ROWS] for at in range(0, len(self.essay), ROWS)]

        def score(part: list[int]) -> list[Rows]:
            return [session.score(part) for session in sessions]

        with ThreadPoolExecutor(max_workers=1) as other_core:
            ahead = other_core.submit(score, parts[0])
            hidden = self.reference.hidden(self.essay)
            for number, at in enumerate(range(0, len(self.essay), ROWS)):
                scored = ahead.result()
                if number + 1 < len(parts):
                    ahead = other_core.submit(score, parts[number + 1])
                theirs = log_softmax(self.reference.logits(hidden[at : at + ROWS]).numpy())
                following = torch.tensor(self.essay[at + 1 : at + ROWS + 1])
                rows = torch.arange(len(following))
                reference_nll -= theirs[rows, following].sum().item()
                both = [log_softmax(logits) for logits in scored]
                for i, (ours, found) in enumerate(zip(both, divergences(theirs, *both), strict=True)):
                    kl[i] += found.sum().item()
                    nll[i] -= ours[rows, following].sum().item()
        for session in sessions:
            session.close()
        n = len(self.essay)
        native, peer = (
            EssayScore(kl[i] / n, math.exp(nll[i] / (n - 1)), math.exp(reference_nll / (n - 1)))
            for i in range(2)
        )
        return native, peer

    def close(self) -> None:
        self.native.close()
        self.peer.close()

    def _greedy(self, prompt: list[int]) -> tuple[list[int], Rows]:
        """llama.cpp's continuation and its logits, [CONTINUATION, vocab]."""
        session = self.peer.session(len(prompt) + CONTINUATION)
        rows = [session.prefill(prompt)]
        while len(rows) < CONTINUATION:
            rows.append(session.step(int(rows[-1].argmax())))
        session.close()
        return [int(row.argmax()) for row in rows], np.stack(rows)

    def _along(self, prompt: list[int], continuation: list[int]) -> Rows:
        """Native's logits where llama.cpp chose ``continuation``: all at once, which takes half the time
        of single steps and gives the same bits (test_chunked_prefill_is_token_by_token_decode)."""
        session = self.native.session(len(prompt) + CONTINUATION)
        first = session.prefill(prompt).copy()
        rows = np.concatenate([first[None], session.score(continuation[:-1])])
        session.close()
        return rows

    def _judge(
        self,
        out: Continuations,
        number: int,
        native: Rows,
        peer: Rows,
        reference: Rows,
    ) -> None:
        exact = log_softmax(reference)
        native_kl, peer_kl = divergences(exact, log_softmax(native), log_softmax(peer))
        out.native_kl += native_kl.tolist()
        out.peer_kl += peer_kl.tolist()
        out.positions += len(native)
        rows = np.arange(len(reference))
        first, second = torch.from_numpy(reference).topk(2).indices.numpy().T

        def gap(logits: Rows, a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> Rows:
            return logits[rows, a] - logits[rows, b]

        exact_gap = gap(reference, first, second)
        out.peer_gap_errors += (gap(peer, first, second) - exact_gap).tolist()
        out.native_gap_errors += (gap(native, first, second) - exact_gap).tolist()
        ours, theirs = native.argmax(1), peer.argmax(1)
        gaps = gap(native, ours, theirs), gap(peer, theirs, ours), abs(gap(reference, ours, theirs))
        for i in np.flatnonzero(ours != theirs).tolist():
            values = (float(g[i]) for g in gaps)
            out.divergences.append(Divergence(number, i, int(ours[i]), int(theirs[i]), *values))
            out.first_divergences.add(number)


def log_softmax(logits: Rows) -> torch.Tensor:
    return torch.log_softmax(torch.from_numpy(logits), -1)


def divergences(exact: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    """KL(exact || other) of each row of log probabilities, in nats, for each of ``others``."""
    probabilities = exact.exp()
    return [((exact - other) * probabilities).sum(-1) for other in others]
