"""Make memory that was allocated and not written show itself: it holds NaN for the time of a call.

An output that a kernel fails to write still holds whatever the allocator's block held before, and after a first
correct run of the same shape that is very often the right answer. PyTorch can fill every uninitialised allocation
(`torch.empty`, `empty_like`, `new_empty`, `empty_strided`, wherever they are called from, custom operators included)
with NaN, or the largest integer: `torch.utils.deterministic.fill_uninitialized_memory`, which acts while
deterministic algorithms are asked for. This is done in ATen, below everything that Python could patch, and on the
same stream as the kernel that follows.

`warn_only` keeps the mode from refusing an operation; that it does not change which SDPA backend a forward call gets is
a test (tests/verify/test_poison.py). The context checks that the fill really happens and raises if not: a poison that
does nothing would pass everything.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils import deterministic


@contextmanager
def poisoned_memory(device: torch.device) -> Iterator[None]:
    """Inside, uninitialised tensors on any device hold NaN (floating) or their largest value (integer).

    Raises RuntimeError when they do not on `device`.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # torch.utils.deterministic is a module with properties, which type checkers do not see
    fill = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            if not torch.empty(8, dtype=dtype, device=device).isnan().all():
                raise RuntimeError(f"uninitialised {dtype} memory on {device} is not poisoned, so nothing would be proved")
        with warnings.catch_warnings():
            # cuBLAS's warning about its workspace: bitwise equality is checked by the suite, on what really ran.
            warnings.filterwarnings("ignore", message=".*[Dd]eterministic.*")
            yield
    finally:
        deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
