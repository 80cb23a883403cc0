"""The steps in order: name, idea, and how each is run. Needs no Triton until a step's launches are asked for."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from flashcore.errors import ArgumentValueError
from flashcore.kernels.registry import BINDINGS, KERNELS
from flashcore.kernels.specialisation import Specialisation
from flashcore.ladder.problem import Problem
from flashcore.spec import AttentionSpec, Options
from flashcore.target import SHARED_MEMORY_LIMIT

if TYPE_CHECKING:
    from flashcore.kernels.program import Program


Loads = Literal["all", "some", "none"]


@dataclass(frozen=True, slots=True)
class Meant:
    """What one launch's machine code must show: matrix instructions, which of its loads take 128 bits, cp.async, and copies
    that arrive at a barrier by themselves."""

    matrix: bool = True
    vector_loads: Loads = "all"
    async_copies: bool = False
    arriving_copies: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """One step. `impl` names the production kernel that the last steps are; the others have a file of their name.

    `meant` has an entry for each launch; what a production kernel must show is its binding's to say. `gluon`: written in Gluon,
    which Triton's interpreter does not run and one release of Triton imports: its launch is in a file of its own.
    """

    name: str
    idea: str
    meant: tuple[Meant, ...] = (Meant(),)
    impl: str | None = None
    gluon: bool = False

    @property
    def archs(self) -> tuple[str, ...]:
        """Where it runs."""
        return tuple(SHARED_MEMORY_LIMIT) if self.impl is None else KERNELS[BINDINGS[self.impl].KERNEL].archs

    @property
    def where(self) -> str:
        """Where it runs, in words."""
        return "sm_80 and later" if self.impl is None else ", ".join(self.archs)

    def program(self, problem: Problem, arch: str, sm_count: int) -> Program:
        """The launches of a step that has a file of its own. Imports Triton."""
        assert self.impl is None
        module = importlib.import_module(f"flashcore.ladder.{self.name}{'_launch' if self.gluon else ''}")
        found: Program = module.program(problem, arch, sm_count)
        return found

    def specialisations(self, problem: Problem, arch: str, sm_count: int) -> tuple[Specialisation, ...]:
        """The binaries that it runs for a problem, in order."""
        if self.impl is None:
            return tuple(launch.specialisation for launch in self.program(problem, arch, sm_count).launches)
        return (BINDINGS[self.impl].specialise_call(_spec(problem), arch, sm_count),)

    def refusal(self, problem: Problem, arch: str | None, interpreted: bool) -> str | None:
        """Why it cannot run a problem on a device, or None when it can."""
        if self.impl is not None:
            return BINDINGS[self.impl].reject(_spec(problem), arch, interpreted)
        if arch is None and not interpreted:
            return "needs a GPU of sm_80 or later" + ("" if self.gluon else ", or TRITON_INTERPRET=1 on a CPU")
        if interpreted and self.gluon:
            return "needs a GPU of sm_80 or later; got the interpreter, which does not run Gluon"
        return None


def _spec(problem: Problem) -> AttentionSpec:
    """The problem as the production kernels know it."""
    sizes = (problem.batch, problem.heads, problem.seqlen_q, problem.head_dim)
    keys = (problem.batch, problem.heads, problem.seqlen_k, problem.head_dim)
    options = Options.check(causal=False, scale=problem.scale, window=None, softcap=0.0, layout="bhsd")
    q, k, v = (torch.empty(size, dtype=torch.float16) for size in (sizes, keys, keys))
    return AttentionSpec.from_tensors(q, k, v, None, options, return_lse=False)


STEPS = (
    Step(
        "unfused",
        "three kernels, the scores in device memory between them",
        (Meant(), Meant(matrix=False, vector_loads="none"), Meant(vector_loads="some")),
    ),
    Step("scalar", "one kernel: an online softmax, on the CUDA cores alone", (Meant(matrix=False, vector_loads="none"),)),
    Step("vectorised", "128-bit loads", (Meant(matrix=False),)),
    Step("tensor_core_qk", "the scores on the matrix units"),
    Step("tensor_core_pv", "both products on the matrix units"),
    Step("tuned_tiles", "tiles to fit the machine"),
    Step("async_copies", "cp.async: the next tile comes while this one is worked on", (Meant(async_copies=True),)),
    Step(
        "warp_specialised",
        "a warp that only copies, warps that only compute, and barriers between them",
        (Meant(async_copies=True, arriving_copies=True),),
        gluon=True,
    ),
    Step("hopper", "TMA, wgmma, warps with tasks of their own: the production kernel", impl="hopper"),
    Step("small", "a cluster shares the keys of a tile: the production kernel for short sequences", impl="small"),
)


def find_step(name: str) -> Step:
    """The step of this name. Raises ArgumentValueError where there is none."""
    for step in STEPS:
        if step.name == name:
            return step
    raise ArgumentValueError(f"step: got {name!r}; allowed: {', '.join(step.name for step in STEPS)}")
