"""What only a GPU can show of gradients: bits, graphs, streams, compiled code, memory. The numbers are `flashcore verify`'s."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

import flashcore
from flashcore.kernels.registry import BACKWARDS, BINDINGS, KERNELS
from flashcore.target import Target
from flashcore.verify.watchdog import watchdog

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
Attend = Callable[..., torch.Tensor]


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    with watchdog(240, "a test of gradients"):
        yield
        torch.cuda.synchronize()


def _ours() -> list[str]:
    if not torch.cuda.is_available():
        return list(BACKWARDS)
    target = Target.of(torch.device("cuda"))
    return [impl for impl in BACKWARDS if target.arch in KERNELS[BINDINGS[impl].KERNEL].archs]


@pytest.fixture(params=_ours())
def attend(request: pytest.FixtureRequest) -> Attend:
    """Each of ours that has gradients on this GPU; bitwise equal ones, so that ways to them can be compared."""
    return partial(flashcore.attention, impl=request.param, causal=True, deterministic=True)


def _inputs(
    seqlen: int = 333,
    batch: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    heads: tuple[int, int] = (8, 4),
    head_dim: int = 64,
) -> list[torch.Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    sizes = [(batch, seqlen, count, head_dim) for count in (heads[0], heads[1], heads[1])]
    return [torch.randn(size, device="cuda", generator=generator).to(dtype).requires_grad_() for size in sizes]


def _gradients(function: Attend, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    o = function(*tensors)
    weights = torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape)
    return torch.autograd.grad((o.float() * weights).sum(), tensors)


def _same(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_gradients_are_torchs_by_its_own_rounding(attend: Attend) -> None:
    tensors = _inputs()
    torchs = _gradients(partial(flashcore.attention, impl="torch", causal=True), tensors)
    for deterministic in (True, False):
        found = _gradients(partial(attend, deterministic=deterministic), tensors)
        torch.testing.assert_close(found, torchs, atol=2e-2, rtol=2e-2)


REPEATED: dict[str, dict[str, Any]] = {
    "causal, one tile a block": {"seqlen": 2000},
    "causal, odd": {"seqlen": 197},
    "causal, many tiles": {"seqlen": 1500, "heads": (32, 16), "head_dim": 128},
    "many tiles": {"seqlen": 1500, "heads": (24, 24), "options": {"causal": False}},
    "many tiles, wide": {"seqlen": 1500, "heads": (16, 16), "head_dim": 128, "options": {"causal": False}},
    "a window": {"seqlen": 1500, "heads": (24, 24), "options": {"window": (300, 100), "causal": False}},
    "a softcap": {"seqlen": 1500, "heads": (16, 8), "head_dim": 128, "options": {"softcap": 20.0}},
}


@pytest.mark.parametrize("case", REPEATED.values(), ids=REPEATED)
def test_deterministic_gradients_are_bitwise_equal_over_1000_runs(attend: Attend, case: dict[str, Any]) -> None:
    options = case.get("options", {})
    tensors = _inputs(**{name: value for name, value in case.items() if name != "options"})
    o = attend(*tensors, **options)
    do = torch.randn(o.shape, device="cuda", dtype=o.dtype, generator=torch.Generator(device="cuda").manual_seed(1))
    expected = torch.autograd.grad(o, tensors, do, retain_graph=True)
    differences = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        found = torch.autograd.grad(o, tensors, do, retain_graph=True)
        # added up on the GPU, so that the runs follow one another without a gap
        differences += sum((a != b).sum() for a, b in zip(found, expected, strict=True))
    assert differences == 0
    assert flashcore.explain(*tensors, impl=attend.keywords["impl"], deterministic=True).backward.reproducible


def test_deterministic_gradients_beside_other_work(attend: Attend) -> None:
    """Blocks that wait for one another must not hang, nor add in another order, where others hold part of the GPU."""
    tensors = _inputs(1500, heads=(32, 16), head_dim=128)
    expected = _gradients(attend, tensors)
    other = torch.cuda.Stream()
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    torch.cuda.synchronize()
    for _ in range(20):
        with torch.cuda.stream(other):
            for _ in range(10):
                a @ a
        assert _same(_gradients(attend, tensors), expected)


def test_compiled_by_inductor_for_any_length(attend: Attend) -> None:
    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q * 2, k, v + 1).relu()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for seqlen in (64, 129, 200):
        tensors = _inputs(seqlen)
        torch.testing.assert_close(_gradients(compiled, tensors), _gradients(layer, tensors), atol=2e-3, rtol=2e-3)


def test_both_passes_in_a_graph_replay_on_new_inputs(attend: Attend) -> None:
    tensors, fresh = _inputs(211), _inputs(211, seed=1)
    expected = _gradients(attend, fresh)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # autograd's own requirement: what it makes once is not made in the graph
        _gradients(attend, tensors)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        found = _gradients(attend, tensors)
    with torch.no_grad():
        for t, other in zip(tensors, fresh, strict=True):
            t.copy_(other)
    graph.replay()
    assert _same(found, expected)


def test_the_backward_pass_runs_on_the_forward_passes_stream(attend: Attend) -> None:
    tensors = _inputs()
    expected = torch.autograd.grad(o := attend(*tensors), tensors, torch.ones_like(o) * 2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        o = attend(*tensors)
        do = torch.ones_like(o)
        torch.cuda._sleep(50_000_000)  # a launch on another stream would read do before it is doubled
        do.mul_(2)
    with torch.cuda.stream(stream):
        found = torch.autograd.grad(o, tensors, do)
    stream.synchronize()
    assert _same(found, expected)


def test_one_call_after_another_without_a_gap(attend: Attend) -> None:
    def chain(*, apart: bool) -> tuple[torch.Tensor, ...]:
        q, k, v = _inputs()
        x = q
        for _ in range(8):
            x = attend(x, k, v) + q
            if apart:
                torch.cuda.synchronize()
        return torch.autograd.grad(x.float().sum(), [q, k, v])

    expected = chain(apart=True)
    torch.cuda._sleep(20_000_000)
    assert _same(chain(apart=False), expected)


def test_memory_grows_with_the_length_and_not_with_its_square(attend: Attend) -> None:
    def peak(seqlen: int) -> int:
        tensors = _inputs(seqlen, batch=1)
        o = attend(*tensors)
        do = torch.ones_like(o)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(o, tensors, do)
        return torch.cuda.max_memory_allocated() - before

    peak(2048)
    assert peak(8192) < 4.2 * peak(2048)


def test_autocast_trains_float32_parameters_in_half_precision(attend: Attend) -> None:
    tensors = _inputs(dtype=torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        o = attend(*tensors)
    assert o.dtype == torch.bfloat16
    gradients = torch.autograd.grad(o.float().sum(), tensors)
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)


def test_auto_names_who_makes_the_gradients() -> None:
    tensors = _inputs(1024)
    plan = flashcore.explain(*tensors, causal=True)
    assert (plan.impl in BACKWARDS) == (plan.backward is not None) and plan.impl in (*BACKWARDS, "torch")
    gradients = _gradients(partial(flashcore.attention, causal=True), tensors)
    torchs = _gradients(partial(flashcore.attention, causal=True, impl="torch"), tensors)
    torch.testing.assert_close(gradients, torchs, atol=2e-2, rtol=2e-2)
    with pytest.raises(NotImplementedError, match=r"impl 'small'.*no backward pass|impl 'small': needs a Hopper GPU"):
        flashcore.attention(*_inputs(64), impl="small")
