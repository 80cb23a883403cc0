"""`flashcore verify` as a user meets it: exit codes, the table, the record."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashcore.verify import mutations
from flashcore.verify.record import read


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
    assert (record.passed, record.failed, record.skipped, record.only) == (3, 0, 0, "tiny-*")
    assert [case.name for case in record.cases] == ["tiny-seed0", "tiny-seed42", "tiny-seed12345"]
    assert all(case.impl == "portable" and case.specialisation and case.bitwise_equal for case in record.cases)
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
        (("--suite", "everything"), "allowed: mission, edge, shipped, all"),
        (("--impl", "cudnn"), "allowed: 'auto'"),
        (("--mutations", "--record", "x.json"), "nothing to record"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    done = _flashcore(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert words in done.stderr and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_failing_case_exits_1_and_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import typer
    from typer.testing import CliRunner

    from flashcore.cli import verify
    from flashcore.verify import subject

    wrong = mutations.implementation(mutations.Mutation.ONE_NAN)
    monkeypatch.setattr(subject, "flashcore_implementation", lambda impl: wrong)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    app = typer.Typer()
    verify.register(app)
    result = CliRunner().invoke(app, ["--only", "tiny-seed0"])
    assert result.exit_code == 1
    assert "failed tiny-seed0: output: not finite everywhere" in result.output
    assert "0 passed, 1 failed, 0 skipped" in result.output


def test_a_run_in_which_everything_was_skipped_has_proved_nothing() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU runs these")
    done = _flashcore("--only", "far-batch")
    assert done.returncode == 1 and "needs 8 GiB of GPU memory" in done.stdout
