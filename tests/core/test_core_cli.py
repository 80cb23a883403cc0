"""`flashcore explain` and `flashcore inspect` as a user meets them: what they print, and how they refuse."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest

from flashcore.build import machine_code
from flashcore.build.machine_code import MachineCode
from flashcore.build.sets import BuiltSet
from flashcore.cli import building
from flashcore.plan import IMPLS
from flashcore.sources import kernel_hash

CODE = MachineCode(
    registers=99, stack=0, shared=1024, spill_loads=0, spill_stores=0, spills_in_loops=0, matrix={}, async_copies=0,
    cluster_barriers=0, before_wait=0, lanes_apart=0,
)  # fmt: skip


def _process(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "160"}
    command = [sys.executable, "-m", "flashcore", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


Run = Callable[..., tuple[int, str, str]]


def test_explain_prints_the_plan() -> None:
    done = _process("explain", "--shape", "1,8,512,64", "--causal")
    assert done.returncode == 0 and done.stderr == ""
    fields = dict(line.split(None, 1) for line in done.stdout.splitlines())
    assert {"device", "impl", "why", "roofline"} <= fields.keys()
    if fields["device"] == "cpu":
        assert fields["impl"] == "torch" and "NVIDIA GPU" in fields["why"]
        rejected = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("rejected")]
        assert rejected == [f"{impl}:" for impl in IMPLS[1:-1]]


def test_the_help_of_explain_names_every_implementation(run: Run) -> None:
    help_text = " ".join(run("explain", "--help")[1].split())
    assert f"{', '.join(IMPLS[:-1])} or {IMPLS[-1]}" in help_text.replace("│ ", "")


def test_bad_input_is_one_line_and_exit_2_without_a_traceback() -> None:
    done = _process("explain", "--impl", "cudnn")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [f"error: impl: got 'cudnn'; allowed: {', '.join(map(repr, IMPLS))}"]


def test_evidence_narrows_a_check_and_nothing_else() -> None:
    done = _process("evidence", "--only", "*-fp16*")
    assert done.returncode == 2 and "only: got '*-fp16*' without --check" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shape", "1,8,512"), "1,8,512"),
        (("--shape", "1,8,512,x"), "x"),
        (("--shape", "1,8/3,512,64"), "3"),
        (("--shape", "1,8,512,300"), "300"),
        (("--shape", "0,8,512,-1"), "-1"),
        (("--window", "5"), "window: got (5,)"),
        (("--window", "a,b"), "--window: got 'a,b'"),
        (("--window", "1.5,2"), "--window: got '1.5,2'"),
        (("--window", "-2,0"), "window: got (-2, 0)"),
        (("--softcap", "-1"), "softcap: got -1.0"),
        (("--softcap", "nan"), "softcap: got nan"),
        (("--layout", "sbhd"), "layout: got 'sbhd'"),
        (("--dtype", "fp8"), "fp8"),
    ],
)
def test_explain_refuses(arguments: tuple[str, ...], words: str, run: Run) -> None:
    code, output, errors = run("explain", *arguments)
    assert code == 2 and output == ""
    assert words in errors and len(errors.strip().splitlines()) == 1, errors


def test_explain_of_an_impl_that_cannot_run_here(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, output, errors = run("explain", "--impl", "portable")
    assert code == 2 and output == "" and errors.startswith("error: impl 'portable': needs an NVIDIA GPU")


@pytest.mark.parametrize(
    "options", [("--shape", "2,8/2,128/256,64"), ("--dtype", "bf16"), ("--window", "-1,0"), ("--layout", "bhsd")]
)
def test_explain_takes_every_kind_of_call(options: tuple[str, ...], run: Run) -> None:
    code, output, _ = run("explain", "--impl", "torch", *options)
    assert code == 0 and "impl        torch" in output


@pytest.fixture
def built(binaries, monkeypatch: pytest.MonkeyPatch) -> dict[str, BuiltSet]:
    """What `flashcore inspect` finds built, by arch, in the place of a compile of some minutes."""
    sets = {"sm_80": BuiltSet("sm_80", (binaries.empty_sm_80,), {}), "sm_90a": BuiltSet("sm_90a", (binaries.empty_sm_90a,), {})}
    monkeypatch.setattr(building, "build_with_progress", lambda arch, only="*": sets[arch])
    return sets


def test_inspect_shows_what_real_machine_code_holds(run: Run, built, binaries) -> None:
    built["sm_80"] = BuiltSet("sm_80", (binaries.empty_sm_80, binaries.half), {})
    code, output, _ = run("inspect", "--arch", "sm_80", "--gate")
    assert code == 0 and "every binary keeps the limits" in output
    assert "2 binaries" in output and "HMMA" in output and "fp16-d64" in output


def test_inspect_gate_fails_for_a_limit_and_for_what_does_not_build(run: Run, built, monkeypatch) -> None:
    monkeypatch.setattr(machine_code, "read_machine_code", lambda binary: replace(CODE, spill_loads=4))
    code, output, _ = run("inspect", "--arch", "sm_80,sm_90a", "--gate")
    assert code == 1 and "spills" in output and "2 binaries break a limit" in output
    assert run("inspect", "--arch", "sm_80")[0] == 0  # shows, and does not judge
    monkeypatch.setattr(machine_code, "read_machine_code", lambda binary: CODE)
    assert run("inspect", "--arch", "sm_80", "--gate")[0] == 0
    built["sm_80"] = replace(built["sm_80"], failures={"another": "ptxas: out of [registers]"})
    code, output, _ = run("inspect", "--arch", "sm_80", "--gate")
    assert code == 1 and "failed to build: another: ptxas: out of [registers]" in output


def test_inspect_shows_what_a_launch_takes(run: Run, built, binaries, monkeypatch) -> None:
    monkeypatch.setattr(machine_code, "read_machine_code", lambda binary: CODE)
    for changes, shown in (
        ({}, ""),
        ({"cluster": 4}, "cluster 4"),
        ({"cluster": 2, "programmatic": True}, "cluster 2, programmatic"),
    ):
        info = binaries.empty_sm_90a.info.model_copy(update=changes)
        built["sm_90a"] = BuiltSet("sm_90a", (replace(binaries.empty_sm_90a, info=info),), {})
        _, output, _ = run("inspect", "--arch", "sm_90a")
        assert shown in output and ("cluster" in output, "programmatic" in output) == ("cluster" in shown, "prog" in shown)


def test_inspect_passes_over_an_arch_that_has_none_of_what_is_asked_for(run: Run, built) -> None:
    code, output, _ = run("inspect", "--arch", "sm_80,sm_90a", "--only", "*-fp16-d64-none-m128n64w4s3")
    assert code == 0 and "sm_90a:" in output and "sm_80:" not in output


def test_info_names_every_kernel_and_where_it_runs(run: Run) -> None:
    code, output, _ = run("info")
    assert code == 0 and f"portable_forward, for every arch, source {kernel_hash('portable_forward')[:16]}" in output


def test_inspect_without_the_tools_fails(run: Run, built, monkeypatch: pytest.MonkeyPatch) -> None:
    machine_code._tool.cache_clear()
    monkeypatch.setattr(machine_code, "find_spec", lambda name: None)
    code, output, errors = run("inspect", "--arch", "sm_80", "--gate")
    machine_code._tool.cache_clear()
    assert code == 2 and "not installed" in errors and "keeps the limits" not in output


def test_inspect_of_nothing_passes_no_gate(run: Run, built) -> None:
    code, output, errors = run("inspect", "--arch", "sm_80", "--only", "nothing*", "--gate")
    assert code == 2 and "'nothing*' matches none" in errors and "keeps the limits" not in output


@pytest.mark.parametrize("command", ["inspect", "build"])
@pytest.mark.parametrize("arch", ["sm_75", "sm_80,hopper", "sm_80,"])
def test_an_unknown_arch_is_refused_before_anything_is_built(command: str, arch: str, run: Run, monkeypatch) -> None:
    monkeypatch.setattr(building, "build_with_progress", lambda *asked: pytest.fail("built something"))
    code, output, errors = run(command, "--arch", arch)
    assert code == 2 and output == "" and "--arch: got" in errors and "sm_90a" in errors
    assert len(errors.strip().splitlines()) == 1


def test_help_imports_no_torch() -> None:
    program = (
        "import sys\nsys.argv = ['flashcore', '--help']\nfrom flashcore.cli import main\n"
        "try: main()\nexcept SystemExit as stopped: print(stopped.code, 'torch' in sys.modules, 'triton' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "0 False False", done.stderr
    assert all(command in done.stdout for command in ("explain", "inspect", "build", "bench", "verify"))


def test_explain_shows_the_backward_pass_of_a_call_that_needs_gradients(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    asked = ("explain", "--impl", "portable", "--shape", "1,2,64,64")
    code, output, _ = run(*asked, "--grad", "--deterministic")
    assert code == 0 and "gradient    portable, bitwise equal from run to run; 0.0 MiB of workspace" in output
    assert "kernel      portable_backward_dq-" in output
    assert "gradient" not in run(*asked)[1]
    code, _, errors = run("explain", "--impl", "torch", "--grad")
    assert code == 0 and not errors
