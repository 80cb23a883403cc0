"""`flashcore profile` from outside: with Nsight Compute and without, with a GPU and without, from a file and on paper."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from flashcore import evidence
from flashcore.bench import runner
from flashcore.bench.artifact import Artifact, ContenderRecord, load
from flashcore.profile.records import ProfileRecord

RECORDED = sorted((evidence.FOLDER / "nvidia-h200").glob("bench-*.json"))
PNG = b"\x89PNG"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(run: Run) -> Run:
    """`flashcore profile` in this process."""
    return partial(run, "profile")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, artifact: Artifact) -> list[runner.Request]:
    """As if there were a GPU, on which every run takes the made-up times; returns the requests."""
    asked: list[runner.Request] = []

    def measure(request, device, progress):
        asked.append(request)
        progress(0, "device_warm", 0.5)
        return artifact

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(runner, "run", measure)
    monkeypatch.setattr("flashcore.environment.collect", lambda *device: artifact.environment)
    return asked


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_profile_is_printed_drawn_and_kept(run: Run, gpu, page, fake_ncu, tmp_path: Path) -> None:
    folder, out = fake_ncu(page(({"Kernel Name": "fill"}, {}))), tmp_path / "new" / "out"
    code, printed, said = run("portable", "--shape", "1,8,512,64", "--out", str(out))
    assert code == 0, said
    assert printed.index("fill") < printed.index("hopper_forward") < printed.index("Roofline measured on NVIDIA H200")
    for text in ("tensor pipe", "41.5 %", "stall: gmma", "flashcore-portable (ncu)", "ceilings: 4 TB/s"):
        assert text in printed
    assert [c.name for c in gpu[0].contenders] == ["flashcore-portable"] and not gpu[0].eager
    assert "flashcore.profile.target\nportable\n--shape\n1,8,512,64" in (folder / "asked").read_text()
    written = {path.name: path for path in out.iterdir()}
    assert set(written) == {
        "roofline-portable-1-8-512-64-fp16.png", "profile-portable-1-8-512-64-fp16.json", "times-portable-1-8-512-64-fp16.json",
    }  # fmt: skip
    assert written["roofline-portable-1-8-512-64-fp16.png"].read_bytes().startswith(PNG)
    record = ProfileRecord.model_validate_json(written["profile-portable-1-8-512-64-fp16.json"].read_text())
    assert record.impl == "portable" and len(record.kernels) == 2
    load(written["times-portable-1-8-512-64-fp16.json"])
    assert "Nsight Compute: portable on 1,8,512,64 fp16" in said and "device_warm" in said


def test_without_ncu_that_is_said_and_the_roofline_stays(run: Run, gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    code, printed, said = run("portable")
    assert code == 0 and "Nsight Compute is not installed here" in said
    assert "Roofline measured on NVIDIA H200" in printed and "flashcore-portable" in printed and "(ncu)" not in printed


def test_ncu_is_left_alone_on_request(run: Run, gpu, page, fake_ncu) -> None:
    folder = fake_ncu(page())
    code, printed, said = run("portable", "--no-ncu")
    assert code == 0 and "(ncu)" not in printed and "Nsight" not in said and not (folder / "asked").exists()


@pytest.mark.parametrize("text", ["==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n", ""])
def test_a_failing_ncu_is_one_line_and_exit_2_and_no_table(run: Run, gpu, fake_ncu, text: str) -> None:
    fake_ncu(text, code=1 if text else 0)
    code, printed, said = run("portable")
    assert code == 2 and printed == ""
    assert [line for line in said.splitlines() if line.startswith("error: ")] == said.splitlines()[-1:]


def test_the_childs_own_words_arrive(run: Run, gpu, fake_ncu, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ncu("==WARNING== No kernels were profiled.\n", runs_target=True)
    # the child sees no GPU, whatever this machine has
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, printed, said = run("portable", "--causal")
    assert code == 2 and printed == ""
    assert said.splitlines()[-1].startswith("error: the call that was to be profiled failed: device: there is no NVIDIA GPU")


def test_what_is_wrong_is_not_profiled(run: Run, gpu, page, fake_ncu, monkeypatch, artifact: Artifact) -> None:
    folder = fake_ncu(page())
    wrong = ContenderRecord(name="flashcore-portable", kind="ours", status="wrong", reason="NaN in the output")
    record = artifact.shapes[0].model_copy(update={"contenders": [wrong]})
    monkeypatch.setattr(runner, "run", lambda *arguments: artifact.model_copy(update={"shapes": [record]}))
    code, printed, said = run("portable")
    assert code == 2 and "error: portable on 1,8,512,64 fp16: wrong: NaN in the output" in said
    assert printed == "" and not (folder / "asked").exists()


def test_without_a_gpu_the_evidence_speaks_and_ncu_is_not_started(page, fake_ncu, tmp_path: Path) -> None:
    folder = fake_ncu(page())
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "flashcore", "profile", "small", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "There is no NVIDIA GPU here" in done.stderr and not (folder / "asked").exists()
    assert "Roofline recorded on NVIDIA H200" in done.stdout and "flashcore-small" in done.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["roofline-small-1-8-512-64-fp16.png"]


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_every_recorded_run_is_placed(run: Run, tmp_path: Path, path: Path) -> None:
    code, printed, _ = run("--from", str(path), "--out", str(tmp_path))
    assert code == 0 and (tmp_path / f"roofline-{path.stem}.png").read_bytes().startswith(PNG)
    artifact = load(path)
    assert all(record.shape.label in printed for record in artifact.shapes) and "flashcore" in printed
    assert "empty kernel" not in printed and f"{artifact.peaks.copy_tbytes:.3g} TB/s" in printed


def test_the_ladders_record_is_placed_with_all_its_shapes(run: Run, tmp_path: Path) -> None:
    path = evidence.FOLDER / "nvidia-h200" / "ladder.json"
    code, printed, _ = run("--from", str(path), "--out", str(tmp_path))
    assert code == 0 and (tmp_path / "roofline-ladder.png").read_bytes().startswith(PNG)
    assert {line.split("│")[2].strip() for line in printed.splitlines() if "ladder-hopper" in line} == {
        "1,8,512,64 fp16",
        "4,16,4096,64 fp16",
    }


def test_a_recorded_run_is_narrowed(run: Run) -> None:
    fa = str(evidence.FOLDER / "nvidia-h200" / "bench-fa.json")
    code, printed, _ = run("hopper", "--from", fa, "--shape", "8,16,2048,128", "--causal")
    assert code == 0 and "8,16,2048,128 fp16 causal" in printed
    assert "flashcore-hopper" in printed and "sdpa" not in printed and "16,32,1024,64" not in printed


def test_on_paper(run: Run, tmp_path: Path) -> None:
    code, printed, _ = run("--paper", "l4", "--shape", "mission", "--shape", "4,16,4096,64", "--out", str(tmp_path))
    assert code == 0 and "NOT a measurement" in printed and "6.99 (memory)" in printed and "2272 (compute)" in printed
    assert (tmp_path / "roofline-l4-paper.png").read_bytes().startswith(PNG)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("flash",), "impl: 'flash' is unknown; allowed: auto, small"),
        (("--shape", "1,8,512"), "B,H,S,D"),
        (("--dtype", "fp8"), "fp16, bf16, fp32"),
        (("--paper", "h100"), "allowed: l4"),
        (("--paper", "l4", "--from", "x.json"), "from and paper: got both"),
        (("hopper", "--paper", "l4"), "times no implementation"),
        (("--paper", "l4", "--dtype", "fp32"), "dtype: fp32 has no ceiling"),
        (("--from", str(RECORDED[0]), "--causal"), "with --shape only"),
        (("--from", "/nowhere.json"), "artifact: /nowhere.json cannot be read"),
        (("--from", __file__), "is not a flashcore-bench artifact"),
        (("--from", str(RECORDED[0]), "--shape", "3,7,333,64"), "nothing to place"),
        (("--out", __file__), "is a file; allowed: a folder"),
        (("--shape", "3,7,333,64"), "recorded are"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(run: Run, arguments: tuple[str, ...], named: str) -> None:
    code, printed, said = run(*arguments)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and printed == "" and len(errors) == 1 and named in errors[0] and said.splitlines()[-1] == errors[0]


def test_help_imports_no_torch_and_the_package_shadows_nothing() -> None:
    program = (
        "import sys\n"
        "sys.argv = ['flashcore', 'profile', '--help']\n"
        "from flashcore import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "import profile, cProfile, flashcore.profile\n"
        "print('torch' in sys.modules, hasattr(profile, 'Profile'), flashcore.profile is profile)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False True False", done.stderr


def test_without_a_gpu_a_step_is_placed_by_the_ladders_record(run: Run, no_gpu) -> None:
    code, printed, said = run("tuned_tiles", "--shape", "4,16,4096,64")
    assert code == 0 and "recorded" in said
    assert "ladder-tuned_tiles" in printed and "flashcore-hopper" not in printed
    code, _, said = run("tuned_tiles", "--shape", "1,2,77,64")
    assert code == 2 and "no recorded run timed ladder-tuned_tiles on 1,2,77,64" in said
