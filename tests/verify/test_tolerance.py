"""Each bound can fail, by itself; what cannot be compared fails; NaN never passes."""

import math

import pytest
import torch

from flashcore.verify.tolerance import (
    FLOOR_MAX_ABS,
    FLOOR_MEAN_ABS,
    GRADIENT_ROUNDING,
    compare_gradient,
    compare_lse,
    compare_output,
)

SHAPE = (2, 16, 2, 8)


def _reference(dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, torch.Tensor]:
    ref = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return ref, ref.to(dtype)


def test_a_rounded_reference_passes() -> None:
    ref, twin = _reference()
    result = compare_output(twin.clone(), ref, twin)
    assert result.passed and result.reason == ""
    assert 0 < result.max_abs <= result.bound < FLOOR_MAX_ABS


def test_the_gate_is_twice_the_twins_error_plus_rounding() -> None:
    ref = torch.zeros(SHAPE, dtype=torch.float64)
    twin = torch.full(SHAPE, 2.0**-10, dtype=torch.float16)
    # (0 + 0.3) - 0.3 is exact, so atol is 0 and the bound is 2 * 2^-10.
    at = torch.full(SHAPE, 2.0**-9, dtype=torch.float16)
    assert compare_output(at, ref, twin).passed
    above = at.clone()
    above[0, 0, 0, 0] *= 1.01
    result = compare_output(above, ref, twin)
    assert not result.passed and "2x PyTorch's own" in result.reason
    assert result.bound == 2.0**-9


def test_atol_is_the_rounding_at_the_references_magnitude() -> None:
    ref = torch.full(SHAPE, 1.0, dtype=torch.float64)
    twin = ref.to(torch.float16)
    one = torch.tensor(1.0, dtype=torch.float16)
    atol = 2 * ((one + 0.3 - 0.3) - one).abs().item()
    assert compare_output(twin, ref, twin).bound == atol


def test_the_floor_on_the_maximum_fails_where_the_gate_lets_through() -> None:
    ref = torch.zeros(SHAPE, dtype=torch.float64)
    twin = torch.ones(SHAPE, dtype=torch.float16)
    out = torch.zeros(SHAPE, dtype=torch.float16)
    out[0, 0, 0, 0] = 0.0625
    result = compare_output(out, ref, twin)
    assert not result.passed and f"not below {FLOOR_MAX_ABS}" in result.reason and "PyTorch" not in result.reason


def test_the_floor_on_the_mean_fails_alone() -> None:
    ref = torch.zeros(SHAPE, dtype=torch.float64)
    twin = torch.ones(SHAPE, dtype=torch.float16)
    result = compare_output(torch.full(SHAPE, 0.03, dtype=torch.float16), ref, twin)
    assert not result.passed and result.reason.startswith(f"mean error 0.03 is not below {FLOOR_MEAN_ABS}")
    assert result.max_abs < FLOOR_MAX_ABS


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("index", [(0, 0, 0, 0), (1, 15, 1, 7)])
def test_one_value_that_is_not_finite_fails(value: float, index: tuple[int, ...]) -> None:
    ref, twin = _reference()
    out = twin.clone()
    out[index] = value
    result = compare_output(out, ref, twin)
    assert not result.passed and "not finite" in result.reason


def test_wrong_shape_and_wrong_dtype_fail() -> None:
    ref, twin = _reference()
    assert "not torch.float16 (2, 16, 2, 8)" in compare_output(twin.transpose(1, 2), ref, twin).reason
    assert not compare_output(twin.float(), ref, twin).passed
    assert not compare_output(twin[:1], ref, twin).passed


def test_a_reference_that_cannot_judge_is_an_error() -> None:
    ref, twin = _reference()
    broken = ref.clone()
    broken[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        compare_output(twin, broken, twin)
    with pytest.raises(ValueError, match="reference is"):
        compare_output(twin, ref.float(), twin)


def test_nothing_to_compare_passes() -> None:
    empty = torch.empty(0, 3, 2, 8)
    assert compare_output(empty.half(), empty.double(), empty.half()).passed


def test_lse_bounds() -> None:
    ref = torch.tensor([[[1.0, -math.inf, 3.0]]], dtype=torch.float64)
    assert compare_lse(ref.float(), ref, torch.float16).passed
    for dtype, error, passes in (
        (torch.float16, 1.9e-4, True),
        (torch.bfloat16, 2.2e-4, False),
        (torch.float32, 1.9e-5, True),
        (torch.float32, 2.2e-5, False),
    ):
        assert compare_lse((ref + error).float(), ref, dtype).passed is passes


def test_lse_of_empty_rows_must_be_minus_infinity_and_of_others_not() -> None:
    ref = torch.tensor([[[1.0, -math.inf]]], dtype=torch.float64)
    for wrong in (
        [1.0, 0.0],
        [1.0, math.nan],
        [1.0, math.inf],
        [1.0, -3.4e38],
        [-math.inf, -math.inf],
        [math.nan, -math.inf],
    ):
        assert not compare_lse(torch.tensor([[wrong]]), ref, torch.float16).passed, wrong


def test_lse_must_be_float32_of_the_right_shape() -> None:
    ref = torch.zeros(1, 2, 3, dtype=torch.float64)
    assert not compare_lse(torch.zeros(1, 2, 3, dtype=torch.float16), ref, torch.float16).passed
    assert not compare_lse(torch.zeros(1, 3, 2), ref, torch.float16).passed


def test_a_huge_lse_is_judged_by_float32_spacing() -> None:
    ref = torch.full((1, 1, 1), -1e30, dtype=torch.float64)
    assert compare_lse(ref.float(), ref, torch.float16).passed
    assert not compare_lse(ref.float() * (1 + 1e-6), ref, torch.float16).passed


def test_a_gradient_has_the_gate_and_no_floor() -> None:
    ref = torch.zeros(SHAPE, dtype=torch.float64)
    twin = torch.full(SHAPE, 2.0, dtype=torch.float16)
    got = torch.full(SHAPE, 4.0, dtype=torch.float16)
    result = compare_gradient(got, ref, twin, 0.0)
    assert result.passed and result.bound == 4.0 and result.share == 1.0
    got[0, 0, 0, 0] = 4.01
    result = compare_gradient(got, ref, twin, 0.0)
    assert not result.passed and result.share == math.inf
    got[0, 0, 0, 0] = math.nan
    assert not compare_gradient(got, ref, twin, 0.0).passed
    assert not compare_gradient(twin.float(), ref, twin, 0.0).passed


def test_a_gradient_that_cancels_may_round_as_its_terms_do() -> None:
    ref = torch.zeros(SHAPE, dtype=torch.float64)
    twin = torch.zeros(SHAPE, dtype=torch.float32)
    got = torch.full(SHAPE, GRADIENT_ROUNDING, dtype=torch.float32)
    assert compare_gradient(got, ref, twin, 1.0).passed and not compare_gradient(1.01 * got, ref, twin, 1.0).passed
    assert not compare_gradient(got, ref, twin, 0.0).passed
    assert compare_gradient(twin, ref, twin, 0.0).share == 0.0
    # TF32 rounds by 2^-11
    assert GRADIENT_ROUNDING == 2.0**-24
