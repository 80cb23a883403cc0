"""The bars of the backward pass: issue 7's table cell by cell, and the three verdicts on a run."""

from collections.abc import Callable

import pytest

from flashcore.bench.artifact import Artifact, ContenderRecord, SeriesRecord
from flashcore.bench.bar import BACKWARD, bars_of
from flashcore.bench.bar_view import bar_views
from flashcore.bench.shapes import GRIDS
from flashcore.bench.timing import Series
from flashcore.bench.view import View, views

Make = Callable[..., Artifact]
HOPPER, DETERMINISTIC, PORTABLE = "flashcore-hopper", "flashcore-hopper-deterministic", "flashcore-portable"
# times as fast as its peer, the same on every shape
US = {"flashcore": 8.0, HOPPER: 8.0, DETERMINISTIC: 10.75, PORTABLE: 18.0, "sdpa-cudnn": 10.0, "sdpa-flash": 20.0}


def _artifact(make_artifact: Make, direction: str = "bwd", us: dict[str, float] = US) -> Artifact:
    def contender(name: str, median: float) -> ContenderRecord:
        series = [SeriesRecord.of(Series(mode, 10, (median,) * 3)) for mode in ("device_warm", "device_reversed")]
        kind = "ours" if name.startswith("flashcore") else "sdpa"
        return ContenderRecord(name=name, kind=kind, status="timed", series=series, peak_bytes=int(median * 2**20))

    artifact = make_artifact(*GRIDS["fa-bwd"])
    settings = artifact.settings.model_copy(update={"grid": "fa-bwd", "direction": direction, "retime": True})
    contenders = [contender(name, median) for name, median in us.items()]
    shapes = [record.model_copy(update={"contenders": contenders}) for record in artifact.shapes]
    return artifact.model_copy(update={"settings": settings, "shapes": shapes})


def _rows(view: View) -> dict[str, dict[str, str]]:
    return {row[0]: dict(zip(view.columns, row, strict=True)) for row in view.rows}


def test_the_table_is_the_issues() -> None:
    hopper, deterministic, portable = BACKWARD
    assert [bar.ours for bar in BACKWARD] == [HOPPER, DETERMINISTIC, PORTABLE]
    wanted = {(c.shape.head_dim, c.shape.seqlen_q, c.shape.causal): c.faster for c in hopper.cells}
    assert wanted == {
        (64, 1024, False): 1.40,
        (64, 1024, True): 1.10,
        (64, 4096, False): 1.22,
        (64, 4096, True): 1.26,
        (64, 16384, False): 1.26,
        (64, 16384, True): 1.34,
        (128, 1024, False): 1.10,
        (128, 1024, True): 1.10,
        (128, 4096, False): 1.16,
        (128, 4096, True): 1.15,
        (128, 16384, False): 1.17,
        (128, 16384, True): 1.17,
    }
    assert {(c.shape.head_dim, c.faster) for c in deterministic.cells} == {(64, 0.92), (128, 0.95)}
    assert portable.mean == 1.10 and not portable.judged and len(portable.cells) == 12
    for shape in GRIDS["fa-bwd"]:
        # 16k tokens and a hidden size of 2048
        assert shape.batch * shape.seqlen_q == 16384 and shape.heads_q * shape.head_dim == 2048
    assert bars_of("fa-bwd", "bwd") == BACKWARD and bars_of("fa-bwd", "fwdbwd") == ()


def test_a_run_has_three_tables_with_their_verdicts(make_artifact: Make) -> None:
    hopper, deterministic, portable = bar_views(_artifact(make_artifact))
    assert f"of {HOPPER}, backward" in hopper.title and f"of {DETERMINISTIC}, backward" in deterministic.title
    # 1.25 of cuDNN's rate: over 1.22, under 1.26
    verdicts = {label: row["verdict"] for label, row in _rows(hopper).items()}
    assert verdicts["4,32,4096,64 fp16"] == "met" and verdicts["4,32,4096,64 fp16 causal"] == "missed"
    assert "8 of the bar's 12 cells met; 4 missed" in hopper.notes
    # 0.930: met at head dim 64, missed at 128
    assert "6 of the bar's 12 cells met; 6 missed" in deterministic.notes
    mean = _rows(portable)["geometric mean of the bar's 12 cells"]
    assert (mean["verdict"], mean[f"{PORTABLE} / sdpa-flash"]) == ("met", "1.111")
    assert {row["verdict"] for label, row in _rows(portable).items() if label.startswith("16,")} == {"-"}
    assert not any("cells met" in note for note in portable.notes)


def test_the_portable_mean_can_be_missed_and_needs_every_cell(make_artifact: Make) -> None:
    mean = "geometric mean of the bar's 12 cells"
    slow = bar_views(_artifact(make_artifact, us={**US, PORTABLE: 18.5}))[2]
    assert _rows(slow)[mean]["verdict"] == "missed"
    whole = _artifact(make_artifact)
    part = bar_views(whole.model_copy(update={"shapes": whole.shapes[1:]}))[2]
    assert _rows(part)[mean]["verdict"] == "not timed"


def test_other_directions_have_no_bar_and_say_what_they_timed(make_artifact: Make) -> None:
    both = _artifact(make_artifact, "fwdbwd")
    assert bar_views(both) == []
    assert views(both)[0].title.startswith("forward and backward: device_warm on")
    assert views(_artifact(make_artifact))[0].title.startswith("backward: device_warm on")


def test_memory_has_its_table(make_artifact: Make) -> None:
    memory = views(_artifact(make_artifact))[-1]
    assert memory.title.startswith("peak memory on") and _rows(memory)["4,32,4096,64 fp16"]["sdpa-flash"] == "20.0"
    single = _artifact(make_artifact).model_copy(update={"shapes": _artifact(make_artifact).shapes[:1]})
    (table,) = views(single)
    assert {row[0]: row[table.columns.index("peak MiB")] for row in table.rows}[PORTABLE] == "18.0"


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_an_artifact_without_gradients_has_no_memory_table(make_artifact: Make, direction: str) -> None:
    artifact = make_artifact(*GRIDS["fa-bwd"])
    settings = artifact.settings.model_copy(update={"direction": direction})
    assert not any(v.title.startswith("peak memory") for v in views(artifact.model_copy(update={"settings": settings})))
