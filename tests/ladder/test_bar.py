"""The ladder's bar: what is met, what is missed, and that what was not measured is neither."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from flashcore.bench.work import flops
from flashcore.ladder.artifact import LadderArtifact, TimedShape
from flashcore.ladder.bar import COLUMNS, FASTEST, bar_view
from flashcore.ladder.checks import StepVerification, cases
from flashcore.ladder.measure import SHAPES
from flashcore.ladder.steps import STEPS

Make = Callable[..., LadderArtifact]


def _timed(known: SimpleNamespace, times: dict[str, float]) -> list[TimedShape]:
    """Both shapes, on which contenders take these times."""
    records = [known.timed(name, us) for name, us in times.items()]
    return [TimedShape(bench=known.bench(shape, records), code={}) for shape in SHAPES]


def _rows(artifact: LadderArtifact) -> list[dict[str, str]]:
    return [dict(zip(COLUMNS, row, strict=True)) for row in bar_view(artifact).rows]


@pytest.mark.parametrize(("hopper", "verdicts"), [(10.0, ["met"] * 3), (10.1, ["missed"] * 3)])
def test_the_top_is_held_against_the_scalar_step_and_pytorch(make_ladder: Make, known, hopper: float, verdicts) -> None:
    times = {"unfused": 150.0, "ladder-unfused": 100.0, "ladder-scalar": 150.0, "ladder-hopper": hopper}
    rows = _rows(make_ladder(shapes=_timed(known, times)))[:3]
    assert [row["verdict"] for row in rows] == verdicts and {row["of"] for row in rows} == {"hopper"}
    assert [row["shape"] for row in rows] == [SHAPES[0].label, SHAPES[1].label, SHAPES[1].label]
    assert rows[0]["measured"].startswith("15.0 [" if hopper == 10.0 else "14.9 [")


def test_the_top_is_the_last_step_and_not_the_fastest(make_ladder: Make, known) -> None:
    times = {"unfused": 150.0, "ladder-scalar": 150.0, "ladder-async_copies": 5.0, "ladder-hopper": 15.0}
    mission, long, fastest = _rows(make_ladder(shapes=_timed(known, times)))[:3]
    assert (mission["of"], mission["verdict"]) == (long["of"], long["verdict"]) == ("hopper", "missed")
    assert (fastest["of"], fastest["verdict"]) == ("async_copies", "met")


@pytest.mark.parametrize("times", [{}, {"ladder-hopper": 1.0}, {"unfused": 100.0, "ladder-scalar": 100.0}])
def test_nothing_is_met_that_was_not_measured(make_ladder: Make, known, times: dict[str, float]) -> None:
    rows = _rows(make_ladder(shapes=_timed(known, times)))[:3]
    # scalar alone is the top itself, and not ahead of itself
    expected = "missed" if "ladder-scalar" in times else "not timed"
    assert [row["verdict"] for row in rows] == [expected] * 3
    assert [row["verdict"] for row in _rows(make_ladder(shapes=[]))[:3]] == ["not timed"] * 3


def test_a_bar_beyond_the_measured_ceiling_is_said_to_be(make_ladder: Make, known) -> None:
    def said(us: float) -> str:
        return " ".join(bar_view(make_ladder(shapes=_timed(known, {"unfused": us}))).notes)

    shape = SHAPES[-1]
    ceiling = _timed(known, {"unfused": 1.0})[-1].bench.peaks.matrix_tflops[shape.dtype]
    just = FASTEST * flops(shape) / ceiling * 1e-6
    assert "no kernel can" in said(0.99 * just) and "no kernel can" not in said(1.01 * just)
    assert "no kernel can" not in " ".join(bar_view(make_ladder(shapes=[])).notes)


def test_the_whole_ladder_is_every_step_with_every_case_on_a_gpu(make_ladder: Make) -> None:
    right = [
        StepVerification(
            step=step.name, interpreted=False, passed=[case.name for case in cases()], failed={}, mutations=["a"], missed=[]
        )
        for step in STEPS
    ]

    def whole(*verified: StepVerification) -> tuple[str, str, str]:
        row = _rows(make_ladder(verification=list(verified)))[-1]
        return row["bar"], row["measured"], row["verdict"]

    count = str(len(STEPS))
    assert whole(*right) == (count, count, "met")
    fewer = (count, str(len(STEPS) - 1), "missed")
    assert whole(*right[1:]) == fewer
    for change in ({"interpreted": True}, {"missed": ["a"]}, {"failed": {"a": "b"}}, {"passed": right[0].passed[1:]}):
        assert whole(right[0].model_copy(update=change), *right[1:]) == fewer
