"""Turns a case into tensors. Values are drawn on the CPU from the case's seed: the same on every machine."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flashcore import reference
from flashcore.verify.cases import Case, MaskCase

# Element strides that put the third batch entry, or the 129th position, past 2^31; a multiple of 64, to stay aligned.
_FAR_BATCH_STRIDE = 2**30 + 64
_FAR_SEQUENCE_STRIDE = 2**24 + 64
# Rows of NaN before and after a padded sequence: more than any tile is high.
_PAD_BEFORE, _PAD_AFTER, _PAD_COLUMNS = 8, 260, 8
_LOW = -1e30


@dataclass(frozen=True)
class Inputs:
    """q (B,Sq,Hq,D), k (B,Sk,Hk,D), v (B,Sk,Hk,Dv), or heads first, as the case's layout says; attn_mask or None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    attn_mask: torch.Tensor | None


def build(case: Case, device: torch.device) -> Inputs:
    """The tensors of `case` on `device`: values by its seed, memory by its storage. On "meta" nothing is drawn."""
    generator = torch.Generator().manual_seed(case.seed)
    described = device.type == "meta"
    q, k, v = _shapes(case) if described else _values(case, generator)
    mask = None if case.mask is None else _mask(case, case.mask, generator)
    if case.dead_nan and not described:
        k, v = _spoil_dead(case, k, v, mask)
    if case.layout == "bhsd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q, k, v = _place(case, (q, k, v), device)
    return Inputs(q, k, v, None if mask is None else _place_mask(case, case.mask, mask, device))


def _values(case: Case, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v in (B,S,H,D) order on the CPU, drawn one after the other; batch size 1 where the batch is expanded."""
    batch = min(1, case.batch) if case.storage == "expanded" else case.batch
    q = torch.randn(batch, case.seqlen_q, case.heads_q, case.head_dim, generator=generator)
    k = torch.randn(batch, case.seqlen_k, case.heads_k, case.head_dim, generator=generator)
    v = torch.randn(batch, case.seqlen_k, case.heads_k, case.dim_v, generator=generator)
    if case.distribution == "large":
        q = q * 12
    elif case.distribution == "constant":
        k = k[:, :1].expand(k.shape)
    elif case.distribution == "rising":
        # Scaled scores from 0 to about 20 along the keys, plus noise.
        ramp = torch.linspace(0, 20, case.seqlen_k) / math.sqrt(case.head_dim)
        q, k = 1 + 0.1 * q, ramp[None, :, None, None] + 0.3 * k
    return q.to(case.dtype), k.to(case.dtype), v.to(case.dtype)


def _shapes(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `_values` draws, without memory."""
    batch = min(1, case.batch) if case.storage == "expanded" else case.batch
    q = torch.empty(batch, case.seqlen_q, case.heads_q, case.head_dim, dtype=case.dtype, device="meta")
    k = torch.empty(batch, case.seqlen_k, case.heads_k, case.head_dim, dtype=case.dtype, device="meta")
    return q, k, torch.empty(batch, case.seqlen_k, case.heads_k, case.dim_v, dtype=case.dtype, device="meta")


def _mask(case: Case, mask: MaskCase, generator: torch.Generator) -> torch.Tensor:
    """The mask on the CPU, with size 1 in every dimension that it does not vary along."""
    full = {"b": case.batch, "h": case.heads_q, "q": case.seqlen_q, "k": case.seqlen_k}
    shape = [size if name in mask.dims else 1 for name, size in full.items()]
    row = torch.arange(shape[2])[:, None]
    key = torch.arange(shape[3])[None, :]
    tail = (key >= shape[3] - shape[3] // 3).expand(shape)
    attend = torch.rand(shape, generator=generator) < 0.7
    if "k" in mask.dims:
        attend[..., :1] = True
    emptied = (row % 3 == 2).expand(shape)
    if mask.kind == "bool":
        return attend
    if mask.kind == "bool_empty_rows":
        return attend & ~emptied
    if mask.kind == "bool_padding":
        return ~tail
    if mask.kind == "bool_none":
        return torch.zeros(shape, dtype=torch.bool)

    dtype = case.dtype if mask.dtype is None else mask.dtype
    noise = torch.randn(shape, generator=generator)
    zero = torch.zeros(shape)
    odd_rows = (row % 2 == 1).expand(shape)
    low = zero.masked_fill(tail if mask.kind == "add_low_keys" else odd_rows, _LOW)
    lowest = zero.masked_fill(odd_rows, torch.finfo(dtype).min)
    kinds = {
        "add": noise,
        "add_empty_rows": noise.masked_fill(~attend | emptied, -math.inf),
        "add_padding": zero.masked_fill(tail, -math.inf),
        "add_none": torch.full(shape, -math.inf),
        "add_low": low,
        "add_lowest": lowest,
        "add_lows": torch.where(key % 2 == 0, torch.finfo(dtype).min, 0.9 * torch.finfo(dtype).min).expand(shape),
        "add_low_keys": low,
    }
    return kinds[mask.kind].to(dtype)


def _spoil_dead(case: Case, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Put NaN, inf and -inf in turn into the keys and values that no query of their group may attend.

    Raises ValueError when there are none: the case would test nothing.
    """
    allowed = attended_by(case, mask)
    groups = allowed.unflatten(1, (case.heads_k, case.heads_q // case.heads_k))
    # [B, Hk, Sk] -> [B, Sk, Hk, 1]
    dead = ~groups.any(dim=3).any(dim=2).transpose(1, 2)[..., None]
    if not dead.any():
        raise ValueError(f"case {case.name} has no key that every query may not attend")
    bad = spoilt_rows(case, case.seqlen_k)
    return torch.where(dead, bad[..., : case.head_dim], k), torch.where(dead, bad[..., : case.dim_v], v)


def attended_by(case: Case, mask: torch.Tensor | None) -> torch.Tensor:
    """Who attends what, as `reference.attended` says it of a case and its mask: bool [B,Hq,Sq,Sk]."""
    return reference.attended(
        batch=case.batch,
        heads_q=case.heads_q,
        seqlen_q=case.seqlen_q,
        seqlen_k=case.seqlen_k,
        causal=case.causal,
        window=case.window,
        attn_mask=mask,
        top_left=case.top_left,
    )


def spoilt_rows(case: Case, length: int) -> torch.Tensor:
    """NaN, inf and -inf in turn, [length, 1, the larger head dim], in the case's dtype."""
    poison = torch.tensor([math.nan, math.inf, -math.inf])
    turn = torch.arange(length)[:, None, None] + torch.arange(max(case.head_dim, case.dim_v))
    return poison[turn % 3].to(case.dtype)


def _place(
    case: Case, tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same values, on the device, in memory laid out as the case's storage says."""
    if case.storage == "packed":
        # (B, S, 3, H, D) or (B, H, S, 3, D)
        q, k, v = (
            torch.stack(tensors, dim=2 if case.layout == "bshd" else 3).to(device).unbind(2 if case.layout == "bshd" else 3)
        )
        return q, k, v
    if case.storage in ("far_batch", "far_sequence"):
        return _place_far(case, tensors, device)
    q, k, v = (_place_one(case, x, device) for x in tensors)
    return q, k, v


def place_like_inputs(case: Case, x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A further tensor of a case, of rank 4 in its layout, in memory like the inputs' where one tensor alone can have it so."""
    if case.storage in ("packed", "far_batch", "far_sequence"):
        return x.contiguous().to(device)
    return _place_one(case, x, device)


def _place_one(case: Case, x: torch.Tensor, device: torch.device) -> torch.Tensor:
    if case.storage == "contiguous":
        return x.contiguous().to(device)
    if case.storage == "transposed":
        return x.transpose(1, 2).contiguous().to(device).transpose(1, 2)
    if case.storage == "expanded":
        return x.contiguous().to(device).expand(case.batch, -1, -1, -1)

    b, first, second, d = x.shape
    if case.storage == "strided":
        view = _nan((b, 2 * first, 2 * second, d), x.dtype, device)[:, ::2, ::2]
    elif case.storage == "unaligned":
        view = _nan((b, first, second, d + 1), x.dtype, device)[..., 1:]
    elif case.storage == "padded":
        rows = 1 if case.layout == "bshd" else 2
        sizes = [b, first + 2, second + 2, d + _PAD_COLUMNS]
        sizes[rows] += _PAD_BEFORE + _PAD_AFTER
        view = _nan(sizes, x.dtype, device)
        view = view.narrow(rows, _PAD_BEFORE, x.shape[rows]).narrow(3 - rows, 1, x.shape[3 - rows])[..., :d]
    else:
        raise AssertionError(f"storage {case.storage} is placed elsewhere")
    view.copy_(x)
    return view


def _nan(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full(tuple(shape), math.nan, dtype=dtype, device=device)


def _place_far(
    case: Case, tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All three in one allocation with huge strides, side by side, NaN between them."""
    views = []
    offset = 0
    layouts = []
    for x in tensors:
        strides = list(x.contiguous().stride())
        row = 1 if case.layout == "bshd" else 2
        if case.storage == "far_batch":
            strides[0] = _FAR_BATCH_STRIDE
            block = x[0].numel()
        else:
            strides[row] = _FAR_SEQUENCE_STRIDE
            strides[3 - row] = x.shape[3]
            strides[0] = x.shape[3 - row] * x.shape[3]
            block = x.shape[0] * strides[0]
        layouts.append((x, strides, offset))
        offset += block
    reach = max(start + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) for x, strides, start in layouts)
    buffer = _nan((reach + 1,), case.dtype, device)
    for x, strides, start in layouts:
        view = buffer.as_strided(x.shape, strides, start)
        view.copy_(x)
        views.append(view)
    q, k, v = views
    return q, k, v


def _place_mask(case: Case, mask: MaskCase | None, values: torch.Tensor, device: torch.device) -> torch.Tensor:
    values = values.to(device)
    if mask is None or not mask.expanded:
        return values
    return values.expand(case.batch, case.heads_q, case.seqlen_q, case.seqlen_k)
