"""Importing the package costs nothing, touches no GPU, and needs no compiler."""

import os
import re
import subprocess
import sys

import pytest

import flashcore


def _python(program: str, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *flags, "-c", program], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done


def test_import_pulls_in_nothing_heavy() -> None:
    heavy = "torch triton pydantic rich typer numpy matplotlib cuda"
    done = _python(f"import sys, flashcore; print([name for name in '{heavy}'.split() if name in sys.modules])")
    assert done.stdout.strip() == "[]"


def test_import_takes_under_50_ms() -> None:
    def milliseconds() -> float:
        # "import time: self [us] | cumulative | imported package", of flashcore and of what it imports
        lines = _python("import flashcore", "-X", "importtime").stderr.splitlines()
        (line,) = (line for line in lines if re.search(r"\| flashcore$", line))
        return int(line.split("|")[1]) / 1000

    assert min(milliseconds() for _ in range(3)) < 50


def test_a_call_on_a_cpu_needs_no_compiler_and_initialises_no_cuda() -> None:
    done = _python(
        "import sys\n"
        "sys.modules['triton'] = None\n"  # as if it were not installed
        "import torch, flashcore\n"
        "def touched(*arguments): raise AssertionError('CUDA was initialised')\n"
        "torch.cuda._lazy_init = torch.cuda.init = touched\n"
        "q = torch.ones(1, 4, 2, 8)\n"
        "print(flashcore.attention(q, q, q, causal=True).sum().item(), flashcore.explain(q, q, q).impl)\n"
        "print(torch.cuda.is_initialized())\n"
    )
    assert done.stdout.split() == ["64.0", "torch", "False"]


def test_what_the_package_exports_is_there() -> None:
    assert set(flashcore.__all__) >= {"attention", "scaled_dot_product_attention", "merge_states", "explain", "reference"}
    assert dir(flashcore) == sorted(flashcore.__all__)
    assert all(getattr(flashcore, name) is not None for name in flashcore.__all__)
    with pytest.raises(AttributeError, match="no attribute 'flash'"):
        flashcore.flash  # noqa: B018  (the access is what raises)
