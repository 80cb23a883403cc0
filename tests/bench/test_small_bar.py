"""The bar of small shapes: its cells in the issue's own terms, and that no cell is met that is not reached."""

import io
from collections.abc import Callable, Mapping

import pytest
from rich.console import Console

from flashcore.bench.artifact import Artifact, ContenderRecord, SeriesRecord, ShapeRecord
from flashcore.bench.bar import SMALL, Cell
from flashcore.bench.bar_view import bar_views
from flashcore.bench.contenders import contenders
from flashcore.bench.report import print_report
from flashcore.bench.shapes import GRIDS, NAMED_SHAPES, Shape
from flashcore.bench.timing import Mode, Series
from flashcore.bench.view import View

Make = Callable[..., Artifact]
Times = Callable[[Shape, Mode], float]
PEERS = {"sdpa-flash": 10.0, "sdpa-cudnn": 8.0, "sdpa-efficient": 20.0, "sdpa-math": 60.0, "sdpa-auto": 8.0}
MODES: tuple[Mode, ...] = ("device_warm", "device_cold", "eager_stream")
RATIO = "flashcore / fastest SDPA"


def _contender(name: str, times: Mapping[Mode, float]) -> ContenderRecord:
    kind = "ours" if name.startswith("flashcore") else "peer" if name == "sdpa-auto" else "sdpa"
    series = [SeriesRecord.of(Series(mode, 10, (us * 0.99, us, us * 1.01))) for mode, us in times.items()]
    return ContenderRecord(name=name, kind=kind, status="timed", series=series)


def _artifact(
    make_artifact: Make,
    ours: Times,
    peers: Mapping[str, float] = PEERS,
    shapes: tuple[Shape, ...] = GRIDS["small"],
    floor: bool = True,
) -> Artifact:
    """A run of grid small in which ours and the peers take these times, the peers the same in every mode and on every shape."""

    def changed(record: ShapeRecord) -> ShapeRecord:
        timed = [_contender("flashcore", {mode: ours(record.shape, mode) for mode in MODES})]
        timed += [_contender(name, dict.fromkeys(MODES, us)) for name, us in peers.items()]
        empty = _contender("empty kernel", {"device_warm": 0.8, "eager_stream": 4.5}).model_copy(update={"kind": "floor"})
        return record.model_copy(update={"contenders": [*timed, *([empty] if floor else [])]})

    artifact = make_artifact(*shapes)
    settings = artifact.settings.model_copy(update={"grid": "small"})
    return artifact.model_copy(update={"settings": settings, "shapes": [changed(record) for record in artifact.shapes]})


def _bar_view(artifact: Artifact) -> View | None:
    """The one table there is of a forward run, None where there is none."""
    views = bar_views(artifact)
    assert len(views) <= 1
    return views[0] if views else None


def _rows(view: View | None) -> dict[tuple[str, str, bool], dict[str, str]]:
    """By shape, series, and whether the bar is a time."""
    assert view is not None
    rows = [dict(zip(view.columns, row, strict=True)) for row in view.rows]
    return {(row["shape"], row["series"], row["bar"].endswith(" us")): row for row in rows}


def _verdicts(artifact: Artifact) -> list[str]:
    return [row["verdict"] for row in _rows(_bar_view(artifact)).values()]


def _share(cell: Cell) -> float:
    assert cell.faster is not None
    return 1 / cell.faster


def test_the_cells_are_those_of_the_issue() -> None:
    def place(shape: Shape) -> tuple[int, int, int, int, bool]:
        return shape.batch, shape.heads_q, shape.seqlen_q, shape.head_dim, shape.causal

    shares = {
        (place(cell.shape), cell.mode): round(_share(cell), 6)
        for cell in SMALL.cells
        if cell.us is None and cell.mode != "device_cold"
    }
    assert shares == {
        ((1, 8, 512, 64, False), "device_warm"): 0.44,
        ((1, 8, 512, 64, True), "device_warm"): 0.45,
        ((1, 12, 197, 64, False), "device_warm"): 0.50,
        ((4, 8, 128, 64, False), "device_warm"): 0.60,
        ((1, 16, 1024, 64, False), "device_warm"): 0.60,
        ((1, 32, 512, 128, False), "device_warm"): 0.70,
        ((32, 8, 512, 64, False), "device_warm"): 0.85,
        ((1, 8, 512, 64, False), "eager_stream"): 0.60,
    }
    cold = {cell.shape: _share(cell) for cell in SMALL.cells if cell.mode == "device_cold"}
    assert cold == dict.fromkeys(GRIDS["small"], 1.0)
    times = [(cell.shape, cell.mode, cell.us) for cell in SMALL.cells if cell.us is not None]
    assert times == [(NAMED_SHAPES["mission"], "eager_stream", 10.0)]
    assert SMALL.ours == "flashcore" and SMALL.mean is None and SMALL.times_calls


def test_a_call_is_held_against_every_way_to_call_sdpa_and_a_launch_against_the_fused_ones() -> None:
    assert set(SMALL.peers["eager_stream"]) == {name for name in contenders() if name.startswith("sdpa-")}
    fused = {"sdpa-flash", "sdpa-cudnn", "sdpa-efficient"}
    assert set(SMALL.peers["device_warm"]) == set(SMALL.peers["device_cold"]) == fused


def _at_the_bar(factor: float) -> Times:
    """Our times at so many times what each series of each shape may take."""
    allowed = {(cell.shape, cell.mode): 8.0 * _share(cell) for cell in SMALL.cells if cell.us is None}
    return lambda shape, mode: factor * allowed.get((shape, mode), 1.0)


def test_just_under_the_bar_is_met_and_just_over_it_is_missed(make_artifact: Make) -> None:
    under, over = (_artifact(make_artifact, _at_the_bar(factor)) for factor in (0.999, 1.001))
    assert _verdicts(under) == ["met"] * 16
    # a call of 4.8 us is within the 10
    assert _verdicts(over) == ["missed" if not is_time else "met" for *_, is_time in _rows(_bar_view(over))]
    view = _bar_view(over)
    assert view is not None and "1 of the bar's 16 cells met; 15 missed" in view.notes


def test_a_row_says_it_in_the_terms_of_the_issue(make_artifact: Make) -> None:
    rows = _rows(_bar_view(_artifact(make_artifact, lambda shape, mode: 4.0 if mode == "device_warm" else 9.0)))
    mission = NAMED_SHAPES["mission"].label
    warm = rows[mission, "device_warm", False]
    assert (warm["bar"], warm["verdict"], warm["flashcore us"]) == ("0.44", "missed", "4.00")
    assert (warm["fastest SDPA us"], warm["which"], warm["floor us"]) == ("8.00", "sdpa-cudnn", "0.800")
    ratio, low, high = warm[RATIO].replace("[", "").replace("]", "").replace(",", "").split()
    assert ratio == "0.500" and float(low) <= 0.5 <= float(high)
    assert rows[GRIDS["small"][2].label, "device_warm", False]["verdict"] == "met"  # 0.50 is allowed there
    cold = rows[mission, "device_cold", False]
    assert (cold["bar"], cold[RATIO].split()[0], cold["verdict"], cold["floor us"]) == ("1.00", "1.125", "missed", "-")
    call = rows[mission, "eager_stream", False]
    assert (call["bar"], call[RATIO].split()[0], call["verdict"], call["floor us"]) == ("0.60", "1.125", "missed", "4.50")
    time = rows[mission, "eager_stream", True]
    assert (time["bar"], time[RATIO], time["verdict"]) == ("10.0 us", "-", "met")


@pytest.mark.parametrize(("us", "words"), [(9.99, "met"), (10.0, "met"), (10.01, "missed")])
def test_a_call_may_take_so_long_and_no_longer(make_artifact: Make, us: float, words: str) -> None:
    rows = _rows(_bar_view(_artifact(make_artifact, lambda shape, mode: us)))
    assert rows[NAMED_SHAPES["mission"].label, "eager_stream", True]["verdict"] == words


def test_calls_are_held_against_plain_sdpa_where_that_is_the_fastest(make_artifact: Make) -> None:
    artifact = _artifact(make_artifact, lambda shape, mode: 4.5, {**PEERS, "sdpa-auto": 5.0})
    rows = _rows(_bar_view(artifact))
    mission = NAMED_SHAPES["mission"].label
    assert rows[mission, "eager_stream", False]["which"] == "sdpa-auto"
    assert rows[mission, "eager_stream", False][RATIO].startswith("0.900 [")
    # what auto takes on the device is one of the backends that are forced
    assert rows[mission, "device_warm", False]["which"] == "sdpa-cudnn"


@pytest.mark.parametrize("gone", ["sdpa-cudnn", "sdpa-efficient", "flashcore"])
def test_without_one_of_the_peers_or_ours_nothing_is_met(make_artifact: Make, gone: str) -> None:
    whole = _artifact(make_artifact, lambda shape, mode: 1.0)
    records = [
        record.model_copy(update={"contenders": [c for c in record.contenders if c.name != gone]}) for record in whole.shapes
    ]
    rows = _rows(_bar_view(whole.model_copy(update={"shapes": records})))
    # a time is measured against none of them
    expected = {True: "met" if gone != "flashcore" else "not timed", False: "not timed"}
    assert all(row["verdict"] == expected[is_time] for (*_, is_time), row in rows.items())
    assert all(row[RATIO] == "-" for row in rows.values())


def test_a_run_without_calls_meets_no_cell_of_calls(make_artifact: Make) -> None:
    whole = _artifact(make_artifact, lambda shape, mode: 1.0)
    records = [
        record.model_copy(
            update={
                "contenders": [
                    c.model_copy(update={"series": [s for s in c.series if s.mode != "eager_stream"]})
                    for c in record.contenders
                ]
            }
        )
        for record in whole.shapes
    ]
    view = _bar_view(whole.model_copy(update={"shapes": records}))
    assert view is not None and "14 of the bar's 16 cells met; 2 not timed" in view.notes
    rows = _rows(view)
    assert {row["verdict"] for (_, series, _), row in rows.items() if series == "eager_stream"} == {"not timed"}


def test_shapes_left_out_are_counted_and_others_are_not_judged(make_artifact: Make) -> None:
    shapes = (GRIDS["small"][3], NAMED_SHAPES["tiny"])
    view = _bar_view(_artifact(make_artifact, lambda shape, mode: 1.0, shapes=shapes))
    assert view is not None and "2 of the bar's 16 cells met; 14 not timed" in view.notes
    assert _rows(view)[NAMED_SHAPES["tiny"].label, "device_warm", False]["verdict"] == "-"


def test_the_terminal_shows_the_bar_of_the_mission_shape(make_artifact: Make) -> None:
    out = io.StringIO()
    print_report(_artifact(make_artifact, lambda shape, mode: 4.0), Console(file=out, width=250))
    for text in ("the bar, NVIDIA H200", "0.44", "10.0 us", "missed", "eager_stream", "of the bar's 16 cells met"):
        assert text in out.getvalue()
