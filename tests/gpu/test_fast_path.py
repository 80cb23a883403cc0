"""Remembered calls on a GPU: where they allocate and launch, in graphs, on streams, on another device, compiled."""

from __future__ import annotations

import pytest
import torch

import flashcore
from flashcore import reference
from flashcore.runtime import engine, fast_path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def _inputs(device: str = "cuda", seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator(device=device).manual_seed(seed)
    return [torch.randn(1, 8, 200, 64, device=device, generator=generator).half() for _ in range(3)]


def _attend(*tensors: torch.Tensor) -> torch.Tensor:
    return flashcore.attention(*tensors, layout="bhsd", impl="portable")  # without an LSE


def _check(o: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    torch.testing.assert_close(o.double(), reference.attention(q, k, v, layout="bhsd")[0], atol=2e-3, rtol=2e-3)


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Inputs of a call that is remembered; from here on, one that is not fails."""
    tensors = _inputs()
    for _ in range(3):
        _attend(*tensors)
    monkeypatch.setattr(engine, "_key", lambda *arguments: pytest.fail("went by its key"))
    return tensors


def test_this_torch_has_what_makes_calls_fast() -> None:
    assert fast_path.ways(torch.device("cuda")) == "found by torch's tensor guards; outputs allocated directly"


def test_a_remembered_call_is_captured_and_replays_on_new_inputs(remembered: list[torch.Tensor]) -> None:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = _attend(*remembered)
    for t, fresh in zip(remembered, _inputs(seed=1), strict=True):
        t.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    _check(o, *remembered)


def test_a_remembered_call_runs_on_the_current_stream(remembered: list[torch.Tensor]) -> None:
    q, k, v = remembered
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # some 25 ms: a launch on another stream would read q before it is doubled
        q.mul_(2)
        o = _attend(q, k, v)
    stream.synchronize()
    _check(o, q, k, v)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_remembered_call_of_another_device_runs_there() -> None:
    here, there = _inputs("cuda:0"), _inputs("cuda:1", seed=1)
    for _ in range(4):
        for tensors in (here, there):
            o = _attend(*tensors)
            assert o.device == tensors[0].device
            _check(o, *tensors)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_compiled_code_in_every_mode(mode: type) -> None:
    compiled = torch.compile(_attend, fullgraph=True)
    tensors = _inputs()
    with mode():
        for _ in range(4):
            _check(compiled(*tensors), *tensors)
