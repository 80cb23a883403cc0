"""The gradients of a call, eagerly: look up what was prepared for such a pass, or plan and prepare it once, and run it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from flashcore import torch_backend
from flashcore.backward_plan import BackwardPlan, Wanted, make_backward_plan, request
from flashcore.backward_spec import BackwardSpec
from flashcore.kernels.arguments import TENSORS, TensorName
from flashcore.memory_order import laid_out
from flashcore.plan import make_plan
from flashcore.runtime.fast_path import Empty, empty_by_dispatcher, empty_directly
from flashcore.spec import AttentionSpec, Options, in_layout
from flashcore.target import Target

# by name, None for what a call has not
Tensors = Mapping[TensorName, torch.Tensor | None]
# dq, dk, dv and dmask where they are asked for; dk and dv come together
Gradients = dict[TensorName, torch.Tensor]
Pass = Callable[[Tensors], Gradients]
# a tensor that a pass allocates: name, sizes, strides, dtype
_Memory = tuple[TensorName, tuple[int, ...], tuple[int, ...], torch.dtype]

_PLACES: dict[TensorName, int] = {name: place for place, name in enumerate(TENSORS)}
_GRADIENTS: tuple[TensorName, ...] = ("dq", "dk", "dv", "dmask")
_MAX_PREPARED = 4096
_prepared: dict[Hashable, Pass] = {}


class Given(NamedTuple):
    """What a backward pass starts from: the gradients of o and of the log-sum-exp, and what the call kept."""

    do: torch.Tensor
    dlse: torch.Tensor | None
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    o: torch.Tensor
    lse: torch.Tensor

    def as_kernels_read_it(self) -> Given:
        """`do` copied where kernels could not load it 16 bytes at a time, as is assumed when a call is planned.

        And what hooks on saved tensors may have laid elsewhere where the forward pass left it.
        """
        dlse = None if self.dlse is None else self.dlse.contiguous()
        return self._replace(do=_loadable(self.do), dlse=dlse, o=laid_out(self.o, self.q), lse=self.lse.contiguous())


def gradients(given: Given, wanted: Wanted, options: Options, impl: str) -> list[torch.Tensor]:
    """The wanted of dq, dk, dv and the mask's gradient, each in dtype, shape and order of what it is the gradient of.

    `impl` is the one that the call's plan has, or "auto" where the call was recorded without a plan: then it is ours wherever
    one of ours takes it. `do` may have any strides.
    """
    given = given.as_kernels_read_it()
    q, mask = given.q, given.mask
    described = tuple(
        None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16)
        for t in (given.do, q, given.k, given.v, mask)
    )
    allow_tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    key = (described, given.dlse is None, wanted, options, impl, allow_tf32)
    prepared = _prepared.get(key)
    if prepared is None:
        prepared = _prepare(given, wanted, options, impl)
        if len(_prepared) >= _MAX_PREPARED:
            _prepared.clear()
        _prepared[key] = prepared
    found = prepared(given._asdict())  # type: ignore[arg-type]  # its names are those of tensors
    made = [found[name] for name, asked in zip(_GRADIENTS, wanted, strict=True) if asked]
    if mask is not None and wanted[3]:
        made[-1] = made[-1].view(mask.shape)
    return made


def forget() -> None:
    """Prepare every pass anew."""
    _prepared.clear()


def _loadable(do: torch.Tensor) -> torch.Tensor:
    """The output's gradient as it is, or a contiguous copy."""
    vector = 16 // do.element_size()
    in_rows = do.stride(3) == 1 and all(stride > 0 and stride % vector == 0 for stride in do.stride()[:3])
    if (in_rows or do.is_contiguous()) and do.data_ptr() % 16 == 0:
        return do
    return do.clone(memory_format=torch.contiguous_format)


def _prepare(given: Given, wanted: Wanted, options: Options, impl: str) -> Pass:
    call = AttentionSpec.from_tensors(given.q, given.k, given.v, given.mask, options, return_lse=True)
    spec = request(call, options, given.mask, wanted, do=given.do, dlse=given.dlse is not None)
    target = Target.of(call.device)
    if impl == "auto":
        impl = make_plan(call, target, impl, spec, ours=True).impl
    if impl == torch_backend.IMPL:
        return partial(_by_torch, wanted, options)
    return prepare_backward(spec, make_backward_plan(spec, target, impl))


def _by_torch(wanted: Wanted, options: Options, tensors: Tensors) -> Gradients:
    """The gradients by PyTorch, which must run the call once more: what it needs for them was not kept."""
    do, dlse, inputs = tensors["do"], tensors["dlse"], [tensors[name] for name in ("q", "k", "v", "mask")]
    leaves: list[Any] = [t if t is None else t.detach().requires_grad_(asked) for t, asked in zip(inputs, wanted, strict=True)]
    assert do is not None
    with torch.enable_grad():
        q, k, v, mask = leaves
        o, lse = torch_backend.attend(q, k, v, mask, options, dlse is not None)
    ends = [(o, do)] if lse is None or dlse is None else [(o, do), (lse, dlse)]
    asked = {name: leaf for name, leaf, wants in zip(_GRADIENTS, leaves, wanted, strict=True) if wants}
    found = torch.autograd.grad([end for end, _ in ends], list(asked.values()), [gradient for _, gradient in ends])
    return {
        name: gradient.contiguous() if name == "dmask" else laid_out(gradient, leaf.detach())
        for (name, leaf), gradient in zip(asked.items(), found, strict=True)
    }


def prepare_backward(spec: BackwardSpec, plan: BackwardPlan) -> Pass:
    """Everything of such passes that does not depend on the tensors' memory, done.

    The pass takes the tensors that the spec describes and returns the gradients that it asks for. Workspaces live until the
    launches that use them have run, by the caching allocator's order of streams.
    """
    return partial(_interpret, spec, plan) if plan.interpreted else _prepare_launches(spec, plan)


def _outputs(spec: BackwardSpec) -> list[_Memory]:
    """The gradients that are asked for."""
    call = spec.call
    found: list[_Memory] = []

    def add(name: TensorName, shape: tuple[int, ...], strides: tuple[int, int, int]) -> None:
        found.append((name, shape, (*in_layout(strides, call.layout), 1), call.dtype))

    if spec.dq:
        add("dq", spec.dq_shape, spec.dq_strides)
    if spec.dkv:
        add("dk", spec.dk_shape, spec.dk_strides)
        add("dv", spec.dv_shape, spec.dv_strides)
    if spec.dmask_shape is not None:
        assert call.mask is not None
        found.append(("dmask", spec.dmask_shape, _contiguous(spec.dmask_shape), call.mask.dtype))
    return found


def _memory(spec: BackwardSpec, plan: BackwardPlan) -> list[_Memory]:
    """All that a pass allocates."""
    workspaces = ((one.tensor, one.shape, _contiguous(one.shape), one.dtype) for one in plan.program.workspaces)
    return [*_outputs(spec), *workspaces]


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _prepare_launches(spec: BackwardSpec, plan: BackwardPlan) -> Pass:
    from flashcore.runtime.launch import Launcher
    from flashcore.runtime.store import obtain

    device = spec.call.device
    launchers = [
        Launcher(obtain(launch.specialisation, Target.of(device)), device, grid=launch.grid, arguments=launch.arguments)
        for launch in plan.program.launches
    ]
    launches, index = [launcher.launch_here for launcher in launchers], launchers[0].device
    memory, names = _memory(spec, plan), [name for name, *_ in _outputs(spec)]
    directly, by_dispatcher = empty_directly(device), empty_by_dispatcher(device)

    def run(tensors: Tensors) -> Gradients:
        if torch._C._cuda_getDevice() != index:
            with torch.cuda.device(index):
                return run(tensors)
        # as in a forward call: the dispatcher's memory is what `verify` poisons
        empty: Empty = by_dispatcher if torch._C._get_deterministic_algorithms() else directly
        made: Gradients = {name: empty(shape, strides, dtype) for name, shape, strides, dtype in memory}
        addresses = [0] * len(TENSORS)
        for name, t in (*tensors.items(), *made.items()):
            if t is not None:
                addresses[_PLACES[name]] = t.data_ptr()
        for launch in launches:
            launch(addresses)
        return {name: made[name] for name in names}

    return run


def _interpret(spec: BackwardSpec, plan: BackwardPlan, tensors: Tensors) -> Gradients:
    from flashcore.runtime.interpret import interpret

    made: Gradients = {
        name: torch.empty_strided(shape, strides, dtype=dtype) for name, shape, strides, dtype in _memory(spec, plan)
    }
    present = {**dict.fromkeys(TENSORS), **tensors, **made}
    for launch in plan.program.launches:
        interpret(launch.specialisation, launch.grid, launch.arguments, present)
    return {name: made[name] for name, *_ in _outputs(spec)}
