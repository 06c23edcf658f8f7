"""What the machine says of itself while it works: temperatures, clocks, energy. Every function takes the
root of the file system to read; what a machine does not show is left out or None."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
SAMPLE_SECONDS = 0.02  # between two looks at a board's power


def temperatures(root: Path = ROOT) -> dict[str, float]:
    """Degrees Celsius by thermal zone."""
    found: dict[str, float] = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        value = number(zone / "temp")
        if value is not None:
            found[text(zone / "type") or zone.name] = value / 1000
    return found


def clocks(root: Path = ROOT) -> list[float]:
    """MHz of each processor, in order."""
    places = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
    found = {int(place.parts[-3][3:]): number(place) for place in places}
    return [value / 1000 for _, value in sorted(found.items()) if value is not None]


class Energy:
    """Joules from one call to the next of :meth:`take`, of the whole board or package.

    From the counters of RAPL (Intel and AMD; often readable by root alone) or the INA3221 power sensor of
    a Jetson, whose power is sampled by a thread that runs between construction and :meth:`close`.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self._counters = [
            (zone / "energy_uj", int(number(zone / "max_energy_range_uj") or 0))
            for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*"))
            if zone.name.count(":") == 1 and number(zone / "energy_uj") is not None
        ]
        self._last = self._read()
        self._rails = [] if self._counters else list(_rails(root))
        self._joules, self._lock, self._stop = 0.0, threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True) if self._rails else None
        if self._thread:
            self._thread.start()

    @property
    def source(self) -> str | None:
        if self._counters:
            return "RAPL"
        return "INA3221" if self._rails else None

    def take(self) -> float | None:
        """None where the board does not show it."""
        if self._thread:
            with self._lock:
                joules, self._joules = self._joules, 0.0
            return joules
        if not self._counters:
            return None
        before, self._last = self._last, self._read()
        pairs = zip(before, self._last, self._counters, strict=True)
        # A counter starts again at 0 after its range.
        return sum(new - old + (span if new < old else 0) for old, new, (_, span) in pairs) / 1e6

    def close(self) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()

    def _read(self) -> list[int]:
        return [int(number(place) or 0) for place, _ in self._counters]

    def _sample(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(SAMPLE_SECONDS):
            power = sum((number(v) or 0) * (number(a) or 0) for v, a in self._rails) / 1e6
            now = time.monotonic()
            with self._lock:
                self._joules += power * (now - last)
            last = now


def _rails(root: Path) -> Iterator[tuple[Path, Path]]:
    """Millivolts and milliamperes of the board's input. Jetsons call it VDD_IN (Orin NX, Nano); where it is
    missing (AGX Orin, Thor), the rails together feed the module."""
    rails: dict[str, tuple[Path, Path]] = {}
    for monitor in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        if text(monitor / "name") != "ina3221":
            continue
        for label in sorted(monitor.glob("in[0-9]*_label")):
            channel = label.name[2:].removesuffix("_label")
            volts, amperes = monitor / f"in{channel}_input", monitor / f"curr{channel}_input"
            if number(volts) is not None and number(amperes) is not None:
                rails[text(label)] = (volts, amperes)
    if "VDD_IN" in rails:
        yield rails["VDD_IN"]
    else:
        # "sum of shunt voltages" is no rail.
        yield from (rail for name, rail in rails.items() if name.startswith(("VDD", "VIN")))


def text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""


def number(path: Path) -> float | None:
    try:
        return float(text(path))
    except ValueError:
        return None
