"""The limits of every binary that machine code shows and that need no GPU to check (mission.md, section 3)."""

from __future__ import annotations

from flashcore.build.machine_code import MachineCode
from flashcore.kernels.portable.binding import KERNEL as PORTABLE
from flashcore.kernels.portable.config import SHARED_MEMORY_LIMIT
from flashcore.kernels.specialisation import Specialisation

# Binaries that may spill: name -> (arch, the measurement that justifies it). Everything else must not.
SPILL_EXCEPTIONS: dict[tuple[str, str], str] = {}


def expected_matrix_instruction(specialisation: Specialisation, arch: str) -> str | None:
    """The matrix instruction a binary must hold; None where it is meant to hold none."""
    if specialisation.kernel != PORTABLE:
        return None
    constants = dict(specialisation.constants)
    element = next(p.type for p in specialisation.parameters if p.name == "q_ptr")
    if element == "*fp32" and constants["PRECISION"] == "ieee":
        return None  # float32 means float32: no matrix unit computes that
    # wgmma and tcgen05 work on 64 rows and four warps; smaller tiles are mma.sync's
    whole_warpgroup = int(constants["BLOCK_M"]) >= 64 and specialisation.num_warps >= 4
    if arch == "sm_90a" and whole_warpgroup:
        return "HGMMA"
    if arch in ("sm_100a", "sm_103a") and whole_warpgroup:
        return "UTCHMMA"
    return "HMMA"


def violations(specialisation: Specialisation, arch: str, code: MachineCode) -> list[str]:
    """What a binary breaks, in words; empty when it keeps every limit."""
    found = []
    if code.spills and (arch, specialisation.name) not in SPILL_EXCEPTIONS:
        found.append(f"spills: {code.spill_loads} loads and {code.spill_stores} stores, allowed 0")
    if code.shared > SHARED_MEMORY_LIMIT[arch]:
        found.append(f"shared memory: {code.shared} bytes, allowed {SHARED_MEMORY_LIMIT[arch]}")
    expected = expected_matrix_instruction(specialisation, arch)
    if expected is not None and not code.matrix.get(expected):
        found.append(f"matrix instructions: {code.matrix or 'none'}, meant {expected}")
    if expected is None and code.matrix:
        found.append(f"matrix instructions: {code.matrix}, meant none")
    return found
