"""The interpreted views, in processes of their own: Triton reads TRITON_INTERPRET once, when it is first imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


# two parts, so that two processes share them
@pytest.mark.parametrize("chosen", ["test_every_view", "not test_every_view"])
def test_the_views_in_the_interpreter(chosen: str) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**kept, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-k", chosen]
    done = subprocess.run(
        [*command, str(HERE / "interpreted_views.py")], capture_output=True, text=True, timeout=280, env=environment
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
