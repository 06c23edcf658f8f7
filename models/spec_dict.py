"""The way back from :meth:`ModelSpec.as_dict`, as an ONNX export has it in its ``edgert.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from .checks import check_spec
from .errors import BadModelMetadata
from .gguf_keys import MAX_LAYERS
from .reader import INT_MAX, Reader
from .spec import LayerSpec, ModelSpec


def spec_from_dict(values: Mapping[str, Any]) -> ModelSpec:
    """What ``as_dict`` was called on. Every field must be there, with its type and in its range. Raises
    BadModelMetadata for what is missing or absurd and UnsupportedArchitecture for keys unknown here."""
    layers = values.get("layers")
    if not isinstance(layers, list) or not 1 <= len(layers) <= MAX_LAYERS:
        raise BadModelMetadata(f"spec.layers: expected a list of 1 to {MAX_LAYERS} tables")
    for i, layer in enumerate(layers):
        if not isinstance(layer, dict):
            raise BadModelMetadata(f"spec.layers.{i}: expected a table, found {layer!r:.40}")
    plain = {name: value for name, value in values.items() if name != "layers"}
    spec = ModelSpec(
        layers=tuple(
            LayerSpec(**_fields(LayerSpec, layer, f"spec.layers.{i}.")) for i, layer in enumerate(layers)
        ),
        **_fields(ModelSpec, plain, "spec."),
    )
    check_spec(spec)
    return spec


def _fields(kind: type, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Every field of the dataclass ``kind`` but ``layers``, read by its type."""
    reader = Reader({prefix + name: value for name, value in values.items()}, prefix)
    types = get_type_hints(kind)
    found = {f.name: _read(reader, f.name, types[f.name]) for f in fields(kind) if f.name != "layers"}
    reader.finish()
    return found


def _read(reader: Reader, name: str, kind: Any) -> Any:
    if kind is bool:
        return reader.flag(name)
    if kind is int:
        return reader.integer(name, low=0, high=INT_MAX)
    if kind is float:
        return reader.positive(name)
    text = reader.text(name)
    choices = get_args(kind)  # of a Literal
    if choices and text not in choices:
        wanted = " or ".join(repr(choice) for choice in choices)
        raise BadModelMetadata(f"{reader.key(name)}: expected {wanted}, found {text[:40]!r}")
    return text
