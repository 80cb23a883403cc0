"""Run a specialisation's kernel in Triton's interpreter, on CPU tensors: the maths, not the binary."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from flashcore.errors import UnsupportedError
from flashcore.kernels.arguments import Argument, Pointer, TensorMap, TensorName
from flashcore.kernels.registry import find_kernel
from flashcore.kernels.specialisation import Specialisation

# Triton's interpreter keeps its state in globals.
_one_at_a_time = threading.Lock()


def interpret(
    specialisation: Specialisation,
    grid: int,
    arguments: Sequence[Argument],
    tensors: Mapping[TensorName, torch.Tensor | None],
) -> None:
    """Run `grid` programs of the kernel with these arguments, in the order of its parameters.

    Raises:
        UnsupportedError: Triton is not installed, or was imported before TRITON_INTERPRET=1 was set.
    """
    try:
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError as error:
        raise UnsupportedError("the interpreter needs Triton: pip install flashcore[compile]") from error
    kernel = find_kernel(specialisation.kernel)
    function = getattr(importlib.import_module(kernel.module), kernel.function)
    if not isinstance(function, InterpretedFunction):
        raise UnsupportedError(f"{kernel.id}: TRITON_INTERPRET=1 must be in the environment before Triton is imported")
    if grid == 0:
        return
    with _one_at_a_time, _bfloat16_as_on_a_gpu():
        names = [parameter.name for parameter in specialisation.parameters]
        values = {name: _interpretable(argument, tensors) for name, argument in zip(names, arguments, strict=True)}
        function[(grid,)](**values, **dict(specialisation.constants))


def _interpretable(argument: Argument, tensors: Mapping[TensorName, torch.Tensor | None]) -> torch.Tensor | int | float:
    """What the interpreter takes for an argument: it has no null pointers and no pointers to bool."""
    assert not isinstance(argument, TensorMap)  # binding.reject refuses to interpret a kernel that takes one
    if not isinstance(argument, Pointer):
        return argument
    tensor = tensors[argument.tensor]
    if tensor is None:
        tensor = tensors["q"]  # never read: constants and store_lse say that it is absent
        assert tensor is not None
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


@contextmanager
def _bfloat16_as_on_a_gpu() -> Iterator[None]:
    """Make the interpreter multiply bfloat16 matrices by value, and round to bfloat16 to the nearest.

    It keeps bfloat16 as the bits in a uint16 array. Its dot multiplies those bits as integers, and its conversion from float32
    cuts bits off, where a GPU rounds (Triton 3.6 and 3.9).
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    dot, cast = interpreter_builder.create_dot, interpreter_builder.cast_impl

    def by_value(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(a: Any, b: Any, *rest: Any) -> Any:
        return dot(by_value(a), by_value(b), *rest)

    def cast_impl(src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(src, dst_type)
        rounded = torch.tensor(src.data).to(torch.bfloat16).view(torch.int16)
        return TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)

    interpreter_builder.create_dot, interpreter_builder.cast_impl = create_dot, cast_impl
    try:
        yield
    finally:
        del interpreter_builder.create_dot, interpreter_builder.cast_impl  # the class's own methods show again
