"""The table of grid crossover: who is the fastest of ours at each size."""

import io
from collections.abc import Callable

from rich.console import Console

from flashcore.bench.artifact import Artifact, ContenderRecord, SeriesRecord
from flashcore.bench.crossover_view import OURS, crossover_view
from flashcore.bench.report import print_report
from flashcore.bench.shapes import GRIDS, Shape
from flashcore.bench.timing import Series
from flashcore.kernels.registry import BINDINGS

Make = Callable[..., Artifact]
FIRST, SECOND = OURS[:2]


def _contender(name: str, us: float | None, status: str = "timed") -> ContenderRecord:
    kind = "ours" if name.startswith("flashcore") else "sdpa"
    series = [] if us is None else [SeriesRecord.of(Series("device_warm", 10, (us,) * 3))]
    return ContenderRecord.model_validate({"name": name, "kind": kind, "status": status, "series": series})


def _artifact(make_artifact: Make, times: Callable[[Shape], list[ContenderRecord]]) -> Artifact:
    artifact = make_artifact(*GRIDS["crossover"])
    records = [record.model_copy(update={"contenders": times(record.shape)}) for record in artifact.shapes]
    settings = artifact.settings.model_copy(update={"grid": "crossover"})
    return artifact.model_copy(update={"settings": settings, "shapes": records})


def _rows(artifact: Artifact) -> list[dict[str, str]]:
    view = crossover_view(artifact)
    assert view is not None
    return [dict(zip(view.columns, row, strict=True)) for row in view.rows]


def test_the_fastest_of_ours_changes_with_the_tiles(make_artifact: Make) -> None:
    def times(shape: Shape) -> list[ContenderRecord]:
        us = shape.batch * shape.heads_q * shape.seqlen_q / 1024
        # the auto contender is no kernel, so it is not among those compared
        others = [_contender("flashcore", 0.1), _contender("sdpa-flash", 30.0), _contender("sdpa-cudnn", 25.0)]
        return [_contender(FIRST, 12.0), _contender(SECOND, us), *others]

    rows = _rows(_artifact(make_artifact, times))
    assert len(rows) == len(GRIDS["crossover"]) and {row["fastest"] for row in rows} == {FIRST, SECOND}
    by_shape = {row["shape"]: row for row in rows}
    few, many = by_shape["1,8,128,64 fp16"], by_shape["16,8,512,64 fp16 causal"]
    assert (few["tiles of 64"], few["fastest"], few["x the next"], few[f"{FIRST} us"]) == ("16", SECOND, "12.00", "12.0")
    assert (many["tiles of 64"], many["fastest"], many["x the next"]) == ("1024", FIRST, "5.33")
    assert few["fastest SDPA us"] == "25.0"
    # the turn can be read down a column
    tiles = [int(row["tiles of 64"]) for row in rows if row["shape"].endswith(",64 fp16")]
    assert tiles == sorted(tiles) and len(tiles) == 9


def test_a_kernel_without_a_time_is_no_fastest(make_artifact: Make) -> None:
    rows = _rows(_artifact(make_artifact, lambda shape: [_contender(FIRST, None, "failed"), _contender(SECOND, 5.0)]))
    assert {(row[f"{FIRST} us"], row["fastest"], row["x the next"]) for row in rows} == {("failed", SECOND, "-")}
    none = _rows(_artifact(make_artifact, lambda shape: []))
    assert {(row["fastest"], row["x the next"], row["fastest SDPA us"]) for row in none} == {("-", "-", "-")}


def test_every_kernel_of_ours_has_a_column_and_only_this_grid_on_a_gpu_the_table(make_artifact: Make) -> None:
    artifact = _artifact(make_artifact, lambda shape: [_contender(name, 5.0) for name in OURS])
    view = crossover_view(artifact)
    assert view is not None and {f"flashcore-{impl} us" for impl in BINDINGS} <= set(view.columns)
    other = artifact.model_copy(update={"settings": artifact.settings.model_copy(update={"grid": "small"})})
    cpu = artifact.model_copy(update={"environment": artifact.environment.model_copy(update={"gpu": None})})
    assert crossover_view(other) is None and crossover_view(cpu) is None
    out = io.StringIO()
    print_report(artifact, Console(file=out, width=250))
    assert "crossover, NVIDIA H200" in out.getvalue()
