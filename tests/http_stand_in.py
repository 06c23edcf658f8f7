"""A small HTTP server that stands in for a package index and a Hugging Face endpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Page:
    """What a path answers. ``cut`` sends only so many bytes of the body and closes the connection; a
    page whose ``times`` is used up gives way to the next one of the same path."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    ranges: bool = True
    times: int | None = None
    before: Callable[[], None] = lambda: None


class StandIn:
    """``pages`` maps a path to the pages it answers in turn; ``seen`` lists (path, headers) of requests."""

    def __init__(self) -> None:
        self.pages: dict[str, list[Page]] = {}
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.url = ""

    def add(self, path: str, *pages: Page) -> None:
        self.pages.setdefault(path, []).extend(pages)

    def requests(self, path: str) -> list[dict[str, str]]:
        return [headers for p, headers in self.seen if p == path]

    def answer(self, path: str) -> Page:
        for page in self.pages.get(path, []):
            if page.times is None:
                return page
            if page.times > 0:
                page.times -= 1
                return page
        return Page(status=404)


@contextmanager
def stand_in() -> Iterator[StandIn]:
    state = StandIn()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(send_body=False)

        def do_GET(self) -> None:
            self._answer(send_body=True)

        def _answer(self, send_body: bool) -> None:
            path = self.path.partition("?")[0]
            state.seen.append((path, dict(self.headers)))
            page = state.answer(path)
            page.before()
            body, status, headers = page.body, page.status, dict(page.headers)
            asked = self.headers.get("Range", "")
            if status == 200 and page.ranges and asked.startswith("bytes="):
                start = int(asked[6:].partition("-")[0])
                if start >= len(body):
                    headers["Content-Range"] = f"bytes */{len(body)}"
                    body, status = b"", 416
                else:
                    headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                    body, status = body[start:], 206
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if send_body:
                self.wfile.write(body if page.cut is None else body[: page.cut])
            if page.cut is not None:
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
