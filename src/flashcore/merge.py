"""Merging the results of attention over disjoint sets of keys."""

from __future__ import annotations

import torch

from flashcore.errors import ArgumentTypeError, ArgumentValueError
from flashcore.spec import LAYOUTS, numbers


def merge_states(
    o_a: torch.Tensor, lse_a: torch.Tensor, o_b: torch.Tensor, lse_b: torch.Tensor, *, layout: str = "bshd"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine attention over two disjoint sets of keys into attention over their union.

    With w_x = exp(lse_x - lse): o = w_a o_a + w_b o_b and lse = log(exp(lse_a) + exp(lse_b)) (FlashAttention-2, Dao 2023,
    section 3.1.1; the same rule combines split-KV decoding and ring attention). A side with lse -inf attended nothing and
    adds nothing, whatever its o holds; where both are -inf the result is o = 0, lse = -inf.

    Args:
        o_a, o_b: (B, S, H, D) for layout "bshd", (B, H, S, D) for "bhsd"; same shape, dtype and device.
        lse_a, lse_b: (B, H, S) float32, natural logarithm, in both layouts.

    Returns:
        (o, lse): o in o_a's dtype and shape, lse (B, H, S) float32. The inputs are not modified.

    Raises:
        ArgumentTypeError: not tensors, or dtypes that differ or are not floating.
        ArgumentValueError: rank, shapes, devices or layout not allowed.
    """
    _check(o_a, lse_a, o_b, lse_b, layout)
    top = torch.maximum(lse_a, lse_b)
    empty = top == float("-inf")
    pivot = torch.where(empty, 0.0, top).detach()

    def weigh(lse_x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # -inf is replaced before exp and not only after: its gradient would be NaN
        absent = lse_x == float("-inf")
        return torch.where(absent, 0.0, torch.exp(torch.where(absent, pivot, lse_x) - pivot)), absent

    weight_a, absent_a = weigh(lse_a)
    weight_b, absent_b = weigh(lse_b)
    total = torch.where(empty, 1.0, weight_a + weight_b)

    def share(o: torch.Tensor, weight: torch.Tensor, absent: torch.Tensor) -> torch.Tensor:
        weight = weight / total
        if layout == "bshd":
            weight, absent = weight.transpose(1, 2), absent.transpose(1, 2)
        return torch.where(absent[..., None], 0.0, o.float()) * weight[..., None]

    lse = torch.where(empty, float("-inf"), pivot + torch.log(total))
    return (share(o_a, weight_a, absent_a) + share(o_b, weight_b, absent_b)).to(o_a.dtype), lse


def _check(o_a: torch.Tensor, lse_a: torch.Tensor, o_b: torch.Tensor, lse_b: torch.Tensor, layout: str) -> None:
    if layout not in LAYOUTS:
        raise ArgumentValueError(f"layout: got {layout!r}; allowed: {' or '.join(map(repr, LAYOUTS))}")
    for name, t in (("o_a", o_a), ("lse_a", lse_a), ("o_b", o_b), ("lse_b", lse_b)):
        if not isinstance(t, torch.Tensor):
            raise ArgumentTypeError(f"{name}: got {type(t).__name__}; allowed: a torch.Tensor")
        if t.device != o_a.device:
            raise ArgumentValueError(f"{name}: got device {t.device} with o_a on {o_a.device}; allowed: o_a's device")
    if not o_a.is_floating_point():
        raise ArgumentTypeError(f"o_a: got dtype {o_a.dtype}; allowed: a floating dtype")
    if o_b.dtype != o_a.dtype:
        raise ArgumentTypeError(f"o_b: got dtype {o_b.dtype} with o_a of {o_a.dtype}; allowed: o_a's dtype")
    if o_a.dim() != 4:
        raise ArgumentValueError(f"o_a: got rank {o_a.dim()}; allowed: rank 4")
    if o_b.shape != o_a.shape:
        raise ArgumentValueError(f"o_b: got shape {numbers(o_b.shape)}; allowed: o_a's, {numbers(o_a.shape)}")
    b, x, y, _ = o_a.shape
    want = (b, y, x) if layout == "bshd" else (b, x, y)
    for name, t in (("lse_a", lse_a), ("lse_b", lse_b)):
        if t.dtype != torch.float32:
            raise ArgumentTypeError(f"{name}: got dtype {t.dtype}; allowed: torch.float32")
        if tuple(t.shape) != tuple(want):
            raise ArgumentValueError(f"{name}: got shape {numbers(t.shape)}; allowed: (B, H, S) = {numbers(want)}")
