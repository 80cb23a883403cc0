"""From a call that was made before straight to its launch: options and tensors are each checked by one call into C.

`TensorGuards` is what torch.compile checks a function's inputs by: types, dispatch keys (those that the thread's modes add
included), dtypes, devices, requires_grad under the grad mode, sizes and strides. It is private to torch, so whether it is
there and tells these apart is tried once (`guarded`). Where it does not, every call goes by the engine's key, which means the
same and is slower. docs/notes/host-overhead.md says by how much, and what else was tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch.autograd import forward_ad

Result = tuple[torch.Tensor, torch.Tensor | None]
# Launches with the addresses of q, k, v and the mask, 0 for none.
Launch = Callable[[int, int, int, int], Result]
# The result, or None for tensors that are not like those it was made for.
Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], Result | None]
# The calls remembered with certain options, newest first, by the number of k's elements: that tells most shapes apart, so that
# a call of one of many shapes tries no more guards than a call of the only one.
Calls = dict[int, tuple[Call, ...]]
Empty = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]

_MAX_OPTIONS, _MAX_SIZES, _MAX_OF_A_SIZE = 256, 1024, 8
_private: Any = getattr(torch._C._dynamo, "guards", None)
_dispatch_depth = torch._C._len_torch_dispatch_stack
_memories: list[Any] = []


def memory() -> Callable[..., Calls]:
    """What one entry point remembers: a function from its options, which must be hashable, to the calls made with them.

    lru_cache looks them up in C, and `typed` keeps apart what is equal but not of one type, as True, 1 and 1.0 are.
    """

    @lru_cache(maxsize=_MAX_OPTIONS, typed=True)
    def calls(*options: object) -> Calls:
        return {}

    _memories.append(calls)
    return calls


def forget() -> None:
    """Remember nothing any more, of no entry point."""
    for calls in _memories:
        calls.cache_clear()


def typed(window: object) -> object:
    """A window as one of the options by which a call is found: a list is as good as a tuple, (True, 0) is not (1, 0)."""
    return (*map(type, window), *window) if isinstance(window, (tuple, list)) else window


def plain(*tensors: torch.Tensor | None) -> bool:
    """Whether no torch mode, transform, tangent, subclass or negation still to be done needs the dispatcher for a call.

    What is not a tensor is plain: validation names it.
    """
    if _dispatch_depth() or torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    return not any(isinstance(t, torch.Tensor) and (type(t) is not torch.Tensor or t.is_neg()) for t in tensors)


def ordinary(*tensors: torch.Tensor | None) -> bool:
    """Whether the tensors' dispatch keys are a new tensor's: they wrap nothing, and their memory is what they mean."""
    return all(torch._C._dispatch_keys(t).raw_repr() == _keys_of_a_new_one(t.device) for t in tensors if t is not None)


@cache
def _keys_of_a_new_one(device: torch.device) -> int:
    return torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr()


def recall(calls: Calls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None) -> Result | None:
    """The result, by what is remembered of such a call; None where nothing is."""
    if type(k) is torch.Tensor:
        for call in calls.get(k.numel(), ()):
            found = call(q, k, v, attn_mask)
            if found is not None:
                return found
    return None


def remember(
    calls: Calls,
    launch: Launch,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
) -> None:
    """Let a plain call like this one, for which `launch` was prepared, be found in `calls` from now on.

    Not so for float32, whose plan depends on whether TF32 is allowed, and for addresses that are not multiples of 16: no guard
    sees these.
    """
    tensors = (q, k, v) if attn_mask is None else (q, k, v, attn_mask)
    unguarded = q.dtype == torch.float32 or (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16
    if unguarded or not guarded():
        return
    if len(calls) >= _MAX_SIZES:
        calls.clear()
    size = k.numel()
    calls[size] = (_guarded(launch, tensors), *calls.get(size, ())[: _MAX_OF_A_SIZE - 1])


def _guarded(launch: Launch, tensors: Sequence[torch.Tensor]) -> Call:
    check, unmasked = _check(tensors), len(tensors) == 3
    dispatch_depth = _dispatch_depth

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None) -> Result | None:
        if attn_mask is None:
            if not (unmasked and check(q, k, v)):
                return None
            mask = 0
        else:
            if unmasked or not check(q, k, v, attn_mask):
                return None
            mask = attn_mask.data_ptr()
        q_at, k_at, v_at = q.data_ptr(), k.data_ptr(), v.data_ptr()
        # the guard does not see the modes that torch.compile is to ignore, nor tangents of forward-mode differentiation
        if (q_at | k_at | v_at) & 15 or dispatch_depth() or forward_ad._current_level >= 0:
            return None
        return launch(q_at, k_at, v_at, mask)

    return call


def _check(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    return _private.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


@cache
def guarded() -> bool:
    """Whether this torch's TensorGuards is there and takes a tensor for what it is like, and for nothing else: tried once."""
    with torch.inference_mode(False), torch.enable_grad():
        t = torch.empty(2, 3, 1, dtype=torch.float16, device="cpu")
        others = (t.float(), t[:1], t.reshape(3, 2, 1), t.transpose(0, 1), t.detach().requires_grad_(), t.to("meta"), None)
        unlike = (*others, torch.nn.Parameter(t, requires_grad=False), torch._neg_view(t))
        try:
            check = _check((t, t))
            return check(t, t.clone()) is True and all(check(t, other) is False for other in unlike)
        except (AttributeError, TypeError, RuntimeError, SystemError):
            return False


def empty_by_dispatcher(device: torch.device) -> Empty:
    """Allocation by the dispatcher: (sizes, strides, dtype) -> a tensor on the device."""
    return lambda sizes, strides, dtype: torch.empty_strided(sizes, strides, dtype=dtype, device=device)


def empty_directly(device: torch.device) -> Empty:
    """Allocation without the dispatcher, on the current device of that type; the other where this torch has none that works."""
    return _direct(device.type) or empty_by_dispatcher(device)


@cache
def _direct(device_type: str) -> Empty | None:
    """Inductor's own way to allocate, tried once."""
    found: Empty | None = getattr(_private, f"_empty_strided_{device_type}", None)
    try:
        return found if found and found((2, 0), (1, 1), torch.float16).shape == (2, 0) else None
    except (TypeError, RuntimeError):
        return None


def ways(device: torch.device) -> str:
    """How a call finds its launch and gets its output here, for people to read."""
    found = "torch's tensor guards" if guarded() else "keys, because this torch has no tensor guards that work as expected"
    return f"found by {found}; outputs allocated {'directly' if _direct(device.type) else 'by the dispatcher'}"
