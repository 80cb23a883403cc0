"""What the debug views' tests share: one torch thread, and no tuned form in place of the hand-chosen ones."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _nothing_tuned(tuned_folder: Path) -> None:
    """What a search finds changes no test."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
