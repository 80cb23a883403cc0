"""Launcher: one kernel with every argument but its pointers packed, ready to be launched."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flashcore.errors import BinaryError
from flashcore.runtime.binary import Binary
from flashcore.runtime.driver import bindings, launch_error, load_function, make_current

# the keys of cuLaunchKernel's `extra`: cuda.h's CU_LAUNCH_PARAM_BUFFER_POINTER, _BUFFER_SIZE and _END
_BUFFER_POINTER, _BUFFER_SIZE, _END = 1, 2, 0
_FORMATS = {"i64": "q", "i32": "i", "fp32": "f"}
_functions: dict[tuple[str, int], Any] = {}
_loading = threading.Lock()


def _function(binary: Binary, device: int) -> Any:
    """The loaded kernel, loaded once for each device."""
    key = (binary.info.sha256, device)
    with _loading:
        if key not in _functions:
            binary.check("before loading")
            with torch.cuda.device(device):
                make_current(device)
                _functions[key] = load_function(
                    binary.cubin, binary.info.symbol, binary.info.shared, f"{binary.info.name} for {binary.info.arch}"
                )
        return _functions[key]


class Launcher:
    """Launches one binary on one device with fixed scalars; only the pointers differ between calls.

    `launch(addresses)` launches on the device's current stream with the addresses of a call's tensors, 0 for an absent one.
    It is a closure and not a method: looking nothing up in an object saves most of a microsecond of five.
    """

    launch: Callable[[Sequence[int]], None]

    def __init__(
        self, binary: Binary, device: torch.device, *, grid: int, pointers: int, scalars: Sequence[int | float]
    ) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        arguments = _Arguments(binary, pointers, scalars)
        self.launch = _bind(binary, index, grid, arguments) if grid else _nothing


def _nothing(addresses: Sequence[int]) -> None:
    """What a launch of no programs does."""


class _Arguments:
    """The packed arguments of a launch: one buffer laid out as the kernel's parameters are, each aligned to its size."""

    def __init__(self, binary: Binary, pointers: int, scalars: Sequence[int | float]) -> None:
        parameters = binary.info.parameters
        scratch = sum(p.name.startswith("scratch_") for p in parameters)
        given = pointers + len(scalars) + scratch
        if given != len(parameters):
            raise BinaryError(f"{binary.info.name}: takes {len(parameters)} arguments, {given} were packed")
        values = [0] * pointers + list(scalars) + [0] * scratch
        packed = bytearray()
        for parameter, value in zip(parameters, values, strict=True):
            packed += bytes(-len(packed) % parameter.size)
            packed += struct.pack("<" + _FORMATS.get(parameter.type, "Q"), value)
        self._template = bytes(packed)
        # The pointers are the first parameters, 8 bytes each, so they lie together.
        self.pack_pointers = struct.Struct(f"<{pointers}Q").pack_into

    def copy(self) -> tuple[ctypes.Array[ctypes.c_char], int, object]:
        """A buffer of its own: (buffer to pack pointers into, address to give cuLaunchKernel as `extra`, what to keep)."""
        buffer = ctypes.create_string_buffer(self._template, max(1, len(self._template)))
        size = ctypes.c_size_t(len(self._template))
        extra = (ctypes.c_void_p * 5)(_BUFFER_POINTER, ctypes.addressof(buffer), _BUFFER_SIZE, ctypes.addressof(size), _END)
        return buffer, ctypes.addressof(extra), (size, extra)


def _bind(binary: Binary, device: int, grid: int, packed: _Arguments) -> Callable[[Sequence[int]], None]:
    name, threads, shared = binary.info.name, binary.info.threads, binary.info.shared
    function = _function(binary, device)
    driver = bindings()
    launch_kernel, success = driver.cuLaunchKernel, driver.CUresult.CUDA_SUCCESS
    # torch._C: the public calls build objects and check what is known here, at up to 1 us each
    current_stream, current_device = torch._C._cuda_getCurrentRawStream, torch._C._cuda_getDevice
    pack_pointers, new_buffer = packed.pack_pointers, packed.copy
    # A thread takes a buffer for the time of its launch, during which the driver reads it; both ends are atomic.
    free: list[tuple[ctypes.Array[ctypes.c_char], int, object]] = [packed.copy()]

    def launch(addresses: Sequence[int]) -> None:
        if current_device() != device:
            with torch.cuda.device(device):
                launch(addresses)
            return
        try:
            taken = free.pop()
        except IndexError:
            taken = new_buffer()
        pack_pointers(taken[0], 0, *addresses)
        status = launch_kernel(function, grid, 1, 1, threads, 1, 1, shared, current_stream(device), 0, taken[1])[0]
        free.append(taken)
        if status is not success and status != success:
            # asked only now, because asking costs as much as a tenth of a launch
            if status == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT and make_current(device):
                launch(addresses)
            else:
                raise launch_error(status, name)

    return launch
