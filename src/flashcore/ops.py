"""The torch.library operator behind the API: what torch.compile, export and dispatch modes see of a call."""

from __future__ import annotations

import torch

from flashcore import errors
from flashcore.errors import UnsupportedError
from flashcore.runtime import engine
from flashcore.spec import Options, check_tensors

_library = torch.library.Library("flashcore", "DEF")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, bool causal, float? scale, int window_left, "
    "int window_right, float softcap, bool return_lse, str layout, bool top_left, str impl) -> (Tensor, Tensor)"
)
_library.define("refuse(str error, str message) -> Tensor")


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
    return_lse: bool,
    layout: str,
    top_left: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():  # below autograd's key already; this tells the planner so
        o, lse = engine.run(
            q,
            k,
            v,
            attn_mask,
            causal=causal,
            scale=scale,
            window=(window_left, window_right),
            softcap=softcap,
            return_lse=return_lse,
            layout=layout,
            impl=impl,
            top_left=top_left,
        )
    # The fake promises contiguous outputs; PyTorch's kernels return transposed ones for some layouts.
    return o.contiguous(), lse if lse is not None else torch.empty(0, dtype=torch.float32, device=q.device)


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
    return_lse: bool,
    layout: str,
    top_left: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    options = Options.check(
        causal=causal,
        scale=scale,
        window=(window_left, window_right),
        softcap=softcap,
        layout=layout,
        top_left=top_left,
    )
    batch, heads_q, _, seqlen_q, _, _, head_dim_v = check_tensors(q, k, v, attn_mask, options.layout, sdpa=top_left)
    shape = (batch, seqlen_q, heads_q, head_dim_v) if layout == "bshd" else (batch, heads_q, seqlen_q, head_dim_v)
    lse_shape = (batch, heads_q, seqlen_q) if return_lse else (0,)
    return q.new_empty(shape), q.new_empty(lse_shape, dtype=torch.float32)


def _no_backward(ctx: object, *grads: torch.Tensor) -> None:
    raise UnsupportedError(
        "torch.ops.flashcore.attention has no backward yet; flashcore.attention with impl='auto' hands calls that need a "
        "gradient to PyTorch"
    )


def _refuse(error: str, message: str) -> torch.Tensor:
    raise getattr(errors, error)(message)


def _fake_refuse(error: str, message: str) -> torch.Tensor:
    return torch.empty(0)


_library.impl("refuse", _refuse, "CompositeExplicitAutograd")
torch.library.register_fake("flashcore::refuse", _fake_refuse, lib=_library)
for _key in ("CUDA", "CPU"):
    _library.impl("attention", _run, _key)
torch.library.register_fake("flashcore::attention", _fake, lib=_library)
torch.library.register_autograd("flashcore::attention", _no_backward, lib=_library)

attention = torch.ops.flashcore.attention.default
# Raises the named error when it runs: what torch.compile makes of an error raised while tracing is not the caller's error.
refuse = torch.ops.flashcore.refuse.default
