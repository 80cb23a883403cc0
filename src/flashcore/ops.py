"""The torch.library operators behind the API: what torch.compile, export and dispatch modes see of a call.

The dispatcher converts each argument twice, but for those at the end that are the default. So what is most often asked for
comes first, and a call that wants no log-sum-exp has an operator without one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from flashcore import autograd, errors, torch_backend, tracing
from flashcore.autograd import Recorded
from flashcore.backward_plan import wanted_gradients
from flashcore.memory_order import dense_strides, laid_out
from flashcore.runtime import backward, engine
from flashcore.runtime.backward import Given
from flashcore.runtime.fast_path import Calls, Result, memory, ordinary, plain, recall
from flashcore.spec import Options, check_tensors, needs_grad

_ARGUMENTS = (
    "(Tensor q, Tensor k, Tensor v, Tensor? attn_mask=None, str layout='bshd', bool causal=False, float? scale=None, "
    "bool top_left=False, int window_left=-1, int window_right=-1, float softcap=0.0, str impl='auto', "
    "bool? deterministic=None)"
)
# of the two operators that a recorded call consists of, in which nothing is left open
_OPTIONS_OF_A_RECORDED = (
    "str layout, bool causal, float? scale, bool top_left, int window_left, int window_right, float softcap, str impl, "
    "bool deterministic"
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
    "deterministic": None,
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
    # what the fake promises; PyTorch's kernels return others for some layouts
    return laid_out(o, q), lse


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
    return q.new_empty_strided(shape, dense_strides(shape, q.stride())), lse


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
            unseen = plain(q, k, v, attn_mask) and ordinary(q, k, v, attn_mask)
            if needs_grad(q, k, v, attn_mask) or tracing.has_tangent(q, k, v, attn_mask):
                return returned(_record(return_lse, unseen, q, k, v, attn_mask, _named(options)))
            if not unseen:
                return _below_autograd(operator, q, k, v, attn_mask, *options)
            found = _run(return_lse, calls, q, k, v, attn_mask, options)
        return returned(found)

    _library.impl(name, autograd, "Autograd")
    for backend in ("CUDA", "CPU"):
        _library.impl(name, run, backend)
    torch.library.register_fake(f"flashcore::{name}", lambda *arguments: returned(_fake(return_lse, *arguments)), lib=_library)
    operator = getattr(torch.ops.flashcore, name).default
    return operator


def _below_autograd(operator: Callable[..., Any], *arguments: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def _record(
    return_lse: bool,
    unseen: bool,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    given: dict[str, Any],
) -> Result:
    """A call that needs a gradient; `unseen`: nothing below autograd has to see it.

    Else it becomes `attention_forward` and `attention_backward`, or PyTorch's own operators where it goes to these.
    """
    if unseen:
        o, lse = engine.run(q, k, v, attn_mask, return_lse=return_lse, **given)
        return laid_out(o, q), lse
    impl = given.pop("impl")
    options = Options.check(**given)
    check_tensors(q, k, v, attn_mask, options.layout, sdpa=options.top_left)
    if tracing.goes_to_torch(q, k, v, attn_mask, options, return_lse, impl):
        o, lse = torch_backend.attend(q, k, v, attn_mask, options, return_lse)
        return laid_out(o, q), lse
    wanted = wanted_gradients(q, k, v, attn_mask)

    def forward(*tensors: torch.Tensor | None) -> Result:
        return _below_autograd(attention_forward, *tensors, wanted, *autograd.listed(options, impl))

    return autograd.record(Recorded(forward, return_lse, options, impl), q, k, v, attn_mask)


def _options_of_a_recorded(given: Sequence[Any]) -> tuple[Options, str]:
    """From what `autograd.listed` makes of them."""
    named = _named(tuple(given))
    impl = named.pop("impl")
    return Options.check(**named), impl


def _attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None, wanted: list[bool], *given: Any
) -> Any:
    dq, dk, dv, dmask = wanted
    with torch.no_grad():
        return engine.run_recorded(q, k, v, attn_mask, (dq, dk, dv, dmask), *_options_of_a_recorded(given))


def _fake_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None, wanted: list[bool], *given: Any
) -> Result:
    return _fake(True, q, k, v, attn_mask, *given)


def _attention_backward(
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    o: torch.Tensor,
    lse: torch.Tensor,
    wanted: list[bool],
    *given: Any,
) -> list[torch.Tensor]:
    dq, dk, dv, dmask = wanted
    options, impl = _options_of_a_recorded(given)
    with torch.no_grad():
        return backward.gradients(Given(do, dlse, q, k, v, attn_mask, o, lse), (dq, dk, dv, dmask), options, impl)


def _fake_backward(
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    o: torch.Tensor,
    lse: torch.Tensor,
    wanted: list[bool],
    *given: Any,
) -> list[torch.Tensor]:
    made = [
        t.new_empty_strided(t.shape, dense_strides(t.shape, t.stride()))
        for t, wants in zip((q, k, v), wanted, strict=False)
        if wants
    ]
    return made if attn_mask is None or not wanted[3] else [*made, attn_mask.new_empty(attn_mask.shape)]


def _define_plain(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """An operator that autograd does not see."""
    _library.define(f"{name}{schema}")
    for backend in ("CUDA", "CPU"):
        _library.impl(name, run, backend)
    torch.library.register_fake(f"flashcore::{name}", fake, lib=_library)
    return getattr(torch.ops.flashcore, name).default


def _refuse(error: str, message: str) -> torch.Tensor:
    raise getattr(errors, error)(message)


def _fake_refuse(error: str, message: str) -> torch.Tensor:
    return torch.empty(0)


attention = _define("attention", return_lse=False)
attention_with_lse = _define("attention_with_lse", return_lse=True)
# What torch.compile records of a call that needs a gradient. The backward pass returns the wanted of dq, dk, dv and dmask.
attention_forward = _define_plain(
    "attention_forward",
    f"(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, bool[4] wanted, {_OPTIONS_OF_A_RECORDED}) -> (Tensor, Tensor)",
    _attention_forward,
    _fake_forward,
)
attention_backward = _define_plain(
    "attention_backward",
    "(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor o, Tensor lse, bool[4] wanted, "
    f"{_OPTIONS_OF_A_RECORDED}) -> Tensor[]",
    _attention_backward,
    _fake_backward,
)

_library.define("refuse(str error, str message) -> Tensor")
_library.impl("refuse", _refuse, "CompositeExplicitAutograd")
torch.library.register_fake("flashcore::refuse", _fake_refuse, lib=_library)
# Raises the named error when it runs: what torch.compile makes of an error raised while tracing is not the caller's error.
refuse = torch.ops.flashcore.refuse.default
