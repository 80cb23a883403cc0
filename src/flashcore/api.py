"""The public functions: names, defaults and documentation. What happens behind them is decided elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.compiler import is_compiling

from flashcore import ops
from flashcore.autocast import under_autocast
from flashcore.errors import ArgumentTypeError, ArgumentValueError, FlashCoreError
from flashcore.plan import Plan, check_impl, only_torch
from flashcore.runtime import engine
from flashcore.runtime.fast_path import Calls, memory, plain, recall, typed
from flashcore.spec import DTYPES, MAX_HEAD_DIM, Options, check_tensors, needs_grad, shown

_attention_calls, _sdpa_calls = memory(), memory()
_any_autocast = torch._C._is_any_autocast_enabled


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: Sequence[int] | None = None,
    softcap: float = 0.0,
    attn_mask: torch.Tensor | None = None,
    return_lse: bool = False,
    layout: str = "bshd",
    impl: str = "auto",
    deterministic: bool | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * q k^T) v, fused, with FlashAttention's conventions (Dao 2023, arXiv:2307.08691).

    Causal, window and mask combine as an intersection; softcap applies to the scaled score, before an additive mask. A row
    with nothing to attend gives output 0 and lse -inf. A key or value that no query may attend never reaches the output,
    NaN and inf included; a NaN in a value that some rows attend may reach other rows of the same tile. That is the promise of
    our kernels: where auto hands a call to PyTorch (`explain` says so), PyTorch's behaviour holds.

    Differentiable in q, k, v and an additive mask, through both outputs. Kept for the backward pass are the inputs, the output
    and the log-sum-exp; nothing of size Sq x Sk is made. Gradients are contiguous, in the dtype of what they are the gradient
    of, a mask's in its own shape; dk and dv are summed over the heads that share a key. An output's gradient whose last stride
    is not 1, or that is expanded or unaligned, is copied once. A second derivative and torch.func's transforms are PyTorch's
    alone. Under torch.autocast, inputs are cast as PyTorch casts those of its own attention: all floating ones but float64.

    Args:
        q: (B, Sq, Hq, D) for layout "bshd", (B, Hq, Sq, D) for "bhsd"; float16, bfloat16 or float32.
        k: (B, Sk, Hk, D) or (B, Hk, Sk, D), where Hk divides Hq (GQA, MQA).
        v: (B, Sk, Hk, Dv) or (B, Hk, Sk, Dv). D and Dv from 1 to 256. Any strides; our kernels want stride 1 in the last
            dimension and never copy.
        causal: row i attends keys up to i + Sk - Sq: the last row is aligned with the last key.
        scale: of the scores; None means 1 / sqrt(D).
        window: None or (left, right): row i attends keys from i + Sk - Sq - left to i + Sk - Sq + right; -1 is unlimited.
            With causal, right is capped at 0.
        softcap: c > 0 replaces a score s by c * tanh(s / c); 0 means no cap.
        attn_mask: bool (True means attend) or additive (q's dtype or float32), broadcastable to (B, Hq, Sq, Sk).
        return_lse: also return the natural log-sum-exp of each row's scores.
        layout: "bshd" or "bhsd", of q, k, v and the output.
        impl: "auto" picks the fastest by evidence, PyTorch included, and `explain` shows which and why. "hopper" (sm_90a:
            H100, H200), "portable" (sm_80 to sm_121) or "torch" runs that one or raises. The same one runs the backward pass;
            "small" (sm_90a) has none. With a gradient, auto takes ours where forward and backward together were measured to
            be as fast as PyTorch's, or where PyTorch has no fused kernel for the call.
        deterministic: of gradients only. True: bitwise equal from run to run. False: sums may be made by atomics, whose order
            no two runs share. None: what torch.use_deterministic_algorithms says when the call is made.

    Returns:
        o in q's dtype and layout, or (o, lse) with lse (B, Hq, Sq) float32. Where a kernel of ours made it o is dense, heads
            and rows in memory in the order of q's: contiguous for a contiguous q.

    Raises:
        ArgumentTypeError (a TypeError), ArgumentValueError (a ValueError): names the argument, what came, what is allowed.
        UnsupportedError (a NotImplementedError): the named impl cannot run this call, or its backward pass, on this device;
            also a second derivative of our gradients, when it is asked for.
    """
    if _any_autocast():
        q, k, v, attn_mask = under_autocast(q, k, v, attn_mask)
    calls = None
    if not is_compiling():
        sides = window if window is None else typed(window)
        try:
            calls = _attention_calls(causal, scale, sides, softcap, return_lse, layout, impl, deterministic)
        except TypeError:  # not hashable: validation says what is wrong with it
            calls = {}
        found = recall(calls, q, k, v, attn_mask)
        if found is not None:
            return found if return_lse else found[0]  # type: ignore[return-value]  # lse is a tensor where it was asked for
    options = (causal, scale, window, softcap, return_lse, layout, impl, deterministic)
    o, lse = _dispatch(q, k, v, attn_mask, *options, top_left=False, calls=calls)
    return (o, lse) if return_lse else o  # type: ignore[return-value]  # lse is a tensor where it was asked for


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: Sequence[int] | None = None,
    softcap: float = 0.0,
    attn_mask: torch.Tensor | None = None,
    return_lse: bool = False,
    layout: str = "bshd",
    impl: str = "auto",
    deterministic: bool | None = None,
) -> Plan:
    """The plan of `attention` with these arguments: which kernel, why, what was rejected. Runs nothing; same errors.

    Where an input needs a gradient, `backward` is the plan of the backward pass (None where PyTorch makes it): its kernels,
    whether it is reproducible, its workspace, and what bitwise equal gradients cost where that was measured.
    """
    if _any_autocast():
        q, k, v, attn_mask = under_autocast(q, k, v, attn_mask)
    options = Options.check(
        causal=causal, scale=scale, window=window, softcap=softcap, layout=layout, deterministic=deterministic
    )
    return engine.plan_call(q, k, v, attn_mask, options, return_lse, impl)[1]


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`: same signature, same meaning, our kernels where they apply.

    Differentiable and under autocast as `attention` is; torch.use_deterministic_algorithms asks for bitwise equal gradients.

    Args:
        query: (B, Hq, Sq, D); key: (B, Hk, Sk, D); value: (B, Hk, Sk, Dv). What our kernels do not take (other ranks and
            dtypes, broadcast batches, dropout) goes to torch's own function; `explain_sdpa` says when and why.
        is_causal: aligned top-left, as torch has it: row i attends keys 0 to i.

    Raises:
        ArgumentValueError: a mask together with is_causal, dropout_p outside [0, 1], NaN or infinite scale.
        What torch raises, where the call is handed to torch.
    """
    if _any_autocast():
        query, key, value, attn_mask = under_autocast(query, key, value, attn_mask)
    calls = None
    if not is_compiling():
        try:
            calls = _sdpa_calls(is_causal, scale, dropout_p, enable_gqa)
        except TypeError:
            calls = {}
        found = recall(calls, query, key, value, attn_mask)
        if found is not None:
            return found[0]
    try:
        reason = _torch_only(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    except FlashCoreError as error:
        return _refuse(error)
    if reason is not None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    options = (is_causal, scale, None, 0.0, False, "bhsd", "auto", None)
    return _dispatch(query, key, value, attn_mask, *options, top_left=True, calls=calls)[0]


def explain_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Plan:
    """The plan of `scaled_dot_product_attention` with these arguments. Runs nothing; same errors."""
    if _any_autocast():
        query, key, value, attn_mask = under_autocast(query, key, value, attn_mask)
    reason = _torch_only(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if reason is not None:
        return only_torch(reason)
    options = Options.check(causal=is_causal, scale=scale, window=None, softcap=0.0, layout="bhsd", top_left=True)
    return engine.plan_call(query, key, value, attn_mask, options, False, "auto")[1]


def _torch_only(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> str | None:
    """Check what torch's signature adds, and say why a call is outside what our own `attention` takes (None: it is not)."""
    Options.check(causal=is_causal, scale=scale, window=None, softcap=0.0, layout="bhsd", top_left=True)
    if attn_mask is not None and is_causal:
        raise ArgumentValueError("attn_mask: got a mask together with is_causal=True; allowed: one of the two")
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise ArgumentTypeError(f"dropout_p: got {shown(dropout_p)}; allowed: a number from 0 to 1")
    if not 0 <= dropout_p <= 1:
        raise ArgumentValueError(f"dropout_p: got {shown(dropout_p)}; allowed: a number from 0 to 1")
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, torch.Tensor):
            raise ArgumentTypeError(f"{name}: got {type(t).__name__}; allowed: a torch.Tensor")
    if attn_mask is not None and not isinstance(attn_mask, torch.Tensor):
        raise ArgumentTypeError(f"attn_mask: got {type(attn_mask).__name__}; allowed: None or a torch.Tensor")
    if dropout_p > 0:
        return f"has no dropout, and dropout_p is {dropout_p}"
    if any(t.is_nested or t.layout != torch.strided for t in (query, key, value)):
        return "takes dense tensors only"
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        return "takes rank 4 only"
    if query.dtype not in DTYPES:
        return f"takes {', '.join(map(str, DTYPES))}, not {query.dtype}"
    if query.shape[0] != key.shape[0] or query.shape[0] != value.shape[0]:
        return "does not broadcast batches"
    if key.shape[1] != value.shape[1] or (query.shape[1] != key.shape[1] and not enable_gqa):
        return "takes different head counts only as enable_gqa means them"
    if max(query.shape[3], value.shape[3]) > MAX_HEAD_DIM:
        return f"takes head dims up to {MAX_HEAD_DIM}"
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype, torch.float32):
        return f"takes masks of torch.bool, the query's dtype or torch.float32, not {attn_mask.dtype}"
    return None


def _dispatch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    window: Sequence[int] | None,
    softcap: float,
    return_lse: bool,
    layout: str,
    impl: str,
    deterministic: bool | None,
    *,
    top_left: bool,
    calls: Calls | None,
) -> engine.Result:
    """Straight to the engine in eager mode; through the operator where torch must see it (tracing, modes, subclasses)."""
    if not is_compiling() and plain(q, k, v, attn_mask):
        return engine.run(
            q,
            k,
            v,
            attn_mask,
            causal=causal,
            scale=scale,
            window=window,
            softcap=softcap,
            return_lse=return_lse,
            layout=layout,
            impl=impl,
            top_left=top_left,
            deterministic=deterministic,
            calls=calls,
        )
    try:
        options = Options.check(
            causal=causal,
            scale=scale,
            window=window,
            softcap=softcap,
            layout=layout,
            top_left=top_left,
            deterministic=deterministic,
        )
        check_impl(impl)
        check_tensors(q, k, v, attn_mask, options.layout, sdpa=top_left)
    except FlashCoreError as error:
        refused = _refuse(error)
        return refused, refused
    left, right = options.window
    # only a gradient is deterministic or not; at its default the dispatcher does not convert the option
    last = (options.deterministic,) if needs_grad(q, k, v, attn_mask) else ()
    given = (attn_mask, layout, causal, options.scale, top_left, left, right, options.softcap, impl, *last)
    if return_lse:
        return ops.attention_with_lse(q, k, v, *given)
    return ops.attention(q, k, v, *given), None


def _refuse(error: FlashCoreError) -> torch.Tensor:
    """Raise the error; under torch.compile, put an operator into the graph that raises it when the graph runs."""
    if not is_compiling():
        raise error
    return ops.refuse(type(error).__name__, error.args[0])
