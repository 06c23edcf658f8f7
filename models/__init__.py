"""What models are: one :class:`ModelSpec`, built from GGUF metadata or a Hugging Face config."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from . import gemma3, lfm2, llama, qwen2, qwen3
from .checks import check_spec, check_tensors
from .errors import BadModelMetadata, UnsupportedArchitecture
from .spec import LayerSpec, ModelSpec
from .spec_dict import spec_from_dict

__all__ = [
    "FAMILIES",
    "BadModelMetadata",
    "LayerSpec",
    "ModelSpec",
    "UnsupportedArchitecture",
    "check_tensors",
    "load_hf_spec",
    "load_spec",
    "spec_from_dict",
]

# GGUF architecture -> the module that has from_gguf, from_hf and hf_tensor_names for it.
FAMILIES: dict[str, ModuleType] = {
    module.ARCHITECTURE: module for module in (llama, qwen2, qwen3, gemma3, lfm2)
}


def load_spec(metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    """The description of a GGUF file, checked against its tensors.

    ``metadata`` is every key of the file, ``tensors`` the shape of every tensor, outermost dimension
    first. Raises UnsupportedArchitecture for what is not implemented, by name, and BadModelMetadata
    for what is missing, contradictory or absurd.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str):
        raise BadModelMetadata(f"general.architecture: expected a string, found {arch!r}")
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise UnsupportedArchitecture(f"general.type: expected 'model', found {kind!r}")
    if arch not in FAMILIES:
        raise UnsupportedArchitecture(
            f"architecture {arch!r} is not implemented; implemented are {', '.join(sorted(FAMILIES))}"
        )
    spec: ModelSpec = FAMILIES[arch].from_gguf(metadata, tensors)
    check_spec(spec)
    check_tensors(spec, tensors)
    return spec


def load_hf_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The description of a Hugging Face checkpoint from its ``config.json``; raises as
    :func:`load_spec` does."""
    model_type = config.get("model_type")
    for module in FAMILIES.values():
        if model_type in module.MODEL_TYPES:
            spec: ModelSpec = module.from_hf(config)
            check_spec(spec)
            return spec
    known = sorted(name for module in FAMILIES.values() for name in module.MODEL_TYPES)
    raise UnsupportedArchitecture(
        f"model_type {model_type!r} is not implemented; implemented are {', '.join(known)}"
    )
