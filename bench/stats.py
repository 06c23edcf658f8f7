"""Samples in few numbers, and whether two sets of them differ."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
# Two sets of three that have nothing in common lie apart one time in ten; two sets of four, one in 35.
LEAST_SAMPLES = 4


@dataclass(frozen=True)
class Summary:
    """Percentiles are interpolated; ``deviation`` is that of a sample, None for a single one."""

    median: float
    mean: float
    p5: float
    p95: float
    deviation: float | None


def summarise(samples: Sequence[float]) -> Summary:
    """Raises ValueError for no samples."""
    if not samples:
        raise ValueError("no samples to summarise")
    p5, median, p95 = (float(p) for p in np.percentile(samples, (5, 50, 95)))
    deviation = statistics.stdev(samples) if len(samples) > 1 else None
    return Summary(median, statistics.fmean(samples), p5, p95, deviation)


@dataclass(frozen=True)
class Ratio:
    """``value`` is the ratio of the medians, ``low`` to ``high`` its 95 % confidence interval; None where
    there are too few samples for one."""

    value: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        if self.low is None or self.high is None:
            return f"no difference shown (fewer than {LEAST_SAMPLES} samples)"
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "no difference shown"


def ratio(samples: Sequence[float], base: Sequence[float], seed: int = 0) -> Ratio:
    """How many times ``base`` the rates ``samples`` are: a percentile bootstrap (Efron 1979) over both."""
    value = statistics.median(samples) / statistics.median(base)
    if min(len(samples), len(base)) < LEAST_SAMPLES:
        return Ratio(value, None, None)
    rng = np.random.default_rng(seed)

    def medians(of: Sequence[float]) -> np.ndarray:
        drawn = rng.choice(np.asarray(of, float), (RESAMPLES, len(of)))
        middle: np.ndarray = np.median(drawn, axis=1)
        return middle

    low, high = np.percentile(medians(samples) / medians(base), (2.5, 97.5))
    return Ratio(value, float(low), float(high))
