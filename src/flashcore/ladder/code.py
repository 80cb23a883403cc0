"""What a step's binaries hold, by their machine code, and the limits that a compile shows. Needs Triton, no GPU."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pydantic import BaseModel, ConfigDict

from flashcore.build.machine_code import disassemble, read_machine_code
from flashcore.ladder.problem import Problem
from flashcore.ladder.steps import Step
from flashcore.runtime.binary import Binary
from flashcore.runtime.store import obtain
from flashcore.target import SHARED_MEMORY_LIMIT, SM_COUNTS, Target

# of a thread, at the mission shape, in the steps that run on every arch (mission.md, section 3)
MAX_REGISTERS = 128
# of an A100, for every other arch than those of target.SM_COUNTS
DEFAULT_SM_COUNT = 108


class KernelCode(BaseModel):
    """One binary, and the Triton that made it.

    wide_loads: loads of 128 bits from device memory into registers; narrow_loads: all others. arriving_copies: where a thread
    has its copies arrive at a barrier (cp.async.mbarrier.arrive).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    specialisation: str
    arch: str
    sha256: str
    triton: str
    registers: int
    spills: int
    shared: int
    matrix: dict[str, int]
    async_copies: int
    arriving_copies: int
    wide_loads: int
    narrow_loads: int


def read_code(binary: Binary) -> KernelCode:
    """Disassemble and count. Raises CompileError where a tool is missing or not understood."""
    code = read_machine_code(binary)
    text = disassemble(binary)
    loads = Counter(".128" in found for found in re.findall(r"\sLDG(\.[\w.]+)", text))
    return KernelCode(
        specialisation=binary.info.name,
        arch=binary.info.arch,
        sha256=binary.info.sha256,
        triton=binary.info.triton,
        registers=code.registers,
        spills=code.spills,
        shared=code.shared,
        matrix=code.matrix,
        async_copies=code.async_copies,
        arriving_copies=len(re.findall(r"\sARRIVES\.LDGSTSBAR", text)),
        wide_loads=loads[True],
        narrow_loads=loads[False],
    )


def arch_for(step: Step, arch: str) -> str:
    """`arch`, or the one that the step runs on where it is not among them."""
    return arch if arch in step.archs else step.archs[0]


def compile_steps(
    steps: Sequence[Step], problem: Problem, arch: str, sm_count: int | None = None
) -> dict[str, list[KernelCode]]:
    """Step -> what its binaries for a problem hold, each compiled (or found in the cache) for `arch`, or for its own.

    Raises:
        CompileError: the compiler refused one.
        UnsupportedError: no Triton is installed.
    """
    wanted = []
    for step in steps:
        one = arch_for(step, arch)
        count = sm_count if sm_count is not None and one == arch else SM_COUNTS.get(one, DEFAULT_SM_COUNT)
        target = Target(name=one, arch=one, capability=None, sm_count=count, interpreted=False)
        wanted += [(step.name, specialisation, target) for specialisation in step.specialisations(problem, one, count)]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        codes = list(pool.map(lambda one: read_code(obtain(one[1], one[2])), wanted))
    return {step.name: [code for (name, _, _), code in zip(wanted, codes, strict=True) if name == step.name] for step in steps}


def violations(step: Step, codes: Sequence[KernelCode]) -> list[str]:
    """What a step's binaries for the mission shape break, in words; empty when they keep every limit and show what is meant."""
    found = []
    if len(codes) != len(step.meant):
        found.append(f"{step.name}: {len(codes)} binaries, meant {len(step.meant)}")
    for code, meant in zip(codes, step.meant, strict=False):
        broken = []
        if code.spills:
            broken.append(f"spills: {code.spills}, allowed 0")
        if code.shared > SHARED_MEMORY_LIMIT[code.arch]:
            broken.append(f"shared memory: {code.shared} bytes, allowed {SHARED_MEMORY_LIMIT[code.arch]}")
        if code.registers > MAX_REGISTERS:
            broken.append(f"registers: {code.registers}, allowed {MAX_REGISTERS}")
        if bool(code.matrix) != meant.matrix:
            broken.append(f"matrix instructions: {code.matrix or 'none'}, meant {'some' if meant.matrix else 'none'}")
        loads = "none" if not code.wide_loads else "some" if code.narrow_loads else "all"
        if loads != meant.vector_loads:
            broken.append(f"128-bit loads: {loads} of them, meant {meant.vector_loads}")
        if bool(code.async_copies) != meant.async_copies:
            broken.append(f"async copies: {code.async_copies}, meant {'some' if meant.async_copies else 'none'}")
        if bool(code.arriving_copies) != meant.arriving_copies:
            broken.append(
                f"copies that arrive at a barrier: {code.arriving_copies}, meant {'some' if meant.arriving_copies else 'none'}"
            )
        found += [f"{code.specialisation} for {code.arch}: {words}" for words in broken]
    return found
