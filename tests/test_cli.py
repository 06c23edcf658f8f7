"""The command line on a real model, as a process of its own."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_process import COMMAND, edgert, environment, start
from conftest import real_model
from machine_files import measured

from edgert import machine
from edgert.model import load

QUESTION = "Why is the sky blue?"
STATS = re.compile(
    r"prompt \d+ tokens [\d.]+ tok/s \| generation \d+ tokens [\d.]+ tok/s \| first token [\d.]+ s \| "
    r"peak memory [\d.]+ [MG]B \| [\d.]+ [MG]B a token = [\d.]+ of the [\d.]+ GB/s this machine reads "
    r"\(\d+%\) \| planned \d+ tok/s and [\d.]+ [MG]B \| native \w+, 2 threads"
)


@pytest.fixture(scope="module")
def model() -> Path:
    return real_model("smollm2-135m")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def answer(model: Path, *more: object, **settings: str) -> subprocess.CompletedProcess[str]:
    return edgert("run", model, QUESTION, "--threads", 2, "--max-tokens", 24, *more, **settings)


def test_run_prints_the_answer_and_one_line_of_statistics(model: Path, cache: str) -> None:
    done = answer(model, EDGERT_CACHE=cache)
    assert done.returncode == 0, done.stderr
    assert "sky" in done.stdout and done.stdout.endswith("\n")
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and STATS.fullmatch(lines[0]), done.stderr

    typed = edgert("run", model, "--threads", 2, "--max-tokens", 24, stdin=QUESTION)
    assert typed.stdout == done.stdout


def test_run_reads_a_file_and_json_says_everything(model: Path, cache: str, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(QUESTION)
    done = edgert(
        *("run", model, "-f", prompt, "--json", "--logprobs", 2, "--max-tokens", 8, "--threads", 2),
        EDGERT_CACHE=cache,
    )
    assert done.returncode == 0 and done.stderr == ""
    result = json.loads(done.stdout)
    with load(model) as same:
        reply = same.chat([{"role": "user", "content": QUESTION}], max_tokens=8)
    assert result["text"] == reply.text
    assert len(result["tokens"]) == len(result["logprobs"]) == 8
    assert result["finish_reason"] == "length"
    first = result["logprobs"][0]
    assert first["text"] == "The" and first["top"][0]["token"] == first["token"] == result["tokens"][0]
    assert len(first["top"]) == 2 and first["top"][1]["logprob"] <= first["logprob"] <= 0
    stats = result["stats"]
    assert stats["generated_tokens"] == 8 and stats["engine"]["engine"] == "native"
    # 96.6 MB of weights, and keys and values of 30 layers for some 40 positions.
    assert 90e6 < stats["bytes_per_token"] < 110e6
    assert stats["read_bytes_per_second"] == pytest.approx(
        stats["bytes_per_token"] * stats["generation_tokens_per_second"], rel=1e-6
    )
    assert stats["share_of_machine"] == pytest.approx(
        stats["read_bytes_per_second"] / stats["machine_bytes_per_second"]
    )


def test_raw_continues_the_text(model: Path) -> None:
    done = edgert("run", model, "--raw", "The capital of France is", "--max-tokens", 1)
    assert done.stdout == " Paris\n"


def test_system_message_and_stop(model: Path) -> None:
    plain = answer(model)
    pirate = answer(model, "--system", "You are a pirate. Answer in one word of pirate slang: Arrr.")
    assert pirate.returncode == 0 and pirate.stdout != plain.stdout
    assert answer(model, "--stop", " blue").stdout == plain.stdout.partition(" blue")[0] + "\n"


def test_seed_repeats_the_answer(model: Path) -> None:
    hot = ("--temperature", 1.5, "--top-k", 50, "--seed")
    first, again, other = (answer(model, *hot, seed).stdout for seed in (7, 7, 8))
    assert first == again != other


def test_run_streams(model: Path) -> None:
    """The first words are on the pipe while the answer is still being made."""
    process = start("run", model, "Write a long story about the sea.", "--max-tokens", 200)
    assert process.stdout is not None
    first = process.stdout.read(1)
    assert first and process.poll() is None
    rest, errors = process.communicate(timeout=300)
    assert len(rest) > 200 and process.returncode == 0, errors


def test_ctrl_c_ends_run_with_130(model: Path) -> None:
    process = start("run", model, "Write a long story about the sea.", "--max-tokens", 5000)
    assert process.stdout is not None and process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "edgert: interrupted" and "Traceback" not in errors


def test_reader_that_goes_away(model: Path) -> None:
    process = start("run", model, "Write a long story about the sea.", "--max-tokens", 5000)
    assert process.stdout is not None and process.stderr is not None and process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""


def test_chat_over_a_pipe(model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    lines = [
        QUESTION,
        "/stats",
        "And why is grass green?",
        "/stats",
        f"/save {saved}",
        "/clear",
        f"/load {saved}",
        "/nonsense",
        "/help",
    ]
    done = edgert("chat", model, "--threads", 2, "--max-tokens", 24, stdin="\n".join(lines) + "\n")
    assert done.returncode == 0, done.stderr
    assert "sky" in done.stdout and "green" in done.stdout
    stats = [line for line in done.stderr.splitlines() if line.startswith("prompt ")]
    reused = [int(found[1]) if (found := re.search(r"\((\d+) reused\)", line)) else 0 for line in stats]
    assert reused[0] == 0 and reused[1] > 30, "the second turn keeps the cache of the first"
    assert "edgert: error: there is no /nonsense" in done.stderr and "/clear" in done.stderr
    assert done.stderr.count("(4 messages)") == 2
    roles = [m["role"] for m in json.loads(saved.read_text())["messages"]]
    assert roles == ["user", "assistant", "user", "assistant"]


def test_chat_ctrl_c_stops_the_answer_and_not_the_program(model: Path, cache: str) -> None:
    """On a terminal: Ctrl-C in an answer, Ctrl-C at the prompt, another question, Ctrl-D."""
    master, slave = pty.openpty()
    command = [*COMMAND, "chat", str(model), "--max-tokens", "3000"]
    process = subprocess.Popen(
        command,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment(EDGERT_CACHE=cache, TERM="dumb"),
        start_new_session=True,
        preexec_fn=_take_terminal,
    )
    os.close(slave)
    screen = _Screen(master)
    screen.wait_for(">>> ")
    screen.type("Write a very long story about the sea.\r")
    screen.wait_for("the", after="sea.\r\n")
    screen.type("\x03")
    screen.wait_for(">>> ")
    time.sleep(0.5)  # Python's input() loses a signal that comes between its prompt and its wait for a key
    screen.type("\x03")
    screen.wait_for("Ctrl-D leaves)")
    screen.type(QUESTION + "\r")
    screen.wait_for("the", after=QUESTION + "\r\n")
    screen.type("\x03")
    screen.wait_for(">>> ")
    screen.type("\x04")
    assert process.wait(timeout=60) == 0, screen.text
    os.close(master)
    assert "Traceback" not in screen.text
    history = Path(cache) / "chat_history"
    assert QUESTION in history.read_text() and history.stat().st_mode & 0o077 == 0


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class _Screen:
    """The other end of a terminal."""

    def __init__(self, master: int) -> None:
        self.master, self.text, self.seen = master, "", 0

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def wait_for(self, what: str, after: str = "") -> None:
        """Until ``what`` appears beyond what earlier calls saw (and beyond ``after``)."""
        end = time.monotonic() + 90
        while time.monotonic() < end:
            begin = self.text.find(after, self.seen)
            at = self.text.find(what, begin + len(after)) if begin >= 0 else -1
            if at >= 0:
                self.seen = at + len(what)
                return
            if select.select([self.master], [], [], 0.2)[0]:
                self.text += os.read(self.master, 65536).decode(errors="replace")
        raise AssertionError(f"{what!r} did not appear: {self.text[self.seen :]!r}")


def test_info(model: Path) -> None:
    done = edgert("info", model)
    assert done.returncode == 0 and done.stderr == ""
    for pattern in (
        r"architecture llama, 134\.5 M parameters",
        r"licence +apache-2\.0",
        r"types +Q4_1 66\.4 MB \(69%\), Q8_0 30\.1 MB",
        r"layers +30, 30 full attention",
        r"heads +9 query, 3 key/value, 64 wide",
        r"context +8192 tokens",
        r"tokenizer +gpt2, pre-tokenizer smollm, 49152 tokens",
        r"body +66\.5 MB",
        r"embedding +30\.1 MB \(31%\) \(also the head",
        r"engine +native",
    ):
        assert re.search(pattern, done.stdout), (pattern, done.stdout)

    facts = json.loads(edgert("info", real_model("gemma-3-270m"), "--json").stdout)
    assert (facts["full_attention_layers"], facts["sliding_window_layers"], facts["window"]) == (3, 15, 512)
    assert facts["tied_head"] and facts["bytes_by_part"]["head"] == 0 and not facts["chat_template"]
    assert facts["bytes_by_part"]["embedding"] == 262144 * 640 // 32 * 34, "Q8_0"
    assert sum(facts["bytes_by_type"].values()) == sum(facts["bytes_by_part"].values())
    # 3 layers grow without end, 15 stop at 512 positions; one key/value head of 256, 2 bytes each.
    assert facts["kv_bytes_full_context"] == 2 * 2 * 256 * (3 * 32768 + 15 * 512)


def test_run_takes_the_doctors_word(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGERT_CACHE", str(tmp_path))
    machine.store(measured(read={2: 4e12}))
    kept = json.loads(answer(model, "--json", EDGERT_CACHE=str(tmp_path)).stdout)["stats"]
    assert kept["machine_bytes_per_second"] == 4e12
    machine.store(measured(read={2: 1e3}))
    probed = json.loads(answer(model, "--json", EDGERT_CACHE=str(tmp_path)).stdout)["stats"]
    assert probed["machine_bytes_per_second"] > 1e8, "slower than what was reached: measured again"


def test_pull_list() -> None:
    done = edgert("pull", "--list")
    assert done.returncode == 0
    assert re.search(r"^smollm2-135m .*Apache-2\.0 +98\.4 MB", done.stdout, re.M)


def test_help_version_and_start_time() -> None:
    import edgert as package

    assert edgert("--version").stdout == f"edgert {package.__version__}\n"
    for verb in ("run", "chat", "pull", "info", "doctor"):
        assert verb in edgert("--help").stdout
        assert f"usage: edgert {verb}" in edgert(verb, "--help").stdout

    code = "import sys, edgert.cli; edgert.cli.main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    slow = {"numpy", "tokenizers", "jinja2", "rich", "psutil", "ssl", "urllib.request", "edgert._native"}
    assert slow & set(done.stderr.split()) == set()


def test_run_imports_nothing_it_does_not_need(model: Path) -> None:
    code = "import sys; from edgert.cli import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    done = edgert("run", model, "Hi", "--max-tokens", 1, command=[sys.executable, "-c", code])
    unwanted = {
        "rich",
        "psutil",
        "ssl",
        "urllib.request",
        "huggingface_hub",
        "llama_cpp",
        "cpuinfo",
        "asyncio",
    }
    assert unwanted & set(done.stderr.split()) == set()
