"""The gradients of interpreted kernels, in a process of its own, as test_interpreted.py says why."""

import os
import subprocess
import sys
from pathlib import Path


def test_calls_whose_gradients_are_ours() -> None:
    checks = Path(__file__).with_name("interpreted_backward.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--show-capture=no", str(checks)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**kept, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
