"""The training example runs from its command line, and what it says of losses is what it trained."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_training_example_trains_and_leaves_a_record_and_a_plot(tmp_path: Path) -> None:
    sizes = ["--steps", "25", "--batch", "4", "--context", "32", "--layers", "1", "--heads", "1"]
    command = [sys.executable, "examples/train_gpt", *sizes, "--out", tmp_path / "run.json", "--plot", tmp_path / "run.png"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run.json").read_text())
    ours, theirs = (next(run for run in record["runs"] if run["attention"] == name) for name in ("FlashCore", "SDPA"))
    assert len(ours["losses"]) == len(ours["step_ms"]) == 25
    assert ours["losses"][-1] < ours["losses"][0] - 0.5, "the loss did not fall: nothing was trained"
    assert max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)) < 0.05
    assert (tmp_path / "run.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert all(run["attention"].split(",")[0] in done.stdout for run in record["runs"])
