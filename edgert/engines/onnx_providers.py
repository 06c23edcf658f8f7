"""ONNX Runtime itself: whether it is there, the execution provider that was asked for, and what the nodes of
a graph run on in the end."""

from __future__ import annotations

import importlib
import platform
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.errors import EngineError, UsageError
from edgert.onnx_kernels import LISTED, without_kernel
from edgert.platforms.huge_pages import anonymous, collapse
from edgert.platforms.state import detect_l4t

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgert.onnx_wire import Graph

# With 1.23.2 the graphs of models with sliding windows give other logits: tests/test_onnx_graph.py fails.
OLDEST = (1, 24)
_REMEDY = "pip install 'edgert[onnx]'"
_CPU = "CPUExecutionProvider"
# In the order in which ONNX Runtime offers them nodes: TensorRT takes no operators of com.microsoft, the CPU
# what is left.
_ORDER = {
    "cpu": (_CPU,),
    "cuda": ("CUDAExecutionProvider", _CPU),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", _CPU),
}
PROVIDERS = tuple(_ORDER)
# Operators in which a pass spends its time: with these on the processor nothing is accelerated.
_HEAVY = frozenset({"MatMul", "MatMulNBits", "GroupQueryAttention"})
_JETSON_INDEX = "https://pypi.jetson-ai-lab.io"


def check_provider(provider: str) -> None:
    """Raises UsageError for a provider that there is not."""
    if provider not in _ORDER:
        raise UsageError(f"unknown provider {provider!r}: expected one of {', '.join(PROVIDERS)}")


def load_runtime(provider: str) -> Any:
    """The module onnxruntime, with telemetry off. Raises EngineError when it is missing or does not load, or
    was built without ``provider``."""
    try:
        runtime = importlib.import_module("onnxruntime")
    except ModuleNotFoundError as error:
        raise EngineError(f"this needs onnxruntime, which is missing; {_remedy(provider)}") from error
    except (ImportError, OSError) as error:  # the package is there, its shared library does not load
        raise EngineError(
            f"onnxruntime is installed but does not load ({error!s:.200}); {_remedy(provider)}"
        ) from error
    if too_old(runtime.__version__):
        raise EngineError(
            f"onnxruntime {runtime.__version__} is too old, it gives wrong logits where a model has sliding "
            f"windows: edgert needs {'.'.join(map(str, OLDEST))} or newer, which needs Python 3.11 or newer; "
            f"{_remedy(provider)}"
        )
    runtime.disable_telemetry_events()
    available = runtime.get_available_providers()
    missing = [name for name in _ORDER[provider] if name not in available]
    if missing:
        raise EngineError(
            f"provider={provider!r} needs {' and '.join(missing)}, and onnxruntime {runtime.__version__} "
            f"has {', '.join(available)}; {_remedy(provider)}, or take provider='cpu'"
        )
    return runtime


def too_old(version: str) -> bool:
    """Whether ONNX Runtime of this ``version`` is older than :data:`OLDEST`."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST


def _remedy(provider: str, root: Path = Path("/")) -> str:
    """What to install for ``provider``. The wheels of onnxruntime-gpu on PyPI are for x86 and for servers
    with ARM: none has the CUDA of a Jetson."""
    if provider == "cpu":
        return _REMEDY
    l4t = detect_l4t(root)
    release = int(l4t.partition(".")[0]) if l4t else 0
    if release:
        pack = {35: "JetPack 5", 36: "JetPack 6", 38: "JetPack 7", 39: "JetPack 7"}.get(
            release, "its JetPack"
        )
        index = f"{_JETSON_INDEX}/jp6/cu126" if release == 36 else _JETSON_INDEX
        return (
            f"on this Jetson with {pack} (L4T {l4t}) install a wheel of onnxruntime-gpu "
            f"{'.'.join(map(str, OLDEST))} or newer that was built for it, not that of PyPI: look in "
            f"{index}, else build one; docs/jetson.md tells how"
        )
    machine = platform.machine()
    if machine not in ("x86_64", "AMD64"):
        return f"onnxruntime-gpu has to be one built for this machine ({machine})"
    return "pip uninstall onnxruntime, then pip install 'edgert[onnx-gpu]'"


def check_kernels(graph: Graph, path: Path, provider: str) -> None:
    """Raises EngineError for a ``graph``, in the directory ``path``, with nodes that ``provider`` would leave
    to the processor, as far as the list of its kernels tells."""
    if provider == "cpu":
        return
    left = without_kernel(graph)
    if not left:
        return
    what = ", ".join(f"{count} {name}" for name, count in sorted(left.items()))
    remedies = ["with this version of edgert"] if any("Group" not in name for name in left) else []
    if any("GroupQueryAttention" in name for name in left):
        remedies.append("with --kv f16, CUDA has no attention with keys and values in float32")
    raise EngineError(
        f"provider={provider!r}: ONNX Runtime {LISTED} has no CUDA kernel for nodes of {path}: {what}; "
        f"export the model again {' and '.join(remedies)}, or take provider='cpu'"
    )


@dataclass(frozen=True)
class Loaded:
    """``session``: an onnxruntime.InferenceSession. ``nodes``: how many run on which provider, by its name;
    empty when this ONNX Runtime (before 1.24) does not say. ``device``: where caches belong, "cpu" or
    "cuda"."""

    session: Any
    nodes: dict[str, int]
    device: str


def load_graph(
    graph: Path,
    provider: str,
    threads: int,
    rest: bool = False,
    constants: Mapping[str, Any] | None = None,
) -> Loaded:
    """Load the graph in a file. ``rest``: its threads sleep between two runs, when others have work, in place
    of spinning. ``constants``: arrays in the place of initializers of these names. Raises EngineError when
    ONNX Runtime cannot, and when ``provider`` is an accelerator that did not take all heavy nodes: they would
    run on the processor unnoticed."""
    runtime = load_runtime(provider)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    # That of the file. By default what leads to an output alone runs last, and until then the queries of all
    # layers of a prompt would stay in memory.
    options.execution_order = runtime.ExecutionOrder.PRIORITY_BASED
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if rest:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if constants:
        values = [runtime.OrtValue.ortvalue_from_numpy(value) for value in constants.values()]
        options.add_external_initializers(list(constants), values)
    before = anonymous()
    try:
        session = runtime.InferenceSession(str(graph), options, providers=list(_ORDER[provider]))
    except Exception as error:  # whatever ONNX Runtime's classes derive from
        raise EngineError(f"ONNX Runtime cannot load {graph}: {error!s:.500}") from error
    found = session.get_providers()
    if provider != "cpu" and _ORDER[provider][0] not in found:
        raise EngineError(
            f"provider={provider!r} did not start, only {', '.join(found)} did: see that the driver and the "
            f"libraries of CUDA (and TensorRT) are those that onnxruntime {runtime.__version__} was built "
            "for, or take provider='cpu'"
        )
    # ONNX Runtime has told of it since 1.24.
    told: list[Any] = getattr(session, "get_provider_graph_assignment_info", list)()
    nodes = Counter[str]()
    left = Counter[str]()
    for part in told:
        for node in part.get_nodes():
            nodes[part.ep_name] += 1
            if part.ep_name == _CPU and node.op_type in _HEAVY:
                left[node.op_type] += 1
    if provider != "cpu" and left:
        what = ", ".join(f"{count} {name}" for name, count in sorted(left.items()))
        raise EngineError(
            f"provider={provider!r} leaves {what} of {graph} to the processor: export with another --quant, "
            "or take provider='cpu'"
        )
    if provider == "cpu":
        collapse(before)  # the packed weights, and nothing of the program that loads them
    return Loaded(session, dict(nodes), "cpu" if provider == "cpu" else "cuda")
