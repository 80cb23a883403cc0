"""Facts read off a binary's machine code: resources and the instructions it holds. Uses the disassemblers Triton carries."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from flashcore.errors import CompileError
from flashcore.runtime.binary import Binary

# Matrix instructions as the disassembler spells them: mma.sync, wgmma and tcgen05.mma.
MATRIX_INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA")


@dataclass(frozen=True, slots=True)
class MachineCode:
    """What one binary takes of a multiprocessor, and what it does with it."""

    registers: int
    stack: int
    shared: int
    spill_loads: int
    spill_stores: int
    matrix: dict[str, int]
    async_copies: int

    @property
    def spills(self) -> int:
        """Local-memory instructions: what a spilled register costs."""
        return self.spill_loads + self.spill_stores


@cache
def _tool(name: str) -> Path:
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        raise CompileError(f"{name} comes with Triton, which is not installed: pip install flashcore[build]")
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise CompileError(f"{name}: not found at {path}; this Triton does not carry it")
    return path


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_tool(tool), *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise CompileError(f"{tool} {' '.join(arguments)} failed with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


def _run_on(binary: Binary, tool: str, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.cubin)
        file.flush()
        return _run(tool, option, file.name)


def disassemble(binary: Binary) -> str:
    """The machine code as text."""
    return _run_on(binary, "nvdisasm", "-c")


def read_machine_code(binary: Binary) -> MachineCode:
    """Disassemble a binary and count.

    Raises:
        CompileError: a tool is missing or fails, or its output is not understood: a gate must not pass on that.
    """
    usage = _run_on(binary, "cuobjdump", "--dump-resource-usage")
    text = disassemble(binary)
    resources = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    # an instruction line: "/*0a10*/  @!P0 HGMMA.64x64x16.F32 R24, ... ;"
    counts = Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", text, re.MULTILINE))
    if resources is None or not counts:
        raise CompileError(f"{binary.info.name}: cannot read the disassemblers' output")
    return MachineCode(
        registers=int(resources[1]),
        stack=int(resources[2]),
        shared=int(resources[3]) + binary.info.shared,
        spill_loads=counts["LDL"],
        spill_stores=counts["STL"],
        matrix={name: counts[name] for name in MATRIX_INSTRUCTIONS if counts[name]},
        async_copies=counts["LDGSTS"] + counts["UTMALDG"],
    )
