"""Whether a measurement had the machine to itself."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Sequence

import psutil

# Share of all processors that others may use before a figure is called disturbed.
DISTURBED = 0.03


class Watch:
    """CPU time of other processes between construction and :meth:`share`. ``workers`` are processes that
    work for us and run all that time."""

    def __init__(self, workers: Sequence[int] = ()) -> None:
        self._workers = [psutil.Process(pid) for pid in workers]
        self._wall, self._busy, self._used = time.monotonic(), _busy(), self._own()

    def share(self) -> float:
        """What others used, the hypervisor's share included, as a fraction of all processors."""
        wall = time.monotonic() - self._wall
        others = (_busy() - self._busy) - (self._own() - self._used)
        return max(0.0, others) / (wall * (os.cpu_count() or 1)) if wall > 0 else 0.0

    def _own(self) -> float:
        own = sum(sum(worker.cpu_times()[:2]) for worker in self._workers)
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)):
            own += usage.ru_utime + usage.ru_stime
        return float(own)


def load_average() -> float:
    """Mean number of runnable processes in the last minute, ours included."""
    return float(psutil.getloadavg()[0])


def _busy() -> float:
    """Seconds all processors together have been busy, or stolen, since the start of the machine."""
    times = psutil.cpu_times()
    # user and nice already hold the guests' time.
    names = ("user", "nice", "system", "irq", "softirq", "steal")
    return float(sum(getattr(times, name, 0.0) for name in names))
