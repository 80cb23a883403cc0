"""The CUDA driver API, through cuda-bindings: the few calls that loading and launching a kernel take."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

from flashcore.errors import BinaryError, DriverError

# names of CUtensorMapDataType's and CUtensorMapSwizzle's members, without their prefixes
_ELEMENTS = {"fp16": "FLOAT16", "bf16": "BFLOAT16"}
_SWIZZLES = {0: "NONE", 32: "32B", 64: "64B", 128: "128B"}
_TENSOR_MAP_BYTES = 128


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


def encode_tensor_map(
    what: str,
    address: int,
    shape: Sequence[int],
    strides: Sequence[int],
    *,
    element: str,
    box: Sequence[int],
    swizzle: int,
) -> bytes:
    """A TMA tensor map over the tensor at an address; what is read beyond its edges is zero, what is written there is dropped.

    `shape` (elements), `box` (elements) and `strides` (bytes, of all dimensions but the last) are outermost first.

    Raises:
        DriverError: the driver makes no such map; it names the call's figures and `what` the tensor is called.
    """
    driver = bindings()
    status, encoded = driver.cuTensorMapEncodeTiled(
        getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{_ELEMENTS[element]}"),
        len(shape),
        address,
        [driver.cuuint64_t(extent) for extent in reversed(shape)],
        [driver.cuuint64_t(stride) for stride in reversed(strides)],
        [driver.cuuint32_t(extent) for extent in reversed(box)],
        [driver.cuuint32_t(1)] * len(shape),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{_SWIZZLES[swizzle]}"),
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DriverError(
            f"{what}: cuTensorMapEncodeTiled failed: {status.name}, for address {address:#x}, shape {tuple(shape)}, "
            f"strides of {tuple(strides)} bytes, box {tuple(box)}, swizzle {swizzle}, {element}"
        )
    return ctypes.string_at(encoded.getPtr(), _TENSOR_MAP_BYTES)


def launch_config(*, grid: int, threads: int, shared: int, cluster: int, programmatic: bool) -> Any:
    """A CUlaunchConfig for cuLaunchKernelEx, complete but for the stream; grid, blocks and clusters have one dimension.

    `programmatic`: the launch may start before the one ahead of it in the stream has ended, for which the kernel waits.
    """
    driver = bindings()
    attributes = []
    if cluster > 1:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        dimension = attribute.value.clusterDim
        dimension.x, dimension.y, dimension.z = cluster, 1, 1
        attributes.append(attribute)
    if programmatic:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared
    # copied into memory that the configuration owns; their number is not set by that
    config.attrs = attributes
    config.numAttrs = len(attributes)
    return config


def launch_error(status: Any, what: str) -> DriverError:
    """The error for a launch that returned `status`."""
    return DriverError(f"{what}: cuLaunchKernelEx failed: {status.name}")
