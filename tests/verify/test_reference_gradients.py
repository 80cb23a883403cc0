"""The oracle's gradients, against autograd of attention written plainly, and what must not reach them."""

import math
from dataclasses import replace

import pytest
import torch

from flashcore import reference
from flashcore.reference_gradients import Call, gradients, terms, twin_gradients
from flashcore.verify.backward_inputs import build_backward
from flashcore.verify.cases import Case, MaskCase

CPU = torch.device("cpu")
BASE = Case(name="x", batch=2, heads_q=4, heads_k=2, seqlen_q=17, seqlen_k=23, head_dim=8, head_dim_v=5)
CASES = {
    "plain": BASE,
    "no lse": replace(BASE, return_lse=False),
    "causal with empty rows": replace(BASE, seqlen_q=23, seqlen_k=17, causal=True),
    "window, heads first": replace(BASE, window=(4, 2), layout="bhsd"),
    "softcap": replace(BASE, softcap=0.7),
    "bool mask": replace(BASE, mask=MaskCase("bool_empty_rows")),
    "additive mask": replace(BASE, mask=MaskCase("add_empty_rows")),
    "broadcast mask, softcap": replace(BASE, mask=MaskCase("add", "hk"), softcap=2.0, scale=0.4),
    "broadcast mask of one value": replace(BASE, mask=MaskCase("add", "")),
    "sdpa": replace(BASE, entry="sdpa", layout="bhsd", causal=True, return_lse=False),
}


def _call(case: Case) -> Call:
    return build_backward(case, CPU).call


def _by_autograd(call: Call) -> list[torch.Tensor]:
    """Float64 gradients of attention in one piece, with -inf scores and a softmax of the rows that attend something."""
    q, k, v = (x.double().requires_grad_() for x in (call.q, call.k, call.v))
    floating = call.attn_mask is not None and call.attn_mask.dtype != torch.bool
    mask = call.attn_mask.double().requires_grad_() if floating else call.attn_mask
    first = (q, k, v) if call.layout == "bhsd" else tuple(x.transpose(1, 2) for x in (q, k, v))
    group = first[0].shape[1] // first[1].shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in first[1:])
    s = first[0] @ keys.mT * (1 / math.sqrt(q.shape[-1]) if call.scale is None else call.scale)
    if call.softcap:
        s = call.softcap * torch.tanh(s / call.softcap)
    allowed = reference.attended(
        batch=q.shape[0],
        heads_q=s.shape[1],
        seqlen_q=s.shape[2],
        seqlen_k=s.shape[3],
        causal=call.causal,
        window=call.window,
        attn_mask=call.attn_mask,
        top_left=call.top_left,
    )
    s = (s + mask if floating else s).masked_fill(~allowed, -math.inf)
    live = allowed.any(-1)
    p = torch.zeros_like(s).index_put((live,), torch.softmax(s[live], -1))
    o = p @ values
    o = o if call.layout == "bhsd" else o.transpose(1, 2)
    total = (o * call.do.double()).sum()
    if call.dlse is not None:
        total = total + (torch.logsumexp(s[live], -1) * call.dlse.double()[live]).sum()
    return list(torch.autograd.grad(total, [q, k, v, *([mask] if floating else [])]))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("chunk", [2**24, 64])
def test_gradients_are_those_of_autograd_in_one_piece(case: Case, chunk: int, monkeypatch) -> None:
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", chunk)
    call = _call(case)
    want, got = _by_autograd(call), [x for x in gradients(call) if x is not None]
    assert len(got) == len(want) == (4 if case.mask and case.mask.kind.startswith("add") else 3)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == torch.float64 and one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_twin_is_near_in_the_inputs_dtype_however_it_is_cut(case: Case, monkeypatch) -> None:
    call = _call(case)
    ref, twin = gradients(call), twin_gradients(call)
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 64)
    cut = twin_gradients(call)
    for one, other, pieces in zip(ref, twin, cut, strict=True):
        if one is None:
            assert other is None
            continue
        assert other.dtype == torch.float16 and other.shape == one.shape
        error = (other.double() - one).abs().max()
        assert 0 < error < 2e-2 * max(1.0, one.abs().max())
        assert (pieces.double() - one).abs().max() < 2 * error + 1e-3


def test_the_terms_bound_each_gradient_and_a_sum_that_cancels_has_them_too() -> None:
    call = _call(BASE)
    for largest, gradient in zip(terms(call), gradients(call), strict=True):
        assert largest == 0.0 if gradient is None else largest > gradient.abs().max()
    # one key: its weight is 1 whatever q is
    alone = _call(replace(BASE, seqlen_k=1, return_lse=False))
    assert gradients(alone).dq.abs().max() < 1e-14 and terms(alone).dq > 0.1
    # every factor's magnitude: they do not cancel, and are as homogeneous in do as the gradients
    assert terms(replace(alone, do=2 * alone.do)).dk == pytest.approx(2 * terms(alone).dk)


def test_rows_that_attend_nothing_have_no_gradient_and_give_none() -> None:
    call = _call(replace(BASE, seqlen_q=23, seqlen_k=17, causal=True))
    dq = gradients(call).dq
    assert not dq[:, :6].any() and dq[:, 6:].abs().amin(dim=(1, 3)).gt(0).all()


@pytest.mark.parametrize("case", [CASES["causal with empty rows"], CASES["bool mask"]], ids=["causal", "mask"])
def test_what_takes_part_in_nothing_may_hold_anything(case: Case) -> None:
    clean, dirty = _call(case), _call(replace(case, dead_rows=True))
    assert dirty.do.isnan().any() and dirty.q.isnan().any()
    for one, other in zip(gradients(clean), gradients(dirty), strict=True):
        assert one is None or torch.equal(one, other)
    window = replace(BASE, window=(2, 2), seqlen_k=60)
    clean, dirty = _call(window), _call(replace(window, dead_nan=True))
    assert dirty.k.isnan().any()
    for one, other in zip(gradients(clean), gradients(dirty), strict=True):
        assert one is None or torch.equal(one, other)


def test_nothing_to_attend_gives_zeros_of_the_right_shapes() -> None:
    call = _call(replace(BASE, seqlen_k=0))
    dq, dk, dv, dmask = gradients(call)
    assert dq.shape == call.q.shape and not dq.any() and dk.numel() == dv.numel() == 0 and dmask is None
    assert terms(call) == (0.0, 0.0, 0.0, 0.0)


def test_a_huge_mask_leaves_the_log_sum_exp_its_gradient() -> None:
    """At -1e30 neither float64 nor float32 can tell the log-sum-exp from a score, and yet every weight is 1 / keys."""
    call = _call(replace(BASE, dtype=torch.float32, mask=MaskCase("add_low")))
    only_lse = replace(call, do=torch.zeros_like(call.do))
    assert only_lse.dlse is not None
    dmask = gradients(only_lse).dmask
    low = dmask[:, :, 1::2]
    torch.testing.assert_close(low, (only_lse.dlse.double()[:, :, 1::2, None] / 23).expand(low.shape))
