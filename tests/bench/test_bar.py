"""The bar of the kernel for Hopper, and what both bars share: cells, verdicts, and that nothing missed or missing is hidden."""

import io
import statistics
from collections.abc import Callable

import pytest
from rich.console import Console

from flashcore.bench import work
from flashcore.bench.artifact import Artifact, ContenderRecord, SeriesRecord, ShapeRecord
from flashcore.bench.bar import BARS, FA, LENGTHS, bars_of
from flashcore.bench.bar_view import bar_views, verdict
from flashcore.bench.markdown import view_to_markdown
from flashcore.bench.report import print_report
from flashcore.bench.shapes import GRIDS, NAMED_SHAPES, Shape
from flashcore.bench.timing import Series
from flashcore.bench.view import View

Make = Callable[..., Artifact]
Ratios = Callable[[Shape], float]
OURS, PEER = FA.ours, "sdpa-cudnn"
CUDNN_US = 9.0  # what the artifact of conftest.py has for every shape


def _artifact(
    make_artifact: Make, first: Ratios, other: Ratios | None = None, shapes: tuple[Shape, ...] = GRIDS["fa"]
) -> Artifact:
    """A run of grid fa in which flashcore-hopper is so many times as fast as cuDNN."""

    def series(us: float, reversed_us: float | None) -> list[SeriesRecord]:
        warm = SeriesRecord.of(Series("device_warm", 10, (us,) * 3))
        if reversed_us is None:
            return [warm]
        again = SeriesRecord.of(Series("device_reversed", 10, (reversed_us,) * 3))
        return [warm, again.model_copy(update={"to_first": reversed_us / us})]

    def changed(record: ShapeRecord) -> ShapeRecord:
        retimed = None if other is None else CUDNN_US
        ours_again = None if other is None else CUDNN_US / other(record.shape)
        hopper = ContenderRecord(
            name=OURS, kind="ours", status="timed", series=series(CUDNN_US / first(record.shape), ours_again)
        )
        peer = ContenderRecord(name=PEER, kind="sdpa", status="timed", series=series(CUDNN_US, retimed))
        auto = ContenderRecord(name="flashcore", kind="ours", status="timed", series=series(CUDNN_US / 2, None))
        return record.model_copy(update={"contenders": [hopper, peer, auto]})

    artifact = make_artifact(*shapes)
    settings = artifact.settings.model_copy(update={"grid": "fa", "retime": other is not None})
    return artifact.model_copy(update={"settings": settings, "shapes": [changed(record) for record in artifact.shapes]})


def _bar_of(shape: Shape) -> float | None:
    (cell,) = FA.of(shape)
    return cell.faster


def _wanted(shape: Shape) -> float:
    return _bar_of(shape) or 1.0


def _bar_view(artifact: Artifact) -> View | None:
    """The one table there is of a forward run, None where there is none."""
    views = bar_views(artifact)
    assert len(views) <= 1
    return views[0] if views else None


def _rows(view: View | None) -> dict[str, dict[str, str]]:
    assert view is not None
    return {row[0]: dict(zip(view.columns, row, strict=True)) for row in view.rows}


RATIO, OTHER = f"{OURS} / {PEER}", "in the other order"
CELLS = tuple(cell.shape for cell in FA.cells)


def test_the_bar_has_its_24_cells() -> None:
    assert len(CELLS) == 24 and {shape.seqlen_q for shape in CELLS} == set(LENGTHS)
    assert {(shape.head_dim, shape.causal) for shape in CELLS} == {(d, c) for d in (64, 128, 256) for c in (False, True)}
    by_cell = {(shape.head_dim, shape.seqlen_q, shape.causal): _bar_of(shape) for shape in CELLS}
    assert by_cell[64, 4096, False] == 1.11 and by_cell[64, 4096, True] == 1.10
    assert by_cell[128, 1024, False] == 1.03 and by_cell[128, 1024, True] == 1.18
    assert by_cell[256, 16384, False] == 1.02 and by_cell[256, 16384, True] == 1.04
    assert _bar_of(NAMED_SHAPES["mission"]) is None


def test_what_reaches_the_bar_in_both_orders_meets_it(make_artifact: Make) -> None:
    rows = _rows(_bar_view(_artifact(make_artifact, lambda s: _wanted(s) + 0.2, lambda s: _wanted(s) + 0.1)))
    assert len(rows) == 37
    for shape in GRIDS["fa"]:
        row = rows[shape.label]
        wanted = _bar_of(shape)
        assert row["verdict"] == ("-" if wanted is None else "met")
        assert row["bar"] == ("-" if wanted is None else f"{wanted:.2f}")
        assert row[RATIO].startswith(f"{(wanted or 1.0) + 0.2:.3f} [") and row[OTHER] == f"{(wanted or 1.0) + 0.1:.3f}"
        assert row["flashcore / sdpa-cudnn"] == "2.000"
    mean = rows["geometric mean of the bar's 24 cells"]
    of_cells = statistics.geometric_mean(_wanted(shape) + 0.2 for shape in CELLS)
    assert mean[RATIO] == f"{of_cells:.3f}" and mean["verdict"] == "met"


def test_a_miss_is_shown_in_its_row_and_in_the_mean(make_artifact: Make) -> None:
    slow = next(shape for shape in CELLS if (shape.head_dim, shape.seqlen_q, shape.causal) == (128, 4096, True))

    def first(shape: Shape) -> float:
        return 1.21 if shape == slow else 1.0

    rows = _rows(_bar_view(_artifact(make_artifact, first, first)))
    assert rows[slow.label]["verdict"] == "missed" and rows[slow.label]["bar"] == "1.22"
    verdicts = [row["verdict"] for row in rows.values()]
    # only the four cells of D 256 whose bar is 1 are met
    assert (verdicts.count("met"), verdicts.count("missed")) == (4, 21)
    assert rows["geometric mean of the bar's 24 cells"]["verdict"] == "missed"


def test_the_cells_are_counted_and_those_of_shapes_left_out_are_not_timed(make_artifact: Make) -> None:
    def first(shape: Shape) -> float:
        return 1.0

    whole = _bar_view(_artifact(make_artifact, first, first))
    assert whole is not None and "4 of the bar's 24 cells met; 20 missed" in whole.notes
    part = _bar_view(_artifact(make_artifact, first, first, shapes=GRIDS["fa"][:4]))
    assert part is not None and "0 of the bar's 24 cells met; 3 missed; 21 not timed" in part.notes


def test_a_bar_speaks_of_shapes_of_its_grid_alone() -> None:
    assert {bar.grid for bar in BARS} == {"fa", "small", "fa-bwd"}
    for bar in BARS:
        assert bar in bars_of(bar.grid, bar.direction) and {cell.shape for cell in bar.cells} <= set(GRIDS[bar.grid])
    assert bars_of("fa-bwd", "fwd") == bars_of("fa", "bwd") == bars_of(None, "fwd") == ()


@pytest.mark.parametrize(
    ("reached", "words"),
    [
        ((True, True), "met"),
        ((False, True), "missed in one order"),
        ((True, False), "missed in one order"),
        ((False, False), "missed"),
        ((True, None), "met, in one order"),
        ((False, None), "missed"),
        ((None, None), "not timed"),
        ((None, True), "not timed"),
        ((True,), "met"),
        ((False,), "missed"),
        ((None,), "not timed"),
    ],
)
def test_verdicts(reached: tuple[bool | None, ...], words: str) -> None:
    assert verdict(reached) == words


def test_just_below_the_bar_is_missed(make_artifact: Make) -> None:
    shape = CELLS[2]
    for first, words in ((_wanted(shape), "met"), (_wanted(shape) - 1e-3, "missed in one order")):
        rows = _rows(_bar_view(_artifact(make_artifact, lambda s, f=first: f, lambda s: 2.0, shapes=(shape,))))
        assert rows[shape.label]["verdict"] == words


def test_a_cell_that_was_not_timed_leaves_no_mean(make_artifact: Make) -> None:
    whole = _artifact(make_artifact, lambda s: 2.0)
    failed = ContenderRecord(name=OURS, kind="ours", status="wrong", reason="max error")
    record = whole.shapes[0].model_copy(update={"contenders": [failed, *whole.shapes[0].contenders[1:]]})
    rows = _rows(_bar_view(whole.model_copy(update={"shapes": [record, *whole.shapes[1:]]})))
    assert rows[GRIDS["fa"][0].label]["verdict"] == "not timed" and rows[GRIDS["fa"][0].label][RATIO] == "-"
    mean = rows["geometric mean of the bar's 24 cells"]
    assert (mean[RATIO], mean["verdict"]) == ("-", "not timed")
    # cells that are not of the bar are not missed from it
    of_bar = _rows(_bar_view(_artifact(make_artifact, lambda s: 2.0, shapes=CELLS)))
    assert of_bar["geometric mean of the bar's 24 cells"]["verdict"] == "met, in one order"


def test_rates_and_the_share_of_the_measured_matrix_rate(make_artifact: Make) -> None:
    artifact = _artifact(make_artifact, lambda s: 1.5)
    shape = GRIDS["fa"][0]
    row = _rows(_bar_view(artifact))[shape.label]
    rate = work.tflops(shape, CUDNN_US / 1.5)
    assert row["TFLOP/s"] == f"{rate:.0f}" and row["flashcore-hopper us"] == "6.00"
    assert row["% of matrix rate"] == f"{100 * rate / 650:.1f}"
    assert row["sdpa-cudnn TFLOP/s"] == f"{work.tflops(shape, CUDNN_US):.0f}"


def test_how_far_the_orders_differ_is_said(make_artifact: Make) -> None:
    moved = GRIDS["fa"][7]
    view = _bar_view(_artifact(make_artifact, lambda s: 1.0, lambda s: 1 / 1.03 if s == moved else 1.0))
    assert (
        view is not None and f"by 0.00 % in the median, by +3.00 % at most (flashcore-hopper, {moved.label})" in view.notes[-1]
    )
    once = _bar_view(_artifact(make_artifact, lambda s: 1.0))
    assert once is not None and once.notes[-1] == "timed in one order only"


def test_only_a_gpu_run_of_its_grid_has_the_table(make_artifact: Make) -> None:
    artifact = _artifact(make_artifact, lambda s: 1.0)
    other = artifact.model_copy(update={"settings": artifact.settings.model_copy(update={"grid": "decode"})})
    cpu = artifact.model_copy(update={"environment": artifact.environment.model_copy(update={"gpu": None})})
    assert _bar_view(other) is None and _bar_view(cpu) is None


def test_terminal_and_markdown_show_it(make_artifact: Make) -> None:
    artifact = _artifact(make_artifact, lambda s: 1.0)
    out = io.StringIO()
    print_report(artifact, Console(file=out, width=250))
    view = _bar_view(artifact)
    assert view is not None
    for text in ("the bar, NVIDIA H200", "geometric mean of the bar's 24 cells", "missed", "timed in one order only"):
        assert text in out.getvalue() and text in view_to_markdown(view)
