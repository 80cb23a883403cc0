"""From a call to its result, eagerly: look up what was prepared for such a call, or validate, plan and prepare it once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch

from flashcore import autograd, torch_backend
from flashcore.autograd import Recorded
from flashcore.backward_plan import Wanted, request, wanted_gradients
from flashcore.backward_spec import BackwardSpec
from flashcore.kernels.registry import BINDINGS
from flashcore.kernels.specialisation import Specialisation
from flashcore.memory_order import laid_out
from flashcore.plan import Plan, make_plan
from flashcore.runtime import backward, fast_path
from flashcore.runtime.binary import Binary
from flashcore.runtime.fast_path import (
    Calls,
    Launch,
    Result,
    empty_by_dispatcher,
    empty_directly,
    remember,
    typed,
)
from flashcore.spec import AttentionSpec, Options, needs_grad
from flashcore.target import Target


@dataclass(frozen=True, slots=True)
class Prepared:
    """What runs a call; `launch` where that is one of our kernels, launched."""

    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], Result]
    launch: Launch | None = None


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
    deterministic: bool | None = None,
    calls: Calls | None = None,
) -> Result:
    """Validate, plan and run a call; everything that depends only on the key is done once for each key.

    `calls` of the entry point, for these options, remembers the call from its second time on.
    """
    key = _key(q, k, v, attn_mask, window, (causal, scale, softcap, return_lse, layout, impl, top_left, deterministic))
    prepared = None if key is None else _prepared.get(key)
    if prepared is not None:
        if calls is not None and prepared.launch is not None:
            remember(calls, prepared.launch, q, k, v, attn_mask)
        return prepared.run(q, k, v, attn_mask)
    options = Options.check(
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
        layout=layout,
        top_left=top_left,
        deterministic=deterministic,
    )
    spec, plan = plan_call(q, k, v, attn_mask, options, return_lse, impl)
    prepared = _keep(key, prepare(spec, plan, options))
    return prepared.run(q, k, v, attn_mask)


def run_recorded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    wanted: Wanted,
    options: Options,
    impl: str,
) -> Result:
    """The forward pass of a call that was recorded before it could be planned (torch.compile): o as q lies, lse contiguous.

    With "auto", PyTorch runs it only where no kernel of ours can, because what its backward pass needs is not recorded.
    """
    key = _key(q, k, v, attn_mask, None, ("recorded", wanted, options, impl))
    prepared = None if key is None else _prepared.get(key)
    if prepared is None:
        spec = AttentionSpec.from_tensors(q, k, v, attn_mask, options, return_lse=True)
        gradient = request(spec, options, attn_mask, wanted, do=None, dlse=True)
        plan = make_plan(spec, Target.of(spec.device), impl, gradient, ours=True)
        prepared = _keep(key, prepare(spec, replace(plan, backward=None), options))
    o, lse = prepared.run(q, k, v, attn_mask)
    assert lse is not None
    return laid_out(o, q), lse.contiguous()


def _keep(key: Hashable | None, prepared: Prepared) -> Prepared:
    if len(_prepared) >= _MAX_PREPARED:
        _prepared.clear()
    if key is not None:
        _prepared[key] = prepared
    return prepared


def forget() -> None:
    """Prepare every call anew: what plans depend on beside their calls (evidence, the environment) has changed."""
    _prepared.clear()
    backward.forget()
    fast_path.forget()


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
    try:
        key = (
            *((t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16, t.requires_grad) for t in tensors),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            options,
            # True == 1 == 1.0 as keys, but not as arguments
            *map(type, options),
            typed(window),
            q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32,
        )
        hash(key)
    except (AttributeError, TypeError, RuntimeError):  # not a tensor, not hashable, a tensor without memory
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
    """The spec and the plan of a call, with nothing launched; its gradients' too where it needs some."""
    spec = AttentionSpec.from_tensors(q, k, v, attn_mask, options, return_lse=return_lse)
    gradient: BackwardSpec | None = None
    if needs_grad(q, k, v, attn_mask):
        wanted = wanted_gradients(q, k, v, attn_mask)
        gradient = request(spec, options, attn_mask, wanted, do=None, dlse=return_lse)
    return spec, make_plan(spec, Target.of(spec.device), impl, gradient)


def prepare(spec: AttentionSpec, plan: Plan, options: Options) -> Prepared:
    """Everything of such calls that does not depend on the tensors' memory, done."""
    if plan.impl == torch_backend.IMPL:
        return Prepared(lambda q, k, v, attn_mask: torch_backend.attend(q, k, v, attn_mask, options, spec.return_lse))
    if plan.backward is not None:
        forward = prepare(replace(spec, return_lse=True), replace(plan, backward=None), options).run
        recorded = Recorded(forward, spec.return_lse, options, plan.impl)
        return Prepared(lambda q, k, v, attn_mask: autograd.record(recorded, q, k, v, attn_mask))
    if plan.interpreted:
        return _prepare_interpreted(spec, plan)
    from flashcore.runtime.store import obtain

    assert plan.specialisation is not None
    binary = obtain(plan.specialisation, Target.of(spec.device))
    launch = prepare_launch(spec, plan.impl, plan.specialisation, plan.grid, binary)
    return Prepared(
        lambda q, k, v, attn_mask: launch(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), 0 if attn_mask is None else attn_mask.data_ptr()
        ),
        launch,
    )


def prepare_launch(spec: AttentionSpec, impl: str, specialisation: Specialisation, grid: int, binary: Binary) -> Launch:
    """The launch of such calls by a kernel of ours, in a grid of so many blocks, with this binary of the specialisation.

    Raises:
        BinaryError, DriverError: as `Launcher`.
    """
    from flashcore.runtime.launch import Launcher

    binding = BINDINGS[impl]
    counted = binding.needs_counter(spec, specialisation, grid)
    device = spec.device
    launcher = Launcher(binary, device, grid=grid, arguments=binding.arguments(spec, specialisation))
    # every name that a launch uses is a variable of this function: nothing is looked up in an object or a module
    launch_here, index = launcher.launch_here, launcher.device
    directly, by_dispatcher = empty_directly(device), empty_by_dispatcher(device)
    current_device, deterministic = torch._C._cuda_getDevice, torch._C._get_deterministic_algorithms
    o_shape, o_strides, dtype = spec.output_shape, spec.output_strides, spec.dtype
    lse_shape, lse_strides, float32 = spec.lse_shape, _contiguous(spec.lse_shape), torch.float32
    with_lse = spec.return_lse

    def launch(q: int, k: int, v: int, attn_mask: int) -> Result:
        if current_device() != index:
            with torch.cuda.device(index):
                return launch(q, k, v, attn_mask)
        # the dispatcher's fills the memory where deterministic algorithms are asked for, by which `verify` poisons it
        empty = by_dispatcher if deterministic() else directly
        o = empty(o_shape, o_strides, dtype)
        lse = empty(lse_shape, lse_strides, float32) if with_lse else None
        # one for each launch, so that streams, threads and graphs share none
        counter = torch.zeros(1, dtype=torch.int32, device=device) if counted else None
        # in the order of kernels.arguments.TENSORS
        launch_here(
            (
                q,
                k,
                v,
                attn_mask,
                o.data_ptr(),
                0 if lse is None else lse.data_ptr(),
                0 if counter is None else counter.data_ptr(),
            )
        )
        return o, lse

    return launch


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _prepare_interpreted(spec: AttentionSpec, plan: Plan) -> Prepared:
    from flashcore.runtime.interpret import interpret

    specialisation = plan.specialisation
    assert specialisation is not None
    arguments = BINDINGS[plan.impl].arguments(spec, specialisation)

    def run_interpreted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None) -> Result:
        o = torch.empty_strided(spec.output_shape, spec.output_strides, dtype=spec.dtype, device=spec.device)
        lse = torch.empty(spec.lse_shape, dtype=torch.float32, device=spec.device) if spec.return_lse else None
        interpret(specialisation, plan.grid, arguments, {"q": q, "k": k, "v": v, "mask": attn_mask, "o": o, "lse": lse})
        return o, lse

    return Prepared(run_interpreted)
