"""The only timer. All contenders run interleaved, in an order drawn anew each round.

On a GPU, these series of a contender, each in microseconds per launch:

- `device_warm`: K launches back to back on the same inputs are captured into one CUDA graph; a sample is one replay's
  time between two events, divided by K. That is device time per launch with the host out of the picture; it includes
  the gap between two graph nodes, which the empty kernel, timed in the same way, shows as the floor.
- `device_reversed`, where asked for: the same graphs once more right after, every round in the reverse of its order. What a
  contender gains by its place in a round, or all of them lose as the GPU grows hot, shows as a difference between the two.
- `device_cold`: the same, but each of the K launches has inputs and an output of its own, and before every replay (and
  outside its events) 3x the L2's size of other data is read, so no launch finds its inputs in L2.
- `eager_stream`: wall clock of N Python calls in a row followed by one synchronisation, divided by N: what a program
  that keeps the GPU's queue filled pays per call, host or device, whichever is slower.
- `eager_latency`: wall clock of one Python call and the synchronisation after it, the queue empty before.

On a CPU, one series: `wall`, the wall clock of one call.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import torch

from flashcore.verify.watchdog import watchdog

Mode = Literal["device_warm", "device_reversed", "device_cold", "eager_stream", "eager_latency", "wall"]
# what is timed returns its output, or its outputs; the empty kernel has none
Output = torch.Tensor | tuple[torch.Tensor, ...] | None
Call = Callable[[], Output]
Progress = Callable[[str, float], None]
T = TypeVar("T")


class WrongOutputError(RuntimeError):
    """What the captured launches wrote is not what the candidate's check takes."""


WARMUP = 20
REPLAY_US = 1000.0
MAX_LAUNCHES = 512
PROBE_LAUNCHES = 8
CHUNK_ROUNDS = 10
EAGER_ROUNDS = 20
EAGER_CALLS = 100
EAGER_BATCH_US = 10_000.0
LATENCY_ROUNDS = 50
LATENCY_BUDGET_US = 100_000.0
HANG_SECONDS = 120.0


class Order(Protocol):
    """The order of the items in a round, by its number."""

    def __call__(self, items: Sequence[T], round_number: int) -> list[T]: ...


@dataclass(frozen=True)
class Candidate:
    """What is timed: `call` runs it once and returns its output (None for the empty kernel).

    `cold_call(i)` is the same call over input set i, None where there is nothing to be cold about; `context` is entered
    around captures and loops, never inside them; `check` gets an output of the captured launches and says what is
    wrong with it, or None. Whose check fails is not timed: a launch that escaped the capture would look infinitely
    fast.
    """

    name: str
    call: Call
    cold_call: Callable[[int], Call] | None = None
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    check: Callable[[Any], str | None] = field(default=lambda output: None)


@dataclass(frozen=True)
class Series:
    """Samples in microseconds per launch; each is the mean over `launches` launches (1: a single launch or call)."""

    mode: Mode
    launches: int
    samples: tuple[float, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of one candidate: its series, or why it has none."""

    series: tuple[Series, ...] = ()
    failure: str | None = None


@dataclass(frozen=True)
class Plan:
    """How long and what to measure. `max_cold_sets` bounds the input sets of a cold replay; 0 leaves cold out.

    retime: measure `device_reversed` as well.
    """

    iters: int = 100
    eager: bool = True
    max_cold_sets: int = 0
    retime: bool = False


def _silent(what: str, fraction: float) -> None:
    """The progress nobody watches."""


def shuffled(items: Sequence[T], round_number: int) -> list[T]:
    """The items in the order of this round, the same in every run.

    Drawn, not rotated: rotation leaves each the same predecessor, whose caches and clocks it then always inherits.
    """
    return random.Random(round_number).sample(list(items), len(items))


def reversed_order(items: Sequence[T], round_number: int) -> list[T]:
    """The items in the reverse of the order of this round."""
    return shuffled(items, round_number)[::-1]


def time_cpu(candidates: Sequence[Candidate], plan: Plan, progress: Progress = _silent) -> dict[str, Outcome]:
    """Wall clock per call, interleaved. A candidate that raises is an outcome with its failure, not an exception."""
    outcomes: dict[str, Outcome] = {}
    for candidate in candidates:
        try:
            with candidate.context():
                _warm_up(candidate)
        except Exception as error:  # a peer may fail in any way; the row says how
            outcomes[candidate.name] = Outcome(failure=describe(error))
    running = [c for c in candidates if c.name not in outcomes]
    samples: dict[str, list[float]] = {c.name: [] for c in running}
    for round_number in range(plan.iters):
        for candidate in shuffled(running, round_number):
            with candidate.context():
                samples[candidate.name].append(_wall_us(candidate.call, 1))
        progress("timing", (round_number + 1) / plan.iters)
    return outcomes | {n: Outcome((Series("wall", 1, tuple(values)),)) for n, values in samples.items()}


def time_cuda(
    candidates: Sequence[Candidate], plan: Plan, device: torch.device, progress: Progress = _silent
) -> dict[str, Outcome]:
    """The series named at the top of this file, for every candidate, on one GPU.

    A candidate that fails (in its warm-up, its capture or its check) has an outcome with the failure.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    flush = _Flush(device)
    failures: dict[str, str] = {}
    warm: list[Replay] = []
    cold: list[Replay] = []
    launch_us: dict[str, float] = {}
    with torch.cuda.stream(stream):
        for position, candidate in enumerate(candidates):
            progress(f"capture {candidate.name}", position / len(candidates))
            try:
                with watchdog(HANG_SECONDS, f"{candidate.name}: warm-up and graph capture"), candidate.context():
                    warm_replay, launch_us[candidate.name] = prepare_warm(candidate)
                    cold_replay = _prepare_cold(candidate, warm_replay.launches, plan.max_cold_sets)
            except Exception as error:  # a peer may fail in any way; the row says how
                failures[candidate.name] = describe(error)
                continue
            warm.append(warm_replay)
            cold.extend([cold_replay] if cold_replay else [])
        series: dict[str, list[Series]] = {replay.name: [] for replay in warm}
        for replay, samples in _replay_all(warm, plan.iters, None, partial(progress, "device_warm")):
            series[replay.name].append(Series("device_warm", replay.launches, samples))
        if plan.retime:
            again = _replay_all(warm, plan.iters, None, partial(progress, "device_reversed"), reversed_order)
            for replay, samples in again:
                series[replay.name].append(Series("device_reversed", replay.launches, samples))
        for replay, samples in _replay_all(cold, plan.iters, flush, partial(progress, "device_cold")):
            series[replay.name].append(Series("device_cold", replay.launches, samples))
    torch.cuda.synchronize(device)
    if plan.eager:
        for name, measured in _time_eager([c for c in candidates if c.name in series], launch_us, progress):
            series[name].append(measured)
    outcomes = {name: Outcome(tuple(measured)) for name, measured in series.items()}
    return outcomes | {name: Outcome(failure=failure) for name, failure in failures.items()}


def describe(error: BaseException) -> str:
    """An exception on one line: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def launches_per_replay(launch_us: float) -> int:
    """How many launches a graph holds so that a replay takes about a millisecond: its own launch then weighs < 1 %."""
    return max(1, min(MAX_LAUNCHES, math.ceil(REPLAY_US / max(launch_us, 1e-3))))


class _Flush:
    """Reads 3x the L2's size of other data on the current stream; reading leaves nothing that must be written back."""

    def __init__(self, device: torch.device) -> None:
        size = 3 * torch.cuda.get_device_properties(device).L2_cache_size
        self._data = torch.ones(max(size // 4, 1), device=device)

    def __call__(self) -> None:
        self._data.sum()


class Replay:
    """A CUDA graph of launches captured on the current stream, and the outputs those launches write."""

    def __init__(self, name: str, calls: Sequence[Call], *, keep_outputs: int) -> None:
        self.name = name
        self.launches = len(calls)
        outputs: deque[Output] = deque(maxlen=keep_outputs)
        self._graph = torch.cuda.CUDAGraph()
        # Not `torch.cuda.graph`: it empties the allocator's cache each time, which costs more than these captures.
        self._graph.capture_begin(capture_error_mode="thread_local")
        try:
            for call in calls:
                outputs.append(call())
        except BaseException:
            with _ignored():
                self._graph.capture_end()
            raise
        self._graph.capture_end()
        self.outputs = [output for output in outputs if output is not None]

    def __call__(self) -> None:
        self._graph.replay()

    def poisoned_outputs(self) -> list[torch.Tensor | tuple[torch.Tensor, ...]]:
        """The kept outputs after a replay that began with NaN in all of them."""
        for tensor in self.tensors():
            tensor.fill_(math.nan)
        self()
        torch.cuda.current_stream().synchronize()
        return self.outputs

    def tensors(self) -> Iterator[torch.Tensor]:
        """Those that the kept outputs consist of."""
        for output in self.outputs:
            yield from (output,) if isinstance(output, torch.Tensor) else output

    def event_us(self) -> float:
        start, end = _event_pair()
        start.record()
        self()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / self.launches


@contextmanager
def _ignored() -> Iterator[None]:
    """A capture that failed cannot be ended properly either; the first error is the one to report."""
    try:
        yield
    except RuntimeError:
        return


def prepare_warm(candidate: Candidate, warmup: int = WARMUP) -> tuple[Replay, float]:
    """The graph over the same inputs, checked, and the estimate of a launch's time that K was chosen by."""
    estimate = _warm_up(candidate, warmup)
    if estimate < REPLAY_US:
        # Calls this short may wait for the host, so their eager time says little about the device's.
        probe = Replay(candidate.name, [candidate.call] * PROBE_LAUNCHES, keep_outputs=1)
        probe()
        estimate = min(probe.event_us() for _ in range(3))
    replay = Replay(candidate.name, [candidate.call] * launches_per_replay(estimate), keep_outputs=1)
    for output in replay.poisoned_outputs():
        wrong = candidate.check(output)
        if wrong:
            raise WrongOutputError(f"the captured launch's output is wrong: {wrong}")
    return replay, estimate


def _prepare_cold(candidate: Candidate, launches: int, max_sets: int) -> Replay | None:
    if candidate.cold_call is None or max_sets == 0:
        return None
    count = min(launches, max_sets)
    calls = [candidate.cold_call(number) for number in range(count)]
    calls[-1]()
    replay = Replay(candidate.name, calls, keep_outputs=count)
    # Only set 0 has a reference; for the rest it is enough to see that every launch wrote its output.
    replay.poisoned_outputs()
    if not all(bool(torch.isfinite(tensor).all()) for tensor in replay.tensors()):
        raise RuntimeError("a captured launch over cold inputs left part of its output unwritten or not finite")
    return replay


def _replay_all(
    replays: Sequence[Replay],
    iters: int,
    before: Callable[[], None] | None,
    progress: Callable[[float], None],
    order: Order = shuffled,
) -> Iterator[tuple[Replay, tuple[float, ...]]]:
    """`iters` samples of each replay, interleaved; `before` runs ahead of each sample, outside its events."""
    if not replays:
        return
    samples: dict[str, list[float]] = {replay.name: [] for replay in replays}
    for first in range(0, iters, CHUNK_ROUNDS):
        progress(first / iters)
        with watchdog(HANG_SECONDS, "graph replays"):
            for replay, us in replay_rounds(replays, range(first, min(first + CHUNK_ROUNDS, iters)), before, order):
                samples[replay.name].append(us)
    for replay in replays:
        yield replay, tuple(samples[replay.name])


def replay_rounds(
    replays: Sequence[Replay], rounds: range, before: Callable[[], None] | None, order: Order
) -> list[tuple[Replay, float]]:
    """One sample of each replay for each of these rounds, queued without a synchronisation between them."""
    torch.cuda.current_stream().synchronize()
    # An untimed replay first: the host then stays ahead of the GPU, and no sample holds its time to launch a graph.
    order(replays, rounds.start)[-1]()
    queued = []
    for round_number in rounds:
        for replay in order(replays, round_number):
            if before is not None:
                before()
            start, end = _event_pair()
            start.record()
            replay()
            end.record()
            queued.append((replay, start, end))
    torch.cuda.current_stream().synchronize()
    return [(replay, float(start.elapsed_time(end)) * 1e3 / replay.launches) for replay, start, end in queued]


def _time_eager(
    candidates: Sequence[Candidate], launch_us: dict[str, float], progress: Progress
) -> Iterator[tuple[str, Series]]:
    """The two wall-clock series of every candidate, interleaved, on the current stream as a user's program has it."""
    if not candidates:
        return
    counts = {c.name: _eager_calls(max(launch_us[c.name], _host_estimate_us(c))) for c in candidates}
    stream = _eager_rounds(candidates, counts, EAGER_ROUNDS, partial(progress, "eager"))
    slowest = max(samples[0] for samples in stream.values())
    rounds = int(min(LATENCY_ROUNDS, max(10, LATENCY_BUDGET_US / slowest)))
    single = dict.fromkeys(counts, 1)
    latency = _eager_rounds(candidates, single, rounds, partial(progress, "latency"))
    for name, count in counts.items():
        yield name, Series("eager_stream", count, tuple(stream[name]))
        yield name, Series("eager_latency", 1, tuple(latency[name]))


def _eager_rounds(
    candidates: Sequence[Candidate], counts: dict[str, int], rounds: int, progress: Callable[[float], None]
) -> dict[str, list[float]]:
    """`rounds` samples of each candidate: wall clock per call of its count of calls and one synchronisation."""
    samples: dict[str, list[float]] = {c.name: [] for c in candidates}
    for round_number in range(rounds):
        progress(round_number / rounds)
        with watchdog(HANG_SECONDS, "eager calls"):
            for candidate in shuffled(candidates, round_number):
                with candidate.context():
                    samples[candidate.name].append(_wall_us(candidate.call, counts[candidate.name]))
    return samples


def _eager_calls(call_us: float) -> int:
    return int(max(2, min(EAGER_CALLS, EAGER_BATCH_US / max(call_us, 1e-3))))


def _host_estimate_us(candidate: Candidate) -> float:
    with candidate.context():
        return min(_wall_us(candidate.call, 3) for _ in range(2))


def _warm_up(candidate: Candidate, calls: int = WARMUP) -> float:
    """Run the warm-up calls; the wall clock in microseconds of one call among the last of them."""
    _wall_us(candidate.call, calls - 3)
    return _wall_us(candidate.call, 3)


def _wall_us(call: Call, count: int) -> float:
    """Wall clock per call of `count` calls followed by one synchronisation, in microseconds; the queue starts empty."""
    on_gpu = torch.cuda.is_initialized()
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter_ns()
    for _ in range(count):
        call()
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter_ns() - start) * 1e-3 / count


def _event_pair() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
