"""What PyTorch offers: each backend of SDPA forced, SDPA as users call it, compiled FlexAttention, and unfused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashcore.bench.contender import Attention, Contender, Kind, on_cuda, too_large
from flashcore.bench.inputs import Inputs
from flashcore.bench.shapes import Shape

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# The maths backend computes half inputs in float32 and holds scores, weights and the mask's result at once.
MATH_BYTES_PER_SCORE = 3 * 4
CPU_BACKENDS = ("sdpa-flash", "sdpa-math", "sdpa-auto")


def torch_contenders() -> tuple[Contender, ...]:
    backends = (
        ("sdpa-flash", SDPBackend.FLASH_ATTENTION),
        ("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
        ("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION),
        ("sdpa-math", SDPBackend.MATH),
    )
    return (
        *(_sdpa(name, "sdpa", partial(sdpa_kernel, [backend])) for name, backend in backends),
        _sdpa("sdpa-auto", "peer", nullcontext),
        Contender("flex", "peer", _prepare_flex, _flex_unavailable, detail=_torch_version),
        Contender("unfused", "peer", _prepare_unfused, _unfused_unavailable, detail=_torch_version),
    )


def _torch_version(inputs: Inputs) -> str:
    return f"torch {torch.__version__}"


def _sdpa(name: str, kind: Kind, context: Callable[[], AbstractContextManager[object]]) -> Contender:
    unavailable = partial(_sdpa_unavailable, name)
    return Contender(name, kind, _prepare_sdpa, unavailable, context=context, detail=_torch_version)


def _sdpa_unavailable(name: str, inputs: Inputs) -> str | None:
    shape = inputs.shape
    if not on_cuda(inputs) and name not in CPU_BACKENDS:
        return "this backend runs on CUDA only"
    if shape.causal and shape.seqlen_q != shape.seqlen_k:
        return "SDPA's is_causal is aligned top-left, this shape's causal bottom-right"
    if shape.causal and shape.mask != "none":
        return "SDPA takes no mask together with is_causal"
    return too_large(inputs, MATH_BYTES_PER_SCORE) if name == "sdpa-math" else None


def _prepare_sdpa(inputs: Inputs) -> Attention:
    shape = inputs.shape
    return partial(
        F.scaled_dot_product_attention,
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.mask,
        is_causal=shape.causal,
        scale=shape.scale,
        enable_gqa=shape.heads_q != shape.heads_k,
    )


def _flex_unavailable(inputs: Inputs) -> str | None:
    if inputs.mask is not None:
        return "FlexAttention takes a mask as a function, not as the tensor the others read"
    return None if on_cuda(inputs) else "FlexAttention is compiled and timed on CUDA only"


def _prepare_flex(inputs: Inputs) -> Attention:
    shape = inputs.shape
    compiled, block_mask = _compiled_flex(shape, inputs.q.device)
    return partial(
        compiled,
        inputs.q,
        inputs.k,
        inputs.v,
        block_mask=block_mask,
        scale=shape.scale,
        enable_gqa=shape.heads_q != shape.heads_k,
    )


@lru_cache(maxsize=1)
def _compiled_flex(shape: Shape, device: torch.device) -> tuple[Callable[..., torch.Tensor], BlockMask | None]:
    """FlexAttention compiled for this shape alone, and its block mask; one shape's input sets share them."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Each shape compiles anew, and past a handful of compilations dynamo would run the eager, unfused fall-back.
    torch._dynamo.reset()
    compiled: Callable[..., torch.Tensor] = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    if not shape.causal:
        return compiled, None
    offset = shape.seqlen_k - shape.seqlen_q

    def bottom_right(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q + offset >= k

    return compiled, create_block_mask(bottom_right, None, None, shape.seqlen_q, shape.seqlen_k, device=device)


def _unfused_unavailable(inputs: Inputs) -> str | None:
    if inputs.mask is not None and inputs.shape.heads_q != inputs.shape.heads_k:
        return "its grouped heads share no mask"
    return too_large(inputs, 3 * inputs.shape.itemsize)


def _prepare_unfused(inputs: Inputs) -> Attention:
    """Three steps through memory: scores, softmax, product. The mask and the views of grouped heads are made before."""
    shape = inputs.shape
    group = shape.heads_q // shape.heads_k
    # The query heads that share a key head become rows of one product, so that keys and values are not copied.
    # [B, Hk, G * Sq, D] and [B, Hk, D, Sk]
    q = inputs.q.reshape(shape.batch, shape.heads_k, group * shape.seqlen_q, shape.head_dim)
    k, v, mask = inputs.k.transpose(-1, -2), inputs.v, inputs.mask
    hidden = None
    if shape.causal:
        allowed = torch.ones(shape.seqlen_q, shape.seqlen_k, dtype=torch.bool, device=q.device)
        hidden = ~allowed.tril(shape.seqlen_k - shape.seqlen_q).repeat(group, 1)
    size = (shape.batch, shape.heads_q, shape.seqlen_q, shape.head_dim_v)

    def attend() -> torch.Tensor:
        scores = q @ k * shape.scale
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        return (torch.softmax(scores, dim=-1) @ v).view(size)

    return attend
