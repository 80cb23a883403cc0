"""The GPU timer's logic on a pretended GPU: graphs that replay what was captured, and a clock that kernels advance."""

import contextlib
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from flashcore.bench.artifact import ContenderRecord
from flashcore.bench.beside import PROBE_ROUNDS, Beside
from flashcore.bench.runner import _with_outcome
from flashcore.bench.timing import EAGER_ROUNDS, Candidate, Plan, WrongOutputError, shuffled, time_cuda


class PretendGpu:
    """Stands in for torch.cuda: `kernel(us)` makes a call that is captured, or runs and lets `us` microseconds pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.capturing: list[Callable[[], None]] | None = None
        self.log: list[str] = []
        gpu = self

        class Graph:
            def __init__(self) -> None:
                self.nodes: list[Callable[[], None]] = []

            def capture_begin(self, capture_error_mode: str) -> None:
                gpu.capturing = self.nodes

            def capture_end(self) -> None:
                gpu.capturing = None

            def replay(self) -> None:
                for node in self.nodes:
                    node()

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.time = 0.0

            def record(self) -> None:
                self.time = gpu.now

            def synchronize(self) -> None: ...

            def elapsed_time(self, other: "Event") -> float:
                return (other.time - self.time) * 1e-3

        stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
        properties = SimpleNamespace(L2_cache_size=1024)
        for name, value in {
            "CUDAGraph": Graph,
            "Event": Event,
            "Stream": lambda device: stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "current_stream": lambda device=None: stream,
            "synchronize": lambda device=None: None,
            "get_device_properties": lambda device: properties,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def kernel(self, us: float, name: str = "", *, escapes: bool = False) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            output = torch.zeros(4)

            def launch() -> None:
                self.now += us
                self.log.append(name)
                output.fill_(1.0)

            if self.capturing is None or escapes:
                launch()
            else:
                self.capturing.append(launch)
            return output

        return call


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> PretendGpu:
    return PretendGpu(monkeypatch)


CPU = torch.device("cpu")


def finite(output: torch.Tensor) -> str | None:
    return None if torch.isfinite(output).all() else "not finite"


def test_device_time_is_a_replay_over_its_launches(gpu: PretendGpu) -> None:
    plan = Plan(iters=25, eager=False)
    outcomes = time_cuda([Candidate("a", gpu.kernel(10.0)), Candidate("b", gpu.kernel(700.0))], plan, CPU)
    a, b = (outcomes[name].series[0] for name in "ab")
    assert (a.mode, a.launches, b.launches, len(a.samples), len(b.samples)) == ("device_warm", 100, 2, 25, 25)
    assert a.samples == pytest.approx([10.0] * 25) and b.samples == pytest.approx([700.0] * 25)


def test_a_launch_that_escapes_the_capture_is_not_timed(gpu: PretendGpu) -> None:
    candidates = [
        Candidate("a", gpu.kernel(10.0), check=finite),
        Candidate("b", gpu.kernel(1.0, escapes=True), check=finite),
    ]
    outcomes = time_cuda(candidates, Plan(iters=10, eager=False), CPU)
    assert outcomes["a"].series and outcomes["a"].failure is None
    assert not outcomes["b"].series and "output is wrong: not finite" in (outcomes["b"].failure or "")


def test_a_call_that_cannot_be_captured_is_an_outcome(gpu: PretendGpu) -> None:
    works = gpu.kernel(1.0)

    def call() -> torch.Tensor:
        if gpu.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        return works()

    outcomes = time_cuda([Candidate("a", call), Candidate("b", works)], Plan(iters=10), CPU)
    assert "not permitted" in (outcomes["a"].failure or "") and outcomes["b"].series


def test_cold_launches_use_each_set_once_a_replay(gpu: PretendGpu) -> None:
    candidate = Candidate("a", gpu.kernel(10.0, "warm"), cold_call=lambda number: gpu.kernel(15.0, f"set {number}"))
    outcome = time_cuda([candidate], Plan(iters=10, eager=False, max_cold_sets=40), CPU)["a"]
    cold = outcome.series[1]
    assert (cold.mode, cold.launches) == ("device_cold", 40) and cold.samples == pytest.approx([15.0] * 10)
    assert gpu.log[-40:] == [f"set {number}" for number in range(40)]


def test_timed_again_every_round_runs_in_reverse(gpu: PretendGpu) -> None:
    plan = Plan(iters=4, eager=False, retime=True)
    outcomes = time_cuda([Candidate(n, gpu.kernel(2000.0, n)) for n in "abc"], plan, CPU)
    rounds = ["".join(gpu.log[start : start + 3]) for start in range(len(gpu.log) - 12, len(gpu.log), 3)]
    assert rounds == ["".join(reversed(shuffled("abc", number))) for number in range(4)]
    for outcome in outcomes.values():
        first, again = outcome.series
        assert (first.mode, again.mode) == ("device_warm", "device_reversed")
        assert first.launches == again.launches and len(first.samples) == len(again.samples) == 4


def test_a_gpu_that_slows_down_shows_between_the_orders(gpu: PretendGpu) -> None:
    hot = False
    kernel = gpu.kernel(2000.0)

    def call() -> torch.Tensor:
        output = kernel()
        if gpu.capturing is not None:

            def throttle() -> None:
                gpu.now += 500.0 * hot

            gpu.capturing.append(throttle)
        return output

    def progress(what: str, fraction: float) -> None:
        nonlocal hot
        hot = what == "device_reversed"

    outcome = time_cuda([Candidate("a", call)], Plan(iters=10, eager=False, retime=True), CPU, progress)["a"]
    series = _with_outcome(ContenderRecord(name="a", kind="ours", status="not timed"), outcome).series
    assert series[0].to_first is None
    assert series[1].to_first == pytest.approx(1.25)


def test_eager_series_come_after_and_only_when_asked_for(gpu: PretendGpu) -> None:
    series = time_cuda([Candidate("a", gpu.kernel(10.0))], Plan(iters=10), CPU)["a"].series
    assert [s.mode for s in series] == ["device_warm", "eager_stream", "eager_latency"]
    assert len(series[1].samples) == EAGER_ROUNDS and series[2].launches == 1


def test_rounds_follow_one_untimed_replay(gpu: PretendGpu) -> None:
    time_cuda([Candidate(n, gpu.kernel(2000.0, n)) for n in "abc"], Plan(iters=4, eager=False), CPU)
    rounds = ["".join(gpu.log[start : start + 3]) for start in range(len(gpu.log) - 12, len(gpu.log), 3)]
    assert rounds == ["".join(shuffled("abc", number)) for number in range(4)]
    assert gpu.log[-13] == rounds[0][-1]


def test_one_after_another_is_timed_beside_the_same_others(gpu: PretendGpu) -> None:
    beside = Beside(CPU)
    beside.keep(Candidate("slow", gpu.kernel(100.0, "slow")))
    beside.keep(Candidate("slower", gpu.kernel(200.0, "slower")))
    for us in (10.0, 20.0):
        samples = beside.time(12, Candidate("new", gpu.kernel(us, "new")), warmup=5)
        assert {
            name: pytest.approx([value] * 12) for name, value in (("slow", 100.0), ("slower", 200.0), ("new", us))
        } == samples
    beside.drop("slower")
    gpu.log.clear()
    assert set(beside.time(12)) == {"slow"} and set(gpu.log) == {"slow"}, "nothing is captured or warmed up again"


def test_rounds_beside_others_are_interleaved_and_may_end_early(gpu: PretendGpu) -> None:
    beside, asked = Beside(CPU), []
    beside.keep(Candidate("other", gpu.kernel(2000.0, "other")))

    def go_on(samples: dict[str, list[float]]) -> bool:
        asked.append({name: len(values) for name, values in samples.items()})
        return False

    samples = beside.time(30, Candidate("new", gpu.kernel(1000.0, "new")), go_on=go_on)
    assert asked == [{"other": PROBE_ROUNDS, "new": PROBE_ROUNDS}]
    assert {name: len(values) for name, values in samples.items()} == asked[0]
    rounds = [set(gpu.log[-2 * PROBE_ROUNDS :][start : start + 2]) for start in range(0, 2 * PROBE_ROUNDS, 2)]
    assert rounds == [{"other", "new"}] * PROBE_ROUNDS


def test_a_wrong_one_is_not_timed_beside_others(gpu: PretendGpu) -> None:
    beside = Beside(CPU)
    beside.keep(Candidate("right", gpu.kernel(10.0), check=finite))
    with pytest.raises(WrongOutputError, match="output is wrong: not finite"):
        beside.time(10, Candidate("escapes", gpu.kernel(1.0, escapes=True), check=finite))
    with pytest.raises(WrongOutputError):
        beside.keep(Candidate("escapes", gpu.kernel(1.0, escapes=True), check=finite))
    assert set(beside.time(10)) == {"right"}
