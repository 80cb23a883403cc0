"""Launcher: one kernel with every argument but its pointers packed, ready to be launched."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from flashcore.errors import BinaryError
from flashcore.runtime.binary import Binary
from flashcore.runtime.driver import bindings, launch_error, load_function

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
                torch.cuda.current_stream()  # makes the device's primary context current
                _functions[key] = load_function(
                    binary.cubin, binary.info.symbol, binary.info.shared, f"{binary.info.name} for {binary.info.arch}"
                )
        return _functions[key]


@cache
def _stream(handle: int) -> Any:
    """cuda-bindings' object for a stream; making one costs more than finding it again."""
    return bindings().CUstream(handle)


class Launcher:
    """Launches one binary on one device with fixed scalars; only the pointers differ between calls.

    The arguments lie in one buffer that the driver reads during the launch, so a lock keeps two threads from mixing theirs.
    """

    def __init__(
        self, binary: Binary, device: torch.device, *, grid: int, pointers: int, scalars: Sequence[int | float]
    ) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        parameters = binary.info.parameters
        scratch = sum(p.name.startswith("scratch_") for p in parameters)
        given = pointers + len(scalars) + scratch
        if given != len(parameters):
            raise BinaryError(f"{binary.info.name}: takes {len(parameters)} arguments, {given} were packed")
        self._name = binary.info.name
        self._device = index
        self._grid = grid
        self._launch_kernel = bindings().cuLaunchKernel
        self._function = _function(binary, index)
        self._threads = binary.info.threads
        self._shared = binary.info.shared
        self._lock = threading.Lock()
        # One 8-byte slot an argument, pointers first: cuLaunchKernel takes the address of each, so their places are ours.
        self._buffer = ctypes.create_string_buffer(8 * max(1, len(parameters)))
        for slot, (parameter, value) in enumerate(
            zip(parameters[pointers : pointers + len(scalars)], scalars, strict=True), start=pointers
        ):
            struct.pack_into("<" + _FORMATS[parameter.type], self._buffer, 8 * slot, value)
        base = ctypes.addressof(self._buffer)
        self._addresses = (ctypes.c_void_p * max(1, len(parameters)))(*(base + 8 * i for i in range(len(parameters))))
        self._arguments = ctypes.addressof(self._addresses)
        self._pack_pointers = struct.Struct(f"<{pointers}Q").pack_into

    def __call__(self, pointers: Sequence[int]) -> None:
        """Launch on the current stream of the device, with the addresses of this call's tensors (0 for an absent one)."""
        if self._grid == 0:
            return
        # torch._C: the public calls build objects or check what is known here, at up to 1 us each
        if torch._C._cuda_getDevice() != self._device:
            with torch.cuda.device(self._device):
                self(pointers)
            return
        stream = _stream(torch._C._cuda_getCurrentRawStream(self._device))
        with self._lock:
            self._pack_pointers(self._buffer, 0, *pointers)
            (status,) = self._launch_kernel(
                self._function, self._grid, 1, 1, self._threads, 1, 1, self._shared, stream, self._arguments, 0
            )
        if status:
            raise launch_error(status, self._name)
