"""Statistics and the bootstrap on data whose answers are known."""

import math

import numpy as np
import pytest

from flashcore.bench.stats import ratio_of_medians, summarise


def test_summary_of_known_samples() -> None:
    stats = summarise(range(1, 102))
    assert (stats.count, stats.min, stats.p10, stats.p50, stats.p90, stats.p99) == (101, 1, 11, 51, 91, 100)
    assert stats.mean == 51
    assert stats.std == pytest.approx(math.sqrt(101 * 102 / 12))


@pytest.mark.parametrize("samples", [[], [1.0, math.nan], [math.inf]])
def test_no_summary_of_nothing_or_of_nan(samples: list[float]) -> None:
    with pytest.raises(ValueError, match="not finite"):
        summarise(samples)


def test_ratio_is_above_one_for_the_faster() -> None:
    ratio = ratio_of_medians([2.0] * 50, [3.0] * 50, baseline="peer")
    assert (ratio.baseline, ratio.value, ratio.low, ratio.high) == ("peer", 1.5, 1.5, 1.5)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(60):
        ours, theirs = generator.normal(10, 1, 100), generator.normal(12, 1, 100)
        ratio = ratio_of_medians(ours, theirs, baseline="peer", seed=trial)
        covered += ratio.low <= 1.2 <= ratio.high
        assert ratio.low < ratio.value < ratio.high
    assert covered >= 51  # 57 are expected; 51 or fewer has a chance under 1 %


def test_what_slows_a_whole_round_does_not_widen_the_interval() -> None:
    slow = np.random.default_rng(2).uniform(1, 2, 100)
    paired = ratio_of_medians(2 * slow, 3 * slow, baseline="peer")
    assert paired.low == pytest.approx(1.5) and paired.high == pytest.approx(1.5)


def test_bootstrap_is_seeded() -> None:
    ours, theirs = np.random.default_rng(3).normal(10, 1, (2, 30))
    first, again, other = (ratio_of_medians(ours, theirs, baseline="p", seed=seed) for seed in (5, 5, 6))
    assert first == again != other


def test_series_of_different_rounds_have_no_ratio() -> None:
    with pytest.raises(ValueError, match="same rounds"):
        ratio_of_medians([1.0, 2.0], [1.0], baseline="peer")
