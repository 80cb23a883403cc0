"""Whether a call that needs a gradient and that torch traces goes to PyTorch: decided while it is recorded."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from flashcore import torch_backend
from flashcore.backward_plan import request, wanted_gradients
from flashcore.errors import UnsupportedError
from flashcore.plan import make_plan
from flashcore.spec import AttentionSpec, Options
from flashcore.target import Target


def goes_to_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    options: Options,
    return_lse: bool,
    impl: str,
) -> bool:
    """Whether a call, already validated, becomes PyTorch's operators.

    Sizes that are symbols count as the sizes that torch saw them as. A call that is recorded as ours for these runs by
    kernels of ours at other sizes too wherever one takes it. Tensors that have no memory yet are taken to be aligned.

    Raises:
        UnsupportedError: a named implementation of ours inside a function transform (torch.func) or forward-mode AD.
    """
    if impl == torch_backend.IMPL:
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None or has_tangent(q, k, v, attn_mask):
        if impl != "auto":
            raise UnsupportedError(f"impl {impl!r}: has no rules for torch.func and forward-mode AD; use 'torch' or 'auto'")
        return True
    if impl != "auto":
        return False  # where it does not take the call it says so when it runs
    with _disable_current_modes():
        described = (_described(q), _described(k), _described(v))
        mask = None if attn_mask is None else _described(attn_mask)
        if any(t is None for t in described) or (attn_mask is not None and mask is None):
            return True
        # none of them is None here
        spec = AttentionSpec.from_tensors(*described, mask, options, return_lse=return_lse)  # type: ignore[arg-type]
        spec = replace(spec, device=q.device)
        wanted = wanted_gradients(q, k, v, attn_mask)
        gradient = request(spec, options, mask, wanted, do=None, dlse=return_lse)
        return make_plan(spec, Target.of(q.device), impl, gradient).impl == torch_backend.IMPL


def has_tangent(*tensors: torch.Tensor | None) -> bool:
    """Whether forward-mode differentiation follows one of them."""
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _described(t: torch.Tensor) -> torch.Tensor | None:
    """A tensor of its sizes, strides and dtype without memory; None where the sizes are known only when the graph runs."""
    sizes, strides = ([_known(number) for number in numbers] for numbers in (t.shape, t.stride()))
    if None in sizes or None in strides:
        return None
    # nor are these
    return torch.empty_strided(sizes, strides, dtype=t.dtype, device="meta")  # type: ignore[arg-type]


def _known(size: int | torch.SymInt) -> int | None:
    """A size, or what torch took a symbol for when it met it; asking makes it no constant of the graph."""
    if isinstance(size, int):
        return size
    from torch.fx.experimental import symbolic_shapes

    if not hasattr(symbolic_shapes, "guarding_hint_or_throw"):  # torch before 2.12
        return size.node.hint
    return symbolic_shapes.guarding_hint_or_throw(size) if symbolic_shapes.has_guarding_hint(size) else None
