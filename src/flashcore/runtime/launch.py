"""Launcher: one kernel with every argument but the tensors' addresses packed, ready to be launched."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flashcore.errors import BinaryError
from flashcore.kernels.arguments import TENSORS, Argument, Pointer, TensorMap
from flashcore.runtime.binary import ELEMENT_SIZES, Binary, KernelParameter
from flashcore.runtime.driver import bindings, launch_config, launch_error, load_function, make_current
from flashcore.runtime.tensor_map import encoder, try_out

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
    """Launches one binary on one device with fixed arguments; only the tensors' addresses differ between calls.

    `launch(addresses)` launches on the device's current stream. It takes one address for each name in
    `kernels.arguments.TENSORS`, in that order, 0 for an absent tensor, and writes those that the arguments mention.
    `launch_here` is the same for a caller who has made sure that `device` is the current one.
    Both are closures and not methods: looking nothing up in an object saves most of a microsecond of five.

    Raises:
        BinaryError: the grid has not whole clusters, the arguments are not those that the binary takes, or the driver refuses
            the binary.
        DriverError: the driver makes no tensor map of what a TensorMap describes.
    """

    device: int
    launch: Callable[[Sequence[int]], None]
    launch_here: Callable[[Sequence[int]], None]

    def __init__(self, binary: Binary, device: torch.device, *, grid: int, arguments: Sequence[Argument]) -> None:
        self.device = torch.cuda.current_device() if device.index is None else device.index
        self.launch_here = _bind(binary, self.device, grid, arguments) if grid else _nothing
        self.launch = _on(self.device, self.launch_here)


def _nothing(addresses: Sequence[int]) -> None:
    """What a launch of no programs does."""


def _on(device: int, launch_here: Callable[[Sequence[int]], None]) -> Callable[[Sequence[int]], None]:
    """The same launch, whichever device is the current one."""
    current_device = torch._C._cuda_getDevice

    def launch(addresses: Sequence[int]) -> None:
        if current_device() == device:
            launch_here(addresses)
        else:
            with torch.cuda.device(device):
                launch_here(addresses)

    return launch


class _Arguments:
    """The packed arguments of a launch: one buffer laid out as the kernel's parameters are.

    `places`: (position in 8-byte words, index of the tensor, bytes to add to its address) of each address to write.
    `encodings`: the same, and a function from an address to a tensor map, of each tensor map to write whole, where the
    driver's cannot be patched.
    """

    def __init__(self, binary: Binary, arguments: Sequence[Argument]) -> None:
        parameters = binary.info.parameters
        values: list[Argument] = []
        for argument in arguments:
            values += (argument, *argument.shape, *argument.strides) if isinstance(argument, TensorMap) else (argument,)
        scratch = sum(p.name.startswith("scratch_") for p in parameters)
        if len(values) + scratch != len(parameters):
            raise BinaryError(f"{binary.info.name}: takes {len(parameters)} arguments, {len(values) + scratch} were packed")
        self.places: list[tuple[int, int, int]] = []
        self.encodings: list[tuple[int, int, int, Callable[[int], bytes]]] = []
        self._template = bytearray(max((p.offset + p.size for p in parameters), default=0))
        for parameter, value in zip(parameters, values + [0] * scratch, strict=True):
            try:
                self._template[parameter.offset : parameter.offset + parameter.size] = self._pack(parameter, value)
            except (struct.error, OverflowError, BinaryError) as error:
                raise BinaryError(
                    f"{binary.info.name}: {parameter.name} is {parameter.type} and cannot take {value}: {error}"
                ) from error

    def _pack(self, parameter: KernelParameter, value: Argument) -> bytes:
        """What a parameter holds before a launch; notes where the launch writes."""
        word = parameter.offset // 8
        if isinstance(value, TensorMap):
            if parameter.tensor_map is None:
                raise BinaryError("it is not a tensor map")
            encode, index = encoder(value, parameter.tensor_map), TENSORS.index(value.tensor)
            skipped = value.offset * ELEMENT_SIZES[parameter.tensor_map.element]
            encoded, address_leads = try_out(encode)
            if address_leads:
                self.places.append((word, index, skipped))
            else:
                self.encodings.append((word, index, skipped, encode))
            return encoded
        if isinstance(value, Pointer):
            if not parameter.type.startswith("*"):
                raise BinaryError("it is not a pointer")
            self.places.append((word, TENSORS.index(value.tensor), 0))
            return bytes(8)
        if parameter.name.startswith("scratch_"):
            return bytes(8)
        if parameter.type not in _FORMATS:
            raise BinaryError("it is not a number")
        return struct.pack("<" + _FORMATS[parameter.type], value)

    def copy(self) -> tuple[memoryview, int, object]:
        """A buffer of its own: (its 8-byte words, address to give the driver as `extra`, what to keep)."""
        length = len(self._template)
        buffer = ctypes.create_string_buffer(bytes(self._template), max(8, length + -length % 8))
        size = ctypes.c_size_t(length)
        extra = (ctypes.c_void_p * 5)(_BUFFER_POINTER, ctypes.addressof(buffer), _BUFFER_SIZE, ctypes.addressof(size), _END)
        return memoryview(buffer).cast("B").cast("Q"), ctypes.addressof(extra), (buffer, size, extra)


class _Slot:
    """What one thread needs for the time of a launch, during which the driver reads it."""

    __slots__ = ("config", "extra", "keep", "stream", "words")

    def __init__(self, packed: _Arguments, config: Any) -> None:
        self.words, self.extra, self.keep = packed.copy()
        self.config = config
        self.stream: int | None = None  # the one that config holds


def _bind(binary: Binary, device: int, grid: int, arguments: Sequence[Argument]) -> Callable[[Sequence[int]], None]:
    info = binary.info
    name = info.name
    if grid % info.cluster:
        raise BinaryError(f"{name}: a grid of {grid} blocks; allowed are multiples of its cluster of {info.cluster}")
    function = _function(binary, device)
    with torch.cuda.device(device):
        make_current(device)
        packed = _Arguments(binary, arguments)
    places, encodings = tuple(packed.places), tuple(packed.encodings)
    driver = bindings()
    # With a configuration made beforehand, cuda-bindings converts four arguments a launch and not eleven.
    launch_kernel, success = driver.cuLaunchKernelEx, driver.CUresult.CUDA_SUCCESS
    # torch._C: the public calls build objects and check what is known here, at up to 1 us each
    current_stream = torch._C._cuda_getCurrentRawStream

    def new_slot() -> _Slot:
        config = launch_config(
            grid=grid, threads=info.threads, shared=info.shared, cluster=info.cluster, programmatic=info.programmatic
        )
        return _Slot(packed, config)

    free = [new_slot()]  # pop and append are atomic

    def launch(addresses: Sequence[int]) -> None:
        try:
            slot = free.pop()
        except IndexError:
            slot = new_slot()
        words = slot.words
        for word, tensor, skipped in places:
            words[word] = addresses[tensor] + skipped
        if encodings:
            make_current(device)  # which encoding needs, like the launch
            for word, tensor, skipped, encode in encodings:
                words[word : word + 16] = memoryview(encode(addresses[tensor] + skipped)).cast("Q")
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
