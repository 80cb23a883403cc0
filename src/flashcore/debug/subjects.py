"""Subjects: what can be debugged, by name, as launches that record their stages and the convention that they are read by."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashcore.bench.shapes import Shape
from flashcore.debug.conventions import Convention, of_ladder, of_production
from flashcore.errors import ArgumentValueError, UnsupportedError
from flashcore.kernels.arguments import Argument, Pointer
from flashcore.kernels.program import Launch, Program
from flashcore.kernels.registry import BINDINGS
from flashcore.kernels.specialisation import Specialisation
from flashcore.ladder.problem import Problem
from flashcore.ladder.steps import STEPS as LADDER_STEPS
from flashcore.ladder.steps import find_step
from flashcore.spec import AttentionSpec, Options
from flashcore.target import SM_COUNTS, Target

# the ladder's own steps
STEPS = tuple(step.name for step in LADDER_STEPS if step.impl is None)
# steps that are production kernels go by the same names
SUBJECTS = (*STEPS, *reversed(BINDINGS))
# the interpreter runs the tiles of this GPU
_INTERPRETED_ARCH = "sm_90a"


@dataclass(frozen=True, slots=True)
class Recording:
    """What a subject launches on one shape, and how its record is read. `counted`: it draws its tiles from a counter."""

    program: Program
    convention: Convention
    counted: bool = False


def check(name: str, shape: Shape) -> None:
    """Refuse what no subject has a view of.

    Raises:
        ArgumentValueError: the name is no subject's, or the shape not one that it takes, on any device.
    """
    if name not in SUBJECTS:
        raise ArgumentValueError(f"subject: got {name!r}; allowed: {', '.join(SUBJECTS)}")
    if shape.dtype != "fp16" or shape.mask != "none":
        raise ArgumentValueError(f"shape: got {shape.label}; allowed: fp16 without a mask")
    if name in STEPS:
        if shape.causal:
            raise ArgumentValueError(f"causal: got True with {name}; allowed: with {', '.join(BINDINGS)}")
        if shape.heads_q != shape.heads_k or shape.head_dim != shape.head_dim_v:
            allowed = "as many key heads as heads, and one head dim"
            raise ArgumentValueError(f"shape: got {shape.label} with {name}; allowed: {allowed}")
        _problem(shape)


def recording(name: str, shape: Shape, target: Target) -> Recording:
    """The launches of a subject, each asked to record.

    Raises:
        ArgumentValueError: as `check`.
        UnsupportedError: it does not run on the target, or not this shape.
    """
    check(name, shape)
    build = _of_step if name in STEPS else _of_production
    return build(name, shape, target)


def specialisations(name: str, shape: Shape, arch: str) -> tuple[Specialisation, ...]:
    """The binaries of a recording on a GPU of an arch, in order. Raises as `recording`."""
    target = Target(name=arch, arch=arch, capability=None, sm_count=SM_COUNTS[arch], interpreted=False)
    return tuple(launch.specialisation for launch in recording(name, shape, target).program.launches)


def _of_step(name: str, shape: Shape, target: Target) -> Recording:
    problem, step = _problem(shape), find_step(name)
    reason = step.refusal(problem, target.arch, target.interpreted)
    if reason is not None:
        raise UnsupportedError(f"{name}: {reason}")
    try:
        program = step.program(problem, target.arch or _INTERPRETED_ARCH, target.sm_count)
    except (ImportError, AttributeError) as error:  # Gluon's names move between Triton's releases
        raise UnsupportedError(f"{name}: the Triton here cannot import it, or there is none: {error}") from error
    launches = tuple(_asked(one.specialisation, one.grid, one.arguments) for one in program.launches)
    constants = [_numbers(one.specialisation) for one in launches]
    return Recording(Program(launches, program.workspaces), of_ladder(name, problem.scale, constants))


def _of_production(name: str, shape: Shape, target: Target) -> Recording:
    binding, spec = BINDINGS[name], _spec(shape)
    reason = binding.reject(spec, target.arch, target.interpreted)
    if reason is not None:
        raise UnsupportedError(f"{name}: {reason}")
    arch = target.arch or _INTERPRETED_ARCH
    sm_count = target.sm_count or SM_COUNTS[arch]
    specialisation = binding.specialise_call(spec, arch, sm_count)
    grid = binding.grid(spec, specialisation, sm_count)
    one = _asked(specialisation, grid, binding.arguments(spec, specialisation))
    counted = binding.needs_counter(spec, specialisation, grid)
    return Recording(Program((one,)), of_production(name, spec.scale, _numbers(specialisation)), counted=counted)


def _asked(specialisation: Specialisation, grid: int, arguments: tuple[Argument, ...]) -> Launch:
    return Launch(specialisation.recording(), grid, (*arguments, Pointer("view")))


def _numbers(specialisation: Specialisation) -> dict[str, int]:
    """The constants that are numbers."""
    return {name: value for name, value in specialisation.constants if isinstance(value, int)}


def _problem(shape: Shape) -> Problem:
    return Problem(shape.batch, shape.heads_q, shape.seqlen_q, shape.seqlen_k, shape.head_dim, shape.scale)


def _spec(shape: Shape) -> AttentionSpec:
    """The shape as the production kernels know it."""
    options = Options.check(causal=shape.causal, scale=shape.scale, window=None, softcap=0.0, layout="bhsd")
    queries = (shape.batch, shape.heads_q, shape.seqlen_q, shape.head_dim)
    keys, values = ((shape.batch, shape.heads_k, shape.seqlen_k, dim) for dim in (shape.head_dim, shape.head_dim_v))
    q, k, v = (torch.empty(size, dtype=shape.torch_dtype) for size in (queries, keys, values))
    return AttentionSpec.from_tensors(q, k, v, None, options, return_lse=False)
