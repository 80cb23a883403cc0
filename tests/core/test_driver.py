"""cuda.bindings.driver, and what is said where it or a driver is missing."""

import sys
from collections.abc import Callable, Iterator
from enum import IntEnum
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


def test_this_machine_has_a_driver_or_says_what_is_missing() -> None:
    if torch.cuda.is_available():
        assert driver.bindings().CUresult.CUDA_SUCCESS == 0
    else:
        missing = "no NVIDIA driver|cuInit failed" if find_spec("cuda") else "pip install cuda-bindings"
        with pytest.raises(DriverError, match=missing):
            driver.bindings()
