"""TMA tensor maps on the GPU, by the kernels that take them: what lies around a tensor, strange strides, changing addresses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import flashcore
from flashcore import reference
from flashcore.errors import UnsupportedError
from flashcore.kernels.arguments import TENSORS, TensorMap
from flashcore.kernels.registry import BINDINGS
from flashcore.runtime.binary import TensorMapLayout
from flashcore.runtime.engine import plan_call
from flashcore.runtime.launch import Launcher
from flashcore.runtime.store import obtain
from flashcore.runtime.tensor_map import encoder, try_out
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
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A copy of another size than a barrier awaits hangs the GPU."""
    with watchdog(120, "a test of tensor maps"):
        yield
        torch.cuda.synchronize()


@pytest.fixture(params=["small", "hopper"])
def impl(request: pytest.FixtureRequest) -> str:
    """The kernels that read their tensors by tensor maps."""
    return request.param


def _attend(impl: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
    """The call by a kernel, where it takes it and its binary is at hand: the Triton of this machine may not know our Gluon."""
    try:
        # mypy matches no dict of objects with keywords, and the signature cannot say that the result is o alone
        plan = flashcore.explain(q, k, v, impl=impl, **options)
    except UnsupportedError as refusal:
        pytest.skip(str(refusal))
    if plan.origin == "compile":
        pytest.skip(f"no binary of the {impl} kernel is shipped or cached here: build the set of sm_90a first")
    return flashcore.attention(q, k, v, impl=impl, **options)


def _random(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator(device="cuda").manual_seed(seed)).to(dtype)


def _amid_nan(t: torch.Tensor) -> torch.Tensor:
    """The same tensor (batch, length, heads, dim) inside memory that is NaN on all its sides, at a multiple of 16 bytes."""
    batch, length, heads, dim = t.shape
    around = torch.full((batch + 2, length + 7, heads + 2, dim + 16), float("nan"), device=t.device, dtype=t.dtype)
    inside = around[1:-1, 3:-4, 1:-1, 8:-8]
    inside.copy_(t)
    return inside


def _check(o: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> None:
    expected = reference.attention(q, k, v, causal=causal)[0]
    torch.testing.assert_close(o.double(), expected, atol=TOLERANCE[q.dtype], rtol=TOLERANCE[q.dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 72, 128, 192, 256])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (63, 65), (197, 130), (129, 257)])
def test_what_lies_around_a_tensor_is_not_read(seqlen_q: int, seqlen_k: int, dim: int, dtype: torch.dtype, impl: str) -> None:
    q, k, v = (
        _amid_nan(_random(2, length, heads, dim, dtype=dtype, seed=seed))
        for seed, (length, heads) in enumerate(((seqlen_q, 4), (seqlen_k, 2), (seqlen_k, 2)))
    )
    for causal in (False, True):
        _check(_attend(impl, q, k, v, causal=causal), q, k, v, causal)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize(("seqlen", "dim"), [(1, 64), (65, 64), (197, 128), (300, 96), (131, 256)])
def test_nothing_is_written_beside_the_outputs(seqlen: int, dim: int, layout: str, impl: str) -> None:
    q, k, v = (_random(2, *((seqlen, 3) if layout == "bshd" else (3, seqlen)), dim, seed=seed) for seed in range(3))
    expected = _attend(impl, q, k, v, layout=layout)
    options = Options.check(causal=False, scale=None, window=None, softcap=0.0, layout=layout)
    spec, plan = plan_call(q, k, v, None, options, True, impl)
    assert plan.specialisation is not None
    arguments = BINDINGS[impl].arguments(spec, plan.specialisation)
    launcher = Launcher(obtain(plan.specialisation, Target.of(q.device)), q.device, grid=plan.grid, arguments=arguments)
    margin, poison = 1 << 16, 7.25
    o, lse = (
        torch.full((size + 2 * margin,), poison, device="cuda", dtype=dtype)
        for size, dtype in ((q.numel(), q.dtype), (2 * 3 * seqlen, torch.float32))
    )
    counter = torch.zeros(1, dtype=torch.int32, device="cuda")
    inside = {"q": q, "k": k, "v": v, "o": o[margin:], "lse": lse[margin:], "counter": counter}
    launcher.launch(tuple(inside[name].data_ptr() if name in inside else 0 for name in TENSORS))
    torch.testing.assert_close(o[margin:-margin].view(q.shape), expected, atol=2e-3, rtol=2e-3)
    for written in (o, lse):
        assert bool((written[:margin] == poison).all() and (written[-margin:] == poison).all())
    assert not bool((lse[margin:-margin] == poison).any())


def test_expanded_keys_and_values_have_strides_of_0(impl: str) -> None:
    q = _random(3, 150, 4, 128)
    for k, v in (
        (_random(1, 170, 4, 128, seed=1).expand(3, -1, -1, -1), _random(1, 170, 4, 128, seed=2).expand(3, -1, -1, -1)),
        (_random(3, 170, 1, 128, seed=1).expand(-1, -1, 4, -1), _random(3, 170, 1, 128, seed=2).expand(-1, -1, 4, -1)),
        (_random(3, 1, 4, 128, seed=1).expand(-1, 170, -1, -1), _random(3, 1, 4, 128, seed=2).expand(-1, 170, -1, -1)),
    ):
        assert 0 in k.stride() and 0 in v.stride()
        _check(_attend(impl, q, k, v), q, k, v)
    everywhere = _random(1, 1, 1, 128).expand(3, 150, 4, 128)
    _check(_attend(impl, everywhere, everywhere, everywhere), everywhere, everywhere, everywhere)


@pytest.mark.parametrize("stride", [0, 1, 7, 2**20 + 3, 2**45 + 1])
def test_the_stride_of_a_dimension_of_one_is_of_no_consequence(stride: int, impl: str) -> None:
    q, k, v = (_random(2, 1, 4, 128, seed=0), *(_random(1, 90, 1, 128, seed=seed) for seed in (1, 2)))
    one_row = torch.as_strided(q, q.shape, (q.stride(0), stride, 128, 1))
    one_batch = [torch.as_strided(t, t.shape, (stride, 128, stride, 1)) for t in (k, v)]
    assert one_row.stride(1) == one_batch[0].stride(0) == one_batch[0].stride(2) == stride
    _check(_attend(impl, one_row[:1], *one_batch), q[:1], k, v)
    k, v = (_random(2, 90, 4, 128, seed=seed) for seed in (1, 2))
    _check(_attend(impl, one_row, k, v), q, k, v)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_one_prepared_call_reads_and_writes_wherever_its_tensors_are(dtype: torch.dtype, impl: str) -> None:
    calls = [[_random(2, 197, 4, 128, dtype=dtype, seed=3 * i + j) for j in range(3)] for i in range(8)]
    outputs = [_attend(impl, *tensors) for tensors in calls]
    assert len({o.data_ptr() for o in outputs}) == len(calls)
    for o, tensors in zip(outputs, calls, strict=True):
        _check(o, *tensors)
    # the same tensors in each other's roles, and a view that starts elsewhere
    q, k, v = calls[0]
    _check(_attend(impl, v, q, k), v, q, k)
    longer = _random(2, 205, 4, 128, dtype=dtype, seed=99)[:, 8:]
    assert torch.equal(_attend(impl, q, longer, v), _attend(impl, q, longer.clone(), v))


@pytest.mark.parametrize("element", ["fp16", "bf16"])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_this_driver_puts_the_address_first(element: str, swizzle: int) -> None:
    """Else every launch encodes its tensor maps anew, which is right but slow."""
    torch.zeros(1, device="cuda")  # makes a context
    layout = TensorMapLayout(element=element, box=(1, 1, 64, (swizzle or 16) // 2), swizzle=swizzle)
    for shape, strides in (((2, 4, 100, 128), (51200, 12800, 128, 1)), ((1, 4, 100, 128), (3, 0, 512, 1))):
        encode = encoder(TensorMap("k", shape, strides), layout)
        template, address_leads = try_out(encode)
        assert address_leads
        address = torch.zeros(64, device="cuda").data_ptr()
        assert encode(address) == address.to_bytes(8, "little") + template[8:]
