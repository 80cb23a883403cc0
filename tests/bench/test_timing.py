"""The timer with contenders whose speed is known."""

import itertools
import time
from contextlib import contextmanager

import pytest
import torch

from flashcore.bench.stats import ratio_of_medians
from flashcore.bench.timing import (
    MAX_LAUNCHES,
    WARMUP,
    Candidate,
    Plan,
    launches_per_replay,
    shuffled,
    time_cpu,
    time_cuda,
)


def _sleeper(name: str, seconds: float, calls: list[str] | None = None) -> Candidate:
    def call() -> None:
        if calls is not None:
            calls.append(name)
        time.sleep(seconds)

    return Candidate(name, call)


def test_slow_and_fast_have_the_right_ratio() -> None:
    outcomes = time_cpu([_sleeper("fast", 2e-3), _sleeper("slow", 6e-3)], Plan(iters=20))
    fast, slow = (outcomes[name].series[0] for name in ("fast", "slow"))
    assert fast.mode == "wall" and fast.launches == 1 and len(fast.samples) == 20
    assert min(fast.samples) >= 2e3  # microseconds, and a sleep is never shorter than asked for
    assert ratio_of_medians(fast.samples, slow.samples, baseline="slow").value == pytest.approx(3, rel=0.25)


def test_rounds_are_interleaved_after_the_warm_up() -> None:
    calls: list[str] = []
    time_cpu([_sleeper(name, 0, calls) for name in "abc"], Plan(iters=4))
    warm_up, timed = calls[: 3 * WARMUP], calls[3 * WARMUP :]
    assert warm_up == ["a"] * WARMUP + ["b"] * WARMUP + ["c"] * WARMUP
    rounds = ["".join(timed[start : start + 3]) for start in range(0, 12, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds) and len(set(rounds)) > 1


def test_one_that_raises_is_an_outcome_and_the_others_are_timed() -> None:
    def broken() -> None:
        raise RuntimeError("no kernel image\nand more")

    outcomes = time_cpu([Candidate("broken", broken), _sleeper("fine", 0)], Plan(iters=10))
    assert outcomes["broken"].failure == "RuntimeError: no kernel image" and not outcomes["broken"].series
    assert len(outcomes["fine"].series[0].samples) == 10


def test_context_is_around_every_call_and_not_timed() -> None:
    inside: list[bool] = []
    active = False

    @contextmanager
    def context():
        nonlocal active
        active = True
        time.sleep(1e-3)
        yield
        active = False

    outcomes = time_cpu([Candidate("c", lambda: inside.append(active), context=context)], Plan(iters=10))
    assert inside == [True] * (WARMUP + 10)
    assert max(outcomes["c"].series[0].samples) < 1e3


def test_progress_reaches_the_end() -> None:
    seen: list[float] = []
    time_cpu([_sleeper("a", 0)], Plan(iters=10), lambda what, fraction: seen.append(fraction))
    assert seen == sorted(seen) and seen[-1] == 1.0


def test_no_one_is_always_first_or_always_behind_the_same_one() -> None:
    rounds = [shuffled("abcd", number) for number in range(100)]
    assert rounds == [shuffled("abcd", number) for number in range(100)]
    for first in "abcd":
        assert 10 <= sum(order[0] == first for order in rounds) <= 40
        for second in set("abcd") - {first}:
            assert 10 <= sum((first, second) in itertools.pairwise(order) for order in rounds) <= 40


@pytest.mark.parametrize(("launch_us", "expected"), [(0.0, MAX_LAUNCHES), (9.0, 112), (600.0, 2), (5000.0, 1)])
def test_launches_fill_a_millisecond(launch_us: float, expected: int) -> None:
    assert launches_per_replay(launch_us) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gpu_series_ratio_and_a_launch_that_escapes_the_capture() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    small, large = (torch.randn(n, n, device=device, dtype=torch.float16) for n in (1024, 2048))
    stale = small @ small

    def escaped() -> torch.Tensor:
        return stale  # launches nothing: its graph is empty, and its output stays as it was poisoned

    def check(output: torch.Tensor) -> str | None:
        return None if torch.isfinite(output).all() else "not finite"

    candidates = [
        Candidate("small", lambda: small @ small, cold_call=lambda i: lambda: small @ small, check=check),
        Candidate("large", lambda: large @ large, check=check),
        Candidate("escaped", escaped, check=check),
    ]
    outcomes = time_cuda(candidates, Plan(iters=20, max_cold_sets=8), device)
    assert "not finite" in (outcomes["escaped"].failure or "")
    modes = [series.mode for series in outcomes["small"].series]
    assert modes == ["device_warm", "device_cold", "eager_stream", "eager_latency"]
    fast, slow = (outcomes[name].series[0] for name in ("small", "large"))
    assert 1 < ratio_of_medians(fast.samples, slow.samples, baseline="large").value < 20
    assert 200 < fast.launches * min(fast.samples) < 4000
