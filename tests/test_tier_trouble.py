"""A session with pages on a disk through what can befall the disk: no wrong token, the text so far is kept,
and the error says what to change."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import real_model
from edgert.bench.text import prose
from file_limit import file_limit
from kv_pages import files_of
from tier_runs import least_memory, long_tiny, on_disk

import edgert
from edgert import _native
from edgert.cost import kv_bytes
from edgert.engines import native_spec
from edgert.errors import EngineError
from edgert.generate import Stream
from edgert.model import Model

CONTEXT, PAGE = 4096, 16  # tokens
REPLY = 1000


@dataclass
class Setting:
    path: Path
    budget: int
    memory: int
    slots: int
    prompt: list[int]
    ends: frozenset[int]  # tokens that end a turn
    expected: tuple[int, ...]  # the reply to the prompt when there is no trouble

    def load(self, directory: Path, **more: Any) -> Model:
        options = {"attention": "sparse", "budget": self.budget, "memory": self.memory, "context": CONTEXT}
        return edgert.load(self.path, page_directory=directory, head="dense", **options, **more)

    def reply(self, tokens: int) -> dict[str, Any]:
        """Options of a reply that ends with that many tokens."""
        return {"max_tokens": tokens, "logit_bias": dict.fromkeys(self.ends, -1e9)}

    @property
    def page_bytes(self) -> int:
        file = _native.GgufFile(str(self.path))
        return int(kv_bytes(native_spec(file, file.metadata), PAGE))

    @property
    def pages(self) -> int:
        """Of the prompt."""
        return -(-len(self.prompt) // PAGE)


@pytest.fixture(
    scope="module",
    params=["tiny", pytest.param("smollm2-135m", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
)
def setting(request: pytest.FixtureRequest) -> Setting:
    tiny = request.param == "tiny"
    path, budget = (long_tiny(), 64) if tiny else (real_model(request.param), 256)
    made = Setting(path, budget, least_memory(path, CONTEXT, budget), 0, [], frozenset(), ())
    with on_disk() as here, made.load(here) as model:
        made.slots = model.engine.describe()["pages_in_memory"]
        made.ends = frozenset(model.tokenizer.eos_ids)
        words = [i * i % 300 for i in range(CONTEXT)] if tiny else model.encode(prose(4000))
        made.prompt = words[: (made.slots + 40) * PAGE - 5]
        made.expected = model.generate(made.prompt, **made.reply(REPLY)).tokens
    assert len(made.expected) == REPLY
    return made


@pytest.fixture
def disk() -> Iterator[Path]:
    with on_disk() as here:
        yield here


def until_it_fails(stream: Stream) -> tuple[tuple[int, ...], str]:
    """The tokens that came, which the reply still has, and the error."""
    with pytest.raises(EngineError) as caught:
        for _ in stream:
            pass
    reply = stream.reply
    assert reply.finish_reason == "cancelled"
    # Bytes of a character that is not complete yet are held back.
    whole = stream._session.model.tokenizer.decode(list(reply.tokens))
    assert reply.text.rstrip("\ufffd") == whole.rstrip("\ufffd")
    return reply.tokens, str(caught.value)


def test_a_full_disk(setting: Setting, disk: Path) -> None:
    """A reply goes on while pages that cannot be written have room in memory; then it ends with its text, and
    where there is more room it goes on."""
    with setting.load(disk) as model, model.session() as session:
        with file_limit((setting.pages - 56) * setting.page_bytes):
            tokens, error = until_it_fails(session.stream(setting.prompt, **setting.reply(REPLY)))
            assert f"the file in {disk} cannot be written: File too large" in error
            assert "free space there, choose another directory, or allow more memory" in error
            assert 16 < len(tokens) < REPLY and tokens == setting.expected[: len(tokens)]
        so_far = [*setting.prompt, *tokens]
        rest = session.generate(so_far, **setting.reply(8))
        assert rest.stats.reused_tokens == len(so_far) - 1
    assert_continues(setting, disk, tokens, rest.tokens)


def test_a_file_system_that_is_full(setting: Setting, tmp_path: Path) -> None:
    image, mounted = tmp_path / "image", tmp_path / "mounted"
    image.write_bytes(b"")
    os.truncate(image, 1 << 24 if setting.page_bytes < 1 << 17 else 1 << 26)
    mounted.mkdir()
    if (
        not shutil.which("mkfs.ext4")
        or subprocess.run(["mkfs.ext4", "-q", "-F", image], capture_output=True).returncode
        or subprocess.run(["mount", "-o", "loop", image, mounted], capture_output=True).returncode
    ):
        pytest.skip("may not make and mount a file system")
    try:
        free = os.statvfs(mounted).f_bavail * os.statvfs(mounted).f_bsize
        leave = (setting.pages - 60) * setting.page_bytes
        with (mounted / "others").open("wb") as others:
            others.write(bytes(free - leave))
        with setting.load(mounted) as model, model.session() as session:
            tokens, error = until_it_fails(session.stream(setting.prompt, **setting.reply(REPLY)))
            assert "cannot be written: No space left on device; free space there" in error
            assert 0 < len(tokens) < REPLY and tokens == setting.expected[: len(tokens)]
            (mounted / "others").unlink()
            rest = session.generate([*setting.prompt, *tokens], **setting.reply(8))
        assert {entry.name for entry in mounted.iterdir()} <= {"lost+found"}
        assert_continues(setting, mounted, tokens, rest.tokens)
    finally:
        subprocess.run(["umount", mounted], check=True)


def assert_continues(
    setting: Setting, directory: Path, tokens: tuple[int, ...], rest: tuple[int, ...]
) -> None:
    """That ``rest`` are the tokens of a run without trouble, which also stopped after ``tokens``."""
    with setting.load(directory) as model, model.session() as session:
        assert session.generate(setting.prompt, **setting.reply(len(tokens))).tokens == tokens
        assert session.generate([*setting.prompt, *tokens], **setting.reply(len(rest))).tokens == rest


def test_a_limit_of_the_file(setting: Setting, disk: Path) -> None:
    limit = (setting.pages - 56) * setting.page_bytes
    with setting.load(disk, page_limit=limit) as model, model.session() as session:
        tokens, error = until_it_fails(session.stream(setting.prompt, **setting.reply(REPLY)))
        assert "may not outgrow" in error
        assert "raise that limit, allow more memory, or shorten the context" in error
        assert 16 < len(tokens) < REPLY and tokens == setting.expected[: len(tokens)]
        assert session.generate(setting.prompt[:500], **setting.reply(4)).tokens
    with setting.load(disk, page_limit=1) as model, model.session() as session:
        tokens, _ = until_it_fails(session.stream(setting.prompt, **setting.reply(REPLY)))
        assert tokens == ()
        short = setting.prompt[: (setting.slots - 30) * PAGE]
        assert len(session.generate(short, **setting.reply(8)).tokens) == 8  # all in memory


def test_a_deleted_directory(setting: Setting, disk: Path) -> None:
    """What was in it goes on; a new session makes it again."""
    where = disk / "pages"
    with setting.load(where) as model, model.session() as session:
        stream = session.stream(setting.prompt, **setting.reply(60))
        next(stream)
        where.rmdir()
        tokens = tuple(piece.token for piece in stream)
        assert tokens == setting.expected[1:60]
        assert session._sequence.tier["pages_read"] > 0
        assert model.generate(setting.prompt, **setting.reply(20)).tokens == setting.expected[:20]
    assert list(where.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="finds the nameless file under /proc")
def test_flipped_bytes(setting: Setting, disk: Path) -> None:
    """No page that came back damaged is used, and what is computed anew is right."""
    with setting.load(disk) as model, model.session() as session:
        stream = session.stream(setting.prompt, **setting.reply(REPLY))
        first = [next(stream).token for _ in range(8)]
        flip_bytes(disk, setting.page_bytes)
        tokens, error = until_it_fails(stream)
        assert "is damaged, expected checksum" in error
        assert "check the disk, choose a directory on another one, or allow more memory" in error
        assert list(tokens[:8]) == first and tokens == setting.expected[: len(tokens)]
        session.rewind(0)
        assert session.generate(setting.prompt, **setting.reply(40)).tokens == setting.expected[:40]


def flip_bytes(directory: Path, page_bytes: int) -> None:
    """One in each page of the file."""
    (path,) = files_of(directory)
    with path.open("r+b", buffering=0) as file:
        for at in range(1000, os.fstat(file.fileno()).st_size, page_bytes):
            old = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([old[0] ^ 1]), at)
        os.fsync(file.fileno())


def test_a_slow_disk_gives_the_same_tokens(
    setting: Setting, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = functools.partial(_native.Cache, read_delay_us=3000)
    monkeypatch.setattr("edgert.engines.native._native.Cache", slow)
    with setting.load(disk) as model, model.session() as session:
        assert session.generate(setting.prompt, **setting.reply(100)).tokens == setting.expected[:100]
        tier = session._sequence.tier
    assert tier["waited_seconds"] > 3e-3
