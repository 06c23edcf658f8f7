"""Where onnxruntime-gpu puts the nodes of an export, looked up without a GPU:
``python -m edgert.bench.onnx_placement DIR --package PATH``.

PATH is where ``pip install --no-deps --target PATH onnxruntime-gpu==1.24.4`` put it. Its CUDA provider needs
the libraries of CUDA and one device to register its kernels and to choose nodes by them, and computes
nothing then. So libraries are built that have every function it asks for: those that give memory do, the
others return 0. Then a step by each head is run. What it gives is nothing, since no kernel computes, but each
looks at its inputs first, and refuses what it cannot take. Releases after 1.24 also refuse this device.
Needs gcc, nm and readelf.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# Of cudaDeviceProp: bytes of memory at 288 and of shared memory at 296, threads of a warp and of a block at
# 308 and 320, blocks of a grid at 336, the architecture (8.7, an Orin) at 360, multiprocessors at 388, in
# CUDA 13 at 384.
_PROPERTIES = """memset(p, 0, 1008); strcpy(p, "none"); *(long*)(p + 288) = 8l << 30;
*(long*)(p + 296) = 49152; *(int*)(p + 308) = 32; *(int*)(p + 320) = 1024;
*(int*)(p + 336) = 0x7fffffff; *(int*)(p + 340) = *(int*)(p + 344) = 65535; *(int*)(p + 360) = 8;
*(int*)(p + 364) = 7; *(int*)(p + 384) = *(int*)(p + 388) = 8; return 0;"""
_ALLOCATE = "*p = aligned_alloc(256, (n + 511) / 256 * 256); return 0;"
_FUNCTIONS = {
    "cudaMalloc": ("void** p, long n", _ALLOCATE),
    "cudaMallocHost": ("void** p, long n", _ALLOCATE),
    "cudaHostAlloc": ("void** p, long n, int f", _ALLOCATE),
    "cudaMallocAsync": ("void** p, long n, void* s", _ALLOCATE),
    "cudaFree": ("void* p", "free(p); return 0;"),
    "cudaFreeHost": ("void* p", "free(p); return 0;"),
    "cudaMemcpy": ("void* to, void* from, long n, int k", "memcpy(to, from, n); return 0;"),
    "cudaMemcpyAsync": ("void* to, void* from, long n, int k, void* s", "memcpy(to, from, n); return 0;"),
    "cudaMemset": ("void* p, int v, long n", "memset(p, v, n); return 0;"),
    "cudaMemsetAsync": ("void* p, int v, long n, void* s", "memset(p, v, n); return 0;"),
    "cudaGetDeviceCount": ("int* n", "*n = 1; return 0;"),
    "cudaGetDevice": ("int* n", "*n = 0; return 0;"),
    "cudaMemGetInfo": ("long* a, long* b", "*a = *b = 8l << 30; return 0;"),
    "cudaDriverGetVersion": ("int* n", "*n = 13000; return 0;"),
    "cudaRuntimeGetVersion": ("int* n", "*n = 13000; return 0;"),
    "cudaGetDeviceProperties": ("char* p, int d", _PROPERTIES),
    "cudaGetDeviceProperties_v2": ("char* p, int d", _PROPERTIES),
    "cudaPointerGetAttributes": ("void* p, void* a", "memset(p, 0, 32); return 0;"),
    "cudaStreamIsCapturing": ("void* s, int* p", "*p = 0; return 0;"),
    "cudaDeviceGetAttribute": (
        "int* p, int a, int d",
        "*p = a == 75 || a == 16 ? 8 : a == 76 ? 7 : 1024; return 0;",
    ),
}
_ASKED = re.compile(r"__cuda|cuda|cublas|cudnn|cufft|curand|cu[A-Z]")
# What runs with these libraries: a process of its own, since they are found when it starts.
_LOAD = """
import collections, sys
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 1
options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
zero = onnxruntime.OrtValue.ortvalue_from_numpy(numpy.array(0, numpy.uint8))
if sys.argv[2] == "flash":
    options.add_external_initializers(["flash.integers"], [zero])
providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=providers)
if session.get_providers() != providers:
    sys.exit("the CUDA provider did not start")
nodes = collections.Counter()
for part in session.get_provider_graph_assignment_info():
    nodes.update((part.ep_name, node.op_type) for node in part.get_nodes())
print("| onnxruntime-gpu", onnxruntime.__version__, "| operator | nodes |")
print("|---|---|---|")
for (provider, op), count in sorted(nodes.items()):
    print(f"| {provider.removesuffix('ExecutionProvider')} | {op} | {count} |")
sizes = {"T": 1, "R": 1, "E": 0, "slots": 64, "window_slots": 64}
types = {"float": numpy.float32, "bool": bool}
for flash in (False, True) if sys.argv[2] == "flash" else (False,):
    binding = session.io_binding()
    for given in session.get_inputs():
        kind = given.type.removeprefix("tensor(").removesuffix(")")
        value = numpy.zeros([sizes.get(size, size) for size in given.shape], types.get(kind, kind))
        if "." in given.name:
            cache = onnxruntime.OrtValue.ortvalue_from_numpy(value, "cuda", 0)
            binding.bind_ortvalue_input(given.name, cache)
            binding.bind_ortvalue_output(given.name.replace(".", "_out."), cache)
        else:
            binding.bind_cpu_input(given.name, numpy.array(flash) if given.name == "flash" else value)
    for made in ("flash_ids", "flash_logits") if flash else ("logits",):
        binding.bind_output(made)
    try:
        session.run_with_iobinding(binding)
        refused = "no kernel refused its inputs"
    except Exception as error:
        refused = str(error)[:400]
    print("\\nstep by the", "FlashHead:" if flash else "dense head:", refused)
"""


def build(provider: Path, into: Path) -> None:
    """The libraries that ``provider`` wants, as far as they are CUDA's."""
    needed = re.findall(r"NEEDED.*\[(libcu[^]]*)\]", _output("readelf", "-d", provider))
    asked: dict[str, dict[str, str]] = {name: {} for name in needed}
    runtime = next(name for name in needed if name.startswith("libcudart"))
    for line in _output("nm", "-D", "--undefined-only", "--with-symbol-versions", provider).splitlines():
        name, _, version = line.split()[-1].replace("@@", "@").partition("@")
        if _ASKED.match(name):
            library = version if version in asked else "libcuda.so.1" if name.startswith("cuT") else runtime
            asked[library][name] = version
    for library, functions in asked.items():
        code = ["#include <stdlib.h>", "#include <string.h>", "static long handle[64];"]
        for name in functions or {"nothing": ""}:
            arguments, body = _FUNCTIONS.get(name, ("", "return 0;"))
            if name == "__cudaRegisterFatBinary":
                body = "return (long)handle;"
            code.append(f"long {name}({arguments}) {{ {body} }}")
        (into / "code.c").write_text("\n".join(code))
        version = next((v for v in functions.values() if v), library)
        (into / "names").write_text(f"{version} {{ global: *; }};")
        flags = ["-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{library}"]
        flags += [f"-Wl,--version-script={into / 'names'}", "-o", str(into / library)]
        subprocess.run(["gcc", *flags, str(into / "code.c")], check=True)


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m edgert.bench.onnx_placement")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--package", type=Path, required=True, help="where onnxruntime-gpu is installed")
    args = parser.parse_args()
    graph = args.directory / "model.onnx"
    with tempfile.TemporaryDirectory() as name:
        build(args.package / "onnxruntime/capi/libonnxruntime_providers_cuda.so", Path(name))
        environment = {**os.environ, "LD_LIBRARY_PATH": name, "PYTHONPATH": str(args.package)}
        flash = "flash" if b"flash.integers" in graph.read_bytes() else "none"
        done = subprocess.run(
            [sys.executable, "-c", _LOAD, str(graph), flash],
            env=environment,
            capture_output=True,
            text=True,
        )
    copies = re.findall(r"Add (Memcpy\w+ \w+ \S+) for", done.stderr)
    print(done.stdout, end="")
    if done.returncode:
        print(done.stderr.strip()[-500:], file=sys.stderr)
        return 1
    print(f"\n{len(copies)} copies: {', '.join(copies)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
