"""What is measured: a test, and a setting of an engine to run it in."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

ENGINES = {"edgert": "edgert", "llamacpp": "llama.cpp", "onnx": "edgert onnx"}


@dataclass(frozen=True)
class Test:
    """A prompt of ``prompt`` tokens, or ``generate`` tokens one by one, behind ``depth`` tokens. The names
    are those of llama-bench."""

    prompt: int
    generate: int
    depth: int

    @property
    def name(self) -> str:
        what = f"pp{self.prompt}" if self.prompt else f"tg{self.generate}"
        return f"{what} @ d{self.depth}" if self.depth else what

    @property
    def tokens(self) -> int:
        """Tokens that one run makes or reads."""
        return self.prompt or self.generate

    @property
    def before(self) -> int:
        """Tokens of the text in the cache when a run begins; generation follows at least one."""
        return self.depth if self.prompt else max(self.depth, 1)

    @property
    def positions(self) -> int:
        return self.before + self.tokens


@dataclass(frozen=True)
class Setting:
    """One engine in one of its settings. ``variant`` tells two of them apart that share all else: the type
    of the head, llama.cpp's flash attention. ``source`` is what a peer loads, ``options`` are arguments of
    its runner."""

    engine: str
    source: str
    head: str = "dense"
    kv: str = "f16"
    attention: str = "full"
    heads: str = "none"  # which KV heads stream with sparse attention (edgert/head_classes.py)
    variant: str = ""
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def label(self) -> str:
        name = ENGINES.get(self.engine, self.engine)
        head = self.head if self.engine in ("edgert", "onnx") else ""
        kv = f"kv {self.kv}" if self.kv != "f16" else ""
        attention = f"{self.attention} attention" if self.attention != "full" else ""
        classes = "streaming heads" if self.heads != "none" else ""
        return " ".join(part for part in (name, head, self.variant, kv, attention, classes) if part)

    @property
    def exact(self) -> bool:
        """Drafts are confirmed, and the tokens are those of edgert's dense head with full attention."""
        drafts = "exact" in (self.head, self.attention)
        return self.engine == "edgert" and drafts and self.head != "flash" and self.attention != "sparse"


@dataclass(frozen=True)
class Job:
    """What a worker is told when it starts. ``text`` is the token ids that stand before whatever is timed
    and that prompts are taken from."""

    setting: Setting
    test: Test
    threads: int
    text: list[int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Job:
        return cls(Setting(**value["setting"]), Test(**value["test"]), value["threads"], value["text"])
