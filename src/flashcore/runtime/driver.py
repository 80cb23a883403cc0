"""The CUDA driver API, through cuda-bindings: the few calls that loading and launching a kernel take."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

from flashcore.errors import BinaryError, DriverError


@cache
def bindings() -> ModuleType:
    """cuda.bindings.driver, initialised.

    Raises:
        DriverError: cuda-bindings is not installed, or there is no working NVIDIA driver.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise DriverError(
            "cuda-bindings is not installed (PyTorch's CUDA builds bring it): pip install cuda-bindings"
        ) from error
    try:
        (status,) = driver.cuInit(0)
    except RuntimeError as error:  # cuda-bindings raises it when libcuda.so.1 cannot be opened
        raise DriverError(f"no NVIDIA driver on this machine: {error}") from error
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DriverError(f"cuInit failed: {status.name}; is there an NVIDIA GPU and a driver on this machine?")
    return driver


def _call(name: str, *arguments: Any) -> Any:
    driver = bindings()
    status, *values = getattr(driver, name)(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DriverError(f"{name} failed: {status.name}")
    return values[0] if values else None


def make_current(device: int) -> bool:
    """Make a device's primary context, which is PyTorch's, current in this thread; False where one was already.

    A new thread has none until something sets it, and PyTorch may serve a whole call from memory it holds without that.
    """
    if int(_call("cuCtxGetCurrent")) != 0:
        return False
    _call("cuCtxSetCurrent", _call("cuDevicePrimaryCtxRetain", _call("cuDeviceGet", device)))
    return True


def load_function(cubin: bytes, symbol: str, shared: int, what: str) -> Any:
    """Load a cubin into the current context and return its CUfunction; it stays loaded for the process.

    Raises:
        BinaryError: the driver does not accept the binary for this GPU, or it holds no such kernel.
    """
    driver = bindings()
    # Loading may allocate; under a stream capture that is only allowed in relaxed mode.
    mode = _call("cuThreadExchangeStreamCaptureMode", driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
    try:
        status, module = driver.cuModuleLoadData(cubin)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise BinaryError(f"{what}: the driver refused the binary: {status.name}")
        status, function = driver.cuModuleGetFunction(module, symbol.encode())
        if status != driver.CUresult.CUDA_SUCCESS:
            raise BinaryError(f"{what}: the binary holds no kernel {symbol!r}: {status.name}")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _call("cuFuncSetAttribute", function, attribute, shared)
    finally:
        _call("cuThreadExchangeStreamCaptureMode", mode)
    return function


def launch_error(status: Any, what: str) -> DriverError:
    """The error for a launch that returned `status`."""
    return DriverError(f"{what}: cuLaunchKernelEx failed: {status.name}")
