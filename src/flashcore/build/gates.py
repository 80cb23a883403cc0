"""The limits of every binary that machine code shows and that need no GPU to check (mission.md, section 3)."""

from __future__ import annotations

from flashcore.build.machine_code import MachineCode
from flashcore.kernels.registry import KERNELS
from flashcore.kernels.specialisation import Specialisation
from flashcore.target import SHARED_MEMORY_LIMIT

# Forms of the Hopper kernel that keep values fixed for a thread in local memory and read them once a tile -> their speed as a
# multiple of the portable kernel's, which spills nothing. Measured before head dim 96 had hold_wait, and before the emulated
# exponentials of head dim 64 kept NaN.
_ONCE_A_TILE = {
    "d64-window-w2n128q2k3je": 1.21,
    "d64-window-softcap-w2n128q2k3je": 1.38,
    "d96-window-w2n128q2k2jh": 1.59,
    "d96-window-softcap-w2n128q2k2jh": 1.59,
    "d192v128-window-w2n128q1k2o": 3.52,
    "d192v128-window-softcap-w2n128q1k2o": 2.40,
    "d192-none-w2n64q1k2rj": 3.16,
    "d192-causal-w2n64q1k2rj": 3.11,
    "d192-window-w2n64q1k2rj": 3.09,
    "d192-window-softcap-w2n64q1k2rj": 2.93,
    "d256-none-w2n64q1k2os": 1.59,
    "d256-causal-w2n64q1k2os": 1.87,
    "d256-window-w2n64q1k2os": 1.93,
    "d256-window-softcap-w2n64q1k2os": 2.51,
}
# Forms of the Hopper backward kernel that spill once a block of keys -> the speed of a whole pass of 16k tokens as a multiple
# of the portable kernels', which spill nothing.
_ONCE_A_BLOCK = {
    "d64-none-fused": 1.68,
    "d64-none-ordered": 1.57,
    "d64-window-fused": 1.57,
    "d64-window-ordered": 1.52,
    "d64-window-softcap-fused": 2.21,
    "d64-window-softcap-ordered": 2.10,
    "d128-none-fused": 1.78,
    "d128-none-ordered": 1.58,
    "d128-window-dkdv": 1.52,
    "d128-window-fused": 1.73,
    "d128-window-ordered": 1.65,
    "d128-window-softcap-dkdv": 1.79,
    "d128-window-softcap-fused": 1.96,
    "d128-window-softcap-ordered": 1.81,
}
_FORWARD_FORMS, _BACKWARD_FORMS = (f"docs/notes/data/hopper-{direction}-forms.txt" for direction in ("forward", "backward"))
# Binaries that may spill, outside their innermost loops: (arch, name) -> the measurement that justifies it. No other may.
SPILL_EXCEPTIONS = {
    ("sm_90a", f"hopper_forward-{dtype}-{form}"): f"{ratio:.2f}x the portable kernel: {_FORWARD_FORMS}"
    for form, ratio in _ONCE_A_TILE.items()
    for dtype in ("fp16", "bf16")
} | {
    (
        "sm_90a",
        f"hopper_backward-{dtype}-{form}",
    ): f"{ratio:.2f}x the portable kernels: {_BACKWARD_FORMS}"
    for form, ratio in _ONCE_A_BLOCK.items()
    for dtype in ("fp16", "bf16")
}


def expected_matrix_instruction(specialisation: Specialisation, arch: str) -> str | None:
    """The matrix instruction a binary must hold, which its kernel's binding says; None where it is meant to hold none."""
    binding = KERNELS[specialisation.kernel].binding
    return None if binding is None else binding.matrix_instruction(specialisation, arch)


def violations(specialisation: Specialisation, arch: str, code: MachineCode) -> list[str]:
    """What a binary breaks, in words; empty when it keeps every limit."""
    found = []
    if code.spills_in_loops:
        found.append(f"spills in innermost loops: {code.spills_in_loops}, allowed 0")
    elif code.spills and (arch, specialisation.name) not in SPILL_EXCEPTIONS:
        found.append(f"spills: {code.spill_loads} loads and {code.spill_stores} stores, allowed 0")
    if code.shared > SHARED_MEMORY_LIMIT[arch]:
        found.append(f"shared memory: {code.shared} bytes, allowed {SHARED_MEMORY_LIMIT[arch]}")
    expected = expected_matrix_instruction(specialisation, arch)
    if expected is not None and not code.matrix.get(expected):
        found.append(f"matrix instructions: {code.matrix or 'none'}, meant {expected}")
    if expected is None and code.matrix:
        found.append(f"matrix instructions: {code.matrix}, meant none")
    if specialisation.cluster > 1 and not code.cluster_barriers:
        found.append(f"cluster barriers: none, and a cluster of {specialisation.cluster} blocks cannot do without")
    if specialisation.cluster == 1 and code.cluster_barriers:
        found.append(f"cluster barriers: {code.cluster_barriers}, meant none")
    if code.before_wait:
        found.append(f"accesses to memory and exits before griddepcontrol.wait: {code.before_wait}, allowed 0")
    if code.lanes_apart:
        found.append(f"atomics after which a warp's lanes stay apart: {code.lanes_apart}, allowed 0")
    return found
