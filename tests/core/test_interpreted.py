"""The interpreted kernel, in a process of its own: Triton reads TRITON_INTERPRET once, when it is first imported."""

import os
import subprocess
import sys
from pathlib import Path


def _environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    return {**kept, "OMP_NUM_THREADS": "1", **changes}


def test_the_portable_kernel_in_the_interpreter() -> None:
    checks = Path(__file__).with_name("interpreted_kernel.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--show-capture=no", str(checks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=_environment(TRITON_INTERPRET="1"))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_a_triton_that_was_imported_before_is_refused() -> None:
    program = (
        "import os, torch, flashcore, flashcore.kernels.portable.forward\n"
        "os.environ['TRITON_INTERPRET'] = '1'\n"
        "q = torch.ones(1, 4, 1, 16)\n"
        "try: flashcore.attention(q, q, q, impl='portable')\n"
        "except NotImplementedError as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=_environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("UnsupportedError") and "before Triton is imported" in done.stdout
