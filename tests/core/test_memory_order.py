"""Results lie in memory as the inputs that they belong to, so that views of packed tensors are undone without a copy."""

from functools import partial
from typing import Any

import pytest
import torch

import flashcore
from flashcore.memory_order import dense_strides, laid_out

BATCH, SEQLEN, HEADS, DIM = 2, 40, 3, 64


@pytest.mark.parametrize(
    ("shape", "like", "strides"),
    [
        ((2, 3, 5, 8), (120, 40, 8), (120, 40, 8, 1)),
        ((2, 3, 5, 8), (999, 8, 24), (120, 8, 24, 1)),
        ((2, 3, 5, 8), (8, 16, 48), (120, 8, 24, 1)),  # the batch is outermost whatever it was
        ((2, 1, 5, 8), (40, 0, 8), (40, 40, 8, 1)),  # one head: its stride says nothing
        ((2, 3, 1, 8), (24, 8, 0), (24, 8, 8, 1)),
        ((2, 3, 5, 8), (0, 0, 0), (120, 40, 8, 1)),  # expanded
        ((0, 3, 5, 8), (120, 8, 24), (120, 8, 24, 1)),
    ],
)
def test_strides_are_dense_and_in_the_order_of_what_they_follow(shape: Any, like: Any, strides: Any) -> None:
    assert dense_strides(shape, like) == strides


def test_only_what_lies_otherwise_is_copied() -> None:
    q = torch.empty(2, 5, 3, 8).transpose(1, 2)
    o = torch.randn(2, 3, 5, 8)
    copied = laid_out(o, q)
    assert copied.stride() == q.stride() and torch.equal(copied, o)
    assert laid_out(copied, q) is copied and laid_out(o, o) is o
    single = torch.randn(2, 1, 5, 8).as_strided((2, 1, 5, 8), (40, 7, 8, 1))
    assert laid_out(single, single) is single


def _packed(grad: bool = True) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    qkv = torch.randn(BATCH, SEQLEN, 3, HEADS, DIM, dtype=torch.float16, requires_grad=grad)
    return qkv, qkv.permute(2, 0, 3, 1, 4).unbind(0)


@pytest.mark.parametrize("impl", ["portable", "hopper"])
def test_a_view_of_packed_rows_gets_its_output_and_gradients_in_their_order(impl: str, launched: Any) -> None:
    _, tensors = _packed()
    o = flashcore.attention(*tensors, layout="bhsd", impl=impl)
    assert o.shape == (BATCH, HEADS, SEQLEN, DIM) and o.transpose(1, 2).is_contiguous()
    assert launched.last.arguments  # it ran through a launcher
    for gradient in torch.autograd.grad(o, tensors, torch.ones_like(o)):
        assert gradient.transpose(1, 2).is_contiguous()
    contiguous = flashcore.attention(*(t.detach().contiguous() for t in tensors), layout="bhsd", impl=impl)
    assert contiguous.is_contiguous()


def test_the_addresses_and_strides_that_kernels_get_are_those_of_the_output(launched: Any) -> None:
    _, (q, k, v) = _packed(grad=False)
    o = flashcore.attention(q, k, v, layout="bhsd", impl="hopper")
    (o_map,) = (argument for argument in launched.last.arguments if getattr(argument, "tensor", "") == "o" and argument.shape)
    assert o_map.strides == o.stride()


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_and_eager_calls_agree_on_the_order(grad: bool) -> None:
    attend = partial(flashcore.attention, layout="bhsd", impl="torch")
    compiled = torch.compile(lambda *tensors: attend(*tensors) * 1, fullgraph=True, backend="aot_eager", dynamic=True)
    for make in (lambda t: t, torch.Tensor.contiguous):
        _, tensors = _packed(grad)
        tensors = tuple(make(t) for t in tensors)
        found = compiled(*tensors)
        torch.testing.assert_close(found, attend(*tensors), atol=2e-3, rtol=2e-3)


def test_an_output_that_hooks_laid_elsewhere_is_laid_back(launched: Any) -> None:
    _, tensors = _packed()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.contiguous() if t.dim() == 4 else t):
        o = flashcore.attention(*tensors, layout="bhsd", impl="hopper")
    torch.autograd.grad(o, tensors, torch.ones_like(o))
    assert len(launched) > 1
