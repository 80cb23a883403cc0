"""Every kernel: where its source is, what binds calls to it, and which of its specialisations a wheel holds."""

from __future__ import annotations

from dataclasses import dataclass

from flashcore.kernels.backward_binding import BackwardBinding
from flashcore.kernels.binding import Binding
from flashcore.kernels.hopper import backward_binding as hopper_backward
from flashcore.kernels.hopper import backward_dq_launch as hopper_dq
from flashcore.kernels.hopper import backward_main as hopper_main
from flashcore.kernels.hopper import backward_wide_launch as hopper_wide
from flashcore.kernels.hopper import binding as hopper
from flashcore.kernels.portable import backward_binding as portable_backward
from flashcore.kernels.portable import binding as portable
from flashcore.kernels.small import binding as small
from flashcore.kernels.specialisation import Specialisation
from flashcore.target import SHARED_MEMORY_LIMIT

# The architectures whose binaries a wheel holds; others are compiled on demand.
SHIPPED_ARCHS = ("sm_80", "sm_89", "sm_90a")

EMPTY = Specialisation(kernel="empty", name="empty", parameters=(), constants=(), num_warps=4, num_stages=1)

# What computes attention, by the name that `impl=` takes; the first that applies where measurements say nothing.
_IN_ORDER: tuple[Binding, ...] = (small, hopper, portable)
BINDINGS = {binding.IMPL: binding for binding in _IN_ORDER}
# What computes gradients, by the same names and in the same order.
_BACKWARDS_IN_ORDER: tuple[BackwardBinding, ...] = (hopper_backward, portable_backward)
BACKWARDS = {binding.IMPL: binding for binding in _BACKWARDS_IN_ORDER}


@dataclass(frozen=True, slots=True)
class Kernel:
    """`module` holds the jitted `function`; `sources` are the files that a binary of it is made of.

    `binding` is None for the empty kernel, which computes nothing that evidence could vouch for. `triton` is the one release
    whose compiler is known to take the source, where not every release does. `on_demand`: no wheel holds it and no evidence
    vouches for it; it is compiled for any arch where someone asks for it by its specialisation.
    """

    id: str
    module: str
    function: str
    sources: tuple[str, ...]
    binding: Binding | BackwardBinding | None
    triton: str | None = None
    on_demand: bool = False

    @property
    def computes(self) -> bool:
        """Whether it has a result, which evidence must then vouch for."""
        return self.binding is not None

    @property
    def archs(self) -> tuple[str, ...]:
        """The architectures it can be built for."""
        if self.on_demand:
            return tuple(SHARED_MEMORY_LIMIT)
        return tuple(arch for arch in SHARED_MEMORY_LIMIT if self.shipped(arch))

    def shipped(self, arch: str) -> tuple[Specialisation, ...]:
        """The specialisations that a wheel holds for an arch; empty where there are none."""
        if self.on_demand:
            return ()
        if self.binding is None:
            return (EMPTY,)
        # a backward pass has several kernels
        return tuple(specialisation for specialisation in self.binding.shipped(arch) if specialisation.kernel == self.id)


KERNELS = {
    kernel.id: kernel
    for kernel in (
        Kernel("empty", "flashcore.kernels.empty", "empty", ("kernels/empty.py",), None),
        Kernel(
            portable.KERNEL,
            "flashcore.kernels.portable.forward",
            "portable_forward",
            ("kernels/portable/forward.py", "kernels/view.py"),
            portable,
        ),
        *(
            Kernel(
                f"portable_backward_{function}",
                f"flashcore.kernels.portable.{file}",
                f"portable_backward_{function}",
                (
                    *(f"kernels/portable/{name}.py" for name in (file, "backward_tile", "forward")),
                    "kernels/view.py",
                ),
                portable_backward,
                on_demand=on_demand,
            )
            for file, function, on_demand in (
                ("backward_rows", "delta", False),
                ("backward_rows", "rest", True),
                ("backward", "dkdv", False),
                ("backward", "dq", False),
                ("backward_mask", "dmask", True),
                ("backward_mask", "dmask_rows", True),
            )
        ),
        Kernel(
            hopper.KERNEL,
            "flashcore.kernels.hopper.forward",
            "hopper_forward",
            tuple(
                f"kernels/hopper/{name}.py"
                for name in (
                    "consumer",
                    "forward",
                    "gluon_api",
                    "launches",
                    "layouts",
                    "mask",
                    "operand",
                    "producer",
                    "ring",
                    "shared",
                    "softmax",
                    "tiles",
                    "view",
                )
            ),
            hopper,
            triton="3.9.0",
        ),
        Kernel(
            hopper_backward.PREPARE,
            "flashcore.kernels.hopper.backward_prepare",
            "hopper_backward_prepare",
            ("kernels/hopper/backward_prepare.py",),
            hopper_backward,
        ),
        Kernel(
            hopper_main.KERNEL,
            "flashcore.kernels.hopper.backward",
            "hopper_backward",
            hopper_main.SOURCES,
            hopper_backward,
            triton="3.9.0",
        ),
        Kernel(
            hopper_wide.KERNEL,
            "flashcore.kernels.hopper.backward_wide",
            "hopper_backward_wide",
            hopper_wide.SOURCES,
            hopper_backward,
            triton="3.9.0",
        ),
        Kernel(
            hopper_dq.KERNEL,
            "flashcore.kernels.hopper.backward_dq",
            "hopper_backward_dq",
            hopper_dq.SOURCES,
            hopper_backward,
            triton="3.9.0",
        ),
        Kernel(
            hopper_backward.FINISH,
            "flashcore.kernels.hopper.backward_finish",
            "hopper_backward_finish",
            ("kernels/hopper/backward_finish.py",),
            hopper_backward,
        ),
        Kernel(
            small.KERNEL,
            "flashcore.kernels.small.forward",
            "small_forward",
            (
                *(f"kernels/hopper/{name}.py" for name in ("gluon_api", "launches", "layouts", "mask", "softmax", "view")),
                *(f"kernels/small/{name}.py" for name in ("cluster", "forward", "layouts", "peers")),
            ),
            small,
            triton="3.9.0",
        ),
    )
}

# The ladder's kernels (flashcore.ladder), by file and function. They compile, are cached and launch as all others do, and are
# apart from KERNELS, which is what plans, wheels and evidence are made of.
LADDER = {
    kernel.id: kernel
    for kernel in (
        *(
            Kernel(
                f"ladder_{function}",
                f"flashcore.ladder.{file}",
                function,
                (f"ladder/{file}.py", "ladder/harness.py", "kernels/view.py"),
                None,
                on_demand=True,
            )
            for file, function in (
                ("unfused", "unfused_scores"),
                ("unfused", "unfused_softmax"),
                ("unfused", "unfused_output"),
                ("scalar", "scalar"),
                ("tensor_core_qk", "tensor_core_qk"),
                ("tensor_core_pv", "tensor_core_pv"),
            )
        ),
        Kernel(
            "ladder_warp_specialised",
            "flashcore.ladder.warp_specialised",
            "warp_specialised",
            ("ladder/warp_specialised.py", "ladder/harness.py", "kernels/hopper/gluon_api.py", "kernels/hopper/view.py"),
            None,
            triton="3.9.0",
            on_demand=True,
        ),
    )
}


def find_kernel(kernel_id: str) -> Kernel:
    """The kernel of this id, of the product's or of the ladder's. Raises KeyError where there is none."""
    return LADDER[kernel_id] if kernel_id in LADDER else KERNELS[kernel_id]


def shipped_set(arch: str) -> tuple[Specialisation, ...]:
    """Every specialisation of every kernel that a wheel holds for an arch."""
    return tuple(specialisation for kernel in KERNELS.values() for specialisation in kernel.shipped(arch))
