"""The generation loop: pieces as they come, the reply when they are through."""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .exact import Counts, make_exact
from .sampling import Options, allowed_ids, make_sampler

if TYPE_CHECKING:
    from .engines.base import Ids, Logits
    from .session import Session

FinishReason = Literal["stop", "length", "cancelled"]
# Log probability of the token drawn, and the likeliest (id, log probability), best first.
Logprob = tuple[float, tuple[tuple[int, float], ...]]


@dataclass(frozen=True)
class Piece:
    """One token of a reply.

    ``text`` may be empty: half a code point or the start of a possible stop string is held back
    until it is decided. ``token`` is None only for text that was released after the last token.
    ``logprob`` and ``top_logprobs`` (id, log probability; best first) are filled when asked for.
    ``finish_reason`` is set on the last piece and only there.
    """

    text: str
    token: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Stats:
    """Counts in tokens, times in seconds, sizes in bytes.

    Times count work only: what the caller does between two pieces is not in them.
    ``prompt_seconds`` covers the tokens that were evaluated (``prompt_tokens - reused_tokens``),
    ``generation_seconds`` the tokens after the first. ``bytes_per_token`` is what the engine
    says it reads of the weights for one token (None when it does not say).
    In the exact modes ``agreed`` of ``drafts`` were what ``passes`` over the full cache or the whole
    head confirmed; 0 in the others.
    """

    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    prompt_seconds: float
    generation_seconds: float
    time_to_first_token: float
    peak_memory: int
    bytes_per_token: int | None
    seed: int
    finish_reason: FinishReason
    drafts: int = 0
    agreed: int = 0
    passes: int = 0

    @property
    def prompt_tps(self) -> float:
        """Prompt tokens evaluated a second."""
        return (self.prompt_tokens - self.reused_tokens) / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generation_tps(self) -> float:
        """Tokens generated a second after the first one."""
        return (self.generated_tokens - 1) / self.generation_seconds if self.generation_seconds else 0.0


@dataclass(frozen=True)
class Reply:
    """``tokens`` holds every id drawn, an end-of-generation token and a stop string's included;
    ``text`` does not show those.

    ``finish_reason`` is "stop" (the model ended its turn, or a stop string, which ``stop_string``
    then names), "length" (``max_tokens`` or the context is used up) or "cancelled".
    ``logprobs`` has an entry a token when asked for: its log probability, the likeliest ids.
    """

    text: str
    tokens: tuple[int, ...]
    stats: Stats
    finish_reason: FinishReason
    stop_string: str | None = None
    logprobs: tuple[Logprob, ...] | None = None


class StopStrings:
    """Releases text up to the first stop string and never a part of one.

    The stop string that is complete first wins (of two that end together, the longer), so that the
    outcome does not depend on where tokens begin.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.found: str | None = None
        self._strings = strings
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is free to show, after ``text`` came in."""
        text = self._held + text
        hits = [(at + len(s), at, s) for s in self._strings if (at := text.find(s)) >= 0]
        if hits:
            _, at, self.found = min(hits)
            self._held = ""
            return text[:at]
        keep = 0  # longest end of the text that a stop string begins with
        for s in self._strings:
            for n in range(min(len(s) - 1, len(text)), keep, -1):
                if text.endswith(s[:n]):
                    keep = n
                    break
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when no more text will come."""
        text, self._held = self._held, ""
        return text


class Stream(Iterator[Piece]):
    """The pieces of one reply. Work happens in ``next``.

    ``cancel()``, from any thread or signal handler, ends it before the next token. ``close()``
    ends it at once. A KeyboardInterrupt or an error inside ``next`` ends it too; in every case
    ``reply`` holds what came, and the session stays consistent and usable.
    """

    def __init__(
        self, session: Session, prompt: Sequence[int], options: Options, began: float, *, owns_session: bool
    ) -> None:
        self._session = session
        self._owns_session = owns_session
        self._prompt = prompt
        self._options = options
        self._sampler = make_sampler(options, session.model.vocab_size)
        self._sampler.observe(prompt)
        self._decoder = session.model.tokenizer.stream()
        self._stops = StopStrings(options.stop)
        room = session.context - len(prompt)
        self._limit = room if options.max_tokens is None else min(room, options.max_tokens)
        self._pieces: list[Piece] = []
        self._reused = 0
        self._finish: FinishReason | None = None
        self._cancelled = False
        self._head = session.model.head
        # Biased ids are scored whether a FlashHead would probe them or not.
        more = list(options.logit_bias or ())
        self._more = more
        self._exact = make_exact(
            session,
            self._sampler,
            attention=session.model.attention,
            head=self._head,
            more=more,
            logprobs=options.logprobs is not None,
        )
        self._ready: deque[tuple[int, Logits | None]] = deque()  # confirmed tokens not yet given out
        # Seconds of work: so far (making the prompt's ids is work), in prefill, until the first
        # token and until the last.
        self._spent = time.perf_counter() - began
        self._prefill_time = self._first_at = self._last_at = 0.0

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Piece:
        with self._session.lock:
            if self._finish:
                raise StopIteration
            began = time.perf_counter()
            try:
                piece = self._advance()
            except BaseException:
                self._end("cancelled")
                raise
            now = time.perf_counter()
            if len(self._pieces) <= 1:
                self._first_at = self._spent + now - began
            self._spent += now - began
            self._last_at = self._spent
            return piece

    def cancel(self) -> None:
        """End the reply before its next token."""
        self._cancelled = True

    def close(self) -> None:
        """End the reply now; waits for a token that another thread is computing."""
        self.cancel()
        with self._session.lock:
            if not self._finish:
                self._end("cancelled")

    @property
    def reply(self) -> Reply:
        """The reply as far as it has come; whole when the stream has ended."""
        finish = self._finish or "cancelled"
        tokens = tuple(p.token for p in self._pieces if p.token is not None)
        counts = self._exact.counts if self._exact else Counts()
        stats = Stats(
            prompt_tokens=len(self._prompt),
            reused_tokens=self._reused,
            generated_tokens=len(tokens),
            prompt_seconds=self._prefill_time,
            generation_seconds=self._last_at - self._first_at,
            time_to_first_token=self._first_at,
            peak_memory=peak_memory(),
            bytes_per_token=self._bytes_per_token(),
            seed=self._options.seed or 0,
            finish_reason=finish,
            drafts=counts.drafts,
            agreed=counts.agreed,
            passes=counts.passes,
        )
        logprobs = None
        if self._options.logprobs is not None:
            logprobs = tuple((p.logprob, p.top_logprobs) for p in self._pieces if p.logprob is not None)
        text = "".join(p.text for p in self._pieces)
        return Reply(text, tokens, stats, finish, self._stops.found, logprobs)

    def _bytes_per_token(self) -> int | None:
        engine = self._session.model.engine.describe()
        if self._exact:
            return self._exact.bytes_per_token(engine)
        return engine.get("flash_bytes_per_step" if self._head == "flash" else "weight_bytes_per_step")

    def _advance(self) -> Piece:
        chosen = self._choose()
        if chosen is None:
            return self._emit(Piece("", None, finish_reason="cancelled"))
        token, logits = chosen
        logprob: float | None = None
        best: list[tuple[int, float]] = []
        if self._options.logprobs is not None and logits is not None:
            logprob, best = self._sampler.logprobs(logits, token, self._options.logprobs)
        finish: FinishReason | None = "length" if len(self._pieces) + 1 >= self._limit else None
        text = ""
        if token in self._session.model.tokenizer.eos_ids:
            finish = "stop"
        else:
            text = self._stops.push(self._decoder.push(token))
        return self._emit(Piece(text, token, logprob, tuple(best), finish))

    def _choose(self) -> tuple[int, Logits | None] | None:
        """The next token, which the sampler has accepted, and logits for its log probability (of the
        whole vocabulary when they are asked for); None when the reply was cancelled."""
        session, position = self._session, len(self._prompt) + len(self._pieces)
        if self._cancelled or not session.serves(self):
            return None
        if self._ready:
            return self._ready.popleft()
        last = self._pieces[-1].token if self._pieces else None
        if self._options.allowed is not None:
            return self._choose_among(last, position)
        if last is not None and self._exact:
            left = self._limit - len(self._pieces)
            ends = session.model.tokenizer.eos_ids
            self._ready.extend(self._exact.block(last, position, left, ends, lambda: self._cancelled))
            return self._ready.popleft()
        if last is not None and self._head == "flash":
            hidden = session.hidden(last)
            ids, logits = session.flash(hidden, self._more)
            return self._draw(logits, position, ids), self._whole(hidden)
        whole = self._prefill() if last is None else session.step(last)
        return None if whole is None else (self._draw(whole, position), whole)

    def _choose_among(self, last: int | None, position: int) -> tuple[int, Logits | None] | None:
        """The same among the ids that are allowed now, by their dense logits, whatever the head."""
        session, allowed = self._session, self._options.allowed
        if callable(allowed):
            allowed = allowed(tuple(p.token for p in self._pieces if p.token is not None))
        ids = allowed_ids(allowed, session.model.vocab_size)
        if last is not None and session.has_among:
            exact = session.model.attention == "exact"
            hidden = session.states([last])[0] if exact else session.hidden(last)
            ids, logits = session.among(hidden, ids.tolist())
            return self._draw(logits, position, ids), self._whole(hidden)
        whole = self._prefill() if last is None else session.step(last)
        return None if whole is None else (self._draw(whole[ids], position, ids), whole)

    def _draw(self, logits: Logits, position: int, ids: Ids | None = None) -> int:
        token = self._sampler.sample(logits, position, ids)
        self._sampler.accept(token)
        return token

    def _whole(self, hidden: Logits) -> Logits | None:
        """The whole head's logits, if log probabilities are wanted: they are of the whole vocabulary."""
        return None if self._options.logprobs is None else self._session.dense(hidden[None])[0]

    def _prefill(self) -> Logits | None:
        """Logits after the prompt; None when the reply was cancelled."""
        began = time.perf_counter()
        logits, self._reused = self._session.prefill(self._prompt, lambda: self._cancelled)
        self._prefill_time = time.perf_counter() - began
        return logits

    def _emit(self, piece: Piece) -> Piece:
        """The piece with what was held back, if it is the last."""
        if piece.finish_reason and not self._stops.found:
            piece = replace(piece, text=piece.text + self._stops.push(self._decoder.flush()))
            if not self._stops.found:
                piece = replace(piece, text=piece.text + self._stops.flush())
        if self._stops.found:
            piece = replace(piece, finish_reason="stop")
        self._pieces.append(piece)
        if piece.finish_reason:
            self._end(piece.finish_reason)
        return piece

    def _end(self, finish: FinishReason) -> None:
        self._finish = finish
        if self._owns_session:
            self._session.close()


def peak_memory() -> int:
    """Highest resident size of this process so far, in bytes."""
    try:
        # getrusage on Linux would count the process that started this one.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
