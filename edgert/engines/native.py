"""The native engine: GGUF on CPUs, through the core in ``edgert._native``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgert import _native
from edgert.cost import check_kv
from edgert.engines.base import Ids, Logits
from edgert.errors import EngineError
from edgert.head_classes import ALL_INDEXED, NAMES, HeadClasses
from edgert.models import ModelSpec
from edgert.tier import IN_MEMORY, Tier

if TYPE_CHECKING:
    from edgert.sidecar import Sidecar

# Tokens of one call into the core: short enough that Ctrl-C is answered while a long prompt runs.
CHUNK = 256


class NativeSession:
    """One sequence of the native engine. See :class:`edgert.engines.base.EngineSession`."""

    def __init__(
        self,
        model: _native.Model,
        context: int,
        kv: str,
        chosen: int,
        tier: Tier,
        heads: HeadClasses,
        probes: int,
        keep: int,
    ) -> None:
        self._model = model
        self._cache = _native.Cache(model, context, kv, chosen, *tier, heads=heads)
        if (self.tier or {}).get("in_memory"):
            raise EngineError(
                f"{tier.directory} lies in memory (tmpfs), not on a disk, so that pages there save none: "
                "choose another page_directory"
            )
        self._probes, self._keep = probes, keep

    @property
    def length(self) -> int:
        return self._cache.length

    @property
    def nbytes(self) -> int:
        """Bytes the KV cache holds now."""
        return self._cache.nbytes

    @property
    def tier(self) -> dict[str, Any] | None:
        """What the disk tier holds and did, None when all keys and values are in memory."""
        return self._cache.tier

    @property
    def step_bytes(self) -> int:
        """Bytes of keys and values the next step reads."""
        return self._cache.step_bytes

    def prefill(self, tokens: Sequence[int]) -> Logits:
        ids = np.asarray(tokens, dtype=np.int32)
        for at in range(0, max(len(ids), 1), CHUNK):
            # A piece of one token is no step: prompts are read in full whatever they are cut into.
            logits = self._model.forward(self._cache, ids[at : at + CHUNK], full=True)
        return logits

    def step(self, token: int) -> Logits:
        return self._model.forward(self._cache, np.array([token], dtype=np.int32))

    def score(self, tokens: Sequence[int]) -> Logits:
        return self._model.forward(self._cache, np.asarray(tokens, dtype=np.int32), True, full=True)

    def hidden(self, token: int) -> Logits:
        state: Logits = self._model.hidden(self._cache, np.array([token], dtype=np.int32))[0]
        return state

    def confirmed(self, earlier: Sequence[Logits], token: int) -> Logits:
        return np.stack([*earlier, self.hidden(token)])

    def states(self, tokens: Sequence[int]) -> Logits:
        return self._model.hidden(self._cache, np.asarray(tokens, dtype=np.int32), full=True)

    def dense(self, hidden: Logits) -> Logits:
        return self._model.dense(hidden)

    def dense_rows(self, hidden: Logits) -> tuple[Ids | None, Logits]:
        return self._model.row_tokens, self._model.dense_rows(hidden)

    def best(self, hidden: Logits) -> list[int]:
        return [int(token) for token in self._model.best(hidden)]

    def flash(self, hidden: Logits, more: Sequence[int]) -> tuple[Ids, Logits]:
        return self._model.flash(hidden, self._probes, self._keep, more)

    def among(self, hidden: Logits, ids: Sequence[int]) -> tuple[Ids, Logits]:
        return self._model.among(hidden, ids)

    def rewind(self, length: int) -> int:
        return self._cache.rewind(length)

    def snapshot(self) -> bytes:
        return self._cache.save()

    def restore(self, state: bytes) -> None:
        self._cache.load(state)

    def close(self) -> None:
        del self._cache


class NativeEngine:
    """A model loaded into the native core, with the FlashHead of its sidecar if there is one.

    ``threads`` 0 means one for each CPU this process may use; ``probes`` 0 the sidecar's own number of
    clusters; ``kv`` is the type of the cached keys and values; ``chosen`` the past tokens that a step
    chooses for each KV head (0: it reads all); ``tier`` the pages of keys and values that a session has in
    memory (0: all) and the directory of the others; ``heads`` what each KV head keeps and reads;
    ``retrieval`` what chooses pages beside past votes. Raises UsageError, ModelFileError,
    UnsupportedModelError or EngineError.
    """

    name = "native"

    def __init__(
        self,
        file: _native.GgufFile,
        spec: ModelSpec,
        threads: int = 0,
        sidecar: Sidecar | None = None,
        probes: int = 0,
        kv: str = "f16",
        chosen: int = 0,
        tier: Tier = IN_MEMORY,
        heads: HeadClasses = ALL_INDEXED,
        retrieval: Sidecar | None = None,
    ) -> None:
        check_kv(spec, kv)
        self.tier, self.heads = tier, heads
        self.spec, self.sidecar, self.kv, self.chosen = spec, sidecar, kv, chosen
        self.probes, self.keep = sidecar.budget(probes) if sidecar else (0, 0)
        # With all keys and values in memory the true queries choose among all: nothing is to be predicted.
        self.retrieval = retrieval if tier.slots else None
        self._model = _native.Model(
            file,
            spec.as_dict(),
            threads,
            sidecar.file if sidecar else None,
            self.retrieval.file if self.retrieval else None,
        )

    @property
    def vocab_size(self) -> int:
        return self.spec.vocab_size

    @property
    def context_length(self) -> int:
        return self.spec.context_length

    def session(self, context: int) -> NativeSession:
        return NativeSession(
            self._model, context, self.kv, self.chosen, self.tier, self.heads, self.probes, self.keep
        )

    @property
    def flash_note(self) -> str | None:
        """What the FlashHead scores and how often it agrees with the dense head; None without one."""
        if self.sidecar is None:
            return None
        parts = [f"{self.probes} clusters of {self.sidecar.cluster_size}"] if self.probes else []
        parts += [f"the best {self.keep} units of 16"] if self.keep else []
        note = f"from {self.sidecar.path.name}, {', '.join(parts)}"
        agreement = self.sidecar.agreement if (self.probes, self.keep) == self.sidecar.budget() else None
        return note if agreement is None else f"{note}, {agreement:.2%} of the dense head's tokens"

    def memory(self) -> dict[str, int]:
        return self._model.memory()

    def describe(self) -> dict[str, Any]:
        model = self._model
        described = {
            "engine": self.name,
            "isa": model.isa,
            "threads": model.threads,
            "kv": self.kv,
            "weight_bytes_per_step": model.step_weight_bytes,
            "body_bytes_per_step": model.step_body_bytes,
        }
        if self.chosen:
            described["budget"] = self.chosen
        if self.heads.classes:
            described["heads"] = {name: self.heads.count(kind) for kind, name in enumerate(NAMES)}
        if self.tier.slots:
            described["pages_in_memory"], described["page_directory"] = self.tier[:2]
            described["pages_chosen_by"] = "retrieval head" if self.retrieval else "votes"
        if self.sidecar:
            described["flash_bytes_per_step"] = model.step_body_bytes + model.flash_bytes(
                self.probes, self.keep
            )
            described["probes"], described["keep"] = self.probes, self.keep
        return described

    def close(self) -> None:
        del self._model
