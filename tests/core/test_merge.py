"""merge_states against one softmax over the union of the keys."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashcore
from flashcore.reference import attention as reference


def _part(seed: int, keys: int, layout: str = "bshd", dtype: torch.dtype = torch.float32, spread: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, length, 3, 8, generator=generator) * spread for length in (5, keys, keys))
    if layout == "bhsd":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return q.to(dtype), k.to(dtype), v.to(dtype)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 9), st.sampled_from(["bshd", "bhsd"]), st.sampled_from([1.0, 6.0]), st.integers(0, 99))
def test_it_is_one_softmax_over_the_union(keys: int, split: int, layout: str, spread: float, seed: int) -> None:
    q, k, v = _part(seed, keys, layout, spread=spread)
    split = min(split, keys)
    dim = 1 if layout == "bshd" else 2
    parts = []
    for begin, length in ((0, split), (split, keys - split)):
        o, lse = reference(q, k.narrow(dim, begin, length), v.narrow(dim, begin, length), layout=layout)
        parts += [o.float(), lse.float()]
    o, lse = flashcore.merge_states(*parts, layout=layout)
    whole, whole_lse = reference(q, k, v, layout=layout)
    torch.testing.assert_close(o, whole.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, whole_lse.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_a_side_that_attended_nothing_adds_nothing_whatever_it_holds(layout: str) -> None:
    sequence = (1, 2, 3) if layout == "bshd" else (2, 1, 3)
    o_a = torch.randn(2, 4, 3, 8).permute(0, *sequence).contiguous()
    o_b = torch.full_like(o_a, math.nan)
    lse_a, lse_b = torch.randn(2, 3, 4), torch.full((2, 3, 4), -math.inf)
    for o, lse in (
        flashcore.merge_states(o_a, lse_a, o_b, lse_b, layout=layout),
        flashcore.merge_states(o_b, lse_b, o_a, lse_a, layout=layout),
    ):
        torch.testing.assert_close((o, lse), (o_a, lse_a))
    o, lse = flashcore.merge_states(o_b, lse_b, o_b, lse_b, layout=layout)
    assert o.eq(0).all() and lse.eq(-math.inf).all()


def test_each_row_is_merged_by_its_own_weights() -> None:
    o_a, o_b = torch.zeros(1, 3, 2, 4), torch.ones(1, 3, 2, 4)
    lse_a = torch.zeros(1, 2, 3)
    lse_b = torch.tensor([[[0.0, math.log(3), -math.inf], [80.0, -80.0, 0.0]]])
    o, lse = flashcore.merge_states(o_a, lse_a, o_b, lse_b)
    expected = torch.tensor([[0.5, 0.75, 0.0], [1.0, 0.0, 0.5]])  # head, row
    torch.testing.assert_close(o[0, :, :, 0].T, expected)
    torch.testing.assert_close(lse[0, 0], torch.tensor([math.log(2), math.log(4), 0.0]))


def test_dtypes_and_inputs() -> None:
    o_a, o_b = (torch.randn(1, 3, 2, 4, dtype=torch.bfloat16) for _ in range(2))
    lse_a, lse_b = torch.randn(1, 2, 3), torch.randn(1, 2, 3)
    before = [t.clone() for t in (o_a, lse_a, o_b, lse_b)]
    o, lse = flashcore.merge_states(o_a, lse_a, o_b, lse_b)
    assert o.dtype == torch.bfloat16 and lse.dtype == torch.float32 and o.shape == o_a.shape
    assert all(torch.equal(now, then) for now, then in zip((o_a, lse_a, o_b, lse_b), before, strict=True))


def test_gradients_are_those_of_the_formula() -> None:
    leaves = [torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3), torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3)]

    def formula(o_a, lse_a, o_b, lse_b):
        weights = torch.softmax(torch.stack([lse_a, lse_b]), 0)[..., None]
        return weights[0] * o_a + weights[1] * o_b, torch.logsumexp(torch.stack([lse_a, lse_b]), 0)

    def gradients(function):
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        o, lse = function(*inputs)
        return torch.autograd.grad(o.square().sum() + lse.square().sum(), inputs)

    found = gradients(lambda *states: flashcore.merge_states(*states, layout="bhsd"))
    torch.testing.assert_close(found, gradients(formula))


@pytest.mark.parametrize("absent", ["one side", "both sides"])
def test_what_attended_nothing_has_no_gradient_and_spoils_none(absent: str) -> None:
    o_a, o_b = (torch.randn(1, 2, 2, 3, requires_grad=True) for _ in range(2))
    lse_a = torch.full((1, 2, 2), -math.inf if absent == "both sides" else 0.5, requires_grad=True)
    lse_b = torch.full((1, 2, 2), -math.inf, requires_grad=True)
    o, _ = flashcore.merge_states(o_a, lse_a, o_b, lse_b)
    for gradient in torch.autograd.grad(o.sum(), (o_b, lse_b, lse_a)):
        assert gradient.eq(0).all(), gradient


def test_it_compiles_with_dynamic_lengths() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(flashcore.merge_states, fullgraph=True, backend="aot_eager")
    for length in (3, 5, 9):
        o, lse = torch.randn(1, length, 2, 4), torch.randn(1, 2, length)
        torch.testing.assert_close(compiled(o, lse, o, lse), flashcore.merge_states(o, lse, o, lse))
    torch._dynamo.reset()


OUT, LSE = torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((OUT, LSE, [1.0], LSE), TypeError, "o_b: got list; allowed: a torch.Tensor"),
        ((OUT, LSE, OUT.half(), LSE), TypeError, "o_b: got dtype torch.float16 with o_a of torch.float32"),
        ((OUT.long(), LSE, OUT.long(), LSE), TypeError, "o_a: got dtype torch.int64; allowed: a floating dtype"),
        ((OUT, LSE.double(), OUT, LSE), TypeError, "lse_a: got dtype torch.float64; allowed: torch.float32"),
        ((OUT, LSE, OUT, LSE.transpose(1, 2)), ValueError, r"lse_b: got shape \(1, 3, 2\); allowed: \(B, H, S\) = \(1, 2, 3\)"),
        ((OUT[0], LSE, OUT[0], LSE), ValueError, "o_a: got rank 3; allowed: rank 4"),
        ((OUT, LSE, OUT[:, :2], LSE), ValueError, r"o_b: got shape \(1, 2, 2, 4\); allowed: o_a's, \(1, 3, 2, 4\)"),
        ((OUT, LSE, OUT.to("meta"), LSE), ValueError, "o_b: got device meta with o_a on cpu"),
    ],
)
def test_bad_input(arguments: tuple, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        flashcore.merge_states(*arguments)


def test_bad_layout() -> None:
    with pytest.raises(ValueError, match="layout: got 'bsdh'; allowed: 'bshd' or 'bhsd'"):
        flashcore.merge_states(OUT, LSE, OUT, LSE, layout="bsdh")
    with pytest.raises(ValueError, match=r"lse_a: got shape \(1, 2, 3\); allowed: \(B, H, S\) = \(1, 3, 2\)"):
        flashcore.merge_states(OUT, LSE, OUT, LSE, layout="bhsd")
    with pytest.raises(TypeError, match="o_a: got NoneType"):
        flashcore.merge_states(None, LSE, OUT, LSE)
