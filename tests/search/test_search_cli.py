"""`flashcore search` as a user meets it: what is refused, what Ctrl-C leaves, what a search says without a GPU."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from flashcore.build import pool
from flashcore.errors import BinaryError
from flashcore.kernels.registry import EMPTY
from flashcore.search import measurers
from flashcore.search import run as running
from flashcore.search.measure import Visit
from flashcore.search.measurers import FolderMeasurer, LocalMeasurer
from flashcore.search.run import Order, Search
from flashcore.search.schema import Problem, SearchResult

Run = Callable[..., tuple[int, str, str]]
SMALL = Problem(impl="small", batch=4, heads=8, heads_k=8, seqlen_q=128, seqlen_k=128, head_dim=64, head_dim_v=64)
CALL = ("search", "small", "--shape", "4,8,128,64")


def test_the_help_imports_no_torch_and_no_optuna() -> None:
    program = (
        "import sys\nfrom flashcore import cli\nsys.argv = ['flashcore', 'search', '--help']\n"
        "try: cli.main()\nexcept SystemExit: print([n for n in ('torch', 'triton', 'optuna') if n in sys.modules])\n"
    )
    environment = {**os.environ, "COLUMNS": "160"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("run", "measure", "report", "retest", "promote"))
    assert done.stdout.strip().endswith("[]")


def test_judging_needs_no_optuna() -> None:
    program = "import sys\nsys.modules['optuna'] = None\nimport flashcore.search.measure, flashcore.search.judge\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fast", "--shape", "mission"), "kernel: got 'fast'; allowed: hopper, small, portable"),
        (("small",), "shape and grid: got both or neither"),
        (("small", "--shape", "mission", "--grid", "small"), "shape and grid: got both or neither"),
        (("small", "--shape", "1,2,3"), "shape: '1,2,3' cannot be read"),
        (("small", "--grid", "none"), "grid: 'none' is unknown"),
        (("small", "--shape", "1,8,4096,64"), "takes at most 1024 keys"),
        (("small", "--shape", "mission", "--window", "3"), "window: got '3'; allowed: left,right"),
        (
            ("small", "--shape", "mission", "--sampler", "best"),
            "sampler: got 'best'; allowed: evolutionary, random, exhaustive",
        ),
        (("small", "--shape", "mission", "--budget", "0"), "budget: got 0; allowed: at least 1"),
        (("small", "--shape", "mission", "--generation", "0"), "generation: got 0; allowed: at least 1"),
        (("small", "--shape", "mission", "--jobs", "0"), "jobs: got 0; allowed: at least 1"),
        (("small", "--shape", "mission", "--sampler", "exhaustive", "--budget", "2"), "budget: got 2 for an exhaustive search"),
    ],
)
def test_bad_arguments_are_refused(run: Run, arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    status, _, errors = run("search", *arguments, "--out", str(tmp_path / "s"))
    assert status == 2 and words in errors and not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "small", "--shape", "mission", "--out", "{file}"), "is a file; allowed: a folder"),
        (("report", "/nowhere/r.json"), "artifact: /nowhere/r.json cannot be read"),
        (("report", "{file}"), "is not a flashcore-search artifact"),
        (("report", "{file}", "--out", "/nowhere/x.json"), "out: /nowhere/x.json cannot be written"),
        (("report", "{file}", "--plot", "/nowhere/x.png"), "plot: /nowhere/x.png cannot be written"),
        (("report", "{file}", "--seeds", "0"), "seeds: got 0; allowed: at least 1"),
        (("retest", "{file}", "--out", "/nowhere"), "is not a flashcore-search artifact"),
        (("promote", "{file}"), "can be read"),
        (("measure", "/nowhere/batch", "--out", "{file}.d"), "/nowhere/batch"),
    ],
)
def test_the_other_commands_refuse_too(run: Run, arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_text("{}")
    status, _, errors = run("search", *(one.format(file=file) for one in arguments))
    assert status == 2 and words in errors


@pytest.fixture
def builder(fakes: ModuleType, monkeypatch: pytest.MonkeyPatch) -> object:
    """What the command builds with."""
    made = fakes.FakeBuilder(SMALL, us=lambda config: 50.0)
    monkeypatch.setattr(running, "CompilerBuilder", lambda *given: made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return made


def test_without_a_gpu_it_says_what_to_run_and_goes_on_with_the_result(run: Run, builder, fakes, tmp_path: Path) -> None:
    out = tmp_path / "s"
    status, _, errors = run(*CALL, "--sampler", "exhaustive", "--out", str(out))
    assert status == 3 and "40 candidates wait for a GPU" in errors
    (folder,) = (out / "batches").iterdir()
    assert f"flashcore search measure {folder} --out {out / 'judged'}" in errors
    assert run(*CALL, "--sampler", "exhaustive", "--out", str(out))[0] == 3  # nothing yet
    (result,) = fakes.FakeMeasurer(us=lambda config: 100 - config["keys"] / 8).judge(folder, list(range(40)))
    (out / "judged").mkdir()
    (out / "judged" / f"{folder.name}.0.json").write_text(result.model_dump_json())
    status, said, _ = run(*CALL, "--sampler", "exhaustive", "--out", str(out))
    assert status == 0 and "40 of 40: 40 measured" in said and "of the hand-chosen form's speed" in said
    found = SearchResult.model_validate_json((out / "result.json").read_text())
    assert len(found.trials) == 40 and len(builder.built) == 40
    status, said, _ = run("search", "report", str(out), "--out", str(tmp_path / "r.json"), "--plot", str(tmp_path / "p.png"))
    assert status == 0 and "what searches found on NVIDIA Fake" in said
    assert (tmp_path / "r.json").exists() and (tmp_path / "p.png").exists()
    assert run(*CALL, "--sampler", "random", "--out", str(out))[0] == 2  # another search's folder


def test_a_grid_is_a_search_for_each_of_its_shapes(run: Run, monkeypatch: pytest.MonkeyPatch, fakes, tmp_path: Path) -> None:
    monkeypatch.setattr(running, "CompilerBuilder", lambda problem, *given: fakes.FakeBuilder(problem, us=lambda config: 50.0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shapes = ("--shape", "4,8,128,64", "--shape", "1,12,197,64")
    status, _, errors = run("search", "small", *shapes, "--budget", "8", "--out", str(tmp_path))
    assert status == 3 and errors.count("8 candidates wait") == 2
    assert sorted(one.name for one in tmp_path.iterdir()) == ["small-fp16-b1h12s197d64", "small-fp16-b4h8s128d64"]


def test_of_a_grid_what_the_kernel_does_not_take_is_left_out(run: Run, monkeypatch, fakes, tmp_path: Path) -> None:
    monkeypatch.setattr(running, "CompilerBuilder", lambda problem, *given: fakes.FakeBuilder(problem, us=lambda config: 50.0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, errors = run("search", "small", "--grid", "small", "--budget", "4", "--out", str(tmp_path))
    assert (
        status == 3
        and errors.count("left out: shape: got small-fp16-b32h8s512d64") == 1
        and errors.count("candidates wait") > 3
    )
    status, _, errors = run("search", "small", "--grid", "fa", "--out", str(tmp_path / "none"))
    assert status == 2 and errors.splitlines()[-1].startswith("error: shape: got") and not (tmp_path / "none").exists()


def test_ctrl_c_ends_it_and_the_next_run_goes_on(run: Run, builder, tmp_path: Path) -> None:
    builder.stop[5] = KeyboardInterrupt()
    status, _, errors = run(*CALL, "--budget", "8", "--out", str(tmp_path))
    assert status == 130 and f"{tmp_path} has what was found" in " ".join(errors.split())
    assert run(*CALL, "--budget", "8", "--out", str(tmp_path))[0] == 3


def test_a_result_that_cannot_be_read_is_refused(builder, fakes, tmp_path: Path) -> None:
    search = Search(Order.of(SMALL, "random", 0, 8), tmp_path, 132)
    (tmp_path / "judged").mkdir()
    (tmp_path / "judged" / "small-fp16-b4h8s128d64-random-s0-0000.0.json").write_text("{")
    with pytest.raises(BinaryError, match="no result that can be read"):
        search.run(builder, FolderMeasurer(tmp_path / "judged"))


def test_the_gpu_of_this_machine_judges_each_generation(
    builder, fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = fakes.FakeMeasurer(us=lambda config: 50.0)

    def measure(folders: list[Path], out: Path, watcher: object) -> Visit:
        (folder,) = folders
        numbers = [built.number for built in builder.read(folder).candidates]
        out.mkdir(exist_ok=True)
        result = gpu.judge(folder, numbers)[-1]
        (out / f"{folder.name}.0.json").write_text(result.model_dump_json())
        return Visit(results={folder: result}, failures={folder: "the driver is gone"} if gpu.visits == 3 else {})

    monkeypatch.setattr(measurers, "measure", measure)
    search = Search(Order.of(SMALL, "random", 0, 16, 6), tmp_path, 132)
    with pytest.raises(BinaryError, match="the driver is gone"):
        search.run(builder, LocalMeasurer(tmp_path / "judged"))
    assert gpu.visits == 3 and len([trial for trial in search.result.trials if trial.verdict == "measured"]) == 12
    result = Search(Order.of(SMALL, "random", 0, 16, 6), tmp_path, 132).run(builder, LocalMeasurer(tmp_path / "judged"))
    assert len(result.trials) == 16 and {trial.verdict for trial in result.trials} == {"measured"}


def test_ctrl_c_stops_the_compilers_after_what_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[float] = []

    class Worker:
        def __init__(self, folder: Path) -> None:
            pass

        def build(self, request: pool.Request) -> pool.Outcome:
            begun.append(time.monotonic())
            time.sleep(0.05)
            return pool.Outcome(request, None, "not built")

        def close(self) -> None:
            pass

    monkeypatch.setattr(pool, "_Worker", Worker)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        pool.compile_all([pool.Request(EMPTY, "sm_90a")] * 1000, jobs=2)
    count = len(begun)
    time.sleep(0.2)
    assert 0 < count == len(begun) < 100
