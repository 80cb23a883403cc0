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
from flashcore.runtime.driver import bindings, launch_error, load_function

_FORMATS = {"i64": "q", "i32": "i", "fp32": "f"}
_functions: dict[tuple[str, int], Any] = {}
_streams: dict[int, Any] = {}
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


def _stream(handle: int) -> Any:
    """cuda-bindings' object for a stream; making one costs more than finding it again."""
    stream = _streams[handle] = bindings().CUstream(handle)
    return stream


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
        self._device = index
        # One 8-byte slot an argument, pointers first: cuLaunchKernel takes the address of each, so their places are ours.
        slots = max(1, len(parameters))
        buffer = ctypes.create_string_buffer(8 * slots)
        packed = parameters[pointers : pointers + len(scalars)]
        for slot, (parameter, value) in enumerate(zip(packed, scalars, strict=True), start=pointers):
            struct.pack_into("<" + _FORMATS[parameter.type], buffer, 8 * slot, value)
        base = ctypes.addressof(buffer)
        addresses = (ctypes.c_void_p * slots)(*(base + 8 * slot for slot in range(slots)))
        self._launch = self._bind(binary, grid, buffer, addresses, pointers) if grid else _nothing

    def _bind(self, binary: Binary, grid: int, buffer: Any, addresses: Any, pointers: int) -> Callable[[Sequence[int]], None]:
        """The launch itself, a closure: its names are looked up in no object, which is half a microsecond of four."""
        name, threads, shared = binary.info.name, binary.info.threads, binary.info.shared
        function = _function(binary, self._device)
        launch_kernel = bindings().cuLaunchKernel
        arguments = ctypes.addressof(addresses)
        pack_pointers = struct.Struct(f"<{pointers}Q").pack_into
        current_stream = torch._C._cuda_getCurrentRawStream
        device, lock, streams = self._device, threading.Lock(), _streams

        def launch(values: Sequence[int]) -> None:
            handle = current_stream(device)
            stream = streams.get(handle) or _stream(handle)
            with lock:
                pack_pointers(buffer, 0, *values)
                status = launch_kernel(function, grid, 1, 1, threads, 1, 1, shared, stream, arguments, 0)[0]
            if status != 0:
                raise launch_error(status, name)

        launch.keeps = addresses  # type: ignore[attr-defined]  # the driver is given their bare address
        return launch

    def __call__(self, pointers: Sequence[int]) -> None:
        """Launch on the current stream of the device, with the addresses of this call's tensors (0 for an absent one)."""
        # torch._C: the public call checks what is known here
        if torch._C._cuda_getDevice() == self._device:
            self._launch(pointers)
        else:
            with torch.cuda.device(self._device):
                self._launch(pointers)


def _nothing(pointers: Sequence[int]) -> None:
    """What a launch of no programs does."""
