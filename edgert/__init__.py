"""edgert runs language models on small machines.

>>> model = edgert.load("smollm2-135m")
>>> for piece in model.stream("Why is the sky blue?", max_tokens=128): print(piece.text, end="")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import EdgertError
    from .generate import Reply
    from .model import Model, load
    from .planner import Plan, plan
    from .session import Session

    __version__: str

__all__ = ["EdgertError", "Model", "Plan", "Reply", "Session", "__version__", "load", "plan"]

_HOME = {
    "EdgertError": "errors",
    "Model": "model",
    "Reply": "generate",
    "Session": "session",
    "load": "model",
    "Plan": "planner",
    "plan": "planner",
}


def __getattr__(name: str) -> Any:
    """Names are imported on first use, so that `import edgert` (and the command line) starts fast."""
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("edgert")
    elif name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value
