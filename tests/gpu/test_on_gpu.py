"""What only a GPU can show: graphs, streams, threads, compiled code. The numbers' correctness is `flashcore verify`'s."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch

import flashcore
from flashcore import ops, reference
from flashcore.kernels.registry import BINDINGS, KERNELS
from flashcore.target import Target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def _inputs(seqlen: int = 197, heads_k: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return tuple(
        torch.randn(2, seqlen, heads, 64, device="cuda", generator=generator).half() for heads in (8, heads_k, heads_k)
    )


Attend = Callable[..., torch.Tensor]


def _ours() -> list[str]:
    if not torch.cuda.is_available():
        return list(BINDINGS)
    target = Target.of(torch.device("cuda"))
    return [impl for impl, binding in BINDINGS.items() if target.arch in KERNELS[binding.KERNEL].archs]


@pytest.fixture(params=_ours())
def attend(request: pytest.FixtureRequest) -> Attend:
    """Each kernel of ours that this GPU runs."""
    # that the result is o alone without return_lse, the signature cannot say
    return partial(flashcore.attention, impl=request.param)


def _check(o: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> None:
    torch.testing.assert_close(o.double(), reference.attention(q, k, v, causal=causal)[0], atol=2e-3, rtol=2e-3)


def test_graph_capture_of_a_call_never_made_before_replays_on_new_inputs(attend: Attend) -> None:
    q, k, v = _inputs(seqlen=211)  # a length of its own: the binary may be loaded, the call is not yet prepared
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = attend(q, k, v)
    for t, fresh in zip((q, k, v), _inputs(seqlen=211, seed=1), strict=True):
        t.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    _check(o, q, k, v)


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_an_attended_nan_reaches_the_results(attend: Attend, where: str) -> None:
    # each place that a thread may hold it in: keys of a block that is computed whole, and of the masked one at the end
    for position in (*range(16, 32), *range(150, 166)):
        q, k, v = _inputs()
        {"q": q, "k": k, "v": v}[where][1, position, 0, 5] = float("nan")
        o, lse = attend(q, k, v, return_lse=True)
        rows = slice(position, position + 1) if where == "q" else slice(None)
        heads = 1 if where == "q" else 2  # two heads of queries share the first of keys and values
        reached = o[1, rows, :heads]
        assert torch.isnan(reached[..., 5] if where == "v" else reached).all()
        assert where == "v" or torch.isnan(lse[1, :heads, rows]).all()
        assert torch.isfinite(o[0]).all() and torch.isfinite(lse[0]).all()


def test_runs_on_the_current_stream(attend: Attend) -> None:
    q, k, v = _inputs()
    o = attend(q, k, v)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # some 25 ms: a launch on another stream would read q before it is doubled
        q.mul_(2)
        doubled = attend(q, k, v)
    stream.synchronize()
    _check(doubled, q, k, v)
    assert not torch.equal(doubled, o)


def test_threads_with_the_same_plan_do_not_mix_their_arguments(attend: Attend) -> None:
    inputs = [_inputs(seed=seed) for seed in range(4)]
    expected = [attend(*tensors) for tensors in inputs]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(300):
            if not torch.equal(attend(*inputs[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_compiled_by_inductor_without_graph_breaks_for_any_length(attend: Attend) -> None:
    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q * 1.0, k, v, causal=True) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for seqlen in (64, 129, 200):
        q, k, v = _inputs(seqlen=seqlen)
        torch.testing.assert_close(compiled(q, k, v), layer(q, k, v))
    # the kernels that inductor makes and ours, one after the other without a gap and one by one
    queued, one_by_one = [q], [q]
    torch.cuda._sleep(20_000_000)
    for _ in range(20):
        queued.append(compiled(queued[-1], k, v))
    for _ in range(20):
        one_by_one.append(compiled(one_by_one[-1], k, v))
        torch.cuda.synchronize()
    assert all(map(torch.equal, queued, one_by_one))


def test_opcheck_on_the_gpu() -> None:
    q, k, v = _inputs()
    for impl in (*_ours(), "auto", "torch"):
        arguments = (q, k, v, None, "bshd", True, None, False, -1, -1, 0.0, impl)
        for operator in (ops.attention, ops.attention_with_lse):
            torch.library.opcheck(operator, arguments)


def test_a_binary_of_another_arch_is_refused_by_name() -> None:
    from flashcore.build.pool import compile_one
    from flashcore.kernels.registry import EMPTY
    from flashcore.runtime.launch import Launcher

    wrong = "sm_120a" if torch.cuda.get_device_capability()[0] != 12 else "sm_80"
    pytest.importorskip("triton")
    binary = compile_one(EMPTY, wrong)
    with pytest.raises(flashcore.FlashCoreError, match=f"{wrong}.*refused"):
        Launcher(binary, torch.device("cuda"), grid=1, arguments=())
