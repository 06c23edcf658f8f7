"""Downloads over HTTP that survive a bad line: resumed with Range, retried, checked by SHA-256, renamed
into place only when whole. Standard library alone; the network modules are imported on first use so
that a run with a cached model never pays for them."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from edgert.errors import DownloadError, PlanError

if TYPE_CHECKING:
    import ssl
    from http.client import HTTPMessage, HTTPResponse
    from urllib.error import HTTPError
    from urllib.request import Request

ATTEMPTS = 4  # in a row without a new byte before giving up
RETRY_WAIT = 0.5  # seconds before the first retry; doubles each time
TIMEOUT = 30.0  # seconds without an answer or a byte
CHUNK = 1 << 18


class Reporter:
    """Where a download says how far it is. This one logs notes and shows no progress; the command line
    has one with a bar."""

    def note(self, text: str) -> None:
        """Something the user must see: licence terms, waiting for another process."""
        import logging

        logging.getLogger("edgert").warning("%s", text)

    def progress(self, what: str, done: int, total: int | None) -> None:
        """``done`` of ``total`` bytes of ``what`` are there (``total`` None: the server did not say)."""


@dataclass(frozen=True)
class Remote:
    """A file to fetch. ``token`` goes out as a bearer token, but never to the host of a redirect."""

    url: str
    what: str
    size: int | None = None
    sha256: str = ""
    token: str = ""


class _TransientError(Exception):
    """Worth another attempt."""


def size_text(n: int | float) -> str:
    """Bytes in the decimal units disks are sold in."""
    for unit, width in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= width:
            return f"{n / width:.1f} {unit}"
    return f"{int(n)} bytes"


def no_space(directory: Path, needed: int, available: int, what: str) -> PlanError:
    remedies = ("free some space", "set EDGERT_CACHE to a directory on a larger disk")
    return PlanError(
        f"no space for {what}: {size_text(needed)} needed in {directory} and {size_text(available)} free; "
        + " or ".join(remedies),
        needed,
        available,
        remedies,
    )


def check_space(directory: Path, needed: int, what: str) -> None:
    """Raise PlanError unless ``needed`` bytes are free where ``directory`` is."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise no_space(directory, needed, free, what)


def write_all(out: BinaryIO, data: bytes, path: Path, what: str) -> None:
    """Write ``data``; a full disk is a PlanError."""
    try:
        out.write(data)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent).free
            raise no_space(path.parent, max(len(data), free + 1), free, what) from e
        raise


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def host_of(url: str) -> str:
    from urllib.parse import urlsplit

    return urlsplit(url).hostname or url


def tls_context() -> ssl.SSLContext:
    """The system's certificates (OpenSSL itself honours SSL_CERT_FILE) and those of PIP_CERT."""
    import ssl

    context = ssl.create_default_context()
    extra = os.environ.get("PIP_CERT")
    if extra:
        try:
            context.load_verify_locations(cafile=extra)
        except (OSError, ssl.SSLError) as e:
            raise DownloadError(f"PIP_CERT names {extra}, which cannot be read as certificates: {e}") from e
    return context


def open_url(url: str, headers: dict[str, str] | None = None) -> tuple[HTTPResponse, str]:
    """GET ``url`` through the proxies of the environment. Returns the response and the SHA-256 a Hugging
    Face server promised on the way ("" if none). Raises DownloadError for what another try cannot
    mend, and _TransientError for what it can."""
    import http.client
    import ssl
    import urllib.error
    import urllib.request

    promised: list[str] = []

    class Redirects(urllib.request.HTTPRedirectHandler):
        def redirect_request(
            self, req: Request, fp: object, code: int, msg: str, headers: HTTPMessage, newurl: str
        ) -> Request | None:
            promised.append(_linked_sha256(headers))
            new = super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]
            if new is not None and host_of(new.full_url) != host_of(req.full_url):
                new.remove_header("Authorization")
            return new

    if not url.lower().startswith(("http://", "https://")):
        raise DownloadError(f"cannot fetch {url}: only http and https addresses are supported")
    opener = urllib.request.build_opener(Redirects, urllib.request.HTTPSHandler(context=tls_context()))
    request = urllib.request.Request(url, headers={"User-Agent": "edgert", **(headers or {})})
    try:
        response: HTTPResponse = opener.open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        raise _status_error(e) from e
    except urllib.error.URLError as e:
        if isinstance(e.reason, ssl.SSLCertVerificationError):
            raise DownloadError(
                f"the certificate of {host_of(url)} is not trusted ({e.reason.verify_message}); behind a "
                "company proxy, set SSL_CERT_FILE to its certificate file"
            ) from e
        raise _TransientError(f"{host_of(url)} cannot be reached ({e.reason})") from e
    except (OSError, http.client.HTTPException) as e:
        raise _TransientError(f"{host_of(url)}: {e or type(e).__name__}") from e
    promised.append(_linked_sha256(response.headers))
    return response, next((p for p in promised if p), "")


def _linked_sha256(headers: HTTPMessage) -> str:
    """A Hugging Face server names a large file's SHA-256 in X-Linked-ETag."""
    tag = (headers.get("X-Linked-ETag") or "").strip('"').lower()
    return tag if len(tag) == 64 and all(c in "0123456789abcdef" for c in tag) else ""


class _RangeError(Exception):
    """HTTP 416. ``total`` is the size the server gave, None if it gave none."""

    def __init__(self, total: int | None) -> None:
        super().__init__()
        self.total = total


def _status_error(e: HTTPError) -> Exception:
    host, code = host_of(e.url), e.code
    if code in (401, 403):
        return DownloadError(
            f"{host} refused access to {e.url} (HTTP {code}): if the model is gated or private, accept its "
            "terms on its page and set HF_TOKEN to your access token"
        )
    if code in (404, 410):
        return DownloadError(f"{host} has no {e.url} (HTTP {code}); check the repository and file names")
    if code == 416:
        total = (e.headers.get("Content-Range") or "").rpartition("/")[2]
        return _RangeError(int(total) if total.isdigit() else None)
    if code in (408, 425, 429) or code >= 500:
        return _TransientError(f"{host} answered HTTP {code}")
    return DownloadError(f"{host} answered HTTP {code} ({e.reason}) for {e.url}")


def read_page(url: str, what: str, headers: dict[str, str] | None = None) -> tuple[bytes, str, str]:
    """A small page: its bytes, content type and final address. Retries; raises DownloadError."""
    import http.client

    for attempt in range(ATTEMPTS):
        try:
            response, _ = open_url(url, headers)
            with response:
                return response.read(), response.headers.get_content_type(), response.url
        except (_TransientError, OSError, http.client.HTTPException) as e:
            if attempt == ATTEMPTS - 1:
                raise DownloadError(f"cannot get {what}: {e}; check the network and try again") from e
            time.sleep(RETRY_WAIT * 2**attempt)
    raise AssertionError("unreachable")


def download(remote: Remote, dest: Path, report: Reporter) -> None:
    """Fetch ``remote`` into ``dest``. What has arrived stays in ``dest``.part when this fails or is
    interrupted, and the next call goes on from there. Raises DownloadError or PlanError."""
    part = dest.with_name(dest.name + ".part")
    resumed = part.exists()
    failures = 0
    while True:
        before = _size(part)
        try:
            promised = _fetch(remote, part, report)
        except _TransientError as e:
            failures = 1 if _size(part) > before else failures + 1
            if failures >= ATTEMPTS:
                raise DownloadError(
                    f"the download of {remote.what} failed: {e}; what arrived is kept, "
                    "run the same command again to go on"
                ) from e
            time.sleep(RETRY_WAIT * 2 ** (failures - 1))
            continue
        promised = remote.sha256 or promised
        if not promised:
            report.note(
                f"{remote.what}: {host_of(remote.url)} gives no SHA-256, so the file was not verified"
            )
        found = file_sha256(part) if promised else ""
        if found != promised:
            part.unlink()
            if resumed:  # the first half may be of another version of the file
                resumed = False
                report.note(f"{remote.what}: the resumed download is damaged, starting again")
                continue
            raise DownloadError(
                f"{remote.what} arrived damaged: SHA-256 {promised} expected, {found} found; "
                "try again, and if it stays so do not trust the source"
            )
        part.replace(dest)
        return


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _fetch(remote: Remote, part: Path, report: Reporter) -> str:
    """Append what is missing of ``remote`` to ``part``; returns the SHA-256 the server promised."""
    import http.client

    done = _size(part)
    headers = {"Accept-Encoding": "identity"}
    if remote.token:
        headers["Authorization"] = f"Bearer {remote.token}"
    if done:
        headers["Range"] = f"bytes={done}-"
    try:
        response, promised = open_url(remote.url, headers)
    except _RangeError as e:
        if e.total == done and remote.sha256:
            return ""  # all of it is there already; the hash will tell
        part.unlink(missing_ok=True)
        raise _TransientError("the server refused to resume the download") from e
    with response:
        if response.status == 206:
            span = response.headers.get("Content-Range", "")
            if not span.startswith(f"bytes {done}-"):
                part.unlink()
                raise _TransientError(f"the server sent another range than asked for ({span})")
        else:
            done = 0
        length = response.headers.get("Content-Length", "")
        total = done + int(length) if length.isdigit() else remote.size
        if total is not None:
            check_space(part.parent, total - done, remote.what)
        with part.open("ab" if done else "wb") as out:
            while True:
                try:
                    block = response.read(CHUNK)
                except (OSError, http.client.HTTPException) as e:
                    raise _TransientError(f"the connection broke after {size_text(done)} ({e})") from e
                if not block:
                    break
                write_all(out, block, part, remote.what)
                done += len(block)
                report.progress(remote.what, done, total)
    if total is not None and done < total:
        raise _TransientError(f"the connection closed after {size_text(done)} of {size_text(total)}")
    return promised
