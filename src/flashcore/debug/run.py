"""A debug run: launch or interpret a subject that records its stages, and judge each view over all tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flashcore import environment
from flashcore.bench.inputs import Inputs, InputSets
from flashcore.bench.shapes import Shape
from flashcore.debug.artifact import DebugArtifact, ViewVerdict
from flashcore.debug.binaries import find
from flashcore.debug.compare import verdict
from flashcore.debug.oracles import Operands, Part, judge
from flashcore.debug.record import Record
from flashcore.debug.subjects import Recording, recording
from flashcore.debug.views import View
from flashcore.kernels.arguments import TENSORS, TensorName
from flashcore.reference import attended
from flashcore.runtime.binary import Binary
from flashcore.sources import kernel_hash
from flashcore.target import Target
from flashcore.verify.watchdog import watchdog

HANG_SECONDS = 60.0


@dataclass(frozen=True)
class Request:
    """What to debug: a subject on a shape with inputs of a seed, and which views. `binaries`: the folder that has it built."""

    subject: str
    shape: Shape
    views: Sequence[View]
    seed: int = 0
    binaries: Path | None = None


def run(request: Request, device: torch.device) -> DebugArtifact:
    """Run the subject once, recording, and judge the views.

    Raises:
        ArgumentValueError: no such subject, or a shape that no device takes, or whose record is too large.
        UnsupportedError: it does not run on this device, or not this shape.
        BinaryError, CompileError: there is no binary of it, and none can be made.
    """
    target = Target.of(device)
    plan = recording(request.subject, request.shape, target)
    record = Record.allocate(request.shape, device)
    inputs = InputSets(request.shape, device, request.seed)[0]
    tensors = _tensors(inputs, record, plan)
    binaries: list[Binary] = []
    if target.interpreted:
        _interpret(plan, tensors)
    else:
        binaries = [find(one.specialisation, target, request.binaries) for one in plan.program.launches]
        _launch(plan, binaries, tensors, device, request.subject)
    return DebugArtifact(
        environment=environment.collect(device),
        subject=request.subject,
        shape=request.shape,
        seed=request.seed,
        interpreted=target.interpreted,
        kernels=[one.specialisation.name for one in plan.program.launches],
        sources={
            kernel: kernel_hash(kernel) for kernel in dict.fromkeys(one.specialisation.kernel for one in plan.program.launches)
        },
        binaries=[binary.info.sha256 for binary in binaries],
        views=judge_views(request.views, record, inputs, plan),
    )


def judge_views(views: Sequence[View], record: Record, inputs: Inputs, plan: Recording) -> list[ViewVerdict]:
    """Every head of a record against its oracles."""
    shape = record.shape
    places = [(batch, head) for batch in range(shape.batch) for head in range(shape.heads_q)]
    found = []
    for view in views:
        heads = [judge(view, record.head(*place), operands(inputs, *place), plan.convention) for place in places]
        parts: list[list[Part]] = [list(part) for part in zip(*heads, strict=True)]
        found.append(ViewVerdict(view=view, parts=[verdict(shape, part) for part in parts]))
    return found


def operands(inputs: Inputs, batch: int, head: int) -> Operands:
    """What a query head works on."""
    shape = inputs.shape
    kv_head = head // (shape.heads_q // shape.heads_k)
    allowed = attended(batch=1, heads_q=1, seqlen_q=shape.seqlen_q, seqlen_k=shape.seqlen_k, causal=shape.causal)
    return Operands(
        inputs.q[batch, head], inputs.k[batch, kv_head], inputs.v[batch, kv_head], allowed[0, 0].to(inputs.q.device)
    )


def _tensors(inputs: Inputs, record: Record, plan: Recording) -> dict[TensorName, torch.Tensor]:
    """Every tensor that a launch names."""
    shape, device = inputs.shape, inputs.q.device
    o = torch.empty(shape.batch, shape.heads_q, shape.seqlen_q, shape.head_dim_v, dtype=inputs.q.dtype, device=device)
    tensors: dict[TensorName, torch.Tensor] = {
        "q": inputs.q,
        "k": inputs.k,
        "v": inputs.v,
        "o": o,
        "view": record.rows,
        **plan.program.allocate(device),
    }
    if plan.counted:
        tensors["counter"] = torch.zeros(1, dtype=torch.int32, device=device)
    return tensors


def _interpret(plan: Recording, tensors: dict[TensorName, torch.Tensor]) -> None:
    from flashcore.runtime.interpret import interpret

    for one in plan.program.launches:
        interpret(one.specialisation, one.grid, one.arguments, {"mask": None, "lse": None, **tensors})


def _launch(
    plan: Recording, binaries: Sequence[Binary], tensors: dict[TensorName, torch.Tensor], device: torch.device, what: str
) -> None:
    from flashcore.runtime.launch import Launcher

    addresses = [tensors[name].data_ptr() if name in tensors else 0 for name in TENSORS]
    launches = [
        Launcher(binary, device, grid=one.grid, arguments=one.arguments).launch
        for one, binary in zip(plan.program.launches, binaries, strict=True)
    ]
    with watchdog(HANG_SECONDS, f"{what}, recording"):
        for launch in launches:
            launch(addresses)
        torch.cuda.synchronize(device)
