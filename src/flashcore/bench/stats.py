"""Statistics of samples, and the ratio of two contenders' medians with the uncertainty that belongs to it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

RESAMPLES = 2000
CONFIDENCE = 0.95


class Stats(BaseModel):
    """Statistics of one series of samples, in microseconds. `std` is the sample standard deviation (n - 1)."""

    model_config = ConfigDict(frozen=True)

    count: int
    p10: float
    p50: float
    p90: float
    p99: float
    mean: float
    std: float
    min: float


class Ratio(BaseModel):
    """How many times faster than the baseline: its median over the contender's, with a 95 % bootstrap interval."""

    model_config = ConfigDict(frozen=True)

    baseline: str
    value: float
    low: float
    high: float


def summarise(samples: Sequence[float]) -> Stats:
    """Statistics of at least one sample. Raises ValueError for none, and for a sample that is not finite."""
    values = np.asarray(samples, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"{values.size} samples, of which {int((~np.isfinite(values)).sum())} are not finite")
    p10, p50, p90, p99 = (float(p) for p in np.percentile(values, (10, 50, 90, 99)))
    return Stats(
        count=values.size,
        p10=p10,
        p50=p50,
        p90=p90,
        p99=p99,
        mean=float(values.mean()),
        std=float(values.std(ddof=1)) if values.size > 1 else 0.0,
        min=float(values.min()),
    )


def ratio_of_medians(samples: Sequence[float], baseline_samples: Sequence[float], *, baseline: str, seed: int = 0) -> Ratio:
    """median(baseline) / median(samples): above 1 the contender is the faster one.

    Sample i of both comes from the same round of the timer, so the bootstrap draws rounds, not samples: what made a
    whole round slow (a clock that dropped) then moves both and does not widen the interval.
    Raises ValueError when the two were not measured in the same rounds (their lengths differ).
    """
    ours, theirs = np.asarray(samples, dtype=np.float64), np.asarray(baseline_samples, dtype=np.float64)
    if ours.size != theirs.size or ours.size == 0:
        raise ValueError(f"the two series must be of the same rounds, got {ours.size} and {theirs.size} samples")
    rounds = np.random.default_rng(seed).integers(0, ours.size, size=(RESAMPLES, ours.size))
    ratios = np.median(theirs[rounds], axis=1) / np.median(ours[rounds], axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(bound) for bound in np.quantile(ratios, (tail, 1 - tail)))
    return Ratio(baseline=baseline, value=float(np.median(theirs) / np.median(ours)), low=low, high=high)
