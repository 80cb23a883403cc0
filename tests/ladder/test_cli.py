"""`flashcore ladder` as a user meets it: the list, what is refused, and what an artifact shows."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from flashcore.build import compile as compiling
from flashcore.ladder import code
from flashcore.ladder.steps import STEPS

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(run: Run) -> Run:
    """`flashcore ladder` in this process."""
    return partial(run, "ladder")


def test_the_help_imports_no_torch_and_no_triton() -> None:
    program = (
        "import sys\nfrom flashcore import cli\nsys.argv = ['flashcore', 'ladder', '--help']\n"
        "try: cli.main()\nexcept SystemExit: print([name for name in ('torch', 'triton') if name in sys.modules])\n"
    )
    environment = {**os.environ, "COLUMNS": "160"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "--run" in done.stdout and done.stdout.strip().endswith("[]")


def test_without_triton_the_steps_are_listed_and_it_says_what_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "triton_version", lambda: None)
    status, said, _ = run()
    assert status == 0 and all(step.name in said for step in STEPS) and "no Triton here" in said
    assert said.index("unfused") < said.index("scalar") < said.index("async_copies") < said.index("warp_spec")
    assert said.index("warp_spec") < said.index("hopper")


def test_the_list_shows_what_the_binaries_hold(run: Run, known, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def compile_steps(steps, problem, arch, sm_count):
        asked.append((arch, sm_count, problem.seqlen_q))
        held = known.code.model_copy(update={"registers": 77, "matrix": {"HMMA": 8}})
        return {step.name: [held, known.code] for step in steps}

    monkeypatch.setattr(code, "compile_steps", compile_steps)
    status, said, _ = run("--step", "tensor_core_qk", "--arch", "sm_80")
    assert status == 0 and "77" in said and "8 HMMA, none" in said and "scalar" not in said
    assert asked == [("sm_80", None, 512)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--step", "fast"), "step: got 'fast'; allowed: unfused"),
        (("--arch", "sm_70"), "arch: got 'sm_70'; allowed: sm_80"),
        (("--out", "x.json"), "out: got x.json; allowed: with --run"),
        (("--plot", "x.png"), "plot: got x.png; allowed: with --run or --from"),
        (("--run", "--from", "x.json"), "run and from: got both"),
        (("--run", "--out", "/nowhere/x.json"), "out: /nowhere/x.json cannot be written"),
        (("--from", "/nowhere/x.json"), "artifact: /nowhere/x.json cannot be read"),
    ],
)
def test_bad_arguments_are_refused(run: Run, arguments: tuple[str, ...], words: str) -> None:
    status, _, errors = run(*arguments)
    assert status == 2 and words in errors


def test_an_artifact_is_shown_with_its_table_and_plot(run: Run, make_ladder, tmp_path: Path) -> None:
    make_ladder().save(tmp_path / "ladder.json")
    status, said, _ = run("--from", str(tmp_path / "ladder.json"), "--plot", str(tmp_path / "ladder.png"))
    assert status == 0 and "the ladder at 1,8,512,64" in said and "the ladder at 4,16,4096,64" in said
    assert "scalar: 2 of 2 cases passed" in said and "0.25" in said and "first failure: small-seed0" in said
    assert (tmp_path / "ladder.png").exists()
