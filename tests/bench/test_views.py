"""What is shown of an artifact: on a terminal, in Markdown, in a plot."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from flashcore.bench import plot
from flashcore.bench.artifact import Artifact
from flashcore.bench.markdown import to_markdown
from flashcore.bench.report import print_report
from flashcore.bench.shapes import GRIDS, Shape, parse_shape
from flashcore.bench.view import View, call_view, grid_view, rate, shape_view, unit_of, views
from flashcore.errors import UnsupportedError

Make = Callable[..., Artifact]


def test_shape_table_ranks_and_explains(make_artifact: Make) -> None:
    artifact = make_artifact()
    view = shape_view(artifact, artifact.shapes[0])
    assert [row[0] for row in view.rows] == [
        "empty kernel",
        "flashcore",
        "sdpa-cudnn",
        "flashcore-portable",
        "sdpa-flash",
        "flex",
    ]
    cells = dict(zip(view.columns, view.rows[1], strict=True))
    assert cells["device us p50 (p10-p90)"] == "8.00 (7.94-8.06)"
    assert (cells["cold us"], cells["eager us"], cells["latency us"]) == ("12.0", "24.0", "32.0")
    # 537 MFLOP in 8 us; 2 MiB at 4 TB/s take 0.52 us and 537 MFLOP at 650 TFLOP/s 0.83 us.
    assert (cells["TFLOP/s"], cells["% of bound"]) == ("67.1", "10.3")
    assert cells["x sdpa-cudnn"].startswith("1.12 [1.1") and cells["verdict"] == "ok 1.0e-04 <= 1.0e-03"
    assert view.rows[2][view.columns.index("x sdpa-cudnn")] == "baseline"
    assert view.rows[-1][-1] == "failed: RuntimeError: no compiler"
    assert "xformers: not timed: xformers is not installed" in view.notes


def test_grid_table_has_a_row_a_shape(make_artifact: Make) -> None:
    artifact = make_artifact(*GRIDS["small"])
    view = grid_view(artifact, "device_warm")
    assert [row[0] for row in view.rows] == [shape.label for shape in GRIDS["small"]]
    assert view.rows[0][view.columns.index("flashcore")] == "8.00 (67.1)"
    assert view.rows[0][view.columns.index("flashcore / best SDPA")].startswith("1.12 [")
    assert view.rows[0][view.columns.index("flex")] == "failed" and "xformers" not in view.columns
    assert "xformers: not timed: xformers is not installed (all shapes)" in view.notes


def _cells(view: View) -> dict[str, str]:
    return dict(zip(view.columns, view.rows[0], strict=True))


def test_a_grid_has_tables_of_warm_of_cold_and_of_calls_where_these_were_timed(make_artifact: Make) -> None:
    artifact = make_artifact(*GRIDS["small"])
    warm, cold, calls = views(artifact)
    assert (_cells(warm)["flashcore"], _cells(cold)["flashcore"]) == ("8.00 (67.1)", "12.0 (44.7)")
    assert _cells(calls)["flashcore"] == "24.0 (32.0)" and _cells(calls)["sdpa-cudnn"] == "27.0 (36.0)"
    # the floor stands beside them, without a rate
    assert (_cells(warm)["empty kernel"], _cells(calls)["empty kernel"]) == ("1.20", "4.70 (15.0)")
    assert [row[0] for row in calls.rows] == [shape.label for shape in GRIDS["small"]]
    assert _cells(calls)["flex"] == "failed" and "xformers" not in calls.columns

    def without(*modes: str) -> Artifact:
        records = [
            record.model_copy(
                update={
                    "contenders": [
                        contender.model_copy(update={"series": [s for s in contender.series if s.mode not in modes]})
                        for contender in record.contenders
                    ]
                }
            )
            for record in artifact.shapes
        ]
        return artifact.model_copy(update={"shapes": records})

    assert views(without("eager_stream", "eager_latency")) == [warm, cold]
    assert views(without("device_cold")) == [warm, calls]
    # a series that only some shapes have leaves a gap, not a figure
    assert _cells(call_view(without("eager_latency")))["flashcore"] == "24.0 (-)"


def test_decode_is_rated_by_its_bytes(make_artifact: Make, decode_shapes: tuple[Shape, ...]) -> None:
    record = make_artifact(*decode_shapes).shapes[0]
    assert record.work.bound_limit == "memory" and unit_of([record]) == "TB/s"
    assert rate(record, 10.0, unit_of([record])) == pytest.approx(record.work.min_bytes / 10e-6 / 1e12)


def test_few_samples_and_a_cpu_are_said(make_artifact: Make) -> None:
    artifact = make_artifact()
    few = artifact.model_copy(
        update={
            "settings": artifact.settings.model_copy(update={"iters": 20}),
            "environment": artifact.environment.model_copy(update={"gpu": None}),
        }
    )
    notes = " ".join(shape_view(few, few.shapes[0]).notes)
    assert "20 samples" in notes and "No GPU" in notes


@pytest.mark.parametrize("shapes", [("mission",), ("mission", "tiny", "small")])
def test_terminal_and_markdown_hold_the_same_cells(make_artifact: Make, shapes: tuple[str, ...]) -> None:
    artifact = make_artifact(*(parse_shape(shape) for shape in shapes))
    out = io.StringIO()
    print_report(artifact, Console(file=out, width=250))
    markdown = to_markdown(artifact)
    for text in ("flashcore-portable", "NVIDIA H200", "2026-11-20", "8.00", "xformers is not installed"):
        assert text in out.getvalue() and text in markdown
    for table in markdown.split("**\n\n")[1:]:
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len(rows) >= 5 and len({row.count("|") for row in rows}) == 1
    assert markdown.endswith("\n")


@pytest.mark.parametrize("name", ["one", "small", "fa", "decode"])
def test_plot_is_a_png(make_artifact: Make, tmp_path: Path, name: str) -> None:
    shapes = GRIDS.get(name, (parse_shape("mission"),))
    plot.plot(make_artifact(*shapes), tmp_path / "run.png")
    data = (tmp_path / "run.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000


def test_plot_without_matplotlib_names_the_extra(make_artifact: Make, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install flashcore\[plot\]"):
        plot.plot(make_artifact(), tmp_path / "run.png")


def test_plot_of_nothing_timed_is_refused(make_artifact: Make, tmp_path: Path) -> None:
    artifact = make_artifact()
    record = artifact.shapes[0].model_copy(update={"contenders": []})
    with pytest.raises(UnsupportedError, match="at least one contender"):
        plot.plot(artifact.model_copy(update={"shapes": [record]}), tmp_path / "run.png")
