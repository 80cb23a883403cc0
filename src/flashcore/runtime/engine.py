"""From a call to its result, eagerly: look up what was prepared for such a call, or validate, plan and prepare it once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch

from flashcore import torch_backend
from flashcore.kernels.registry import BINDINGS
from flashcore.plan import Plan, make_plan
from flashcore.spec import AttentionSpec, Options
from flashcore.target import Target

Result = tuple[torch.Tensor, torch.Tensor | None]
Prepared = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], Result]

# What one process meets is a handful of call shapes; the bound only keeps a pathological one from growing without end.
_MAX_PREPARED = 4096
_prepared: dict[Hashable, Prepared] = {}


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    *,
    causal: bool,
    scale: float | None,
    window: Sequence[int] | None,
    softcap: float,
    return_lse: bool,
    layout: str,
    impl: str,
    top_left: bool,
) -> Result:
    """Validate, plan and run a call; everything that depends only on the key is done once for each key."""
    key = _key(q, k, v, attn_mask, window, (causal, scale, softcap, return_lse, layout, impl, top_left))
    prepared = None if key is None else _prepared.get(key)
    if prepared is not None:
        return prepared(q, k, v, attn_mask)
    options = Options.check(causal=causal, scale=scale, window=window, softcap=softcap, layout=layout, top_left=top_left)
    spec, plan = plan_call(q, k, v, attn_mask, options, return_lse, impl)
    prepared = _prepare(spec, plan, options)
    if len(_prepared) >= _MAX_PREPARED:
        _prepared.clear()
    if key is not None:
        _prepared[key] = prepared
    return prepared(q, k, v, attn_mask)


def _key(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    window: Sequence[int] | None,
    options: tuple[object, ...],
) -> Hashable | None:
    """All that a prepared call depends on; None for arguments so wrong that they make none, which validation then names."""
    tensors = (q, k, v) if attn_mask is None else (q, k, v, attn_mask)
    sides = tuple(window) if isinstance(window, list) else window
    try:
        key = (
            *((t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16, t.requires_grad) for t in tensors),
            torch.is_grad_enabled(),
            options,
            # True == 1 == 1.0 as keys, but not as arguments
            *map(type, options),
            sides,
            *map(type, sides or ()),
            q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32,
        )
        hash(key)
    except (AttributeError, TypeError, RuntimeError):  # not a tensor, not hashable or iterable, a tensor without memory
        return None
    return key


def plan_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    options: Options,
    return_lse: bool,
    impl: str,
) -> tuple[AttentionSpec, Plan]:
    """The spec and the plan of a call, with nothing launched."""
    spec = AttentionSpec.from_tensors(q, k, v, attn_mask, options, return_lse=return_lse)
    return spec, make_plan(spec, Target.of(spec.device), impl)


def _prepare(spec: AttentionSpec, plan: Plan, options: Options) -> Prepared:
    if plan.impl == torch_backend.IMPL:
        return lambda q, k, v, attn_mask: torch_backend.attend(q, k, v, attn_mask, options, spec.return_lse)
    if plan.interpreted:
        return _prepare_interpreted(spec, plan)
    return _prepare_launch(spec, plan)


def _outputs(spec: AttentionSpec) -> Result:
    o = torch.empty(spec.output_shape, dtype=spec.dtype, device=spec.device)
    lse = torch.empty(spec.lse_shape, dtype=torch.float32, device=spec.device) if spec.return_lse else None
    return o, lse


def _prepare_launch(spec: AttentionSpec, plan: Plan) -> Prepared:
    from flashcore.runtime.launch import Launcher
    from flashcore.runtime.store import obtain

    assert plan.specialisation is not None
    binding = BINDINGS[plan.impl]
    counted = binding.needs_counter(plan.specialisation)
    device = spec.device
    launch_kernel = Launcher(
        obtain(plan.specialisation, Target.of(device)),
        device,
        grid=plan.grid,
        arguments=binding.arguments(spec, plan.specialisation),
    ).launch

    def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None) -> Result:
        o, lse = _outputs(spec)
        # one for each launch, so that streams, threads and graphs share none
        counter = torch.zeros(1, dtype=torch.int32, device=device) if counted else None
        # in the order of kernels.arguments.TENSORS
        launch_kernel(
            (
                q.data_ptr(),
                k.data_ptr(),
                v.data_ptr(),
                0 if attn_mask is None else attn_mask.data_ptr(),
                o.data_ptr(),
                0 if lse is None else lse.data_ptr(),
                0 if counter is None else counter.data_ptr(),
            )
        )
        return o, lse

    return launch


def _prepare_interpreted(spec: AttentionSpec, plan: Plan) -> Prepared:
    from flashcore.runtime.interpret import interpret

    specialisation = plan.specialisation
    assert specialisation is not None
    arguments = BINDINGS[plan.impl].arguments(spec, specialisation)

    def run_interpreted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None) -> Result:
        o, lse = _outputs(spec)
        interpret(specialisation, plan.grid, arguments, {"q": q, "k": k, "v": v, "mask": attn_mask, "o": o, "lse": lse})
        return o, lse

    return run_interpreted
