"""Whether a measurement had the machine to itself."""

from __future__ import annotations

import os
import resource
import time

import psutil

# Share of all processors that others may use before a figure is called disturbed.
DISTURBED = 0.03


class Watch:
    """CPU time of other processes between construction and :meth:`share`."""

    def __init__(self) -> None:
        self._wall, self._busy, self._own = time.monotonic(), _busy(), _own()

    def share(self) -> float:
        """What others used, the hypervisor's share included, as a fraction of all processors."""
        wall = time.monotonic() - self._wall
        others = (_busy() - self._busy) - (_own() - self._own)
        return max(0.0, others) / (wall * (os.cpu_count() or 1)) if wall > 0 else 0.0


def load_average() -> float:
    """Mean number of runnable processes in the last minute, ours included."""
    return float(psutil.getloadavg()[0])


def _busy() -> float:
    """Seconds all processors together have been busy, or stolen, since the start of the machine."""
    times = psutil.cpu_times()
    # user and nice already hold the guests' time.
    names = ("user", "nice", "system", "irq", "softirq", "steal")
    return float(sum(getattr(times, name, 0.0) for name in names))


def _own() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
