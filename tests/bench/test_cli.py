"""`flashcore bench` from outside: exit codes, one line for a mistake, files written."""

from pathlib import Path

import pytest

from flashcore import cli
from flashcore.bench import contenders as registry
from flashcore.bench import runner
from flashcore.bench.artifact import load
from flashcore.errors import UnsupportedError


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["flashcore", "bench", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    return int(exit_info.value.code or 0)


QUICK = ("--shape", "tiny", "--iters", "10", "--impl", "flashcore", "--impl", "sdpa-math", "--dtype", "fp32")


def test_quick_run_writes_what_it_prints(monkeypatch, tmp_path: Path, capsys) -> None:
    out, picture = tmp_path / "run.json", tmp_path / "run.png"
    assert run(monkeypatch, *QUICK, "--causal", "--out", str(out), "--plot", str(picture)) == 0
    printed = capsys.readouterr().out
    artifact = load(out)
    assert artifact.shapes[0].shape.label == "1,1,32,64 fp32 causal" and artifact.shapes[0].shape.label in printed
    assert {c.name for c in artifact.shapes[0].contenders if c.status == "timed"} >= {"flashcore", "sdpa-math"}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_result_of_ours_is_exit_1(monkeypatch, tmp_path: Path, capsys) -> None:
    right = registry.flashcore.attention
    monkeypatch.setattr(registry.flashcore, "attention", lambda *args, **kwargs: right(*args, **kwargs) * 0.95)
    assert run(monkeypatch, *QUICK, "--out", str(tmp_path / "run.json")) == 1
    rows = {c.name: c for c in load(tmp_path / "run.json").shapes[0].contenders}
    assert rows["flashcore"].status == "wrong" and not rows["flashcore"].series
    assert "error: flashcore on 1,1,32,64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "retime", "eager"),
    [
        (("--grid", "fa"), True, False),
        (("--grid", "fa", "--eager"), True, True),
        (("--grid", "small"), False, True),
        (("--grid", "small", "--no-eager"), False, False),
        (("--grid", "decode"), False, True),
        (("--grid", "crossover", "--no-eager"), False, False),
        (("--shape", "tiny"), False, True),
    ],
)
def test_the_bars_grid_is_timed_in_both_orders_without_python_calls(
    monkeypatch, arguments: tuple[str, ...], retime: bool, eager: bool
) -> None:
    asked: list[runner.Request] = []

    def run_nothing(request, device, progress):
        asked.append(request)
        raise UnsupportedError("nothing is measured here")

    monkeypatch.setattr(runner, "run", run_nothing)
    run(monkeypatch, *arguments)
    assert (asked[0].retime, asked[0].eager) == (retime, eager)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--shape", "1,8,512"), "B,H,S,D"),
        (("--grid", "big"), "small, fa, fa-bwd, train, features, decode, crossover"),
        (("--grid", "fa", "--shape", "tiny"), "one of them"),
        (("--dtype", "fp8"), "fp16, bf16, fp32"),
        (("--impl", "magic"), "flashcore-portable"),
        (("--direction", "sideways"), "fwd, bwd, fwdbwd"),
        (("--direction", "bwd", "--impl", "flex"), "flashcore-hopper-deterministic"),
        (("--iters", "3"), "10"),
        (("--out", "/nowhere/at/all.json"), "folder that exists"),
        (("--plot", "/"), "folder that exists"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(monkeypatch, capsys, arguments: tuple[str, ...], named: str) -> None:
    assert run(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error


@pytest.mark.parametrize("direction", ["bwd", "fwdbwd"])
def test_gradients_are_timed_and_written(monkeypatch, tmp_path: Path, capsys, direction: str) -> None:
    out = tmp_path / "run.json"
    assert run(monkeypatch, *QUICK, "--direction", direction, "--out", str(out)) == 0
    artifact = load(out)
    assert artifact.settings.direction == direction
    assert {c.name for c in artifact.shapes[0].contenders if c.status == "timed"} == {"flashcore", "sdpa-math"}
    title = {"bwd": "backward: 1,1,32,64", "fwdbwd": "forward and backward: 1,1,32,64"}[direction]
    assert title in capsys.readouterr().out


def test_a_wrong_gradient_of_ours_is_exit_1(monkeypatch, tmp_path: Path, capsys) -> None:
    right = registry.flashcore.attention

    def attention(q, k, v, **options):
        o = right(q, k, v, **options)
        return o + 0.05 * (o - o.detach())  # right forward; its gradient is scaled

    monkeypatch.setattr(registry.flashcore, "attention", attention)
    assert run(monkeypatch, *QUICK, "--direction", "bwd", "--out", str(tmp_path / "run.json")) == 1
    assert "error: flashcore on 1,1,32,64 fp32: dq: max error" in capsys.readouterr().err
