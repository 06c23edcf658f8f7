"""The rules of the house: who may import whom, and what stands in more than one place agrees."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Folder -> package it is installed as, and the parts of the project it may import besides itself.
PACKAGES = {
    "edgert": "edgert",
    "models": "edgert.models",
    "platforms": "edgert.platforms",
    "export": "edgert.export",
    "bench": "edgert.bench",
}
MAY_IMPORT = {
    "edgert": {"models", "platforms", "native"},
    "models": set(),
    "platforms": set(),
    "export": {"edgert", "models", "platforms", "native"},
    "bench": {"edgert", "models", "platforms", "native"},
}
HEAVY = {"torch", "onnx", "transformers"}
# What an extra brings: imported where it is needed, inside a function, by the one file named here.
OPTIONAL = {
    "llama_cpp": {"edgert/engines/llamacpp.py"},
    "onnxruntime": {"edgert/engines/onnx_providers.py"},
    "huggingface_hub": {"edgert/hub.py"},
    "matplotlib": {"edgert/cli/figures.py"},
}
# Distribution -> module, where the names differ.
MODULE_OF = {"py-cpuinfo": "cpuinfo", "nanobind-backend": "nanobind_backend"}


def module_name(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([PACKAGES[folder], *(part for part in rest if part != "__init__")])


def imports(path: Path, source: str, *, top_level_only: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, relative ones resolved, `importlib` calls with a
    constant included. `from a import b` gives `a.b`: b may be a module."""
    tree = ast.parse(source)
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    deferred = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if top_level_only and id(node) in deferred:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__", "run_module")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, str(node.args[0].value)


def part_of(name: str) -> str | None:
    """The part of the project a dotted name belongs to; None for anything else."""
    head, *rest = name.split(".")
    if head != "edgert":
        return head if head in PACKAGES else None
    if rest and rest[0] == "_native":
        return "native"
    return rest[0] if rest and rest[0] in PACKAGES else "edgert"


def violations(path: Path, source: str) -> list[str]:
    folder = path.relative_to(ROOT).parts[0]
    where = path.relative_to(ROOT).as_posix()
    found = []
    for line, name in imports(path, source):
        part = part_of(name)
        if part is not None and part != folder and part not in MAY_IMPORT[folder]:
            found.append(f"{where}:{line}: {folder} must not import {name}")
        if folder in ("edgert", "models", "platforms") and name.split(".")[0] in HEAVY:
            found.append(f"{where}:{line}: {name} belongs in export, bench or tests")
        if name.split(".")[0] in PACKAGES.keys() - {"edgert"}:
            found.append(f"{where}:{line}: {name} is installed as edgert.{name}")
    return found


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_imports_point_one_way() -> None:
    paths = sources(*PACKAGES)
    assert {path.relative_to(ROOT).parts[0] for path in paths} == set(PACKAGES)
    assert [v for path in paths for v in violations(path, path.read_text())] == []


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("models/x.py", "from edgert.errors import EdgertError"),
        ("models/x.py", "from ..errors import EdgertError"),
        ("models/x.py", "from .. import platforms"),
        ("models/x.py", "import edgert._native"),
        ("platforms/x.py", "import edgert.models.spec"),
        ("edgert/engines/x.py", "from ..bench import report"),
        ("edgert/x.py", "def f():\n    import torch.nn"),
        ("edgert/x.py", "import importlib\nimportlib.import_module('edgert.export.flashhead')"),
        ("edgert/x.py", "from models import spec"),
        ("export/x.py", "from edgert.bench import report"),
    ],
)
def test_a_forbidden_import_is_seen(where: str, source: str) -> None:
    assert violations(ROOT / where, source)


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("models/x.py", "from .spec import ModelSpec\nimport edgert.models.llama\nimport numpy"),
        (
            "edgert/engines/x.py",
            "from .. import _native\nfrom ..models import spec\nfrom .base import Engine",
        ),
        ("export/x.py", "import torch\nfrom edgert.models import load_spec\nimport edgert"),
    ],
)
def test_an_allowed_import_passes(where: str, source: str) -> None:
    assert violations(ROOT / where, source) == []


def declared_modules() -> set[str]:
    names = {distribution(requirement) for requirement in PYPROJECT["project"]["dependencies"]}
    return {MODULE_OF.get(name, name.replace("-", "_")) for name in names}


def distribution(requirement: str) -> str:
    return requirement.split(";")[0].split(">")[0].split("=")[0].split("<")[0].split("[")[0].strip()


def test_the_runtime_imports_only_what_it_declares() -> None:
    allowed = set(sys.stdlib_module_names) | {"edgert"} | declared_modules()
    found = []
    for path in sources("edgert", "models", "platforms"):
        where = path.relative_to(ROOT).as_posix()
        source = path.read_text()
        top = set(imports(path, source, top_level_only=True))
        for line, name in imports(path, source):
            module = name.split(".")[0]
            if module in allowed or (where in OPTIONAL.get(module, ()) and (line, name) not in top):
                continue
            found.append(f"{where}:{line}: {module}")
    assert found == []


def test_importing_edgert_loads_nothing_heavy() -> None:
    heavy = HEAVY | set(OPTIONAL)
    code = f"import edgert, edgert.cli, sys; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_build_requirements_agree() -> None:
    assert PYPROJECT["dependency-groups"]["build"] == PYPROJECT["build-system"]["requires"]


def test_every_package_folder_is_mapped_into_edgert() -> None:
    mapping = PYPROJECT["tool"]["scikit-build"]["wheel"]["packages"]
    assert {source: target.replace("/", ".") for target, source in mapping.items()} == PACKAGES


def stub_names(stub: str) -> dict[str, list[str]]:
    """Dotted name -> argument names, for everything public a stub declares."""
    names: dict[str, list[str]] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                names[prefix + node.name] = []
                visit(node.body, prefix + node.name + ".")
            elif isinstance(node, ast.FunctionDef):
                arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                names.setdefault(prefix + node.name, []).extend(arguments)
            elif isinstance(node, ast.AnnAssign):
                names[prefix + ast.unparse(node.target)] = []

    visit(ast.parse(stub).body, "")
    return names


def test_the_committed_stub_is_the_built_module() -> None:
    """Names and arguments, not text: how types are spelled belongs to nanobind's version."""
    stubgen = pytest.importorskip("nanobind.stubgen")
    import edgert._native as native

    generator = stubgen.StubGen(native)
    generator.put(native)
    built, committed = stub_names(generator.get()), stub_names((ROOT / "edgert/_native.pyi").read_text())
    assert committed == built, "run `make stub` and commit edgert/_native.pyi"
