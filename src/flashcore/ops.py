"""The torch.library operators behind the API: what torch.compile, export and dispatch modes see of a call.

The dispatcher converts each argument twice, but for those at the end that are the default. So what is most often asked for
comes first, and a call that wants no log-sum-exp has an operator without one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from flashcore import errors
from flashcore.errors import UnsupportedError
from flashcore.runtime import engine
from flashcore.runtime.fast_path import Calls, Result, memory, plain, recall
from flashcore.spec import Options, check_tensors, needs_grad

_ARGUMENTS = (
    "(Tensor q, Tensor k, Tensor v, Tensor? attn_mask=None, str layout='bshd', bool causal=False, float? scale=None, "
    "bool top_left=False, int window_left=-1, int window_right=-1, float softcap=0.0, str impl='auto')"
)
_library = torch.library.Library("flashcore", "DEF")


# The arguments after the mask, with the defaults that the schema gives them.
_OPTIONS: dict[str, Any] = {
    "layout": "bshd",
    "causal": False,
    "scale": None,
    "top_left": False,
    "window_left": -1,
    "window_right": -1,
    "softcap": 0.0,
    "impl": "auto",
}


def _named(options: tuple[object, ...]) -> dict[str, Any]:
    """The options by name, of which the dispatcher leaves out defaults at the end; the window as one."""
    given = {**_OPTIONS, **dict(zip(_OPTIONS, options, strict=False))}
    window = given.pop("window_left"), given.pop("window_right")
    return {**given, "window": window}


def _run(
    return_lse: bool,
    calls: Calls,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    options: tuple[object, ...],
) -> Result:
    with torch.no_grad():  # at autograd's key or below it; this tells the planner that no gradient is needed
        o, lse = engine.run(q, k, v, attn_mask, return_lse=return_lse, calls=calls, **_named(options))
    # The fake promises contiguous outputs; PyTorch's kernels return transposed ones for some layouts.
    return o.contiguous(), lse


def _fake(
    return_lse: bool,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *options: object,
) -> Result:
    given = _named(options)
    del given["impl"]
    checked = Options.check(**given)
    sizes = check_tensors(q, k, v, attn_mask, checked.layout, sdpa=checked.top_left)
    batch, heads_q, _, seqlen_q, _, _, head_dim_v = sizes
    shape = (batch, seqlen_q, heads_q, head_dim_v) if checked.layout == "bshd" else (batch, heads_q, seqlen_q, head_dim_v)
    lse = q.new_empty((batch, heads_q, seqlen_q), dtype=torch.float32) if return_lse else None
    return q.new_empty(shape), lse


def _define(name: str, *, return_lse: bool) -> Callable[..., Any]:
    """An operator that returns o, or o and the log-sum-exp."""
    _library.define(f"{name}{_ARGUMENTS} -> {'(Tensor, Tensor)' if return_lse else 'Tensor'}")
    remembered = memory()

    def returned(result: Result) -> Any:
        return result if return_lse else result[0]

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None = None, *options: Any) -> Any:
        calls = remembered(*options)
        found = recall(calls, q, k, v, attn_mask)
        return returned(_run(return_lse, calls, q, k, v, attn_mask, options) if found is None else found)

    def autograd(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None = None, *options: Any
    ) -> Any:
        """What the dispatcher calls first. A call that needs no gradient and that nothing below must see goes no further."""
        calls = remembered(*options)
        found = recall(calls, q, k, v, attn_mask)
        if found is None:
            if needs_grad(q, k, v, attn_mask):
                return _Recorded.apply(operator, q, k, v, attn_mask, *options)
            if not (plain(q, k, v, attn_mask) and _ordinary(q, k, v, attn_mask)):
                return _below_autograd(operator, q, k, v, attn_mask, *options)
            found = _run(return_lse, calls, q, k, v, attn_mask, options)
        return returned(found)

    _library.impl(name, autograd, "Autograd")
    for backend in ("CUDA", "CPU"):
        _library.impl(name, run, backend)
    torch.library.register_fake(f"flashcore::{name}", lambda *arguments: returned(_fake(return_lse, *arguments)), lib=_library)
    operator = getattr(torch.ops.flashcore, name).default
    return operator


def _ordinary(*tensors: torch.Tensor | None) -> bool:
    """Whether the tensors' dispatch keys are a new tensor's: they wrap nothing, and their memory is what they mean."""
    return all(torch._C._dispatch_keys(t).raw_repr() == _keys_of_a_new_one(t.device) for t in tensors if t is not None)


@cache
def _keys_of_a_new_one(device: torch.device) -> int:
    return torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr()


def _below_autograd(operator: Callable[..., Any], *arguments: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


class _Recorded(torch.autograd.Function):
    """A call of which some input needs a gradient, which is known to be missing when it is asked for."""

    @staticmethod
    def forward(ctx: Any, operator: Callable[..., Any], *arguments: Any) -> Any:
        return _below_autograd(operator, *arguments)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        raise UnsupportedError(
            "torch.ops.flashcore.attention has no backward yet; flashcore.attention with impl='auto' hands calls that need a "
            "gradient to PyTorch"
        )


def _refuse(error: str, message: str) -> torch.Tensor:
    raise getattr(errors, error)(message)


def _fake_refuse(error: str, message: str) -> torch.Tensor:
    return torch.empty(0)


attention = _define("attention", return_lse=False)
attention_with_lse = _define("attention_with_lse", return_lse=True)

_library.define("refuse(str error, str message) -> Tensor")
_library.impl("refuse", _refuse, "CompositeExplicitAutograd")
torch.library.register_fake("flashcore::refuse", _fake_refuse, lib=_library)
# Raises the named error when it runs: what torch.compile makes of an error raised while tracing is not the caller's error.
refuse = torch.ops.flashcore.refuse.default
