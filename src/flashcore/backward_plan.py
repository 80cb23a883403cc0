"""make_backward_plan: the launches that make a call's gradients by a named implementation, and what is known of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from flashcore import evidence
from flashcore.backward_spec import BackwardSpec
from flashcore.errors import UnsupportedError
from flashcore.kernels.program import Program
from flashcore.kernels.registry import BACKWARDS
from flashcore.planned_binary import STATES, PlannedBinary, describe
from flashcore.spec import AttentionSpec, Options
from flashcore.target import SM_COUNTS, Target

# of a call's q, k, v and mask: which need a gradient
Wanted = tuple[bool, bool, bool, bool]


@dataclass(frozen=True, slots=True)
class BackwardPlan:
    """What the gradients of a call will be made by. `binaries` are those of the program's launches; none when interpreted."""

    # a name of BACKWARDS
    impl: str
    program: Program
    binaries: tuple[PlannedBinary, ...]
    # bitwise equal from run to run
    reproducible: bool
    interpreted: bool
    # by measurement; None where it was not measured, or where every pass of this implementation is reproducible
    cost_of_determinism: str | None = None

    @property
    def evidence(self) -> str:
        """The worst state of its binaries; "none" where none is involved."""
        return max((binary.evidence for binary in self.binaries), key=STATES.index, default="none")

    @property
    def workspace_bytes(self) -> int:
        """Device memory that the pass takes while it runs, beside the gradients."""
        return self.program.workspace_bytes

    def refused_by_auto(self, target: Target) -> str | None:
        """Why auto does not take what a named call would run."""
        refusals = (binary.refused_by_auto(target) for binary in self.binaries)
        return next((f"{refusal} (backward pass)" for refusal in refusals if refusal is not None), None)

    def __str__(self) -> str:
        kind = "bitwise equal from run to run" if self.reproducible else "by atomics: its last bits vary from run to run"
        lines = [f"gradient    {self.impl}, {kind}; {self.workspace_bytes / 2**20:.1f} MiB of workspace"]
        if self.cost_of_determinism is not None:
            lines.append(f"determinism {self.cost_of_determinism}")
        binaries = self.binaries or (None,) * len(self.program.launches)
        for launch, binary in zip(self.program.launches, binaries, strict=True):
            lines += describe(launch.specialisation, launch.grid, binary)
        return "\n".join(lines)


def wanted_gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None) -> Wanted:
    """Which of a call's tensors need a gradient."""
    return q.requires_grad, k.requires_grad, v.requires_grad, attn_mask is not None and attn_mask.requires_grad


def request(
    spec: AttentionSpec,
    options: Options,
    attn_mask: torch.Tensor | None,
    wanted: Wanted,
    *,
    do: torch.Tensor | None,
    dlse: bool,
) -> BackwardSpec:
    """What is asked of the backward pass of a call. Before `do` is known (None), one that lies as o is assumed."""
    dq, dk, dv, dmask = wanted
    return BackwardSpec.of(
        replace(spec, return_lse=True),  # which the forward call keeps for it, asked for or not
        torch.empty_strided(spec.output_shape, spec.output_strides, dtype=spec.dtype, device="meta") if do is None else do,
        dq=dq,
        dkv=dk or dv,
        mask=attn_mask if dmask else None,
        dlse=dlse,
        deterministic=options.deterministic,
    )


def make_backward_plan(spec: BackwardSpec, target: Target, impl: str) -> BackwardPlan:
    """The plan of a backward pass by a named implementation.

    Raises:
        UnsupportedError: it cannot run this pass on this device; it never falls back.
    """
    found = plan_backward(spec, target, impl)
    if isinstance(found, str):
        raise UnsupportedError(f"impl {impl!r}: {found}")
    return found


def plan_backward(spec: BackwardSpec, target: Target, impl: str) -> BackwardPlan | str:
    """The same, or why the implementation cannot run it."""
    if impl not in BACKWARDS:
        return f"has no backward pass, and a gradient is needed; use {', '.join(map(repr, (*BACKWARDS, 'torch')))} or 'auto'"
    binding = BACKWARDS[impl]
    refusal = binding.reject(spec, target.arch, target.interpreted)
    if refusal is not None:
        return f"{refusal} (backward pass)"
    arch = target.arch or "sm_90a"  # as the forward call's plan
    program = binding.program(spec, arch, target.sm_count or SM_COUNTS[arch])
    found: list[PlannedBinary] = []
    for launch in () if target.interpreted else program.launches:
        binary = PlannedBinary.find(launch.specialisation, arch, target)
        if isinstance(binary, str):
            return binary
        found.append(binary)
    always = binding.reproducible(replace(spec, deterministic=False))
    return BackwardPlan(
        impl,
        program,
        tuple(found),
        reproducible=binding.reproducible(spec),
        interpreted=target.interpreted,
        cost_of_determinism=None if always else evidence.cost_of_determinism(spec.call, target, impl),
    )
