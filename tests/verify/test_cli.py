"""`flashcore verify` as a user meets it: exit codes, the table, the record."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from flashcore.cli import verify
from flashcore.kernels.registry import BINDINGS
from flashcore.verify import mutations, subject
from flashcore.verify.record import read
from flashcore.verify.suite import Implementation


def _flashcore(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "140"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "flashcore", "verify", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, env=environment)


def test_a_passing_run_prints_its_table_and_records(tmp_path: Path) -> None:
    path = tmp_path / "out" / "record.json"
    done = _flashcore("--only", "tiny-*", "--record", str(path))
    assert done.returncode == 0, done.stderr
    assert "tiny-seed42" in done.stdout and "3 passed, 0 failed, 0 skipped" in done.stdout
    record = read(path)
    assert (record.implementation, record.failed, record.skipped, record.only) == ("ours", 0, 0, "tiny-*")
    # every kernel of ours has a record of every case, in one order; without a GPU all but the portable one reject them
    names = ("tiny-seed0", "tiny-seed42", "tiny-seed12345")
    assert [(case.name, case.implementation) for case in record.cases] == [(name, impl) for name in names for impl in BINDINGS]
    assert record.passed >= 3 and record.passed + record.rejected == len(record.cases)
    passed = [case for case in record.cases if case.verdict == "passed"]
    assert all(case.impl == case.implementation and case.specialisation and case.bitwise_equal for case in passed)
    assert record.environment.kernel_sources["portable_forward"]
    assert [entry.name for entry in path.parent.iterdir()] == ["record.json"]
    if not torch.cuda.is_available():
        assert "this proves the maths, not the binary" in done.stdout
        assert record.interpreted and record.binaries == {}


def test_list_runs_nothing() -> None:
    done = _flashcore("--suite", "mission", "--list")
    assert done.returncode == 0 and len(done.stdout.split()) == 15


def test_mutations() -> None:
    done = _flashcore("--mutations", "--only", "medium-seed0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(mutation.value in done.stdout for mutation in mutations.Mutation)
    # One tile of keys: nothing is rescaled, so that mutation goes unseen, and the command says so by failing.
    assert _flashcore("--mutations", "--only", "tiny-seed0").returncode == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--only", "nothing*"), "matches none"),
        (("--suite", "everything"), "allowed: mission, edge, tile, short, shipped, all"),
        (("--impl", "cudnn"), "allowed: 'ours', 'auto'"),
        (("--mutations", "--record", "x.json"), "nothing to record"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    done = _flashcore(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert words in done.stderr and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def _invoke(monkeypatch: pytest.MonkeyPatch, implementations: tuple[Implementation, ...], *arguments: str) -> Any:
    """The command in this process, with these in place of our kernels."""
    monkeypatch.setattr(subject, "flashcore_implementations", lambda impl: implementations)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    app = typer.Typer()
    verify.register(app)
    return CliRunner().invoke(app, list(arguments))


def test_a_failing_case_exits_1_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = mutations.implementation(mutations.Mutation.ONE_NAN)
    result = _invoke(monkeypatch, (wrong,), "--only", "tiny-seed0")
    assert result.exit_code == 1
    assert "failed tiny-seed0: output: not finite everywhere" in result.output
    assert "0 passed, 1 failed, 0 skipped" in result.output


def test_two_kernels_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def rejects_most(case, inputs):
        return None if case.seed == 0 else "takes seed 0 only"

    two = (
        Implementation("hopper", mutations.tiled_attention, reject=rejects_most),
        Implementation("portable", mutations.tiled_attention),
    )
    result = _invoke(monkeypatch, two, "--only", "tiny-*", "--record", str(tmp_path / "record.json"))
    assert result.exit_code == 0
    lines = [line.rstrip() for line in result.output.splitlines()]
    assert "hopper rejected 2: takes seed 0 only" in lines
    assert "hopper: 1 passed, 0 failed, 0 skipped, 2 rejected" in lines
    assert "portable: 3 passed, 0 failed, 0 skipped" in lines
    assert "4 passed, 0 failed, 0 skipped, 2 rejected" in lines
    record = read(tmp_path / "record.json")
    assert (record.passed, record.rejected) == (4, 2)
    of_hopper = [(case.name, case.verdict) for case in record.cases if case.implementation == "hopper"]
    assert of_hopper == [("tiny-seed0", "passed"), ("tiny-seed42", "rejected"), ("tiny-seed12345", "rejected")]


def test_a_run_in_which_everything_was_rejected_has_proved_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    never = Implementation("hopper", mutations.tiled_attention, reject=lambda case, inputs: "needs sm_90a")
    assert _invoke(monkeypatch, (never,), "--impl", "hopper", "--only", "tiny-seed0").exit_code == 1


def test_a_run_in_which_everything_was_skipped_has_proved_nothing() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU runs these")
    done = _flashcore("--only", "far-batch")
    assert done.returncode == 1 and "needs 8 GiB of GPU memory" in done.stdout
