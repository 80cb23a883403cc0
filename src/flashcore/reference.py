"""The oracle: attention in float64, and its twin in the inputs' own dtype. Slow, plain, and right.

Both compute, for one query row i and the keys j that it may attend,

    s_j = scale * (q_i . k_j)        then, with a softcap c > 0,  s_j = c * tanh(s_j / c),  then + mask_ij
    lse = log(sum_j exp(s_j))        o   = sum_j exp(s_j - lse) * v_j

`attention` does so in float64 whatever the inputs' dtype is. `twin` does it in the inputs' dtype with plain PyTorch
operations, as FlashAttention's own tests do (`attention_ref(..., upcast=False)`): the error that any honest
implementation in that dtype makes, which is what verify/tolerance.py measures a kernel against.

Nothing here validates its arguments beyond what the maths needs; `flashcore.attention` does.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

# Elements of one [heads, rows, keys] block of scores: 128 MiB in float64, of which about six are alive at once.
_CHUNK_ELEMENTS = 2**24


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    attn_mask: torch.Tensor | None = None,
    layout: str = "bshd",
    top_left: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in float64.

    q (B,Sq,Hq,D), k (B,Sk,Hk,D), v (B,Sk,Hk,Dv), or with heads before sequence for layout "bhsd"; Hk divides Hq.
    attn_mask: bool (True = attend) or floating (added), broadcastable to (B,Hq,Sq,Sk) in either layout. The diagonal
    of causal and window is bottom-right aligned, or with top_left as torch's `is_causal`.

    Returns o, float64, in q's layout with v's head dim, and lse, float64, natural log, (B,Hq,Sq). A row with nothing
    to attend has o 0 and lse -inf. A key or value that a row may not attend does not reach it, whatever it holds; a
    row that attends a value that is not finite is NaN there.
    """
    return _attend(q, k, v, torch.float64, causal, scale, window, softcap, attn_mask, layout, top_left)


def twin(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    attn_mask: torch.Tensor | None = None,
    layout: str = "bshd",
    top_left: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` in the inputs' dtype by plain PyTorch: same arguments, same shapes, o in q's dtype.

    A floating mask of a wider dtype widens the scores to it, by PyTorch's own promotion; the softmax weights are cast
    back to v's dtype before the second product.
    """
    return _attend(q, k, v, q.dtype, causal, scale, window, softcap, attn_mask, layout, top_left)


def attended(
    *,
    batch: int,
    heads_q: int,
    seqlen_q: int,
    seqlen_k: int,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    attn_mask: torch.Tensor | None = None,
    top_left: bool = False,
) -> torch.Tensor:
    """Which query may attend which key: bool (batch, heads_q, seqlen_q, seqlen_k), materialised (small shapes)."""
    device = torch.device("cpu") if attn_mask is None else attn_mask.device
    allowed = _band(0, seqlen_q, seqlen_q, seqlen_k, causal, window, top_left, device)
    allowed = allowed.expand(batch, heads_q, seqlen_q, seqlen_k)
    return allowed if attn_mask is None else allowed & _permits(attn_mask)


@torch.no_grad()
def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dtype: torch.dtype,
    causal: bool,
    scale: float | None,
    window: tuple[int, int] | None,
    softcap: float,
    attn_mask: torch.Tensor | None,
    layout: str,
    top_left: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loop over blocks of heads and query rows; `dtype` is what the maths is done in."""
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    batch, heads_q, seqlen_q, head_dim = q.shape
    if scale is None:
        scale = 1.0 / math.sqrt(head_dim)
    o = torch.zeros(batch, heads_q, seqlen_q, v.shape[-1], dtype=dtype, device=q.device)
    lse = torch.full((batch, heads_q, seqlen_q), -math.inf, dtype=dtype, device=q.device)
    for block in blocks(q, k, attn_mask, dtype, causal, window, top_left):
        queries = q[block.index].to(dtype)
        keys, values = (x[block.batch, block.kv_heads].to(dtype) for x in (k, v))
        o[block.index], lse[block.index] = attend_block(queries, keys, values, block.allowed, block.bias, scale, softcap)
    return (o.transpose(1, 2) if layout == "bshd" else o), lse


@dataclass(frozen=True)
class Block:
    """Query rows of some heads of one batch entry, with every key: what is computed at once, so that memory stays bounded.

    kv_heads: the key head of each query head. allowed: bool [H or 1,M,N]. bias: the additive mask there, [H,M,N], or None.
    """

    batch: int
    heads: slice
    rows: slice
    kv_heads: torch.Tensor
    allowed: torch.Tensor
    bias: torch.Tensor | None

    @property
    def index(self) -> tuple[int, slice, slice]:
        """Where its rows are in a tensor (B,H,S,...)."""
        return self.batch, self.heads, self.rows


def blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dtype: torch.dtype,
    causal: bool,
    window: tuple[int, int] | None,
    top_left: bool,
) -> Iterator[Block]:
    """The blocks of a call, q (B,Hq,Sq,D) and k (B,Hk,Sk,D); none where there is nothing to attend. `dtype`: of the scores."""
    batch, heads_q, seqlen_q = q.shape[:3]
    heads_k, seqlen_k = k.shape[1], k.shape[2]
    if 0 in (batch, heads_q, seqlen_q, seqlen_k):
        return
    mask = None if attn_mask is None else attn_mask.expand(batch, heads_q, seqlen_q, seqlen_k)
    kv_head = torch.arange(heads_q, device=q.device) // (heads_q // heads_k)
    row_step = min(seqlen_q, max(1, _CHUNK_ELEMENTS // seqlen_k))
    head_step = max(1, _CHUNK_ELEMENTS // (seqlen_k * row_step))
    for b in range(batch):
        for h in range(0, heads_q, head_step):
            heads = slice(h, min(h + head_step, heads_q))
            for r in range(0, seqlen_q, row_step):
                rows = slice(r, min(r + row_step, seqlen_q))
                allowed = _band(rows.start, rows.stop, seqlen_q, seqlen_k, causal, window, top_left, q.device)[None]
                bias = None
                if mask is not None:
                    allowed = allowed & _permits(mask[b, heads, rows])
                    if mask.dtype != torch.bool:
                        bias = mask[b, heads, rows]
                        bias = bias.to(torch.promote_types(bias.dtype, dtype))
                yield Block(b, heads, rows, kv_head[heads], allowed, bias)


def attend_block(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    allowed: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [H,M,D], k [H,N,D], v [H,N,Dv], allowed [H or 1,M,N], bias [H,M,N] or None -> o [H,M,Dv], lse [H,M]."""
    scores = masked_scores(q, k, allowed, bias, scale, softcap)
    lse = _log_sum_exp(scores)
    empty = ~allowed.any(dim=-1, keepdim=True)
    weights = torch.softmax(scores, dim=-1).masked_fill(empty, 0.0).to(v.dtype)

    finite = v.isfinite()
    if finite.all():
        return weights @ v, lse
    # A forbidden value has weight 0, and 0 * NaN is NaN: so the product is over the finite values only, and a row that
    # does attend one that is not finite is marked afterwards.
    o = weights @ v.masked_fill(~finite, 0.0)
    attends_bad = (allowed.to(torch.float32) @ (~finite).to(torch.float32)) > 0
    return o.masked_fill(attends_bad, math.nan), lse


def _log_sum_exp(scores: torch.Tensor) -> torch.Tensor:
    """[H,M] of scores [H,M,N], -inf for a row of -inf.

    torch.logsumexp's gradient is exp(score - result), which is 1 for each of many keys at -1e30; this one's is the softmax.
    """
    largest = scores.detach().amax(dim=-1, keepdim=True)
    pivot = largest.masked_fill(largest == -math.inf, 0.0)
    return (torch.exp(scores - pivot).sum(dim=-1, keepdim=True).log() + pivot).squeeze(-1)


def masked_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    allowed: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """The scores [H,M,N] of a block, scaled, capped and biased; -inf where a row may not attend."""
    # [H, M, N]
    scores = (q * scale) @ k.transpose(-1, -2)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    # masked_fill, not an added -inf: what a forbidden key holds may be NaN, and NaN plus anything is NaN.
    return scores.masked_fill(~allowed, -math.inf)


def _band(
    row_start: int,
    row_stop: int,
    seqlen_q: int,
    seqlen_k: int,
    causal: bool,
    window: tuple[int, int] | None,
    top_left: bool,
    device: torch.device,
) -> torch.Tensor:
    """Bool [row_stop - row_start, seqlen_k]: the keys that causal and window leave to each of these query rows."""
    left, right = (-1, -1) if window is None else window
    if causal:
        right = 0
    offset = 0 if top_left else seqlen_k - seqlen_q
    # [M, 1] and [1, N]
    diagonal = torch.arange(row_start, row_stop, device=device)[:, None] + offset
    key = torch.arange(seqlen_k, device=device)[None, :]
    allowed = torch.ones(row_stop - row_start, seqlen_k, dtype=torch.bool, device=device)
    if left >= 0:
        allowed &= key >= diagonal - left
    if right >= 0:
        allowed &= key <= diagonal + right
    return allowed


def _permits(mask: torch.Tensor) -> torch.Tensor:
    """Where a mask lets a query attend: a bool mask's True, or anything but -inf in an additive one."""
    return mask if mask.dtype == torch.bool else mask != -math.inf
