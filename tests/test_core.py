"""The core without Python: its kernel tests, and whole tiny models on every ISA level; the same
cross-built for AArch64 under qemu (`make test-arm`)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from edgert.models import ModelSpec

from edgert import _native

ROOT = Path(__file__).parent.parent
QEMU = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]
MODELS = [
    ("llama", "Q4_1"),
    ("llama3", "Q8_0"),
    ("llama-256", "mixed"),
    ("qwen2", "Q5_0"),
    ("qwen3", "F16"),
    ("gemma3", "Q4_0"),
    ("lfm2", "Q5_1"),
]
arm = pytest.mark.arm
LAYER_FIELDS = ("kind", "n_kv_heads", "window", "rope_base", "rope_scale")


def run(*command: str | Path, env: dict[str, str] | None = None) -> bytes:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, env={**os.environ, **(env or {})}
    )
    assert done.returncode == 0, (done.stdout[-3000:] + done.stderr[-3000:]).decode(errors="replace")
    return done.stdout


def cmake() -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which("cmake", path=path)
    assert found, "cmake is not installed"
    return found


@pytest.fixture(scope="module")
def host() -> Path:
    """Where the programs are, built from the objects of the editable install."""
    trees = sorted(ROOT.glob("build/cp310-abi3-*/CMakeCache.txt"))
    assert trees, "no build tree: run make"
    run(cmake(), "--build", trees[0].parent, "--target", "core_tests")
    return trees[0].parent / "native" / "tests"


@pytest.fixture(scope="module")
def aarch64() -> Path:
    if not shutil.which("aarch64-linux-gnu-g++") or not shutil.which("qemu-aarch64"):
        pytest.skip("needs Debian's g++-aarch64-linux-gnu and qemu-user")
    tree = ROOT / "build" / "aarch64"
    toolchain = ROOT / "cmake" / "aarch64.cmake"
    run(cmake(), "-S", ROOT, "-B", tree, f"-DCMAKE_TOOLCHAIN_FILE={toolchain}", "-DCMAKE_BUILD_TYPE=Release")
    run(cmake(), "--build", tree, "--target", "core_tests", "--parallel", str(os.cpu_count()))
    return tree / "native" / "tests"


def spec_text(spec: ModelSpec) -> str:
    fields = spec.as_dict()
    layers = fields.pop("layers")
    del fields["family"], fields["name"]
    lines = [f"{name} {int(value) if isinstance(value, bool) else value}" for name, value in fields.items()]
    for layer in layers:
        lines.append("layer " + " ".join(str(layer[key]) for key in LAYER_FIELDS))
    return "\n".join(lines)


def logits(
    program: list[str | Path], name: str, quant: str, isa: str, threads: int, tmp_path: Path
) -> npt.NDArray[np.float32]:
    """[40, vocab]: 20 tokens prefilled, 20 decoded, past every window and page of 16."""
    tiny_models = pytest.importorskip("tiny_models")
    tiny = tiny_models.tiny(name, quant)
    tokens = tiny_models.prompt(tiny, 40)
    spec = tmp_path / "spec"
    spec.write_text(spec_text(tiny.spec))
    out = run(*program, tiny.path, spec, str(threads), *map(str, tokens), env={"EDGERT_ISA": isa})
    return np.frombuffer(out, np.float32).reshape(40, -1)


def check_close(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32], quant: str) -> None:
    """Levels differ in the order in which sums of squares and softmax totals are added: a few units
    in the last place. That can tip the rounding of a key or value to f16 (1/2048 of one value); with
    quantised weights also that of an int8 activation (1/127 of its block's largest: about 2 % of one
    value in a row of 64 to 256, 0.2 % of the row), several of them in a model."""
    assert np.isfinite(found).all()
    error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < (1e-4 if quant == "F16" else 3e-2)


def test_no_wake_up_is_lost(host: Path) -> None:
    run(host / "test_wake", "5")


@pytest.mark.slow
def test_no_wake_up_is_lost_in_minutes(host: Path) -> None:
    run(host / "test_wake", "120")


@pytest.mark.parametrize("program", ["test_kernels", "test_records"])
def test_kernels_agree_with_arithmetic(program: str, host: Path) -> None:
    out = run(host / program).decode()
    assert [line.split(":")[0] for line in out.splitlines()] == _native.isa_levels()


def test_pages_of_a_store_are_what_was_written(host: Path, tmp_path: Path) -> None:
    assert b"every page as it was written" in run(host / "test_page_store", tmp_path)


def test_files_of_an_isa_level_share_no_functions(host: Path) -> None:
    """A weak function in an object built with ISA flags may be the copy the linker keeps for everybody,
    and would then run on a CPU without these instructions."""
    objects = sorted(host.parent.rglob("kernels_*.o"))
    assert len(objects) >= 2
    for path in objects:
        symbols = [line.split()[-2:] for line in run("nm", "--defined-only", path).decode().splitlines()]
        assert [name for kind, name in symbols if kind in "WVi"] == [], path.name


@pytest.mark.parametrize(("name", "quant"), MODELS)
def test_levels_and_threads_agree_on_tiny_models(name: str, quant: str, host: Path, tmp_path: Path) -> None:
    program: list[str | Path] = [host / "run_model"]
    scalar = logits(program, name, quant, "scalar", 1, tmp_path)
    for isa in _native.isa_levels():
        one = logits(program, name, quant, isa, 1, tmp_path)
        check_close(one, scalar, quant)
        assert np.array_equal(logits(program, name, quant, isa, 3, tmp_path), one)


@arm
def test_a_cpu_without_avx2_is_told_so(host: Path, tmp_path: Path) -> None:
    if not shutil.which("qemu-x86_64"):
        pytest.skip("needs Debian's qemu-user")
    tiny = pytest.importorskip("tiny_models").tiny("llama", "Q4_1")
    spec = tmp_path / "spec"
    spec.write_text(spec_text(tiny.spec))
    old = ["qemu-x86_64", "-cpu", "Nehalem", host / "run_model", tiny.path, spec, "1", "5", "6"]
    refused = subprocess.run(old, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "neither AVX2" in refused.stderr and "EDGERT_ISA=scalar" in refused.stderr
    forced = run(*old, env={"EDGERT_ISA": "scalar"})
    here = run(*old[3:], env={"EDGERT_ISA": "scalar"})
    assert len(forced) == 2 * tiny.spec.vocab_size * 4
    assert np.allclose(
        np.frombuffer(forced, np.float32), np.frombuffer(here, np.float32), rtol=1e-5, atol=1e-5
    )


@arm
@pytest.mark.parametrize("program", ["test_kernels", "test_records"])
def test_arm_kernels_agree_with_arithmetic(program: str, aarch64: Path) -> None:
    out = run(*QEMU, aarch64 / program).decode()
    assert [line.split(":")[0] for line in out.splitlines()] == ["neon", "scalar"]


@arm
@pytest.mark.parametrize(("name", "quant"), MODELS)
def test_arm_agrees_with_this_machine_on_tiny_models(
    name: str, quant: str, aarch64: Path, host: Path, tmp_path: Path
) -> None:
    here = logits([host / "run_model"], name, quant, "scalar", 1, tmp_path)
    program = [*QEMU, aarch64 / "run_model"]
    neon = logits(program, name, quant, "neon", 1, tmp_path)
    check_close(neon, here, quant)
    assert np.array_equal(logits(program, name, quant, "neon", 2, tmp_path), neon)
