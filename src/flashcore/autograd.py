"""A call as autograd records it, where forward and backward are our kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from flashcore.backward_plan import Wanted
from flashcore.errors import UnsupportedError
from flashcore.runtime.backward import Given, gradients
from flashcore.runtime.fast_path import Result, ordinary, plain
from flashcore.spec import Options


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a call keeps for its backward pass beside its tensors."""

    # q, k, v and the mask -> o, which lies as q does, and lse, contiguous
    forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], Result]
    return_lse: bool
    options: Options
    # runs the backward pass: a name of BACKWARDS, or "auto"
    impl: str


def record(recorded: Recorded, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None) -> Result:
    """Run a call so that autograd knows its backward pass. Kept are q, k, v, the mask, o and the log-sum-exp."""
    made = _Attention.apply(recorded, q, k, v, attn_mask)
    return made if recorded.return_lse else (made, None)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, recorded: Recorded, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None
    ) -> Any:
        o, lse = recorded.forward(q, k, v, attn_mask)
        ctx.recorded = recorded
        ctx.save_for_backward(q, k, v, attn_mask, o, lse)
        ctx.set_materialize_grads(False)
        return (o, lse) if recorded.return_lse else o

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor | None, dlse: torch.Tensor | None = None) -> Any:
        wanted = ctx.needs_input_grad[1:]
        if do is None and dlse is None:
            return (None,) * 5
        q, k, v, attn_mask, o, lse = ctx.saved_tensors
        given = Given(torch.zeros_like(o) if do is None else do, dlse, q, k, v, attn_mask, o, lse)
        # grad mode is on where the gradients are to be differentiated themselves
        differentiate = _Gradients.apply if torch.is_grad_enabled() else _gradients
        found = iter(differentiate(ctx.recorded.options, ctx.recorded.impl, wanted, *given))
        return (None, *(next(found) if asked else None for asked in wanted))


class _Gradients(torch.autograd.Function):
    """The backward pass where autograd records it too: its own gradient is known to be missing when it is asked for."""

    @staticmethod
    def forward(ctx: Any, options: Options, impl: str, wanted: Wanted, *tensors: torch.Tensor | None) -> Any:
        return tuple(_gradients(options, impl, wanted, *tensors))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        raise UnsupportedError(
            "double backward: the gradients of flashcore.attention cannot be differentiated; impl='torch' can do so where "
            "PyTorch's attention can"
        )


def _gradients(options: Options, impl: str, wanted: Wanted, *tensors: Any) -> list[torch.Tensor]:
    """Straight to the engine in eager mode; through the operator where torch must see it, as in a forward call."""
    given = Given(*tensors)
    # what was kept was ordinary when the call was made
    if plain(*tensors) and ordinary(given.do, given.dlse):
        return gradients(given, wanted, options, impl)
    with torch._C._AutoDispatchBelowAutograd():
        found: list[torch.Tensor] = torch.ops.flashcore.attention_backward.default(*tensors, wanted, *listed(options, impl))
    return found


def listed(options: Options, impl: str) -> tuple[Any, ...]:
    """A call's options as its two operators take them."""
    left, right = options.window
    return (
        options.layout,
        options.causal,
        options.scale,
        options.top_left,
        left,
        right,
        options.softcap,
        impl,
        options.deterministic,
    )
