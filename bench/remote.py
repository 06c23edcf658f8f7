"""The other end of a worker."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import Any

from edgert.bench.settings import Job

from edgert import errors
from edgert.errors import EngineError


class Worker:
    """A running ``edgert.bench.worker``; a context manager that ends it."""

    def __init__(self, job: Job) -> None:
        self.setting = job.setting
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "edgert.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            # Ctrl-C is for us: we then end the workers and keep what they have measured.
            start_new_session=True,
        )
        self._send(json.dumps(job.to_json()))

    @property
    def pid(self) -> int:
        return self._process.pid

    def about(self) -> dict[str, Any]:
        """Waits until the model is loaded. Raises the error that loading raised."""
        return self._receive()

    def ask(self, what: str) -> dict[str, Any]:
        """The answer of a method of ``Bench``. Raises the error it raised."""
        self._send(what)
        return self._receive()

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise getattr(errors, answer["kind"], EngineError)(f"{self.setting.label}: {answer['error']}")
        return answer

    def _ended(self) -> EngineError:
        code = self._process.wait()
        self._log.seek(0)
        last = self._log.read().decode(errors="replace").strip()[-500:]
        return EngineError(
            f"{self.setting.label}: its process ended with {code} in the middle of a test: {last}"
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()
