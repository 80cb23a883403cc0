"""Launches that may start before those ahead of them have ended, clusters among them: none reads or writes too early.

A chain of calls, each of which takes what the one before wrote, must give the same bits whether the GPU has the calls one
after another without a gap or is idle before each. Peaked scores and changing operands keep a wrong input from going unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch

import flashcore
from flashcore.kernels.arguments import TENSORS
from flashcore.kernels.registry import BINDINGS
from flashcore.runtime.binary import Binary
from flashcore.runtime.engine import plan_call
from flashcore.runtime.launch import Launcher
from flashcore.runtime.store import obtain
from flashcore.spec import Options
from flashcore.target import Target
from flashcore.verify.watchdog import watchdog

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs a GPU of sm_90a"
    ),
]
# (B, S, H, D): of the small kernel clusters of 1, 2 and 4 blocks, less than a wave of them and several; of the hopper kernel
# fewer tiles than multiprocessors, and so many that it draws them from a counter where they are causal
SHAPES = [(4, 128, 8, 64), (1, 512, 8, 64), (4, 260, 12, 64), (1, 1000, 4, 64), (2, 400, 4, 128)]
CALLS, EVERY = 50, 5
# some 10 ms on the GPU, while which all calls of a chain are queued behind it
GAP_CYCLES = 20_000_000


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A cluster whose blocks do not meet hangs the GPU."""
    with watchdog(120, "a test of launches"):
        yield
        torch.cuda.synchronize()


@pytest.fixture(params=["small", "hopper", "small hopper", "small portable", "hopper portable"])
def impls(request: pytest.FixtureRequest) -> list[str]:
    """The kernels that a chain's calls take in turn. The portable one waits for all before it, and all wait for it."""
    return request.param.split()


Tensors = list[torch.Tensor]
Between = Callable[[torch.Tensor], object]


def _operands(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, Tensors]:
    """What a chain begins with, and the other operands of its calls."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    first, *others = (torch.randn(shape, device="cuda", generator=generator).half() for _ in range(5))
    return first, others


def _call(step: int, impls: list[str], x: torch.Tensor, others: Tensors) -> torch.Tensor:
    """The call of a chain with this number: x is its q, k or v."""
    tensors = [others[(step + role) % len(others)] for role in range(3)]
    tensors[step % 3] = x
    impl, causal = impls[step % len(impls)], step % 4 < 2
    # that the result is o alone without return_lse, the signature cannot say
    return flashcore.attention(*tensors, causal=causal, scale=0.5, impl=impl)


def _chain(impls: list[str], x: torch.Tensor, others: Tensors, between: Between | None = None) -> Tensors:
    """Every fifth result. The others' memory is soon that of a later one, which must not be written before it was read."""
    kept = []
    for step in range(CALLS):
        x = _call(step, impls, x, others)
        if between is not None:
            between(x)
        if step % EVERY == EVERY - 1:
            kept.append(x)
    return kept


def _one_by_one(impls: list[str], x: torch.Tensor, others: Tensors, between: Between | None = None) -> Tensors:
    """The same with an idle GPU before each call."""
    seen = []

    def wait(result: torch.Tensor) -> None:
        torch.cuda.synchronize()
        if between is not None:
            between(result)
            torch.cuda.synchronize()
        seen.append(result.clone())
        torch.cuda.synchronize()

    kept = _chain(impls, x, others, wait)
    assert all(not torch.equal(one, next_one) for one, next_one in pairwise([x, *seen]))
    return kept


def _skip_without_binaries(impls: list[str], x: torch.Tensor) -> None:
    """The Triton of this machine may not know our Gluon."""
    for impl in impls:
        for causal in (False, True):
            if flashcore.explain(x, x, x, causal=causal, impl=impl).origin == "compile":
                pytest.skip(f"no binary of the {impl} kernel is shipped or cached here: build the set of sm_90a first")


def _same(found: Tensors, expected: Tensors) -> list[int]:
    """The places at which two chains differ: none."""
    assert len(found) == len(expected) == CALLS // EVERY
    return [i for i, (one, other) in enumerate(zip(found, expected, strict=True)) if not torch.equal(one, other)]


def _elementwise(x: torch.Tensor) -> None:
    """PyTorch's own kernel, which reads what the call wrote and writes what the next reads."""
    x.mul_(1.25)


@pytest.mark.parametrize("between", [None, _elementwise], ids=["back to back", "elementwise between"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_chain_of_calls_gives_the_bits_of_calls_one_by_one(shape: tuple, impls: list[str], between: Between | None) -> None:
    x, others = _operands(shape)
    _skip_without_binaries(impls, x)
    expected = _one_by_one(impls, x, others, between)
    torch.cuda._sleep(GAP_CYCLES)
    assert _same(_chain(impls, x, others, between), expected) == []

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _chain(impls, x, others, between)
    # replays one after the other too: the first calls of one and the last ones of that before it
    for _ in range(3):
        graph.replay()
    assert _same(captured, expected) == []
    fresh, _ = _operands(shape, seed=1)
    expected = _one_by_one(impls, fresh, others, between)
    x.copy_(fresh)
    graph.replay()
    assert _same(captured, expected) == []


def test_two_streams_do_not_disturb_each_other(impls: list[str]) -> None:
    operands = [_operands((1, 512, 8, 64), seed) for seed in range(2)]
    _skip_without_binaries(impls, operands[0][0])
    expected = [_one_by_one(impls, *of_stream) for of_stream in operands]
    streams = [torch.cuda.Stream() for _ in operands]
    found = []
    for stream, of_stream in zip(streams, operands, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(GAP_CYCLES)
            found.append(_chain(impls, *of_stream))
    torch.cuda.synchronize()
    assert [_same(*pair) for pair in zip(found, expected, strict=True)] == [[], []]


def _handed_over(impls: list[str], x: torch.Tensor, others: Tensors) -> Tensors:
    """The chain with each call on the other of two streams, which waits for the one before."""
    current, streams = torch.cuda.current_stream(), [torch.cuda.Stream() for _ in range(2)]
    for stream in streams:
        stream.wait_stream(current)
    results = [x]  # all of them: memory that one stream frees and the other still reads is for torch to keep apart
    for step in range(CALLS):
        stream = streams[step % 2]
        stream.wait_stream(streams[1 - step % 2])
        with torch.cuda.stream(stream):
            results.append(_call(step, impls, results[-1], others))
    for stream in streams:
        current.wait_stream(stream)
    return results[EVERY::EVERY]


def test_what_another_stream_waits_for_is_there(impls: list[str]) -> None:
    x, others = _operands((1, 512, 8, 64))
    _skip_without_binaries(impls, x)
    expected = _one_by_one(impls, x, others)
    torch.cuda._sleep(GAP_CYCLES)
    found = _handed_over(impls, x, others)
    torch.cuda.synchronize()
    assert _same(found, expected) == []
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _handed_over(impls, x, others)
    graph.replay()
    assert _same(captured, expected) == []


def test_a_chain_is_captured_on_a_side_stream_and_replayed_on_another(impls: list[str]) -> None:
    x, others = _operands((2, 331, 4, 64))  # a length of its own: no call of it was made before the capture
    _skip_without_binaries(impls, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        captured = _chain(impls, x, others)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph.replay()
    stream.synchronize()
    assert _same(captured, _one_by_one(impls, x, others)) == []


@pytest.mark.parametrize("impl", ["small", "hopper"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_launch_that_waits_for_the_stream_gives_the_same_bits(shape: tuple, impl: str) -> None:
    x, others = _operands(shape)
    _skip_without_binaries([impl], x)
    options = Options.check(causal=True, scale=None, window=None, softcap=0.0, layout="bshd")
    spec, plan = plan_call(x, others[0], others[1], None, options, True, impl)
    assert plan.specialisation is not None
    binary = obtain(plan.specialisation, Target.of(x.device))
    assert binary.info.programmatic and binary.info.cluster == plan.specialisation.cluster
    arguments = BINDINGS[impl].arguments(spec, plan.specialisation)
    results = []
    for programmatic in (True, False):
        info = binary.info.model_copy(update={"programmatic": programmatic})
        launcher = Launcher(Binary(binary.cubin, info), x.device, grid=plan.grid, arguments=arguments)
        outputs = {
            "o": torch.full_like(x, 7.25),
            "lse": torch.full(spec.lse_shape, 7.25, device="cuda"),
            "counter": torch.zeros(1, dtype=torch.int32, device="cuda"),
        }
        tensors = {"q": x, "k": others[0], "v": others[1], **outputs}
        launcher.launch(tuple(tensors[name].data_ptr() if name in tensors else 0 for name in TENSORS))
        results.append(outputs)
    with_attribute, without = results
    expected = flashcore.attention(x, others[0], others[1], causal=True, return_lse=True, impl=impl)
    for name, wanted in zip(("o", "lse"), expected, strict=True):
        assert torch.equal(with_attribute[name], without[name]) and torch.equal(with_attribute[name], wanted)
