"""How far from the float64 result an output may be: the only place in the project where a tolerance is written.

Two bounds on the output, and both must hold:

- the floor: max|out - ref| < 0.06, mean|out - ref| < 0.02, every element finite (with poisoned memory, see poison.py,
  that also says that every element was written);
- the gate, after FlashAttention's own tests: max|out - ref| <= 2 * max|twin - ref| + atol, where `twin` is the same
  maths in the inputs' dtype by plain PyTorch and atol = 2 * max|((r + 0.3) - 0.3) - r| with r = ref rounded to, and the
  sums done in, the inputs' dtype: twice what one rounding at the outputs' magnitude can do. The floor alone would let a
  scale error of 4 to 11 percent through.

A gradient: the gate alone, its twin being autograd of the twin; gradients have no scale that a floor could be set by. The gate
is nothing where a gradient cancels (of a row with a single key it is 0 whatever q is, and the twin's exactly so), while float32
sums of its terms leave what they round by. So the bound is never below GRADIENT_ROUNDING times the largest sum of its terms'
magnitudes, in which a weight counts with what it is the exponential of (the log-sum-exp that a kernel keeps is a float32).

The log-sum-exp: exactly -inf where the reference is, finite elsewhere, and within LSE_ATOL or LSE_RELATIVE of it,
whichever is larger. Every comparison is written so that NaN fails it. Nothing elsewhere may loosen these.
"""

import math
from dataclasses import dataclass

import torch

FLOOR_MAX_ABS = 0.06
FLOOR_MEAN_ABS = 0.02
TWIN_FACTOR = 2.0

# LSE, absolute. Half inputs: mission.md section 6; what a scale rounded into a half q would break. float32: a dot
# product of up to 256 float32 terms of order 1 is off by about 1e-6, as is exp2 against exp; one by TF32 by about 3e-4.
# 2e-5 lets every IEEE order of summation through, and no TF32.
LSE_ATOL = {torch.float16: 2e-4, torch.bfloat16: 2e-4, torch.float32: 2e-5}
# LSE, relative: it is a float32, and at 1e30 (a low finite mask) cannot be nearer than its own spacing. Half inputs:
# four spacings (the sum, the way to base 2 and back, the final store). float32, where the absolute bound leaves no
# slack for it: sixteen, because a dot product rounds with the sum of its terms' magnitudes, several times its value
# (measured with scores of 30: 2e-5 = 6 spacings by IEEE products; TF32 would be off by 4e-3). The absolute bound rules
# up to |lse| = 419 and 10.
LSE_RELATIVE = {
    torch.float16: 4 * torch.finfo(torch.float32).eps,
    torch.bfloat16: 4 * torch.finfo(torch.float32).eps,
    torch.float32: 16 * torch.finfo(torch.float32).eps,
}

# Gradients, relative to the terms that they are sums of (reference_gradients.terms): the unit roundoff of float32, once. Beside
# what half inputs round by it is nothing, and TF32 would be off by 2^13 times as much.
GRADIENT_ROUNDING = torch.finfo(torch.float32).eps / 2


@dataclass(frozen=True)
class Comparison:
    """One tensor against its reference. bound is what max_abs may be at most; reason is "" when it passed."""

    max_abs: float
    mean_abs: float
    bound: float
    passed: bool
    reason: str

    @property
    def share(self) -> float:
        """How much of its bound the error takes; infinite where it did not pass."""
        if not self.passed:
            return math.inf
        return self.max_abs / self.bound if self.bound else 0.0


def compare_output(out: torch.Tensor, ref: torch.Tensor, twin: torch.Tensor) -> Comparison:
    """Judge `out` by both bounds. ref: float64, finite, out's shape. twin: as ref in shape, in the inputs' dtype.

    Raises ValueError when ref or twin cannot judge anything (not finite, other shapes): that is a fault of the suite.
    """
    _check_references(ref, twin)
    if out.shape != ref.shape or out.dtype != twin.dtype:
        return _unlike(out, tuple(ref.shape), twin.dtype)
    measured = _measure(out, ref, twin)
    failures = measured.failures()
    if not measured.max_abs < FLOOR_MAX_ABS:
        failures.append(f"max error {measured.max_abs:.3g} is not below {FLOOR_MAX_ABS}")
    if not measured.mean_abs < FLOOR_MEAN_ABS:
        failures.append(f"mean error {measured.mean_abs:.3g} is not below {FLOOR_MEAN_ABS}")
    gate = measured.gate
    if not measured.max_abs <= gate:
        failures.append(measured.above(gate))
    return Comparison(measured.max_abs, measured.mean_abs, min(gate, FLOOR_MAX_ABS), not failures, "; ".join(failures))


def compare_gradient(out: torch.Tensor, ref: torch.Tensor, twin: torch.Tensor, terms: float) -> Comparison:
    """Judge a gradient as `compare_output` does, by the gate alone. terms: the largest sum of its terms' magnitudes.

    Raises ValueError as `compare_output` does.
    """
    _check_references(ref, twin)
    if out.shape != ref.shape or out.dtype != twin.dtype:
        return _unlike(out, tuple(ref.shape), twin.dtype)
    measured = _measure(out, ref, twin)
    failures = measured.failures()
    bound = max(measured.gate, GRADIENT_ROUNDING * terms)
    if not measured.max_abs <= bound:
        failures.append(measured.above(bound))
    return Comparison(measured.max_abs, measured.mean_abs, bound, not failures, "; ".join(failures))


@dataclass(frozen=True)
class _Measured:
    """A tensor's distance from its reference, the twin's, and what one rounding at the reference's magnitude can do."""

    max_abs: float
    mean_abs: float
    twin_abs: float
    rounding: float
    finite: bool

    @property
    def gate(self) -> float:
        return TWIN_FACTOR * self.twin_abs + 2.0 * self.rounding

    def failures(self) -> list[str]:
        return [] if self.finite else ["not finite everywhere (or never written)"]

    def above(self, bound: float) -> str:
        return f"max error {self.max_abs:.3g} is above {bound:.3g} (2x PyTorch's own {self.twin_abs:.3g}, plus rounding)"


def _check_references(ref: torch.Tensor, twin: torch.Tensor) -> None:
    if ref.dtype != torch.float64 or twin.shape != ref.shape:
        raise ValueError(f"the reference is {ref.dtype} {tuple(ref.shape)}, its twin {tuple(twin.shape)}")


def _measure(out: torch.Tensor, ref: torch.Tensor, twin: torch.Tensor) -> _Measured:
    """The distances of tensors of one shape; `out` and `twin` of one dtype."""
    max_abs = twin_abs = rounding = total = 0.0
    finite = True
    # One batch entry at a time: the largest case's output alone is past 2^31 elements.
    for out_b, ref_b, twin_b in zip(out, ref, twin, strict=True):
        if ref_b.numel() == 0:
            continue
        if not (ref_b.isfinite().all() and twin_b.isfinite().all()):
            raise ValueError("the reference or its twin is not finite, so there is no bound to judge by")
        error = (out_b.to(torch.float64) - ref_b).abs()
        finite = finite and bool(out_b.isfinite().all())
        max_abs = _worse(max_abs, error.max().item())
        total += error.sum().item()
        twin_abs = max(twin_abs, (twin_b.to(torch.float64) - ref_b).abs().max().item())
        rounded = ref_b.to(twin.dtype)
        rounding = max(rounding, (((rounded + 0.3) - 0.3) - rounded).abs().max().item())
    return _Measured(max_abs, total / max(1, out.numel()), twin_abs, rounding, finite)


def compare_lse(lse: torch.Tensor, ref: torch.Tensor, dtype: torch.dtype) -> Comparison:
    """Judge a log-sum-exp (float32) against the float64 one of the same shape; `dtype` is the inputs'.

    max_abs and bound are those of the element that is worst in proportion to its own bound.
    """
    if lse.shape != ref.shape or lse.dtype != torch.float32:
        return _unlike(lse, tuple(ref.shape), torch.float32)
    empty = ref == -math.inf
    if not ref[~empty].isfinite().all():
        raise ValueError("the reference LSE is NaN or +inf somewhere, so there is no bound to judge by")
    atol = LSE_ATOL[dtype]
    failures = []
    if not (lse[empty] == -math.inf).all():
        failures.append("a row with nothing to attend does not have LSE -inf")
    got, want = lse[~empty], ref[~empty]
    if got.numel() == 0:
        return Comparison(0.0, 0.0, atol, not failures, "; ".join(failures))
    if not got.isfinite().all():
        failures.append("not finite in a row that attends something")
    error = (got.to(torch.float64) - want).abs()
    bound = (LSE_RELATIVE[dtype] * want.abs()).clamp(min=atol)
    worst = int((error / bound).argmax())  # argmax takes NaN for the largest
    max_abs, worst_bound = error[worst].item(), bound[worst].item()
    if not max_abs <= worst_bound:
        failures.append(f"LSE error {max_abs:.3g} is above {worst_bound:.3g}")
    return Comparison(max_abs, error.mean().item(), worst_bound, not failures, "; ".join(failures))


def _unlike(got: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Comparison:
    """The result for something that cannot even be compared."""
    reason = f"is {got.dtype} {tuple(got.shape)}, not {dtype} {shape}"
    return Comparison(math.nan, math.nan, math.nan, False, reason)


def _worse(a: float, b: float) -> float:
    """The larger of two errors, where NaN is larger than anything (the builtin max drops it)."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)
