"""cuda.bindings.driver, and what is said where it or a driver is missing."""

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from enum import IntEnum
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

from flashcore.errors import DriverError
from flashcore.runtime import driver


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_NO_DEVICE = 100


@pytest.fixture(autouse=True)
def _fresh_bindings() -> Iterator[None]:
    driver.bindings.cache_clear()
    yield
    driver.bindings.cache_clear()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType | None]:
    """A function that puts a module with this cuInit in the place of cuda.bindings.driver; None: not installed."""

    def install(initialise: Callable[[int], tuple[Result]] | None) -> ModuleType | None:
        if initialise is None:
            for name in ("cuda.bindings", "cuda.bindings.driver"):
                monkeypatch.setitem(sys.modules, name, None)
            return None
        package, module = ModuleType("cuda.bindings"), ModuleType("cuda.bindings.driver")
        module.CUresult, module.cuInit, package.driver = Result, initialise, module
        monkeypatch.setitem(sys.modules, "cuda.bindings", package)
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", module)
        return module

    return install


def test_without_cuda_bindings(install) -> None:
    install(None)
    with pytest.raises(DriverError, match="pip install cuda-bindings"):
        driver.bindings()


def test_without_a_driver(install) -> None:
    def no_library(flags: int) -> tuple[Result]:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    install(no_library)
    with pytest.raises(DriverError, match=r"no NVIDIA driver on this machine: .*libcuda\.so\.1"):
        driver.bindings()


def test_a_driver_without_a_gpu_is_asked_again(install) -> None:
    install(lambda flags: (Result.CUDA_ERROR_NO_DEVICE,))
    with pytest.raises(DriverError, match="cuInit failed: CUDA_ERROR_NO_DEVICE"):
        driver.bindings()
    module = install(lambda flags: (Result.CUDA_SUCCESS,))
    assert driver.bindings() is module


def _encode(**changes: object) -> bytes:
    given = {"shape": (2, 3, 64), "strides": (1 << 33, 0), "element": "fp16", "box": (1, 1, 64), "swizzle": 128, **changes}
    return driver.encode_tensor_map("k", 1 << 40, **given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the driver would answer: tests/gpu has that")
@pytest.mark.parametrize(
    "changes", [{"element": "fp16"}, {"element": "bf16"}, *({"swizzle": s} for s in (0, 32, 64, 128))], ids=str
)
def test_a_tensor_map_is_asked_for_in_words_that_cuda_bindings_knows(changes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a driver the call gets as far as looking for one, which is after its arguments were taken."""
    real = pytest.importorskip("cuda.bindings.driver")
    monkeypatch.setattr(driver, "bindings", cache(lambda: real))
    with pytest.raises(TypeError):
        _encode(**changes, box=("1", 1, 64))
    with pytest.raises((RuntimeError, DriverError)):
        _encode(**changes)


class _Attribute(ctypes.Structure):
    """cuda.h's CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_uint), ("padding", ctypes.c_uint), ("value", ctypes.c_uint * 16))


class _Config(ctypes.Structure):
    """cuda.h's CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


@pytest.mark.parametrize(
    ("cluster", "programmatic", "attributes"),
    # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION is 4, CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION is 6
    [(1, False, []), (4, False, [(4, [4, 1, 1])]), (1, True, [(6, [1, 0, 0])]), (2, True, [(4, [2, 1, 1]), (6, [1, 0, 0])])],
)
def test_a_launch_configuration_is_what_the_driver_reads(
    cluster: int, programmatic: bool, attributes: list[tuple[int, list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the memory that cuda-bindings hands to the driver, when the attributes' own objects are gone."""
    real = pytest.importorskip("cuda.bindings.driver")
    monkeypatch.setattr(driver, "bindings", cache(lambda: real))
    config = driver.launch_config(grid=24, threads=128, shared=5000, cluster=cluster, programmatic=programmatic)
    gc.collect()
    config.hStream = real.CUstream(4096)
    read = _Config.from_address(int(config.getPtr()))
    assert (list(read.grid), list(read.block), read.shared, read.stream) == ([24, 1, 1], [128, 1, 1], 5000, 4096)
    assert [(one.id, list(one.value[:3])) for one in read.attributes[: read.count]] == attributes


def test_this_machine_has_a_driver_or_says_what_is_missing() -> None:
    if torch.cuda.is_available():
        assert driver.bindings().CUresult.CUDA_SUCCESS == 0
    else:
        missing = "no NVIDIA driver|cuInit failed" if find_spec("cuda") else "pip install cuda-bindings"
        with pytest.raises(DriverError, match=missing):
            driver.bindings()
