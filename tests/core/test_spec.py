"""AttentionSpec and Band: what a call asks for, resolved once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashcore.kernels.portable import binding as portable
from flashcore.spec import AttentionSpec, Band, Options
from flashcore.torch_backend import band_mask

lengths = st.integers(0, 12)
sides = st.integers(-1, 14)


def _options(**given_options: object) -> Options:
    options = {"causal": False, "scale": None, "window": None, "softcap": 0.0, "layout": "bshd", **given_options}
    return Options.check(**options)


def _attended(seqlen_q: int, seqlen_k: int, causal: bool, window: tuple[int, int], top_left: bool) -> list[list[bool]]:
    """By the words of the documentation, one pair at a time."""
    offset = 0 if top_left else seqlen_k - seqlen_q
    left, right = window
    return [
        [
            (not causal or j <= i + offset)
            and (left == -1 or j >= i + offset - left)
            and (right == -1 or j <= i + offset + right)
            for j in range(seqlen_k)
        ]
        for i in range(seqlen_q)
    ]


@given(lengths, lengths, st.booleans(), st.tuples(sides, sides), st.booleans())
def test_a_band_is_what_causal_window_and_alignment_mean(seqlen_q, seqlen_k, causal, window, top_left) -> None:
    band = Band.of(_options(causal=causal, window=window, top_left=top_left), seqlen_q, seqlen_k)
    expected = _attended(seqlen_q, seqlen_k, causal, window, top_left)
    found = [
        [(band.lo is None or i + band.lo <= j) and (band.hi is None or j <= i + band.hi) for j in range(seqlen_k)]
        for i in range(seqlen_q)
    ]
    assert found == expected
    mask = band_mask(band, seqlen_q, seqlen_k, torch.device("cpu"))
    assert (mask is None and all(map(all, expected))) or mask.tolist() == expected


@given(st.integers(1, 12), st.integers(1, 12), st.booleans(), st.tuples(sides, sides), st.booleans())
def test_a_limit_is_none_exactly_where_it_excludes_nothing(seqlen_q, seqlen_k, causal, window, top_left) -> None:
    band = Band.of(_options(causal=causal, window=window, top_left=top_left), seqlen_q, seqlen_k)
    rows, keys = range(seqlen_q), range(seqlen_k)
    if band.lo is not None:
        assert any(j < i + band.lo for i in rows for j in keys)
    if band.hi is not None:
        assert any(j > i + band.hi for i in rows for j in keys)


def test_a_decode_step_has_no_band() -> None:
    assert Band.of(_options(causal=True), 1, 500) == Band(None, None)
    assert Band.of(_options(causal=True, top_left=True), 1, 500) == Band(None, 0)
    assert Band.of(_options(window=(499, 0)), 1, 500) == Band(None, None)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_strides_are_ordered_batch_head_sequence(layout: str, make_spec) -> None:
    spec = make_spec(2, 6, 3, 10, 20, 64, 32, layout=layout)
    sequence_first = layout == "bshd"
    assert spec.q_strides == ((10 * 6 * 64, 64, 6 * 64) if sequence_first else (6 * 10 * 64, 10 * 64, 64))
    assert spec.k_strides == ((20 * 3 * 64, 64, 3 * 64) if sequence_first else (3 * 20 * 64, 20 * 64, 64))
    assert spec.v_strides == ((20 * 3 * 32, 32, 3 * 32) if sequence_first else (3 * 20 * 32, 20 * 32, 32))
    sizes = (spec.batch, spec.heads_q, spec.heads_k, spec.seqlen_q, spec.seqlen_k, spec.head_dim, spec.head_dim_v)
    assert sizes == (2, 6, 3, 10, 20, 64, 32)
    assert spec.output_shape == ((2, 10, 6, 32) if sequence_first else (2, 6, 10, 32)) and spec.lse_shape == (2, 6, 10)


def _spec(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, **options) -> AttentionSpec:
    return AttentionSpec.from_tensors(q, k, v, mask, _options(**options), return_lse=False)


def test_aligned_means_that_every_pointer_stride_and_head_dim_allows_16_byte_loads() -> None:
    plain = torch.zeros(2, 5, 4, 64, dtype=torch.float16)
    assert _spec(plain, plain, plain).aligned
    packed = torch.zeros(2, 5, 3, 4, 64, dtype=torch.float16)
    assert _spec(*packed.unbind(2)).aligned
    shifted = torch.zeros(plain.numel() + 1, dtype=torch.float16)[1:].view(plain.shape)
    assert not _spec(plain, shifted, plain).aligned
    odd_stride = torch.zeros(2, 5, 4, 68, dtype=torch.float16)[..., :64]
    assert not _spec(plain, plain, odd_stride).aligned
    assert _spec(*(t.float() for t in (plain, plain, plain))).aligned
    for dim, aligned in ((72, True), (80, True), (76, False)):  # 8 half elements are 16 bytes
        t = torch.zeros(2, 5, 4, dim, dtype=torch.float16)
        assert _spec(t, t, t).aligned == aligned
        assert _spec(plain, plain, t).aligned == aligned
    t = torch.zeros(2, 5, 4, 76)  # of float32, 4
    assert _spec(t, t, t).aligned


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("stride", [0, 1, 7, 2**45 + 1])
def test_a_stride_that_nothing_is_ever_multiplied_by_is_0(layout: str, stride: int) -> None:
    """PyTorch keeps whatever stride a dimension of one element, or of none, happens to have."""
    storage = torch.zeros(4096, dtype=torch.float16)
    one_second = torch.as_strided(storage, (1, 1, 4, 64), (256, stride, 64, 1))
    one_each = torch.as_strided(storage, (1, 1, 1, 64), (stride, stride, stride, 1))
    assert one_second.stride(1) == one_each.stride(0) == one_each.stride(2) == stride
    spec = _spec(one_second, one_each, one_each, layout=layout)
    q_strides = (0, 64, 0) if layout == "bshd" else (0, 0, 64)
    assert (spec.aligned, spec.q_strides, spec.k_strides, spec.v_strides) == (True, q_strides, (0, 0, 0), (0, 0, 0))
    specialisation = portable.specialise_call(spec, "sm_90a", 132)
    arguments = portable.arguments(spec, specialisation)
    for parameter, argument in zip(specialisation.parameters, arguments, strict=True):
        assert not isinstance(argument, int) or argument % parameter.divisor == 0, parameter
    nothing = torch.as_strided(storage, (0, 5, 4, 64), (stride, 256, 64, 1))
    assert _spec(nothing, nothing, nothing).aligned


def test_contiguous_last_looks_at_each_tensor_and_forgives_a_single_element() -> None:
    plain = torch.zeros(2, 5, 4, 8)
    turned = torch.zeros(2, 5, 8, 4).transpose(2, 3)
    assert _spec(plain, plain, plain).contiguous_last
    assert not any(_spec(*(turned if i == position else plain for i in range(3))).contiguous_last for position in range(3))
    one = torch.zeros(2, 5, 4, 8)[..., ::8]
    assert _spec(plain, plain, one).contiguous_last


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_mask_strides_are_those_of_the_broadcast_mask(layout: str, make_spec) -> None:
    def strides(*shape: int, dtype: torch.dtype = torch.bool):
        return make_spec(2, 4, 2, 5, 7, mask=torch.zeros(shape, dtype=dtype), layout=layout).mask

    assert strides(2, 4, 5, 7).strides == (140, 35, 7, 1)
    assert strides(5, 7).strides == (0, 0, 7, 1)
    assert strides(7).strides == (0, 0, 0, 1)
    assert strides(2, 1, 1, 7).strides == (7, 0, 0, 1)
    assert strides(4, 5, 1).strides == (0, 5, 1, 0)
    assert strides().strides == (0, 0, 0, 0)
    assert (strides(7).kind, strides(7, dtype=torch.float16).kind) == ("bool", "additive")
    assert strides(7, dtype=torch.float32).dtype == torch.float32


def test_defaults_are_resolved(make_spec) -> None:
    assert make_spec(head_dim=64).scale == 0.125
    assert make_spec(head_dim=64, head_dim_v=16).scale == 0.125
    assert make_spec(scale=3).scale == 3.0 and isinstance(make_spec(scale=3).scale, float)
    assert make_spec(window=[5, -1]).band == Band(-5, None)
    assert make_spec(causal=True, window=(5, 9)).band == Band(-5, 0)
    assert make_spec(causal=True).square_causal
    assert not make_spec(causal=True, seqlen_k=200).square_causal and not make_spec(causal=True, window=(5, 0)).square_causal


def test_tf32_is_what_the_user_told_torch(make_spec) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            assert make_spec(dtype=torch.float32).allow_tf32 == allowed
            assert not make_spec(dtype=torch.float16).allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
