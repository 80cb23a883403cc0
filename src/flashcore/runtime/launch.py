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
        """A buffer of its own: (buffer to pack pointers into, address to give the driver as `extra`, what to keep)."""
        buffer = ctypes.create_string_buffer(self._template, max(1, len(self._template)))
        size = ctypes.c_size_t(len(self._template))
        extra = (ctypes.c_void_p * 5)(_BUFFER_POINTER, ctypes.addressof(buffer), _BUFFER_SIZE, ctypes.addressof(size), _END)
        return buffer, ctypes.addressof(extra), (size, extra)


class _Slot:
    """What one thread needs for the time of a launch, during which the driver reads it."""

    __slots__ = ("buffer", "config", "extra", "keep", "stream")

    def __init__(self, packed: _Arguments, config: Any) -> None:
        self.buffer, self.extra, self.keep = packed.copy()
        self.config = config
        self.stream: int | None = None  # the one that config holds


def _bind(binary: Binary, device: int, grid: int, packed: _Arguments) -> Callable[[Sequence[int]], None]:
    name, threads, shared = binary.info.name, binary.info.threads, binary.info.shared
    function = _function(binary, device)
    driver = bindings()
    # With a configuration made beforehand, cuda-bindings converts four arguments a launch and not eleven.
    launch_kernel, success = driver.cuLaunchKernelEx, driver.CUresult.CUDA_SUCCESS
    # torch._C: the public calls build objects and check what is known here, at up to 1 us each
    current_stream, current_device = torch._C._cuda_getCurrentRawStream, torch._C._cuda_getDevice
    pack_pointers = packed.pack_pointers

    def new_slot() -> _Slot:
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared
        config.numAttrs = 0
        return _Slot(packed, config)

    free = [new_slot()]  # pop and append are atomic

    def launch(addresses: Sequence[int]) -> None:
        if current_device() != device:
            with torch.cuda.device(device):
                launch(addresses)
            return
        try:
            slot = free.pop()
        except IndexError:
            slot = new_slot()
        pack_pointers(slot.buffer, 0, *addresses)
        stream = current_stream(device)
        if stream != slot.stream:
            slot.config.hStream = driver.CUstream(stream)
            slot.stream = stream
        status = launch_kernel(slot.config, function, 0, slot.extra)[0]
        free.append(slot)
        if status is not success and status != success:
            # asked only now, because asking costs as much as a tenth of a launch
            if status == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT and make_current(device):
                launch(addresses)
            else:
                raise launch_error(status, name)

    return launch
