"""``edgert export DIRECTORY``: a Hugging Face model directory to one GGUF file.

The file has llama.cpp's keys and tensor names for the family, so that llama.cpp runs it too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from edgert.export.checkpoint import Checkpoint, read_json
from edgert.export.gguf_writer import Streamed, Tensor, TensorType, Value, write_gguf
from edgert.export.hf_tokenizer import tokenizer_keys
from edgert.export.hf_weights import encoded, find_weights
from edgert.models import (
    BadModelMetadata,
    ModelSpec,
    UnsupportedArchitecture,
    load_hf_spec,
    load_spec,
)
from edgert.models.llama import rope_factors

from edgert.errors import ModelFileError, UnsupportedModelError, UsageError

# --quant -> type of the matrices, and general.file_type of a file that has them.
QUANTS: dict[str, tuple[TensorType, int]] = {
    "f32": ("F32", 0),
    "f16": ("F16", 1),
    "int8": ("Q8_0", 7),
    "int4": ("Q4_0", 2),
}
_GEMMA_PATTERN = 6  # every sixth layer sees everything: what readers take for granted

Note = Callable[[str], None]
Steps = Callable[[str, int], Callable[[int], None]]


def convert(directory: Path, quant: str, output: Path | None, note: Note, steps: Steps) -> Path:
    """Write the GGUF file of the model in ``directory`` and return its path: ``output``, or
    ``<directory's name>.<type>.gguf`` in it.

    Raises UsageError, ModelFileError, UnsupportedModelError, TokenizerError and OutputError; nothing is left
    half-written."""
    if quant not in QUANTS:
        raise UsageError(f"--quant {quant}: expected {', '.join(QUANTS)}")
    config_path = directory / "config.json"
    if not config_path.exists():
        raise UsageError(f"{directory} has no config.json; give a Hugging Face model directory")
    name = directory.resolve().name.encode("utf-8", "replace").decode() or "model"
    target = output or directory / f"{name}.{QUANTS[quant][0]}.gguf"
    if target.suffix != ".gguf":
        raise UsageError(f"--output {target}: expected the name of a .gguf file")
    if not target.parent.is_dir():
        raise UsageError(f"no such directory: {target.parent}; create it or choose another --output")
    config = read_json(config_path, "config.json")
    spec = _spec(config, config_path)
    with Checkpoint(directory) as checkpoint:
        weights = find_weights(spec, checkpoint, directory, QUANTS[quant][0])
        metadata = model_keys(spec, name) | {"general.file_type": QUANTS[quant][1]}
        ends = _ends(directory, config, spec.vocab_size)
        metadata |= tokenizer_keys(directory, spec.vocab_size, ends, spec.family, note)
        _check_keys(metadata, spec, config_path)
        done = steps(f"writing {target.name}", sum(math.prod(w.shape) for w in weights))
        tensors: list[Tensor | Streamed] = []
        if spec.rope_factors:
            factors = np.array(rope_factors(config), np.float32)
            tensors.append(Tensor("rope_freqs.weight", "F32", factors.shape, factors.view(np.uint8)))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for w in weights:
                parts = partial(encoded, w, checkpoint, pool, done)
                tensors.append(Streamed(w.name, w.type, w.shape, parts))
            write_gguf(target, metadata, tensors)
    return target


def _spec(config: Mapping[str, Any], path: Path) -> ModelSpec:
    try:
        return load_hf_spec(config)
    except UnsupportedArchitecture as error:
        raise UnsupportedModelError(f"{path}: {error}") from error
    except BadModelMetadata as error:
        raise ModelFileError(f"{path}: {error}", str(path), 0, "config.json") from error


def _ends(directory: Path, config: Mapping[str, Any], size: int) -> list[int]:
    """Ids that end a generation: those of generation_config.json, else of config.json."""
    path = directory / "generation_config.json"
    settings = read_json(path, "generation_config.json") if path.exists() else {}
    source = settings if settings.get("eos_token_id") is not None else config
    found = source.get("eos_token_id")
    ends = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(i) is int and 0 <= i < size for i in ends):
        where = path if source is settings else directory / "config.json"
        raise ModelFileError(
            f"{where}: eos_token_id: expected token ids below {size}, found {found!r:.60}",
            str(where),
            0,
            "eos_token_id",
        )
    return ends


def model_keys(spec: ModelSpec, name: str) -> dict[str, Value]:
    """The ``general.*`` and ``<architecture>.*`` keys that describe ``spec``."""
    attention = [layer for layer in spec.layers if layer.kind == "attention"]
    windows = [layer for layer in attention if layer.window]
    # Gemma's windowed layers have a rope of their own; elsewhere all layers have the same.
    plain = min(attention or spec.layers, key=lambda layer: layer.window)
    kv_heads = [layer.n_kv_heads for layer in spec.layers]
    keys: dict[str, Value] = {
        "block_count": spec.n_layers,
        "context_length": spec.context_length,
        "embedding_length": spec.dim,
        "feed_forward_length": spec.ffn_dim,
        "attention.head_count": spec.n_heads,
        "attention.head_count_kv": kv_heads[0] if len(set(kv_heads)) == 1 else kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "attention.layer_norm_rms_epsilon": spec.norm_eps,
        "rope.dimension_count": spec.rope_dims,
        "rope.freq_base": plain.rope_base,
        "vocab_size": spec.vocab_size,
    }
    if plain.rope_scale != 1.0:
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0 / plain.rope_scale}
    if spec.conv_kernel:
        keys["shortconv.l_cache"] = spec.conv_kernel
    if windows:
        keys["attention.sliding_window"] = windows[0].window
    if windows and spec.family == "gemma3":
        keys["rope.freq_base_swa"] = windows[0].rope_base
        sliding = [layer.window > 0 for layer in spec.layers]
        if sliding != [(i + 1) % _GEMMA_PATTERN != 0 for i in range(spec.n_layers)]:
            keys["attention.sliding_window_pattern"] = sliding
    return {
        "general.architecture": spec.family,
        "general.type": "model",
        "general.name": name,
        "general.quantization_version": 2,
        **{f"{spec.family}.{key}": value for key, value in keys.items()},
    }


def _check_keys(metadata: Mapping[str, Value], spec: ModelSpec, path: Path) -> None:
    """Refuse a model whose keys, read as the runtime reads them, describe another."""
    try:
        read = load_spec(metadata, spec.tensor_shapes()).as_dict()
    except (UnsupportedArchitecture, BadModelMetadata) as error:
        raise UnsupportedModelError(f"{path}: GGUF cannot express this model: {error}") from error
    wanted = spec.as_dict()
    for key, value in wanted.items():
        if key not in ("name", "rope_style") and not _same(read[key], value):
            raise UnsupportedModelError(
                f"{path}: GGUF cannot express {key} = {value!r:.80} of this {spec.family} model, it would be "
                f"{read[key]!r:.80}; use the model without this change"
            )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return all(_same(a[key], b[key]) for key in a)
    return math.isclose(a, b, rel_tol=1e-6) if isinstance(a, float) else bool(a == b)
