"""What we ship: the source archive builds, away from the repository, the one wheel that installs
and runs where nothing else is."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {"torch", "onnx", "onnxruntime", "transformers", "llama-cpp-python", "llama_cpp_python"}


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "-o", out, ROOT)
    (archive,) = out.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the unpacked source archive, in a directory the repository does not know."""
    elsewhere, out = tmp_path_factory.mktemp("elsewhere"), tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(elsewhere, filter="data")
    (source,) = elsewhere.iterdir()
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "-o", out, source)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of a virtual environment with the wheel and what it asks for."""
    venv = tmp_path_factory.mktemp("fresh") / "venv"
    run(sys.executable, "-m", "venv", venv)
    run(venv / "bin/python", "-m", "pip", "install", "-q", wheel)
    return venv / "bin"


def test_sdist_holds_what_the_repository_holds(sdist: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs the git repository to compare with")
    with tarfile.open(sdist) as archive:
        names = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    known = set(run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\n"))
    assert names - known == {"PKG-INFO"}
    assert {name for name in known - names if name and not name.startswith(".")} == set()


def test_wheel_is_one_abi3_wheel_with_edgert_only(wheel: Path) -> None:
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"edgert", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    assert [name for name in names if name.endswith(".so")] == ["edgert/_native.abi3.so"]
    folders = {name.split("/")[1] for name in names if name.count("/") > 1 and name.startswith("edgert/")}
    assert {"models", "platforms", "export", "bench", "cli", "engines"} <= folders
    assert {"edgert/py.typed", "edgert/_native.pyi"} <= set(names)


def test_wheel_asks_for_nothing_heavy(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    required = [value for value in metadata.get_all("Requires-Dist", []) if "extra ==" not in value]
    assert len(required) >= 4
    assert [value for value in required for heavy in FORBIDDEN if value.startswith(heavy)] == []


def test_fresh_environment_runs(fresh: Path, tmp_path: Path) -> None:
    version = run(fresh / "edgert", "--version", cwd=tmp_path)
    imported = run(
        fresh / "python", "-c", "import edgert; print(edgert.__file__, edgert.__version__)", cwd=tmp_path
    )
    assert version.split() == ["edgert", imported.split()[1]]
    assert Path(imported.split()[0]).is_relative_to(fresh.parent)
    installed = {
        line.split("==")[0].lower() for line in run(fresh / "python", "-m", "pip", "freeze").split("\n")
    }
    assert installed & FORBIDDEN == set()


def test_fresh_environment_explains_the_machine(fresh: Path, tmp_path: Path) -> None:
    levels = run(
        fresh / "python", "-c", "from edgert import _native; print(*_native.isa_levels())", cwd=tmp_path
    ).split()
    assert levels[-1] == "scalar"
    assert levels[0] in run(fresh / "edgert", "doctor", cwd=tmp_path)
