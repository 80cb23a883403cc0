"""Attention by PyTorch: what auto hands a call to when no kernel of ours applies, and what `impl="torch"` names.

Differentiable, and made of traceable torch operations only, so that it serves autograd and torch.compile alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from flashcore.spec import Band, Options, needs_grad

# the name that `impl=` takes
IMPL = "torch"


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    options: Options,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention with PyTorch's own kernels: SDPA where it can say what is asked, else matrix products and a softmax.

    These are also what gives gradients that are bitwise equal from run to run where a call asks for that by its own argument:
    SDPA's fused kernels promise it only under torch.use_deterministic_algorithms.

    Args:
        q, k, v: as `flashcore.attention` takes them, already validated.

    Returns:
        (o, lse): o in the layout of q; lse (B, H, Sq) float32, or None unless asked for.
    """
    if options.layout == "bshd":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    # SDPA takes no float32 mask beside half inputs, and rounding one to half would turn low finite values into -inf.
    sdpa_takes_mask = attn_mask is None or attn_mask.dtype in (torch.bool, q.dtype)
    unpromised = options.deterministic and needs_grad(q, k, v, attn_mask) and not torch.are_deterministic_algorithms_enabled()
    if options.softcap == 0 and not return_lse and sdpa_takes_mask and not unpromised:
        o, lse = _sdpa(q, k, v, attn_mask, options), None
    elif torch._C._is_any_autocast_enabled():
        with torch.autocast(q.device.type, enabled=False):  # which would have the float32 products in half precision
            o, lse = _by_hand(q, k, v, attn_mask, options)
    else:
        o, lse = _by_hand(q, k, v, attn_mask, options)
    return (o.transpose(1, 2) if options.layout == "bshd" else o), lse if return_lse else None


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None, options: Options) -> torch.Tensor:
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    band = Band.of(options, seqlen_q, seqlen_k)
    # a branch, not bool(): only that becomes a guard under Dynamo, and SDPA takes no SymBool
    gqa = True if q.shape[1] != k.shape[1] else False  # noqa: SIM210
    if band == Band(None, 0) and attn_mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=options.scale, enable_gqa=gqa)
    inside = band_mask(band, seqlen_q, seqlen_k, q.device)
    if inside is None:
        mask = attn_mask
    elif attn_mask is None:
        mask = inside
    elif attn_mask.dtype == torch.bool:
        mask = attn_mask & inside
    else:
        mask = attn_mask.masked_fill(~inside, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=options.scale, enable_gqa=gqa)


def _by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    scale = q.shape[3] ** -0.5 if options.scale is None else options.scale
    group = q.shape[1] // k.shape[1]
    if group != 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    # float32 throughout: this path is for calls that need the log-sum-exp or a cap, not for speed
    s = (q.float() @ k.float().transpose(-2, -1)) * scale
    if options.softcap != 0:
        s = torch.tanh(s / options.softcap) * options.softcap
    inside = band_mask(Band.of(options, q.shape[2], k.shape[2]), q.shape[2], k.shape[2], q.device)
    if attn_mask is not None:
        s = s.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else s + attn_mask
    if inside is not None:
        s = s.masked_fill(~inside, float("-inf"))
    lse = torch.logsumexp(s, -1)
    empty = (lse == float("-inf"))[..., None]
    p = torch.softmax(s.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    return (p @ v.float()).to(q.dtype), lse


def band_mask(band: Band, seqlen_q: int, seqlen_k: int, device: torch.device) -> torch.Tensor | None:
    """The band as a bool mask (Sq, Sk), True where a row attends a key; None when it excludes nothing."""
    if band == Band(None, None):
        return None
    distance = torch.arange(seqlen_k, device=device)[None, :] - torch.arange(seqlen_q, device=device)[:, None]
    inside = torch.ones_like(distance, dtype=torch.bool)
    if band.lo is not None:
        inside = inside & (distance >= band.lo)
    if band.hi is not None:
        inside = inside & (distance <= band.hi)
    return inside
