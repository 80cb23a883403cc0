"""`flashcore debug` as a user meets it: what is refused, what is built, and artifacts."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from flashcore.bench.shapes import parse_shape
from flashcore.build.pool import Outcome, Request
from flashcore.debug import artifact, binaries
from flashcore.debug.artifact import DebugArtifact, ViewVerdict
from flashcore.debug.binaries import build, find
from flashcore.debug.compare import PartVerdict
from flashcore.debug.subjects import SUBJECTS, check, specialisations
from flashcore.environment import collect
from flashcore.errors import ArgumentValueError, BinaryError, CompileError
from flashcore.kernels.specialisation import VIEW
from flashcore.runtime.binary import Binary, BinaryInfo
from flashcore.sources import kernel_hash
from flashcore.target import Target

Run = Callable[..., tuple[int, str, str]]
MISSION = parse_shape("mission")
H200 = Target(name="an H200", arch="sm_90a", capability=(9, 0), sm_count=132, interpreted=False)


@pytest.fixture
def run(run: Run) -> Run:
    """`flashcore debug` in this process."""
    return partial(run, "debug")


def test_the_help_imports_no_torch_and_no_triton() -> None:
    program = (
        "import sys\nfrom flashcore import cli\nsys.argv = ['flashcore', 'debug', '--help']\n"
        "try: cli.main()\nexcept SystemExit: print([name for name in ('torch', 'triton') if name in sys.modules])\n"
    )
    environment = {**os.environ, "COLUMNS": "160"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "--view" in done.stdout and done.stdout.strip().endswith("[]")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "subject: got None with --build None; allowed: one of the two"),
        (("scalar", "--build", "x"), "subject: got 'scalar' with --build x; allowed: one of the two"),
        (("fast",), "subject: got 'fast'; allowed: unfused, scalar"),
        (("scalar", "--view", "weights"), "view: got 'weights'; allowed: scores, softmax, pv"),
        (("scalar", "--causal"), "causal: got True with scalar; allowed: with small, hopper, portable"),
        (("scalar", "--arch", "sm_89"), "arch: got sm_89; allowed: with --build"),
        (("--build", "x", "--view", "pv"), "view: got ['pv']; allowed: with a subject"),
        (("--build", "x", "--causal"), "causal: got True; allowed: with a subject; --build makes both"),
        (("--build", "x", "--arch", "sm_70"), "arch: got 'sm_70'; allowed: sm_89, sm_90a"),
        (("scalar", "--shape", "1,2,3"), "shape: '1,2,3' cannot be read"),
        (("scalar", "--shape", "1,2/1,64,64"), "shape: got 1,2/1,64,64 fp16 with scalar; allowed: as many key heads"),
        (("scalar", "--shape", "1,2,64,96"), "head_dim: got 96; allowed: 16, 32, 64, 128"),
        (("scalar", "--out", "/nowhere/x.json"), "out: /nowhere/x.json cannot be written"),
        (("scalar", "--binaries", "/nowhere"), "binaries: got /nowhere; allowed: a folder that"),
    ],
)
def test_bad_arguments_are_refused(run: Run, arguments: tuple[str, ...], words: str) -> None:
    status, _, errors = run(*arguments)
    assert status == 2 and words in errors


def test_other_dtypes_and_masks_have_no_views() -> None:
    for changed in ({"dtype": "bf16"}, {"mask": "bool"}):
        with pytest.raises(ArgumentValueError, match="allowed: fp16 without a mask"):
            check("portable", replace(MISSION, **changed))


def _part(**changes: object) -> PartVerdict:
    right = {"name": "scores", "tile": (64, 64), "tiles": 4, "wrong": 0, "error": 1e-6, "bound": 1e-5, "first": None, "map": ()}
    return PartVerdict(**{**right, **changes})


def test_an_artifact_is_read_back_and_is_right_only_where_something_was_judged(tmp_path: Path) -> None:
    def make(*views: ViewVerdict) -> DebugArtifact:
        return DebugArtifact(
            environment=collect(torch.device("cpu")), subject="small", shape=MISSION, seed=0, interpreted=False,
            kernels=["a"], sources={}, binaries=["b"], views=list(views),
        )  # fmt: skip

    right, wrong = ViewVerdict(view="scores", parts=[_part()]), ViewVerdict(view="pv", parts=[_part(wrong=1, error=None)])
    assert make(right).right and not make(right, wrong).right and not make().right
    assert not ViewVerdict(view="pv", parts=[]).right and not ViewVerdict(view="pv", parts=[_part(tiles=0)]).right
    path = tmp_path / "debug.json"
    make(right, wrong).save(path)
    assert artifact.load(path) == make(right, wrong).model_copy(update={"environment": artifact.load(path).environment})
    path.write_text(path.read_text().replace("flashcore-debug", "flashcore-ladder"))
    with pytest.raises(ArgumentValueError, match="not a flashcore-debug artifact of schema 1: kind"):
        artifact.load(path)


def _compile_nothing(requests: list[Request], *, done: Callable[[Outcome], None]) -> list[Outcome]:
    """What compile_all gives, without a compiler."""
    outcomes = []
    for number, request in enumerate(requests):
        cubin = bytes([number])
        info = BinaryInfo(
            kernel=request.specialisation.kernel, name=request.specialisation.name, key=request.specialisation.key,
            arch=request.arch, symbol="x", parameters=[], threads=128, shared=0, cluster=1, programmatic=False,
            sha256=sha256(cubin).hexdigest(), size=1,
            source_sha256=kernel_hash(request.specialisation.kernel), triton="3.9.0",
        )  # fmt: skip
        outcomes.append(Outcome(request, Binary(cubin, info), None))
        done(outcomes[-1])
    return outcomes


def test_a_folder_of_binaries_serves_a_machine_without_the_compiler(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binaries, "compile_all", _compile_nothing)
    monkeypatch.setattr(binaries, "obtain", None)  # which would compile
    folder = tmp_path / "views"
    status, said, errors = run("--build", str(folder))
    assert status == 0 and "small_forward-fp16-d64-causal-c2k256n128-view" in said, errors
    assert (
        "not for 1,8,512,64 fp16 causal: scalar: causal: got True with scalar" in said
        and "not for 1,8,512,64 fp16:" not in said
    )
    assert f"flashcore debug SUBJECT --binaries {folder}" in said
    for name in SUBJECTS:
        for specialisation in specialisations(name, MISSION, "sm_90a"):
            assert specialisation.parameters[-1] == VIEW and specialisation.recorded
            assert find(specialisation, H200, folder).info.key == specialisation.key
    (other,) = specialisations("scalar", parse_shape("1,1,8,16"), "sm_90a")
    with pytest.raises(BinaryError, match=r"ladder_scalar-d16-.* is not there; build it with `flashcore debug --build"):
        find(other, H200, folder)
    (one,) = specialisations("scalar", MISSION, "sm_90a")
    cubin = folder / "sm_90a" / f"{one.name}.cubin"
    cubin.write_bytes(b"else")
    with pytest.raises(BinaryError, match="is damaged"):
        find(one, H200, folder)
    cubin.unlink()
    with pytest.raises(BinaryError, match="cannot be read"):
        find(one, H200, folder)
    monkeypatch.setattr(binaries, "kernel_hash", lambda kernel: "another")
    with pytest.raises(BinaryError, match="is of another source than the present one"):
        find(one, H200, folder)


def test_a_folder_is_built_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(requests: list[Request], *, done: Callable[[Outcome], None]) -> list[Outcome]:
        found = _compile_nothing(requests, done=done)
        return [*found[:-1], Outcome(requests[-1], None, "no registers")]

    monkeypatch.setattr(binaries, "compile_all", fail)
    with pytest.raises(CompileError, match=r"1 of .* binaries failed to build; the first: no registers"):
        build(tmp_path, "sm_90a", [MISSION])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ArgumentValueError, match="no subject takes 1,8,512,64 bf16 on sm_90a"):
        build(tmp_path, "sm_90a", [replace(MISSION, dtype="bf16")])
