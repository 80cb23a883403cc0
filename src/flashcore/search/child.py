"""The process that judges (judge.py), as measure.py has it: started when there is something to ask, asked, heard, ended."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashcore.sources import PACKAGE

COMMAND = (sys.executable, "-m", "flashcore.search.judge")
_WORDS = 1500


@dataclass(frozen=True)
class Limits:
    """How long a child may say nothing, in seconds: before a batch is ready, and at a candidate."""

    setup: float
    candidate: float


# Longer than the child's own watchdogs wait, for hangs that these do not see. Before a batch is ready torch is loaded, and
# float64 results are computed.
PATIENCE = Limits(setup=240.0, candidate=60.0)


class Child:
    """A child process, started when there is something to ask of it, and what it says line by line."""

    def __init__(self, command: Sequence[str], stderr: Path) -> None:
        self._command, self._stderr = command, stderr
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def start(self) -> None:
        """Start it, where it does not run: loading torch takes it as long as reading batches takes others."""
        if self._process is not None:
            return
        package_root = str(PACKAGE.parent)
        paths = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
        with self._stderr.open("w") as stderr:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | {"PYTHONPATH": paths},
            )
        self._lines = queue.SimpleQueue()
        threading.Thread(target=_forward, args=(self._process, self._lines), daemon=True).start()

    def ask(self, request: Mapping[str, object]) -> None:
        self.start()
        assert self._process is not None and self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which `hear` finds
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def hear(self, silence: float) -> dict[str, Any] | None:
        """What it says next; None once it has ended. Raises TimeoutError when it says nothing for so long."""
        try:
            line = self._lines.get(timeout=silence)
        except queue.Empty:
            raise TimeoutError from None
        return None if line is None else json.loads(line)

    def stop(self) -> tuple[int | None, str]:
        """End it, if it runs: (its exit status, the last it had to say to people)."""
        process, self._process = self._process, None
        if process is None:
            return None, ""
        assert process.stdin is not None
        with suppress(BrokenPipeError, OSError):
            process.stdin.close()  # which is how one that waits for a request is told to end
        status: int | None
        try:
            status = process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            status = _wait(process)
        return status, self._stderr.read_text(errors="replace").strip()[-_WORDS:]

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()


def _wait(process: subprocess.Popen[str]) -> int | None:
    """The exit status of a process that was killed; None where the driver does not let go of it, and others must do."""
    try:
        return process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        return None


def _forward(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)
