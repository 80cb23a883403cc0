"""Compile many specialisations at once, each in a worker process; a compiler that crashes fails one of them, not all."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flashcore.errors import CompileError
from flashcore.kernels.specialisation import Specialisation
from flashcore.runtime.binary import Binary, BinaryInfo


@dataclass(frozen=True, slots=True)
class Request:
    """One binary to build."""

    specialisation: Specialisation
    arch: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request: a binary, or the compiler's words."""

    request: Request
    binary: Binary | None
    error: str | None


class _Worker:
    """A worker process and the conversation with it; a dead one is started again for the next request."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None

    def build(self, request: Request) -> Outcome:
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        out = self._folder / "cubin"
        try:
            process.stdin.write(json.dumps({"key": request.specialisation.key, "arch": request.arch, "out": str(out)}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = process.wait()
            words = (self._folder / "stderr").read_text(errors="replace")[-2000:]
            return Outcome(request, None, f"{request.specialisation.name}: the compiler died with status {status}: {words}")
        answer = json.loads(line)
        if "error" in answer:
            return Outcome(request, None, answer["error"])
        return Outcome(request, Binary(out.read_bytes(), BinaryInfo.model_validate(answer["info"])), None)

    def _start(self) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        package_root = str(Path(__file__).parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package_root, environment.get("PYTHONPATH"))))
        with (self._folder / "stderr").open("w") as stderr:
            return subprocess.Popen(
                [sys.executable, "-m", "flashcore.build.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment,
            )

    def close(self) -> None:
        if self._process is not None and self._process.stdin is not None and self._process.stdout is not None:
            with suppress(BrokenPipeError):  # a worker that died with a request unread
                self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait()


def compile_all(
    requests: Sequence[Request], *, jobs: int | None = None, done: Callable[[Outcome], None] = lambda outcome: None
) -> list[Outcome]:
    """Compile every request, in their order; `done` is called as each ends. Failures are outcomes, not exceptions."""
    outcomes: dict[int, Outcome] = {}
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(requests)):
        waiting.put(index)
    faults: list[BaseException] = []

    def serve(folder: Path) -> None:
        folder.mkdir()
        worker = _Worker(folder)
        try:
            while not faults:
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                outcomes[index] = worker.build(requests[index])
                done(outcomes[index])
        except BaseException as fault:  # carried to the caller's thread and raised there
            faults.append(fault)
        finally:
            worker.close()

    count = max(1, min(len(requests), jobs or os.cpu_count() or 1))
    with tempfile.TemporaryDirectory(prefix="flashcore-build-") as folder:
        threads = [threading.Thread(target=serve, args=(Path(folder) / str(i),)) for i in range(count)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as stopped:  # Ctrl-C: nothing more is begun, and what is under way ends first
            faults.append(stopped)
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            raise
    if faults:
        raise faults[0]
    return [outcomes[index] for index in range(len(requests))]


def compile_one(specialisation: Specialisation, arch: str) -> Binary:
    """Compile one specialisation in a worker process.

    Raises:
        CompileError: the compiler refused it or died; the message holds its words.
    """
    (outcome,) = compile_all([Request(specialisation, arch)], jobs=1)
    if outcome.binary is None:
        raise CompileError(outcome.error)
    return outcome.binary
