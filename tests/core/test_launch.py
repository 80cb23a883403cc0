"""The launcher, with a driver that only writes down what it was told."""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from enum import IntEnum
from hashlib import sha256
from types import ModuleType, SimpleNamespace

import pytest
import torch

import flashcore
from flashcore import evidence
from flashcore.errors import BinaryError, DriverError
from flashcore.kernels.specialisation import Specialisation
from flashcore.runtime import driver, launch, store
from flashcore.runtime.binary import Binary, BinaryInfo, KernelParameter
from flashcore.runtime.launch import Launcher
from flashcore.target import Target

_SIZES = {"i64": 8, "i32": 4, "fp32": 4}
_CTYPES = {"i64": ctypes.c_int64, "i32": ctypes.c_int32, "fp32": ctypes.c_float}


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209
    CUDA_ERROR_NOT_FOUND = 500
    CUDA_ERROR_LAUNCH_FAILED = 719
    CUDA_ERROR_INVALID_CONTEXT = 201


class FakeDriver(ModuleType):
    """cuda.bindings.driver as far as FlashCore uses it. `answers` are the statuses of calls that do not succeed."""

    CUresult = Result
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED="relaxed")
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared")

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")
        self.answers: dict[str, Result] = {}
        self.calls: list[tuple] = []
        self.launches: list[SimpleNamespace] = []
        self.parameters: Sequence[KernelParameter] = ()
        self.context = 1000  # the one current in this thread; 0 for none. A device's primary one is 1000 and its number.

    def _answer(self, *call: object) -> Result:
        self.calls.append(call)
        return self.answers.get(str(call[0]), Result.CUDA_SUCCESS)

    def cuThreadExchangeStreamCaptureMode(self, mode: object):
        return self._answer("cuThreadExchangeStreamCaptureMode", mode), "mode before"

    def cuCtxGetCurrent(self):
        return self._answer("cuCtxGetCurrent"), self.context

    def cuCtxSetCurrent(self, context: int):
        self.context = context
        return (self._answer("cuCtxSetCurrent", context),)

    def cuDeviceGet(self, index: int):
        return self._answer("cuDeviceGet", index), index

    def cuDevicePrimaryCtxRetain(self, device: int):
        return self._answer("cuDevicePrimaryCtxRetain", device), 1000 + device

    def cuModuleLoadData(self, image: bytes):
        return self._answer("cuModuleLoadData", image), "module"

    def cuModuleGetFunction(self, module: object, name: bytes):
        return self._answer("cuModuleGetFunction", module, name), "function"

    def cuFuncSetAttribute(self, *arguments: object):
        return (self._answer("cuFuncSetAttribute", *arguments),)

    def CUstream(self, handle: int) -> int:
        return handle

    class CUlaunchConfig:
        """Plain attributes; what is not set is not there to be read."""

    def cuLaunchKernelEx(self, config, function, parameters, extra):
        assert config.numAttrs == 0
        grid = (config.gridDimX, config.gridDimY, config.gridDimZ)
        block = (config.blockDimX, config.blockDimY, config.blockDimZ)
        return self._launch(function, *grid, *block, config.sharedMemBytes, config.hStream, parameters, extra)

    def _launch(self, function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
        time.sleep(0)  # another thread may run before the arguments are read
        values = self._by_parameter(int(parameters)) if parameters else self._packed(int(extra))
        if self.context == 0:
            return (Result.CUDA_ERROR_INVALID_CONTEXT,)
        self.launches.append(
            SimpleNamespace(
                function=function, grid=(gx, gy, gz), block=(bx, by, bz), shared=shared, stream=int(stream), values=values
            )
        )
        return (self._answer("cuLaunchKernelEx"),)

    def _by_parameter(self, address: int) -> list[int | float]:
        addresses = (ctypes.c_void_p * len(self.parameters)).from_address(address)
        return [
            _CTYPES.get(p.type, ctypes.c_uint64).from_address(where).value
            for p, where in zip(self.parameters, addresses, strict=True)
        ]

    def _packed(self, address: int) -> list[int | float]:
        """The arguments as cuda.h's `extra` has them: (1, buffer, 2, &size, 0), each at a multiple of its own size."""
        buffer_key, buffer, size_key, size, end = (ctypes.c_void_p * 5).from_address(address)
        assert (buffer_key, size_key, end) == (1, 2, None)
        values, offset = [], 0
        for p in self.parameters:
            offset += -offset % p.size
            values.append(_CTYPES.get(p.type, ctypes.c_uint64).from_address(buffer + offset).value)
            offset += p.size
        assert ctypes.c_size_t.from_address(size).value == offset
        return values


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """The fake driver in the real one's place, and torch's GPU calls answering as for one GPU, device 0, stream 77."""
    module = FakeDriver()
    for place in (driver, launch):
        monkeypatch.setattr(place, "bindings", lambda: module)
    for name, value in {
        "current_device": lambda: 0,
        "current_stream": lambda device=None: None,
        "device": lambda index: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)
    return module


def _binary(*types: str, scratch: int = 2, **changes: object) -> Binary:
    """A binary with these parameters whose bytes are like no other's, so that no earlier load of it is known."""
    cubin = os.urandom(64)
    parameters = [KernelParameter(name=f"p{i}", type=kind, size=_SIZES.get(kind, 8)) for i, kind in enumerate(types)]
    parameters += [KernelParameter(name=f"scratch_{i}", type="*u8", size=8) for i in range(scratch)]
    info = {
        "kernel": "k", "name": "the-kernel", "key": "{}", "arch": "sm_90a", "symbol": "entry", "parameters": parameters,
        "threads": 128, "shared": 5000, "sha256": sha256(cubin).hexdigest(), "size": len(cubin), "source_sha256": "",
        "triton": "3.9.0", **changes,
    }  # fmt: skip
    return Binary(cubin, BinaryInfo(**info))


GPU = torch.device("cuda", 0)


def _launcher(fake: FakeDriver, binary: Binary, **options: object) -> Launcher:
    fake.parameters = binary.info.parameters
    return Launcher(binary, GPU, **{"grid": 3, "pointers": 0, "scalars": (), **options})


def test_a_binary_is_loaded_once_and_launched(fake: FakeDriver) -> None:
    binary = _binary("*fp16", "i64")
    for _ in range(2):
        _launcher(fake, binary, pointers=1, scalars=(7,)).launch((4096,))
    names = [call[0] for call in fake.calls]
    assert names.count("cuModuleLoadData") == 1 and names.count("cuLaunchKernelEx") == 2
    assert ("cuModuleLoadData", binary.cubin) in fake.calls and ("cuModuleGetFunction", "module", b"entry") in fake.calls
    assert ("cuFuncSetAttribute", "function", "shared", 5000) in fake.calls
    # a load may happen under a stream capture; the mode is put back
    assert [call[1] for call in fake.calls if call[0] == "cuThreadExchangeStreamCaptureMode"] == ["relaxed", "mode before"]
    first = fake.launches[0]
    assert (first.function, first.grid, first.block) == ("function", (3, 1, 1), (128, 1, 1))
    assert (first.shared, first.stream, first.values) == (5000, 77, [4096, 7, 0, 0])


@pytest.mark.parametrize("scratch", [0, 1, 2])
def test_arguments_are_packed_by_their_types(scratch: int, fake: FakeDriver) -> None:
    types = ("*fp16", "*fp32", "i64", "i32", "i64", "i32", "i32", "fp32", "fp32", "i32")
    scalars = (2**40 + 3, -5, -(2**33), 2**31 - 1, -(2**31), 0.125, -3.5, 1)
    launcher = _launcher(fake, _binary(*types, scratch=scratch), pointers=2, scalars=scalars)
    launcher.launch((2**47 + 16, 0))
    assert fake.launches[0].values == [2**47 + 16, 0, *scalars] + [0] * scratch
    launcher.launch((32, 2**63 + 48))
    assert fake.launches[1].values == [32, 2**63 + 48, *scalars] + [0] * scratch


def test_a_kernel_without_arguments(fake: FakeDriver) -> None:
    _launcher(fake, _binary(scratch=0)).launch(())
    assert fake.launches[0].values == []


def test_a_launch_of_no_programs_is_none(fake: FakeDriver) -> None:
    _launcher(fake, _binary("*fp16"), pointers=1, grid=0).launch((16,))
    assert fake.launches == []


def test_too_few_or_too_many_arguments_are_refused(fake: FakeDriver) -> None:
    for pointers, scalars in ((1, (1,)), (2, (1, 2)), (0, ())):
        with pytest.raises(BinaryError, match="the-kernel: takes 5 arguments"):
            _launcher(fake, _binary("*fp16", "*fp16", "i32"), pointers=pointers, scalars=scalars)
    assert fake.launches == []


@pytest.mark.parametrize(
    ("call", "status", "words"),
    [
        (
            "cuModuleLoadData",
            Result.CUDA_ERROR_NO_BINARY_FOR_GPU,
            "for sm_90a: the driver refused the binary: .*NO_BINARY_FOR_GPU",
        ),
        ("cuModuleGetFunction", Result.CUDA_ERROR_NOT_FOUND, "holds no kernel 'entry': CUDA_ERROR_NOT_FOUND"),
    ],
)
def test_a_binary_that_the_driver_refuses(call: str, status: Result, words: str, fake: FakeDriver) -> None:
    fake.answers[call] = status
    binary = _binary()
    with pytest.raises(BinaryError, match=words):
        _launcher(fake, binary).launch(())
    # the capture mode is put back all the same, and the failure is not remembered as a success
    assert fake.calls[-1] == ("cuThreadExchangeStreamCaptureMode", "mode before")
    fake.answers.clear()
    _launcher(fake, binary).launch(())
    assert len(fake.launches) == 1


def test_a_damaged_binary_never_reaches_the_driver(fake: FakeDriver) -> None:
    with pytest.raises(BinaryError, match="the-kernel is damaged"):
        _launcher(fake, _binary(sha256="0" * 64))
    assert "cuModuleLoadData" not in [call[0] for call in fake.calls]


def test_other_calls_that_fail_name_themselves(fake: FakeDriver) -> None:
    fake.answers["cuFuncSetAttribute"] = Result.CUDA_ERROR_NOT_FOUND
    with pytest.raises(DriverError, match="cuFuncSetAttribute failed: CUDA_ERROR_NOT_FOUND"):
        _launcher(fake, _binary())


def test_a_launch_that_fails(fake: FakeDriver) -> None:
    launcher = _launcher(fake, _binary())
    fake.answers["cuLaunchKernelEx"] = Result.CUDA_ERROR_LAUNCH_FAILED
    with pytest.raises(DriverError, match="the-kernel: cuLaunchKernelEx failed: CUDA_ERROR_LAUNCH_FAILED"):
        launcher.launch(())
    fake.answers.clear()
    launcher.launch(())
    assert len(fake.launches) == 2


def test_a_thread_without_a_context_gets_the_devices_own(fake: FakeDriver) -> None:
    fake.context = 0
    launcher = _launcher(fake, _binary("*fp16"), pointers=1)
    assert fake.context == 1000
    fake.context = 0  # as in a thread that was started after the load
    launcher.launch((64,))
    assert fake.context == 1000 and [one.values for one in fake.launches] == [[64, 0, 0]]


def test_a_context_that_the_driver_refuses_is_not_tried_for_ever(fake: FakeDriver) -> None:
    launcher = _launcher(fake, _binary())
    fake.answers["cuLaunchKernelEx"] = Result.CUDA_ERROR_INVALID_CONTEXT
    with pytest.raises(DriverError, match="CUDA_ERROR_INVALID_CONTEXT"):
        launcher.launch(())
    fake.context = 0
    with pytest.raises(DriverError, match="CUDA_ERROR_INVALID_CONTEXT"):
        launcher.launch(())


def test_threads_do_not_mix_their_arguments(fake: FakeDriver) -> None:
    launcher = _launcher(fake, _binary(*["*fp16"] * 6, "i64"), pointers=6, scalars=(9,))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [
            threading.Thread(target=lambda first=first: [launcher.launch(range(first, first + 6)) for _ in range(300)])
            for first in (100, 200, 300)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(fake.launches) == 900
    counts = {tuple(one.values) for one in fake.launches}
    assert counts == {(*range(first, first + 6), 9, 0, 0) for first in (100, 200, 300)}


def test_a_launch_on_a_device_that_is_not_the_current_one(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    current = [1]

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.index

        def __exit__(self, *error: object) -> None:
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "device", Device)
    launched_on: list[int] = []
    original = fake.cuLaunchKernelEx
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[0], raising=False)
    monkeypatch.setattr(fake, "cuLaunchKernelEx", lambda *a: (launched_on.append(current[0]), original(*a))[1])
    _launcher(fake, _binary()).launch(())
    assert launched_on == [0] and current == [1]


@pytest.fixture
def on_the_gpu(fake: FakeDriver, h200: Target, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """CPU tensors that every part of FlashCore takes for tensors on an H200."""

    def obtain(specialisation: Specialisation, target: Target) -> Binary:
        binary = _binary(*(p.type for p in specialisation.parameters), name=specialisation.name)
        fake.parameters = binary.info.parameters
        return binary

    location = store.Location("shipped", SimpleNamespace(sha256="5" * 64), None)
    monkeypatch.setattr(Target, "of", classmethod(lambda cls, device: h200))
    monkeypatch.setattr(store, "locate", lambda specialisation, arch: location)
    monkeypatch.setattr(store, "obtain", obtain)
    monkeypatch.setattr(evidence, "state", lambda *arguments: "verified")
    monkeypatch.setattr(evidence, "slower_than_torch", lambda *arguments: None)
    return fake


def test_a_call_from_end_to_end(on_the_gpu: FakeDriver) -> None:
    q, k, v = (torch.zeros(2, length, 4, 64, dtype=torch.float16) for length in (70, 90, 90))
    mask = torch.ones(70, 90, dtype=torch.bool)
    o, lse = flashcore.attention(q, k, v, attn_mask=mask, return_lse=True)
    again = flashcore.attention(q, k, v)
    with_mask, plain = on_the_gpu.launches
    pointers = [t.data_ptr() for t in (q, k, v, mask, o, lse)]
    assert with_mask.values[:6] == pointers
    assert plain.values[:6] == [*pointers[:3], 0, again.data_ptr(), 0]
    assert (o.shape, lse.shape, lse.dtype) == ((2, 70, 4, 64), (2, 4, 70), torch.float32)
    strides = [q.stride(0), q.stride(2), q.stride(1), k.stride(0), k.stride(2), k.stride(1)]
    assert with_mask.values[6:12] == strides


def test_a_second_call_uses_what_the_first_prepared(on_the_gpu: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.zeros(1, 70, 4, 64, dtype=torch.float16) for _ in range(4)]
    first = flashcore.attention(*tensors[:3])
    monkeypatch.setattr(store, "obtain", lambda *arguments: pytest.fail("prepared again"))
    second = flashcore.attention(*tensors[1:])
    assert second.data_ptr() != first.data_ptr()
    assert on_the_gpu.launches[1].values[:3] == [t.data_ptr() for t in tensors[1:]]


@pytest.mark.parametrize("sizes", [(0, 70, 70), (2, 0, 70)])
def test_nothing_to_compute_launches_nothing(sizes: tuple[int, int, int], on_the_gpu: FakeDriver) -> None:
    batch, seqlen_q, seqlen_k = sizes
    q, k = (torch.zeros(batch, length, 4, 64, dtype=torch.float16) for length in (seqlen_q, seqlen_k))
    assert flashcore.attention(q, k, k).shape == q.shape and on_the_gpu.launches == []
