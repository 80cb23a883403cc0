"""What is made of a run's artifact: the table, Markdown, the plot, and the file itself."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flashcore.bench import work
from flashcore.errors import ArgumentValueError, UnsupportedError
from flashcore.ladder import artifact
from flashcore.ladder.artifact import LadderArtifact
from flashcore.ladder.measure import SHAPES
from flashcore.ladder.plot import plot
from flashcore.ladder.table import COLUMNS, brought, rows, to_markdown, view

Make = Callable[..., LadderArtifact]


def test_each_step_is_compared_with_the_one_before_and_with_pytorch(make_ladder: Make) -> None:
    ladder = make_ladder()
    baseline, unfused, scalar, vectorised = rows(ladder, ladder.shapes[0])
    assert (baseline.us, baseline.before, baseline.baseline) == (80.0, None, 1.0)
    assert (unfused.us, unfused.before, unfused.baseline) == (40.0, None, 2.0)
    # a step that got slower is shown as it is
    assert (scalar.us, scalar.before, scalar.baseline) == (160.0, 0.25, 0.5)
    assert unfused.tflops == pytest.approx(work.tflops(SHAPES[0], 40.0)) and unfused.share == pytest.approx(
        unfused.tflops / 500
    )
    assert vectorised.us is None and vectorised.tflops is None and "not finite" in vectorised.verdict


def test_the_step_after_one_that_was_not_timed_is_compared_with_the_last_that_was(make_ladder: Make) -> None:
    ladder = make_ladder(steps=["unfused", "vectorised", "scalar"])
    assert [row.before for row in rows(ladder, ladder.shapes[0])] == [None, None, None, 0.25]


def test_the_table_shows_the_worst_of_several_kernels(make_ladder: Make) -> None:
    ladder = make_ladder()
    shown = view(ladder, ladder.shapes[1])
    assert all(len(row) == len(COLUMNS) for row in shown.rows)
    by_name = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in shown.rows}
    assert [by_name["unfused"][column] for column in ("registers", "spills", "shared")] == ["90", "2", "1024"]
    assert by_name["PyTorch, unfused"]["registers"] == by_name["vectorised"]["us"] == "-"
    assert "4,16,4096,64" in shown.title and any("500 TFLOP/s" in note for note in shown.notes)
    assert shown.notes[-1].endswith("made by Triton 3.9.0")


def test_markdown_has_a_table_a_shape(make_ladder: Make) -> None:
    text = to_markdown(make_ladder())
    assert text.count("| step | us |") == 2 and "| scalar | 160 |" in text and text.endswith("\n")


def test_what_a_step_brought_is_told_by_shape(make_ladder: Make) -> None:
    ladder = make_ladder()
    scalar = brought(ladder, "scalar")
    assert [line.split(":")[0] for line in scalar] == [shape.label for shape in SHAPES]
    assert scalar[0].endswith("0.25 times as fast as the step before; 0.50 times as fast as unfused PyTorch")
    assert all("step before" not in line and "160" not in line for line in brought(ladder, "unfused"))
    assert "not finite" in brought(ladder, "vectorised")[1] and brought(ladder, "hopper")[0].endswith(": not in this run")
    assert brought(make_ladder(shapes=[]), "scalar") == ["no shape was timed"]


def test_an_artifact_is_read_back_and_another_is_refused(make_ladder: Make, tmp_path: Path) -> None:
    path = tmp_path / "ladder.json"
    ladder = make_ladder()
    ladder.save(path)
    assert artifact.load(path) == ladder and list(tmp_path.iterdir()) == [path]
    path.write_text(path.read_text().replace('"schema_version":1,"kind":"flashcore-ladder"', '"schema_version":2,"kind":"x"'))
    with pytest.raises(ArgumentValueError, match="not a flashcore-ladder artifact of schema 1: schema_version"):
        artifact.load(path)
    with pytest.raises(ArgumentValueError, match="cannot be read"):
        artifact.load(tmp_path / "none.json")


def test_failures_are_named(make_ladder: Make) -> None:
    ladder = make_ladder()
    assert [line.split(":")[0] for line in ladder.failures] == ["vectorised"] and "small-seed0" in ladder.failures[0]
    assert make_ladder(verification=ladder.verification[:2]).failures == []


def test_a_step_that_ran_nothing_or_lets_a_mutation_through_is_not_sound(make_ladder: Make) -> None:
    right = make_ladder().verification[0]
    assert right.sound
    for change in ({"passed": []}, {"missed": ["one NaN"]}, {"mutations": []}, {"failed": {"a": "b"}}):
        assert not right.model_copy(update=change).sound


def test_the_plot_is_a_png_and_needs_something_that_was_timed(make_ladder: Make, tmp_path: Path) -> None:
    path = tmp_path / "ladder.png"
    plot(make_ladder(), path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    with pytest.raises(UnsupportedError, match="at least one step that was timed"):
        plot(make_ladder(shapes=[]), path)
