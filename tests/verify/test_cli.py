"""`flashcore verify` as a user meets it: exit codes, the table, the record."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from flashcore.cli import verify
from flashcore.kernels.registry import BINDINGS
from flashcore.target import Target
from flashcore.verify import ahead, backward_mutations, backward_subject, mutations, subject
from flashcore.verify.record import read
from flashcore.verify.suite import BackwardRan, Implementation, Ran


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
        (("--suite", "everything"), "allowed: mission, edge, tile, short, shipped, tuned, all"),
        (("--impl", "cudnn"), "allowed: 'ours', 'auto'"),
        (("--mutations", "--record", "x.json"), "nothing to record"),
        (("--direction", "sideways"), "allowed: fwd, bwd, both"),
        (("--suite", "backward"), "allowed: mission, edge"),
        (("--direction", "bwd", "--impl", "small"), "allowed: 'ours', 'auto'"),
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


def test_without_a_terminal_a_log_says_how_far_a_run_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "LOG_SECONDS", 0.0)
    wrong = mutations.implementation(mutations.Mutation.ONE_NAN)
    lines = _invoke(monkeypatch, (wrong,), "--only", "tiny-*").output.splitlines()
    assert f"{wrong.name}: tiny-seed0 fails: output: not finite everywhere" in "\n".join(lines)
    assert f"2 of 3 done (0 passed, 2 failed, 0 skipped), at {wrong.name}: tiny-seed42" in lines
    monkeypatch.setattr(verify, "LOG_SECONDS", 60.0)
    assert " of 3 done" not in _invoke(monkeypatch, (wrong,), "--only", "tiny-*").output


def test_without_a_terminal_a_log_says_how_far_mutations_and_compiling_are(monkeypatch: pytest.MonkeyPatch) -> None:
    right = mutations.implementation(None)
    monkeypatch.setattr(verify, "LOG_SECONDS", 0.0)
    lines = _invoke(monkeypatch, (right,), "--mutations", "--only", "tiny-*").output.splitlines()
    assert [line for line in lines if line.startswith("at case")] == [f"at case {i} of 3" for i in (1, 2, 3)]
    monkeypatch.setattr(verify, "LOG_SECONDS", 60.0)
    assert "at case" not in _invoke(monkeypatch, (right,), "--mutations", "--only", "tiny-*").output
    # what nobody has yet is compiled ahead on a GPU
    monkeypatch.setattr(ahead, "missing", lambda specialisations, target: [None, None])
    monkeypatch.setattr(ahead, "compile_ahead", lambda needed, target, advance: 0)
    monkeypatch.setattr(Target, "of", lambda device: Target("a GPU", "sm_90a", (9, 0), 132, False))
    lines = _invoke(monkeypatch, (right,), "--only", "tiny-seed0").output.splitlines()
    assert lines.index("compiling 2 binaries") < lines.index("compiled 2 binaries; 0 failed to")


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


def _invoke_backward(monkeypatch: pytest.MonkeyPatch, implementations: tuple[Implementation, ...], *arguments: str) -> Any:
    monkeypatch.setattr(backward_subject, "backward_implementations", lambda impl: implementations)
    return _invoke(monkeypatch, (mutations.implementation(None),), *arguments)


def _explained(given: Any) -> BackwardRan:
    launches = (Ran("plain", "plain_delta", "delta", "a" * 64), Ran("plain", "plain_dq", "dq", "b" * 64))
    return BackwardRan("plain", launches, reproducible=True)


def test_gradients_have_a_table_and_a_record_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = replace(backward_mutations.implementation(None), explain_backward=_explained)
    arguments = ("--direction", "both", "--only", "tiny-*", "--record", str(tmp_path / "record.json"))
    result = _invoke_backward(monkeypatch, (plain,), *arguments)
    assert result.exit_code == 0 and result.output.count("3 passed, 0 failed, 0 skipped") == 2
    forward, backward = (read(tmp_path / name) for name in ("record.json", "record-bwd.json"))
    assert (forward.direction, backward.direction) == ("fwd", "bwd") and backward.suite == "all"
    case = backward.cases[0]
    assert case.gradients.keys() == {"dq", "dk", "dv"} and case.output is None and case.reproducible
    assert [launch.specialisation for launch in case.launches] == ["delta", "dq"]
    # each launch's binary ran in each case
    names = ("tiny-seed0", "tiny-seed42", "tiny-seed12345")
    assert {sha256: its.passed for sha256, its in backward.binaries.items()} == {"a" * 64: names, "b" * 64: names}
    alone = _invoke_backward(monkeypatch, (plain,), *arguments[2:], "--direction", "bwd")
    assert alone.exit_code == 0 and read(tmp_path / "record.json").direction == "bwd"


def test_a_wrong_gradient_exits_1_and_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = backward_mutations.implementation(backward_mutations.BackwardMutation.UNSCALED_DK)
    result = _invoke_backward(monkeypatch, (wrong,), "--direction", "both", "--only", "tiny-seed0")
    assert result.exit_code == 1 and "failed tiny-seed0: dk: max error" in result.output
    # the forward pass was right
    assert "1 passed, 0 failed, 0 skipped" in result.output and "0 passed, 1 failed, 0 skipped" in result.output


def test_wrong_backward_passes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    arguments = ("--direction", "bwd", "--mutations", "--only", "backward-softcap-d64-fp16")
    result = _invoke_backward(monkeypatch, (backward_mutations.implementation(None),), *arguments)
    assert all(mutation.value in result.output for mutation in backward_mutations.BackwardMutation)
    # no gradient of the log-sum-exp comes in, so that ignoring it goes unseen, and the command says so by failing
    assert result.exit_code == 1
