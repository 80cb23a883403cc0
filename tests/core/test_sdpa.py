"""scaled_dot_product_attention: torch's own results on a CPU, and plans that say what goes to torch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import flashcore
from flashcore.kernels.registry import BINDINGS


def _qkv(*, heads_k: int = 4, seqlen_q: int = 5, seqlen_k: int = 7, dim: int = 8, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 4, seqlen_q, dim), (2, heads_k, seqlen_k, dim), (2, heads_k, seqlen_k, dim))
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def _same(tensors: list[torch.Tensor], **options: Any) -> None:
    expected = F.scaled_dot_product_attention(*tensors, **options)
    found = flashcore.scaled_dot_product_attention(*tensors, **options)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("lengths", [(5, 5), (5, 7), (7, 5), (1, 6), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_causal_is_aligned_top_left(lengths: tuple[int, int], dtype: torch.dtype) -> None:
    _same(_qkv(seqlen_q=lengths[0], seqlen_k=lengths[1], dtype=dtype), is_causal=True)


FORMS = [(5, 7), (1, 7), (5, 1), (1, 1), (4, 5, 7), (1, 5, 7), (2, 4, 5, 7), (2, 1, 5, 7), (1, 4, 1, 7), (2, 1, 1, 7)]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", ["bool", "additive", "float32-beside-half"])
def test_masks_of_every_form(form: tuple[int, ...], kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(form, generator=generator)
    if kind == "float32-beside-half":  # torch takes no such mask: compare with the mask in the inputs' dtype
        tensors = _qkv(dtype=torch.bfloat16)
        mask = values.bfloat16()
        expected = F.scaled_dot_product_attention(*tensors, attn_mask=mask)
        found = flashcore.scaled_dot_product_attention(*tensors, attn_mask=mask.float())
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    else:
        _same(_qkv(), attn_mask=(values > -0.5) if kind == "bool" else values)


@pytest.mark.parametrize("heads_k", [1, 2, 4])
@pytest.mark.parametrize("is_causal", [False, True])
def test_enable_gqa(heads_k: int, is_causal: bool) -> None:
    _same(_qkv(heads_k=heads_k), enable_gqa=True, is_causal=is_causal)


@pytest.mark.parametrize("scale", [None, 0.0, 1, -0.7, 3.5])
def test_scale(scale: float | None) -> None:
    _same(_qkv(), scale=scale)


HANDED_OVER = {
    "rank 3": ([torch.ones(4, 5, 8), torch.ones(4, 7, 8), torch.ones(4, 7, 8)], {}, "rank 4 only"),
    "rank 5": ([torch.ones(1, 2, 4, 5, 8)] * 3, {"is_causal": True}, "rank 4 only"),
    "float64": (_qkv(dtype=torch.float64), {}, "torch.float64"),
    "wide": (_qkv(dim=320), {"is_causal": True}, "head dims up to 256"),
    "batches": ([torch.ones(2, 4, 5, 8), torch.ones(1, 4, 7, 8), torch.ones(1, 4, 7, 8)], {}, "broadcast batches"),
    "dropout": (_qkv(), {"dropout_p": 1.0}, "dropout_p is 1.0"),
}


@pytest.mark.parametrize("name", HANDED_OVER)
def test_what_is_torchs_alone_goes_to_torch_and_the_plan_says_so(name: str) -> None:
    tensors, options, words = HANDED_OVER[name]
    _same(tensors, **options)
    plan = flashcore.explain_sdpa(*tensors, **options)
    assert plan.impl == "torch" and words in plan.reason
    assert [impl for impl, why in plan.rejected if words in why] == list(BINDINGS)


def test_dropout_drops_as_often_as_asked() -> None:
    # all scores equal, values one: what remains of each of 1000 keys is 0 or 1 / (1 - p) of it
    q, k, v = torch.zeros(1, 1, 50, 8), torch.zeros(1, 1, 1000, 8), torch.ones(1, 1, 1000, 8)
    torch.manual_seed(0)
    o = flashcore.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
    assert o.mean().item() == pytest.approx(1, abs=0.02) and o.std().item() > 0.01
    assert "dropout_p is 0.3" in flashcore.explain_sdpa(q, k, v, dropout_p=0.3).reason


def test_head_counts_that_differ_need_enable_gqa_as_in_torch() -> None:
    tensors = _qkv(heads_k=2)
    with pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(*tensors)
    with pytest.raises(RuntimeError):
        flashcore.scaled_dot_product_attention(*tensors)
    assert "enable_gqa" in flashcore.explain_sdpa(*tensors).reason


def test_gradients_are_torchs() -> None:
    def gradients(function) -> list[torch.Tensor]:
        leaves = [t.requires_grad_() for t in _qkv(heads_k=2)]
        o = function(*leaves, is_causal=True, enable_gqa=True)
        return list(torch.autograd.grad(o.square().sum(), leaves))

    torch.testing.assert_close(gradients(flashcore.scaled_dot_product_attention), gradients(F.scaled_dot_product_attention))


def test_nothing_to_attend_to() -> None:
    for seqlen_q, seqlen_k in ((0, 7), (5, 0), (0, 0)):
        o = flashcore.scaled_dot_product_attention(*_qkv(seqlen_q=seqlen_q, seqlen_k=seqlen_k))
        assert o.shape == (2, 4, seqlen_q, 8) and o.eq(0).all()


def test_the_signature_is_torchs() -> None:
    import inspect

    ours = inspect.signature(flashcore.scaled_dot_product_attention).parameters
    assert {name: p.default for name, p in ours.items()} == {
        "query": inspect.Parameter.empty,
        "key": inspect.Parameter.empty,
        "value": inspect.Parameter.empty,
        "attn_mask": None,
        "dropout_p": 0.0,
        "is_causal": False,
        "scale": None,
        "enable_gqa": False,
    }
