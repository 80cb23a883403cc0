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

from flashcore.build.control_flow import atomics_that_part_lanes, opcodes_before, opcodes_of, opcodes_of_innermost_loops
from flashcore.errors import CompileError
from flashcore.runtime.binary import Binary

# Matrix instructions as the disassembler spells them: mma.sync, wgmma and tcgen05.mma.
MATRIX_INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA")
# What barrier.cluster.arrive and .wait become (UCGABAR_ARV, UCGABAR_WAIT), and nothing else in our kernels.
_CLUSTER_BARRIER = "UCGABAR"
# What griddepcontrol.wait becomes.
_WAIT_FOR_GRIDS = "ACQBULK"
# What must come after it: reads and writes of device memory, which LD and ST may be too, and the end, so that a launch that
# has ended has seen the end of those before it.
_AFTER_WAIT = (
    *("LD", "LDG", "LDGSTS", "ST", "STG", "ATOM", "ATOMG", "RED", "REDG"),
    *("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "UBLKRED", "EXIT"),
)
# What setmaxnreg becomes. Where warps have tasks of their own, those of the last group that have none go from one barrier of
# the compiler's to the next and end with the others, without a wait of their own.
_SPECIALISED = "USETMAXREG"


@dataclass(frozen=True, slots=True)
class MachineCode:
    """What one binary takes of a multiprocessor, and what it does with it.

    `async_copies` are copies into shared memory, those of threads and those by TMA together. `spills_in_loops` are those of the
    spill instructions that are in the innermost loops with matrix instructions, where they are paid for each tile of keys.
    `cluster_barriers` are arrivals at barriers of a cluster and waits for them. `before_wait`, of a programmatic binary, are
    the accesses to device memory and the exits that some way through the code comes to before the wait for earlier launches.
    `lanes_apart` are atomics after which a warp's lanes do not meet at once.
    """

    registers: int
    stack: int
    shared: int
    spill_loads: int
    spill_stores: int
    spills_in_loops: int
    matrix: dict[str, int]
    async_copies: int
    cluster_barriers: int
    before_wait: int
    lanes_apart: int

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


def _run_on(cubin: bytes, tool: str, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _run(tool, option, file.name)


def disassemble(binary: Binary) -> str:
    """The machine code as text."""
    return _run_on(binary.cubin, "nvdisasm", "-c")


def read_parameter_places(cubin: bytes, symbol: str) -> list[tuple[int, int]]:
    """(offset, size) in bytes of each parameter of a function, in order, as the cubin tells the driver (EIATTR_KPARAM_INFO).

    Offsets are not to be computed: what is aligned to more than 8 bytes is so in the GPU's constant memory, where the
    parameters begin at an address that differs between archs (0x210 on sm_90).

    Raises:
        CompileError: cuobjdump is missing or fails, or the function has no such table or one that is not understood.
    """
    tables = re.split(r"^\.nv\.info\.(\S+)$", _run_on(cubin, "cuobjdump", "-elf"), flags=re.MULTILINE)
    found = dict(zip(tables[1::2], tables[2::2], strict=True)).get(symbol)
    if found is None:
        raise CompileError(f"{symbol}: the cubin says nothing of it (no .nv.info.{symbol})")
    table = found.split("\n\n\n")[0]
    entries = re.findall(r"Ordinal : 0x([0-9a-f]+)\s+Offset\s*: 0x([0-9a-f]+)\s+Size\s*: 0x([0-9a-f]+)", table)
    places = {int(ordinal, 16): (int(offset, 16), int(size, 16)) for ordinal, offset, size in entries}
    if len(entries) != table.count("EIATTR_KPARAM_INFO") or sorted(places) != list(range(len(entries))):
        raise CompileError(
            f"{symbol}: cannot read the cubin's table of parameters: {len(entries)} entries for {sorted(places)}"
        )
    return [places[ordinal] for ordinal in range(len(entries))]


def read_machine_code(binary: Binary) -> MachineCode:
    """Disassemble a binary and count.

    Raises:
        CompileError: a tool is missing or fails, or its output is not understood: a gate must not pass on that.
    """
    usage = _run_on(binary.cubin, "cuobjdump", "--dump-resource-usage")
    text = disassemble(binary)
    resources = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    counts = opcodes_of(text)
    if resources is None or not counts:
        raise CompileError(f"{binary.info.name}: cannot read the disassemblers' output")
    in_loops = opcodes_of_innermost_loops(text, MATRIX_INSTRUCTIONS)
    early = opcodes_before(text, _WAIT_FOR_GRIDS) if binary.info.programmatic else Counter[str]()
    if counts[_SPECIALISED]:
        del early["EXIT"]
    return MachineCode(
        registers=int(resources[1]),
        stack=int(resources[2]),
        shared=int(resources[3]) + binary.info.shared,
        spill_loads=counts["LDL"],
        spill_stores=counts["STL"],
        spills_in_loops=in_loops["LDL"] + in_loops["STL"],
        matrix={name: counts[name] for name in MATRIX_INSTRUCTIONS if counts[name]},
        async_copies=counts["LDGSTS"] + counts["UTMALDG"],
        cluster_barriers=counts[_CLUSTER_BARRIER],
        before_wait=sum(early.get(name, 0) for name in _AFTER_WAIT),
        lanes_apart=atomics_that_part_lanes(text),
    )
