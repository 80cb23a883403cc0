"""Every kernel: where its source is, and which of its specialisations a wheel holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flashcore.kernels.portable import binding as portable
from flashcore.kernels.specialisation import Specialisation

# The architectures whose binaries a wheel holds; others are compiled on demand.
SHIPPED_ARCHS = ("sm_80", "sm_89", "sm_90a")

EMPTY = Specialisation(kernel="empty", name="empty", parameters=(), constants=(), num_warps=4, num_stages=1)


@dataclass(frozen=True, slots=True)
class Kernel:
    """`module` holds the jitted `function`; `sources` are the files that a binary of it is made of.

    `computes`: it has a result, which evidence must then vouch for.
    """

    id: str
    module: str
    function: str
    sources: tuple[str, ...]
    shipped: Callable[[str], tuple[Specialisation, ...]]
    computes: bool = True


KERNELS = {
    kernel.id: kernel
    for kernel in (
        Kernel("empty", "flashcore.kernels.empty", "empty", ("kernels/empty.py",), lambda arch: (EMPTY,), computes=False),
        Kernel(
            portable.KERNEL,
            "flashcore.kernels.portable.forward",
            "portable_forward",
            ("kernels/portable/forward.py",),
            portable.shipped,
        ),
    )
}


def shipped_set(arch: str) -> tuple[Specialisation, ...]:
    """Every specialisation of every kernel that a wheel holds for an arch."""
    return tuple(specialisation for kernel in KERNELS.values() for specialisation in kernel.shipped(arch))
