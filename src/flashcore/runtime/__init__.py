"""From a plan to a launch: find the binary, load it, pack its arguments once, launch. Only this package talks to the driver."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def empty_launch(device: torch.device) -> Callable[[], None]:
    """A callable that launches a kernel that does nothing on the current stream: the floor under every measured time."""
    from flashcore.kernels.registry import EMPTY
    from flashcore.runtime.launch import Launcher
    from flashcore.runtime.store import obtain
    from flashcore.target import Target

    target = Target.of(device)
    launch = Launcher(obtain(EMPTY, target), device, grid=1, arguments=()).launch
    return lambda: launch(())
