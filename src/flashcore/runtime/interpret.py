"""Run a specialisation's kernel in Triton's interpreter, on CPU tensors: the maths, not the binary."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Sequence

import torch

from flashcore.errors import UnsupportedError
from flashcore.kernels.registry import KERNELS
from flashcore.kernels.specialisation import Specialisation

# Triton's interpreter keeps its state in globals.
_one_at_a_time = threading.Lock()


def interpret(
    specialisation: Specialisation, grid: int, tensors: Sequence[torch.Tensor], scalars: Sequence[int | float]
) -> None:
    """Run `grid` programs of the kernel with these arguments, in the order of the specialisation's parameters.

    Raises:
        UnsupportedError: Triton is not installed, or was imported before TRITON_INTERPRET=1 was set.
    """
    try:
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError as error:
        raise UnsupportedError("the interpreter needs Triton: pip install flashcore[compile]") from error
    kernel = KERNELS[specialisation.kernel]
    function = getattr(importlib.import_module(kernel.module), kernel.function)
    if not isinstance(function, InterpretedFunction):
        raise UnsupportedError(f"{kernel.id}: TRITON_INTERPRET=1 must be in the environment before Triton is imported")
    if grid == 0:
        return
    with _one_at_a_time:
        function[(grid,)](*tensors, *scalars, **dict(specialisation.constants))
