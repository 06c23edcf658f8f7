"""Progress on stderr. A download bar: one line redrawn on a terminal, a line every quarter elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable

from edgert.download import Reporter, size_text


class Bar(Reporter):
    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._what = ""
        self._open = False  # a bar stands on the current line
        self._drawn = 0.0
        self._began = (0.0, 0)  # time and bytes when this file started
        self._quarter = -1

    def note(self, text: str) -> None:
        self.close()
        print(f"edgert: {text}", file=sys.stderr)

    def progress(self, what: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if what != self._what:
            self.close()
            self._what, self._began, self._quarter = what, (now, done), -1
        whole = total is not None and done >= total
        if not self._terminal:
            quarter = 4 * done // total if total else done // 50_000_000
            if quarter != self._quarter:
                self._quarter = quarter
                print(f"edgert: {what}: {self._amount(done, total)}", file=sys.stderr)
            return
        if not whole and now - self._drawn < 0.1:
            return
        self._drawn = now
        speed = (done - self._began[1]) / max(now - self._began[0], 1e-3)
        text = f"{self._amount(done, total)}  {size_text(speed)}/s"
        columns = shutil.get_terminal_size().columns
        name = what if len(what) <= 40 else what[:39] + "…"
        width = min(30, columns - len(name) - len(text) - 6)
        line = f"{name}  {text}"
        if total and width >= 5:
            full = width * done // total
            line = f"{name} [{'=' * full}{' ' * (width - full)}] {text}"
        print("\r\x1b[K" + line[: columns - 1], end="", file=sys.stderr, flush=True)
        self._open = True
        if whole:
            self.close()

    def close(self) -> None:
        """End the line of a bar that is still open."""
        if self._open:
            print(file=sys.stderr)
            self._open = False

    @staticmethod
    def _amount(done: int, total: int | None) -> str:
        if total:
            return f"{100 * done // total:3d} % of {size_text(total)}"
        return size_text(done)


class Steps:
    """A line on stderr for each step of the work, with its percentage on a terminal."""

    def __call__(self, what: str, total: int) -> Callable[[int], None]:
        began, done, shown = time.monotonic(), 0, 0.0
        terminal = sys.stderr.isatty()

        def progress(n: int) -> None:
            nonlocal done, shown
            done += n
            now = time.monotonic()
            whole = done >= total
            if terminal and (whole or now - shown > 0.1):
                shown = now
                end = "\n" if whole else ""
                print(
                    f"\r\x1b[Kedgert: {what}: {min(1, done / total):.0%}, {now - began:.0f} s",
                    end=end,
                    file=sys.stderr,
                    flush=True,
                )
            elif whole and not terminal:
                print(f"edgert: {what}: {now - began:.1f} s", file=sys.stderr)

        return progress
