"""What the core's tests share: one torch thread, caches that do not leak between tests, specs, targets and real binaries."""

import ctypes
import fcntl
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from enum import IntEnum
from hashlib import sha256
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import flashcore
from flashcore import evidence
from flashcore.build.pool import Request, compile_all
from flashcore.kernels.arguments import Argument
from flashcore.kernels.registry import EMPTY, shipped_set
from flashcore.runtime import driver, engine, launch, store
from flashcore.runtime.binary import Binary, BinaryInfo, KernelParameter, TensorMapLayout
from flashcore.runtime.launch import Launcher
from flashcore.spec import AttentionSpec, Options
from flashcore.target import Target

# taken here, because a test may put something else in their place
_CACHED = (store.obtain, store.read_manifest, evidence.indexes)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _fresh_caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No plan, binary, manifest or evidence of one test reaches another; what the environment says of them is not heard."""
    for name in ("TRITON_INTERPRET", "FLASHCORE_STRICT"):
        monkeypatch.delenv(name, raising=False)

    def clear() -> None:
        engine.forget()
        for cached in _CACHED:
            cached.cache_clear()

    clear()
    yield
    clear()


@pytest.fixture(autouse=True)
def _nothing_tuned(tuned_folder: Path) -> None:
    """What a search finds changes no test of the hand-chosen forms."""


@pytest.fixture
def h200() -> Target:
    return Target(name="NVIDIA H200", arch="sm_90a", capability=(9, 0), sm_count=132, interpreted=False)


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty disk cache, and a package that ships nothing."""
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "shipped")
    folder = tmp_path / "cache"
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def make_spec() -> Callable[..., AttentionSpec]:
    """A function that makes the spec of a call from its sizes; the tensors are not written, only described."""

    def make(
        batch: int = 2,
        heads_q: int = 4,
        heads_k: int = 4,
        seqlen_q: int = 128,
        seqlen_k: int = 128,
        head_dim: int = 64,
        head_dim_v: int | None = None,
        dtype: torch.dtype = torch.float16,
        mask: torch.Tensor | None = None,
        layout: str = "bshd",
        return_lse: bool = False,
        offset: int = 0,
        **options: object,
    ) -> AttentionSpec:
        def empty(heads: int, length: int, dim: int) -> torch.Tensor:
            size = (batch, length, heads, dim) if layout == "bshd" else (batch, heads, length, dim)
            storage = torch.empty(offset + batch * length * heads * dim, dtype=dtype)
            return storage[offset:].view(size)

        given = {"causal": False, "scale": None, "window": None, "softcap": 0.0, "layout": layout, **options}
        return AttentionSpec.from_tensors(
            empty(heads_q, seqlen_q, head_dim),
            empty(heads_k, seqlen_k, head_dim),
            empty(heads_k, seqlen_k, head_dim_v or head_dim),
            mask,
            Options.check(**given),
            return_lse=return_lse,
        )

    return make


@pytest.fixture(scope="session")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Real binaries, compiled once: the empty kernel for two archs, a half and a float32 portable kernel for sm_80."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the workers share what the first of them compiles
    kept = folder / "binaries.pickle"
    with (folder / "binaries.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            kept.write_bytes(pickle.dumps(_compile()))
    return SimpleNamespace(**pickle.loads(kept.read_bytes()))


def _compile() -> dict[str, Binary | None]:
    half, full = (next(s for s in shipped_set("sm_80") if name in s.name) for name in ("fp16-d64-none-m64", "fp32-d64partial"))
    requests = {
        "empty_sm_80": Request(EMPTY, "sm_80"),
        "empty_sm_90a": Request(EMPTY, "sm_90a"),
        "half": Request(half, "sm_80"),
        "full": Request(full, "sm_80"),
    }
    outcomes = compile_all(list(requests.values()), jobs=2)
    assert [outcome.error for outcome in outcomes] == [None] * len(requests)
    return {name: outcome.binary for name, outcome in zip(requests, outcomes, strict=True)}


_SIZES = {"i64": 8, "i32": 4, "fp32": 4}
_CTYPES = {"i64": ctypes.c_int64, "i32": ctypes.c_int32, "fp32": ctypes.c_float}


_LAYOUT = TensorMapLayout(element="fp16", box=(1, 64, 32), swizzle=64)
_MAP = "tensormap<fp16[1,64,32]>"


# where a kernel's parameters begin in the constant memory of sm_90, in which they are aligned
_BANK = 0x210


def placed(parameters: Sequence[KernelParameter]) -> list[KernelParameter]:
    """The parameters one after the other, with the offsets that ptxas gives them for sm_90."""
    found, end = [], _BANK
    for parameter in parameters:
        start = end + -end % (64 if parameter.tensor_map else parameter.size)
        found.append(parameter.model_copy(update={"offset": start - _BANK}))
        end = start + parameter.size
    return found


def parameters_of(name: str, kind: str) -> list[KernelParameter]:
    """A parameter of this type, not yet placed; for _MAP its shape and strides too, as the compiler adds them."""
    if kind != _MAP:
        size = _SIZES.get(kind, 8)
        return [KernelParameter(name=name, type=kind, size=size, offset=0)]
    tensor_map = KernelParameter(name=name, type=kind, size=128, offset=0, tensor_map=_LAYOUT)
    return [tensor_map, *(p for i in range(6) for p in parameters_of(f"{name}_{i}", "i32" if i < 3 else "i64"))]


def address_first(address: int, others: bytes) -> bytes:
    """A tensor map as Hopper's are: the address, then what does not depend on it."""
    return address.to_bytes(8, "little") + others


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209
    CUDA_ERROR_NOT_FOUND = 500
    CUDA_ERROR_LAUNCH_FAILED = 719
    CUDA_ERROR_INVALID_CONTEXT = 201


class Names:
    """An enum of the driver's, whose members are their own names."""

    def __getattr__(self, name: str) -> str:
        return name


class EncodedMap:
    """A CUtensorMap."""

    def __init__(self, content: bytes) -> None:
        self._content = ctypes.create_string_buffer(content, 128)

    def getPtr(self) -> int:
        return ctypes.addressof(self._content)


class FakeDriver(ModuleType):
    """cuda.bindings.driver as far as FlashCore uses it. `answers` are the statuses of calls that do not succeed.

    `map_of` is what an encoded tensor map holds, by its address and by the hash of everything else.
    """

    CUresult = Result
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED="relaxed")
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared")
    CUtensorMapDataType = CUtensorMapSwizzle = CUtensorMapInterleave = Names()
    CUtensorMapL2promotion = CUtensorMapFloatOOBfill = CUlaunchAttributeID = Names()

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")
        self.answers: dict[str, Result] = {}
        self.calls: list[tuple] = []
        self.launches: list[SimpleNamespace] = []
        self.parameters: Sequence[KernelParameter] = ()
        self.map_of = address_first
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

    def cuuint64_t(self, value: int) -> int:
        return ctypes.c_uint64(value).value

    def cuuint32_t(self, value: int) -> int:
        return ctypes.c_uint32(value).value

    def cuTensorMapEncodeTiled(self, element, rank, address, *others):
        assert address % 16 == 0 and address > 0
        if self.context == 0:
            return Result.CUDA_ERROR_INVALID_CONTEXT, None
        content = self.map_of(address, sha256(repr((element, rank, others)).encode()).digest())
        return self._answer("cuTensorMapEncodeTiled", element, rank, address, *others), EncodedMap(content)

    class CUlaunchConfig:
        """Plain attributes; what is not set is not there to be read."""

    class CUlaunchAttribute:
        """An id, and the one member of the value that is set."""

        def __init__(self) -> None:
            self.value = SimpleNamespace(clusterDim=SimpleNamespace())

    def cuLaunchKernelEx(self, config, function, parameters, extra):
        assert config.numAttrs == len(config.attrs)
        grid = (config.gridDimX, config.gridDimY, config.gridDimZ)
        block = (config.blockDimX, config.blockDimY, config.blockDimZ)
        return self._launch(function, grid, block, config.sharedMemBytes, config.hStream, config.attrs, parameters, extra)

    def _launch(self, function, grid, block, shared, stream, attributes, parameters, extra):
        time.sleep(0)  # another thread may run before the arguments are read
        assert not parameters
        values = self._packed(int(extra))
        if self.context == 0:
            return (Result.CUDA_ERROR_INVALID_CONTEXT,)
        self.launches.append(
            SimpleNamespace(
                function=function,
                grid=grid,
                block=block,
                shared=shared,
                stream=int(stream),
                attributes={one.id: one.value for one in attributes},
                values=values,
            )
        )
        return (self._answer("cuLaunchKernelEx"),)

    def _packed(self, address: int) -> list[int | float | bytes]:
        """The arguments as cuda.h's `extra` has them: (1, buffer, 2, &size, 0), each at its offset."""
        buffer_key, buffer, size_key, size, end = (ctypes.c_void_p * 5).from_address(address)
        assert (buffer_key, size_key, end) == (1, 2, None)
        values = []
        for p in self.parameters:
            if p.tensor_map:
                values.append(ctypes.string_at(buffer + p.offset, 128))
            else:
                values.append(_CTYPES.get(p.type, ctypes.c_uint64).from_address(buffer + p.offset).value)
        assert ctypes.c_size_t.from_address(size).value == max((p.offset + p.size for p in self.parameters), default=0)
        return values

    def binary(self, *types: str, scratch: int = 2, **changes: object) -> Binary:
        """A binary with these parameters whose bytes are like no other's, so that no earlier load of it is known."""
        cubin = os.urandom(64)
        parameters = [parameter for i, kind in enumerate(types) for parameter in parameters_of(f"p{i}", kind)]
        parameters += [KernelParameter(name=f"scratch_{i}", type="*u8", size=8, offset=0) for i in range(scratch)]
        info = {
            "kernel": "k", "name": "the-kernel", "key": "{}", "arch": "sm_90a", "symbol": "entry",
            "parameters": placed(changes.pop("parameters", parameters)), "threads": 128, "shared": 5000,
            "cluster": 1, "programmatic": False,
            "sha256": sha256(cubin).hexdigest(), "size": len(cubin), "source_sha256": "", "triton": "3.9.0", **changes,
        }  # fmt: skip
        return Binary(cubin, BinaryInfo(**info))

    def launcher(self, binary: Binary, *arguments: Argument, grid: int = 3) -> Launcher:
        """A launcher on device 0, whose arguments the driver then reads as this binary's parameters."""
        self.parameters = binary.info.parameters
        return Launcher(binary, torch.device("cuda", 0), grid=grid, arguments=arguments)


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


class FakeLauncher:
    """In the Launcher's place: keeps what it was given, and writes down its launches."""

    launched: "Launched"

    def __init__(self, binary: object, device: torch.device, *, grid: int, arguments: Sequence[Argument]) -> None:
        self.binary, self.given_device, self.grid, self.arguments = binary, device, grid, arguments
        self.device = 0

    def launch_here(self, addresses: tuple[int, ...]) -> None:
        self.launched.append((self, addresses))


class Launched(list[tuple[FakeLauncher, tuple[int, ...]]]):
    """Every launch: by which launcher, with which addresses; and calls to make some."""

    launcher = FakeLauncher

    @property
    def last(self) -> FakeLauncher:
        return self[-1][0]

    @staticmethod
    def tensor(length: int = 90, *, heads: int = 4, batch: int = 2, dim: int = 64, dtype: torch.dtype = torch.float16):
        return torch.zeros(batch, length, heads, dim, dtype=dtype)

    def call(self, **changes: object) -> dict[str, object]:
        """Arguments of flashcore.attention, with fresh tensors."""
        return {"q": self.tensor(70), "k": self.tensor(), "v": self.tensor(), "impl": "portable", **changes}

    @staticmethod
    def remember(call: dict[str, object]) -> None:
        """Call often enough for the call to be remembered."""
        for _ in range(3):
            flashcore.attention(**call)


@pytest.fixture
def launched(h200: Target, monkeypatch: pytest.MonkeyPatch) -> Launched:
    """The launches of CPU tensors that are taken for tensors on an H200, on which all of our kernels are verified."""
    found = Launched()
    location = store.Location("shipped", SimpleNamespace(sha256="5" * 64), Path("somewhere.cubin"))
    monkeypatch.setattr(FakeLauncher, "launched", found, raising=False)
    monkeypatch.setattr(launch, "Launcher", FakeLauncher)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(Target, "of", classmethod(lambda cls, device: h200))
    monkeypatch.setattr(store, "locate", lambda specialisation, arch: location)
    monkeypatch.setattr(store, "obtain", lambda specialisation, target: specialisation)
    monkeypatch.setattr(evidence, "state", lambda *arguments: "verified")
    monkeypatch.setattr(evidence, "compare", lambda *arguments, **options: None)
    return found


@pytest.fixture
def no_keys(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function; once it was called, a call that is not remembered fails."""
    return lambda: monkeypatch.setattr(engine, "_key", lambda *arguments: pytest.fail("went by its key"))
