"""The oracle against torch in float64, against loops to check by eye, and what must hold of any softmax."""

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from flashcore import reference


def _qkv(b=2, hq=4, hk=2, sq=7, sk=11, d=5, dv=3, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = ((b, sq, hq, d), (b, sk, hk, d), (b, sk, hk, dv))
    return tuple(torch.randn(s, dtype=torch.float64, generator=g).to(dtype) for s in shapes)


def _brute(q, k, v, *, causal=False, scale=None, window=None, softcap=0.0, attn_mask=None, top_left=False):
    """Scalars only: one query, one key at a time."""
    b, sq, hq, d = q.shape
    sk, hk, dv = k.shape[1], k.shape[2], v.shape[3]
    scale = d**-0.5 if scale is None else scale
    o = torch.zeros(b, sq, hq, dv, dtype=torch.float64)
    lse = torch.full((b, hq, sq), -math.inf, dtype=torch.float64)
    for bi in range(b):
        for h in range(hq):
            for i in range(sq):
                scores = {}
                for j in range(sk):
                    at = i if top_left else i + sk - sq
                    if causal and j > at:
                        continue
                    if window is not None and window[0] >= 0 and j < at - window[0]:
                        continue
                    if window is not None and window[1] >= 0 and j > at + window[1]:
                        continue
                    s = scale * sum(q[bi, i, h, c].item() * k[bi, j, h * hk // hq, c].item() for c in range(d))
                    if softcap > 0:
                        s = softcap * math.tanh(s / softcap)
                    if attn_mask is not None:
                        m = attn_mask.expand(b, hq, sq, sk)[bi, h, i, j].item()
                        if m is False or m == -math.inf:
                            continue
                        s += 0.0 if m is True else m
                    scores[j] = s
                if not scores:
                    continue
                top = max(scores.values())
                total = sum(math.exp(s - top) for s in scores.values())
                lse[bi, h, i] = top + math.log(total)
                for j, s in scores.items():
                    o[bi, i, h] += math.exp(s - top) / total * v[bi, j, h * hk // hq]
    return o, lse


MASKS = {
    "none": None,
    "bool": torch.rand(2, 4, 7, 11, generator=torch.Generator().manual_seed(1)) < 0.5,
    "bool-keys": torch.tensor([True] * 6 + [False] * 5),
    "add": torch.randn(4, 7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
    "add-inf": torch.zeros(2, 1, 7, 1, dtype=torch.float64).index_fill(2, torch.tensor([3]), -math.inf),
    "add-low": torch.zeros(7, 11, dtype=torch.float64).index_fill(0, torch.tensor([2]), -1e30),
}
OPTIONS = [
    {},
    {"causal": True},
    {"causal": True, "top_left": True},
    {"window": (2, 3)},
    {"window": (0, 0)},
    {"window": (-1, 1), "causal": True},
    {"window": (3, 100), "causal": True},
    {"softcap": 0.7},
    {"scale": -0.4},
    {"scale": 0.0},
]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_against_brute_force(mask, options) -> None:
    q, k, v = _qkv()
    o, lse = reference.attention(q, k, v, **options, attn_mask=MASKS[mask])
    want_o, want_lse = _brute(q, k, v, **options, attn_mask=MASKS[mask])
    torch.testing.assert_close(o, want_o, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("sq", "sk"), [(1, 9), (9, 1), (9, 4), (6, 6)])
@pytest.mark.parametrize("options", OPTIONS[:7], ids=str)
def test_lengths_against_brute_force(sq, sk, options) -> None:
    q, k, v = _qkv(b=1, sq=sq, sk=sk)
    torch.testing.assert_close(reference.attention(q, k, v, **options), _brute(q, k, v, **options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_against_torch_in_float64(causal) -> None:
    q, k, v = (x.transpose(1, 2) for x in _qkv(sq=40, sk=40, d=16, dv=16))
    o, _ = reference.attention(q, k, v, causal=causal, layout="bhsd", top_left=True)
    torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True))


def test_layouts_agree() -> None:
    q, k, v = _qkv()
    o, lse = reference.attention(q, k, v, causal=True)
    o_h, lse_h = reference.attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=True, layout="bhsd")
    assert torch.equal(o, o_h.transpose(1, 2)) and torch.equal(lse, lse_h)


def test_chunks_do_not_show(monkeypatch) -> None:
    q, k, v = _qkv(sq=13)
    mask = MASKS["bool"][:, :, :1].expand(2, 4, 13, 11)
    whole = reference.attention(q, k, v, causal=True, attn_mask=mask)
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 25)
    torch.testing.assert_close(reference.attention(q, k, v, causal=True, attn_mask=mask), whole, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("sq", "sk", "b"), [(5, 0, 2), (0, 5, 2), (0, 0, 2), (5, 5, 0)])
def test_empty(sq, sk, b) -> None:
    q, k, v = _qkv(b=b, sq=sq, sk=sk)
    for compute in (reference.attention, reference.twin):
        o, lse = compute(q, k, v)
        assert o.shape == (b, sq, 4, 3) and lse.shape == (b, 4, sq)
        if sk == 0:
            assert (o == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("how", ["bool", "add", "window"])
def test_what_a_row_may_not_attend_never_reaches_it(bad, how) -> None:
    q, k, v = _qkv(b=1, sq=4, sk=9)
    clean_k, clean_v = k.clone(), v.clone()
    k[:, 6:], v[:, 6:] = bad, bad
    clean_k[:, 6:], clean_v[:, 6:] = 0, 0
    keep = torch.arange(9) < 6
    options = {
        "bool": {"attn_mask": keep},
        "add": {"attn_mask": torch.zeros(9).masked_fill(~keep, -math.inf)},
        "window": {"window": (-1, 0), "top_left": True},
    }[how]
    for compute in (reference.attention, reference.twin):
        got, want = compute(q, k, v, **options), compute(q, clean_k, clean_v, **options)
        assert got[0].isfinite().all()
        assert all(map(torch.equal, got, want))


def test_a_bad_value_reaches_exactly_the_rows_that_attend_it() -> None:
    q, k, v = _qkv(b=1, sq=6, sk=6)
    v[:, 3, :, 1] = math.nan
    o, _ = reference.attention(q, k, v, causal=True)
    bad = o.isnan()
    assert bad[:, 3:, :, 1].all() and not bad[:, :3].any() and not bad[..., 0].any() and not bad[..., 2].any()


def test_a_row_of_low_finite_mask_is_a_plain_softmax() -> None:
    q, k, v = _qkv(b=1)
    for low in (-1e30, torch.finfo(torch.float32).min):
        o, lse = reference.attention(q, k, v, attn_mask=torch.full((11,), low))
        # At such a size scores vanish beside the mask even in float64: every key weighs the same.
        torch.testing.assert_close(o, v.mean(1, keepdim=True).repeat_interleave(2, 2).expand(o.shape))
        assert lse.isfinite().all()
    shift, _ = reference.attention(q, k, v, attn_mask=torch.full((11,), -1000.0))
    torch.testing.assert_close(shift, reference.attention(q, k, v)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_twin_is_the_same_maths_in_its_own_dtype(dtype) -> None:
    q, k, v = _qkv(sq=33, sk=65, d=32, dv=32, dtype=dtype)
    for options in OPTIONS:
        o, _ = reference.twin(q, k, v, **options)
        ref, _ = reference.attention(q, k, v, **options)
        assert o.dtype == dtype and ref.dtype == torch.float64
        error = (o.double() - ref).abs().max().item()
        assert error < 30 * torch.finfo(dtype).eps
        # Done in the dtype: plain rounding of the float64 result would be nearer.
        if not options:
            assert error > (ref.to(dtype).double() - ref).abs().max().item()


def test_attended_is_what_attention_attends() -> None:
    allowed = reference.attended(batch=1, heads_q=1, seqlen_q=3, seqlen_k=5, causal=True, window=(1, 5))
    want = [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert allowed[0, 0].int().tolist() == want


lengths = st.integers(1, 24)
SETTINGS = settings(max_examples=40, deadline=None)


@SETTINGS
@given(sq=lengths, sk=lengths, seed=st.integers(0, 1000), softcap=st.sampled_from([0.0, 2.0]))
def test_the_order_of_keys_does_not_matter(sq, sk, seed, softcap) -> None:
    q, k, v = _qkv(sq=sq, sk=sk, seed=seed)
    order = torch.randperm(sk, generator=torch.Generator().manual_seed(seed))
    mask = torch.randn(sq, sk, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    one = reference.attention(q, k, v, softcap=softcap, attn_mask=mask)
    other = reference.attention(q, k[:, order], v[:, order], softcap=softcap, attn_mask=mask[:, order])
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@SETTINGS
@given(sq=lengths, sk=st.integers(2, 24), data=st.data(), causal=st.booleans())
def test_parts_of_the_keys_merge_to_the_whole(sq, sk, data, causal) -> None:
    q, k, v = _qkv(sq=sq, sk=sk, seed=sk)
    cut = data.draw(st.integers(0, sk))
    key = torch.arange(sk)
    whole_o, whole_lse = reference.attention(q, k, v, causal=causal)
    parts = [reference.attention(q, k, v, causal=causal, attn_mask=mask) for mask in (key < cut, key >= cut)]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    pivot = lse.masked_fill(lse == -math.inf, 0)
    weighted = [o * (part_lse - pivot).exp().transpose(1, 2)[..., None] for o, part_lse in parts]
    torch.testing.assert_close(lse, whole_lse, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(weighted[0] + weighted[1], whole_o, rtol=1e-10, atol=1e-10)


@SETTINGS
@given(
    sq=lengths,
    sk=lengths,
    seed=st.integers(0, 1000),
    causal=st.booleans(),
    left=st.integers(-1, 9),
    right=st.integers(-1, 9),
)
def test_outputs_are_weighted_means_and_weights_sum_to_one(sq, sk, seed, causal, left, right) -> None:
    q, k, v = _qkv(sq=sq, sk=sk, seed=seed)
    o, lse = reference.attention(q, k, torch.ones_like(v), causal=causal, window=(left, right))
    empty = (lse == -math.inf).transpose(1, 2)[..., None].expand(o.shape)
    assert (o[empty] == 0).all()
    torch.testing.assert_close(o[~empty], torch.ones_like(o[~empty]))
