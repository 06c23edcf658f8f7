"""Checks that a description is sane and that a file's tensors are the ones it describes."""

from __future__ import annotations

from collections.abc import Mapping

from .errors import BadModelMetadata, UnsupportedArchitecture
from .spec import ModelSpec

# Far above any published model; they keep products of dimensions within 64 bits and layer lists short.
_LIMITS = {
    "dim": 2**18,
    "n_heads": 2**12,
    "head_dim": 2**12,
    "ffn_dim": 2**20,
    "vocab_size": 2**24,
    "context_length": 2**31 - 1,
}
_SHOWN = 5  # tensors named in one message


def check_spec(spec: ModelSpec) -> None:
    """Raises BadModelMetadata when dimensions are absurd or do not fit together."""
    for field, limit in _LIMITS.items():
        value = getattr(spec, field)
        if not 1 <= value <= limit:
            raise BadModelMetadata(f"{field}: expected 1 to {limit}, found {value}")
    if not spec.layers:
        raise BadModelMetadata("expected at least one layer, found none")
    if not 0 < spec.norm_eps < 1:
        raise BadModelMetadata(f"norm_eps: expected a number between 0 and 1, found {spec.norm_eps}")
    if spec.rope_dims % 2 or not 2 <= spec.rope_dims <= spec.head_dim:
        raise BadModelMetadata(
            f"rope_dims: expected an even number of at most head_dim = {spec.head_dim}, "
            f"found {spec.rope_dims}"
        )
    for i, layer in enumerate(spec.layers):
        if layer.kind == "conv":
            if not 2 <= spec.conv_kernel <= 64:
                raise BadModelMetadata(f"conv_kernel: expected 2 to 64 taps, found {spec.conv_kernel}")
            continue
        if layer.n_kv_heads < 1 or spec.n_heads % layer.n_kv_heads:
            raise BadModelMetadata(
                f"layer {i}: expected a number of KV heads that divides the {spec.n_heads} query heads, "
                f"found {layer.n_kv_heads}"
            )
        if layer.window < 0:
            raise BadModelMetadata(
                f"layer {i}: expected a window of 0 or more positions, found {layer.window}"
            )
        if layer.rope_base <= 1 or layer.rope_scale <= 0:
            raise BadModelMetadata(
                f"layer {i}: expected a rope base above 1 and a rope scale above 0, "
                f"found {layer.rope_base} and {layer.rope_scale}"
            )


def check_tensors(spec: ModelSpec, tensors: Mapping[str, tuple[int, ...]]) -> None:
    """Raises BadModelMetadata when a tensor is missing or has another shape than ``spec`` needs, and
    UnsupportedArchitecture when there is one that ``spec`` has no use for: computing without it would
    give another model. Shapes are outermost dimension first."""
    wanted = spec.tensor_shapes()
    faults = []
    for name, shape in wanted.items():
        found = tensors.get(name)
        if found is None:
            faults.append(f"{name}: expected {list(shape)}, found no such tensor")
        elif tuple(found) != shape:
            faults.append(f"{name}: expected {list(shape)}, found {list(found)}")
    if faults:
        raise BadModelMetadata(f"tensors do not fit the {spec.family} model: {_listed(faults)}")
    extra = [f"{name} {list(shape)}" for name, shape in tensors.items() if name not in wanted]
    if extra:
        raise UnsupportedArchitecture(f"tensors not implemented for {spec.family}: {_listed(extra)}")


def _listed(items: list[str]) -> str:
    more = len(items) - _SHOWN
    return "; ".join(items[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
