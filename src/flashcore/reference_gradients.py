"""The oracle's gradients: autograd of `reference.attention` in float64, of its twin, and how much either had to cancel.

With p the weights, s the score before the mask is added and do, dlse the gradients of o and the log-sum-exp,

    dv = p^T do     dp = do v^T     ds = p * (dp - delta)     delta = rowsum(do * o) - dlse
    dq = scale * ds k     dk = scale * ds^T q     the mask's gradient = ds

where with a softcap c dq and dk are of ds * (1 - (s / c)^2).

Every function takes rows a block at a time, as the oracle does, so none needs a whole score matrix. What takes part in nothing
reaches no gradient, whatever it holds: a key or value that no row of a block attends, a row that attends nothing, its do.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from flashcore.reference import Block, attend_block, blocks, masked_scores


class Gradients(NamedTuple):
    """Of q, k, v and the additive mask, each in the shape and layout of what it is the gradient of; dmask None without one."""

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    dmask: torch.Tensor | None


class Terms(NamedTuple):
    """For each gradient the largest sum of its terms' magnitudes: what a float32 sum of them rounds in proportion to."""

    dq: float
    dk: float
    dv: float
    dmask: float


@dataclass(frozen=True)
class Call:
    """A call of attention and the gradients that come into it.

    q, k, v, attn_mask and the options as `reference.attention` takes them; do like o, dlse (B,Hq,Sq) or None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    do: torch.Tensor
    dlse: torch.Tensor | None = None
    attn_mask: torch.Tensor | None = None
    causal: bool = False
    scale: float | None = None
    window: tuple[int, int] | None = None
    softcap: float = 0.0
    layout: str = "bshd"
    top_left: bool = False


def gradients(call: Call) -> Gradients:
    """The gradients in float64."""
    return _gradients(call, torch.float64)


def twin_gradients(call: Call) -> Gradients:
    """The gradients in the inputs' dtype by plain PyTorch: what autograd gives of `reference.twin`.

    Sums over blocks of rows, over a group's heads and over what a mask broadcasts along are float32 and rounded once.
    """
    return _gradients(call, call.q.dtype)


def terms(call: Call) -> Terms:
    """How large the terms are that each gradient is a sum of: the formulas above with the magnitude of every factor, and each
    weight p times 1 + |s| + |lse| of the scores without a mask, as float32 can tell exp(s - lse) no better than s and lse."""
    heads_first = _heads_first(call)
    sums = _zeros(heads_first, torch.float64, torch.float64)
    for part in _parts(heads_first, torch.float64):
        block, scale = part.block, abs(part.scale)
        weights = torch.softmax(masked_scores(part.q, part.k, block.allowed, block.bias, part.scale, call.softcap), dim=-1)
        o, _ = attend_block(part.q, part.k, part.v, block.allowed, block.bias, part.scale, call.softcap)
        # A weight rounds with what it is the exponential of, but for a mask's values, which may be huge and cancel.
        scores = masked_scores(part.q, part.k, block.allowed, None, part.scale, call.softcap)
        lse = torch.logsumexp(scores, dim=-1, keepdim=True)
        # [H, M, N]
        p = (weights * (1 + scores.abs() + lse.abs())).masked_fill(~block.allowed, 0.0)
        delta = (part.do * o).abs().sum(dim=-1)
        if part.dlse is not None:
            delta = delta + part.dlse.abs()
        ds = p * (part.do.abs() @ part.v.abs().transpose(-1, -2) + delta[..., None])
        _add(sums, block, scale * ds @ part.k.abs(), scale * ds.transpose(-1, -2) @ part.q.abs(), p.mT @ part.do.abs(), ds)
    return Terms(*(0.0 if x is None or x.numel() == 0 else x.max().item() for x in sums))


def idle(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows attend nothing and which keys are attended by nothing, whose gradients are exactly 0: bool, in q's layout and
    in k's, with 1 for the head dim."""
    first = _heads_first(call)
    rows = torch.ones(first.q.shape[:3], dtype=torch.bool, device=call.q.device)
    uses = torch.zeros(first.k.shape[:3], dtype=torch.int32, device=call.k.device)
    for block in blocks(first.q, first.k, call.attn_mask, torch.float64, call.causal, call.window, call.top_left):
        rows[block.index] = ~block.allowed.any(dim=-1)
        attended = block.allowed.any(dim=-2).to(torch.int32)
        uses[block.batch].index_add_(0, block.kv_heads, attended.expand(len(block.kv_heads), -1))
    found = (rows[..., None], (uses == 0)[..., None])
    return found if call.layout == "bhsd" else (found[0].transpose(1, 2), found[1].transpose(1, 2))


class _Part(NamedTuple):
    """A block's operands: q [H,M,D], k [H,N,D], v [H,N,Dv], do [H,M,Dv], dlse [H,M] or None, with 0 for what takes no part."""

    block: Block
    scale: float
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    do: torch.Tensor
    dlse: torch.Tensor | None


def _heads_first(call: Call) -> Call:
    """The same call in layout "bhsd"."""
    if call.layout == "bhsd":
        return call
    q, k, v, do = (x.transpose(1, 2) for x in (call.q, call.k, call.v, call.do))
    fields = {name: getattr(call, name) for name in ("dlse", "attn_mask", "causal", "scale", "window", "softcap", "top_left")}
    return Call(q, k, v, do, layout="bhsd", **fields)


def _parts(call: Call, dtype: torch.dtype) -> Iterator[_Part]:
    scale = 1.0 / math.sqrt(call.q.shape[-1]) if call.scale is None else call.scale
    for block in blocks(call.q, call.k, call.attn_mask, dtype, call.causal, call.window, call.top_left):
        unattended = ~block.allowed.any(dim=-2)[..., None]
        empty = ~block.allowed.any(dim=-1)
        q, do = (x[block.index].to(dtype).masked_fill(empty[..., None], 0.0) for x in (call.q, call.do))
        k, v = (x[block.batch, block.kv_heads].to(dtype).masked_fill(unattended, 0.0) for x in (call.k, call.v))
        dlse = None if call.dlse is None else call.dlse[block.index].to(dtype).masked_fill(empty, 0.0)
        yield _Part(block, scale, q, k, v, do, dlse)


def _gradients(call: Call, dtype: torch.dtype) -> Gradients:
    """Autograd block by block; `dtype` is what the maths is done in."""
    heads_first = _heads_first(call)
    mask_dtype = None if call.attn_mask is None else torch.promote_types(call.attn_mask.dtype, dtype)
    sums = _zeros(heads_first, torch.float64 if dtype == torch.float64 else torch.float32, mask_dtype)
    for part in _parts(heads_first, dtype):
        block = part.block
        leaves = [x.detach().requires_grad_() for x in (part.q, part.k, part.v, block.bias) if x is not None]
        with torch.enable_grad():
            bias = None if block.bias is None else leaves[3]
            o, lse = attend_block(leaves[0], leaves[1], leaves[2], block.allowed, bias, part.scale, call.softcap)
        into = [(o, part.do)] if part.dlse is None else [(o, part.do), (lse, part.dlse.to(lse.dtype))]
        found = torch.autograd.grad([x for x, _ in into], leaves, [gradient for _, gradient in into])
        _add(sums, block, *found)
    dq, dk, dv = (x.to(dtype) for x in sums[:3])
    if call.layout == "bshd":
        dq, dk, dv = (x.transpose(1, 2) for x in (dq, dk, dv))
    # a mask of a wider dtype than the maths keeps its own, by PyTorch's own promotion
    return Gradients(dq, dk, dv, None if sums.dmask is None else sums.dmask.to(mask_dtype).view(_shape(call.attn_mask)))


def _zeros(call: Call, dtype: torch.dtype, mask_dtype: torch.dtype | None) -> Gradients:
    """What the blocks' gradients are added to; the mask's with rank 4, None for a bool one."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (call.q, call.k, call.v))
    mask = call.attn_mask
    if mask is None or mask.dtype == torch.bool:
        return Gradients(dq, dk, dv, None)
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    return Gradients(dq, dk, dv, torch.zeros(shape, dtype=dtype, device=mask.device))


def _shape(mask: torch.Tensor | None) -> torch.Size:
    assert mask is not None
    return mask.shape


def _add(
    sums: Gradients, block: Block, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, ds: torch.Tensor | None = None
) -> None:
    """Add a block's gradients: dq [H,M,D], dk [H,N,D], dv [H,N,Dv], and ds [H,M,N] for the mask's."""
    sums.dq[block.index] += dq
    sums.dk[block.batch].index_add_(0, block.kv_heads, dk.to(sums.dk.dtype))
    sums.dv[block.batch].index_add_(0, block.kv_heads, dv.to(sums.dv.dtype))
    if sums.dmask is None or ds is None:
        return
    batches, heads, rows, _ = sums.dmask.shape
    # where the block lies in the mask; a dimension of size 1 is one that the mask broadcasts along
    target = sums.dmask[0 if batches == 1 else block.batch]
    target = target if heads == 1 else target[block.heads]
    target = target if rows == 1 else target[:, block.rows]
    target += ds.to(target.dtype).sum_to_size(target.shape)
