"""What the search's tests share."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def fakes() -> ModuleType:
    """`fakes.py` beside this file: a compiler and a GPU that are none."""
    return _beside("fakes")


@pytest.fixture(scope="session")
def stub() -> ModuleType:
    """`stub.py` beside this file: a machine on which binaries behave as their bytes say."""
    return _beside("stub")


def _beside(name: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(f"search_{name}", Path(__file__).with_name(f"{name}.py"))
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # where dataclasses look for the names in their annotations
    found.loader.exec_module(module)
    return module
