"""Where calls stand under the ceilings: by a made-up run, by recorded ones, by a profile and on paper."""

from dataclasses import replace

import pytest

from flashcore.bench import work
from flashcore.bench.artifact import Artifact
from flashcore.bench.shapes import parse_shape
from flashcore.errors import ArgumentValueError, UnsupportedError
from flashcore.profile import plot, recorded
from flashcore.profile.ncu_page import parse
from flashcore.profile.records import ProfileRecord
from flashcore.profile.roofline import Point, Roofline, of_artifact, paper, with_profiles
from flashcore.profile.view import kernel_view, roofline_view

MISSION = parse_shape("mission")
LONG = parse_shape("4,16,4096,64")


@pytest.fixture
def record(artifact: Artifact, page) -> ProfileRecord:
    from flashcore.profile import metrics

    asked, _ = metrics.choose(None)
    return ProfileRecord(
        environment=artifact.environment, ncu="Version 2025.3", command=["ncu"], impl="hopper", shape=MISSION,
        absent=["stall tex_throttle"], kernels=parse(page(), asked),
    )  # fmt: skip


def test_points_of_a_run(artifact: Artifact) -> None:
    roofline = of_artifact(artifact)
    assert [(point.name, point.us) for point in roofline.points] == [
        ("flashcore", 4.0), ("flashcore-portable", 8.0), ("sdpa-auto", 16.0),
    ]  # fmt: skip
    first = roofline.points[0]
    # 2^29 FLOPs over 2^21 bytes, in 4 us; 2^29 FLOPs at 640 TFLOP/s take 0.839 us
    assert first.intensity == 256 and first.tflops == pytest.approx(2**29 / 4e-6 / 1e12)
    assert roofline.share(first) == pytest.approx(2**29 / 640e12 / 4e-6)
    assert roofline.ceilings.tbytes == 4.0 and "recorded on NVIDIA H200" in roofline.title
    assert "measured on NVIDIA H200" in of_artifact(artifact, recorded=False).title


def test_a_run_is_narrowed_to_a_contender_and_shapes(artifact: Artifact) -> None:
    assert [point.name for point in of_artifact(artifact, contender="sdpa-auto", shapes=[MISSION]).points] == ["sdpa-auto"]
    # one that was wrong has no place, nor has a shape that was not run, nor a run without times
    for nothing in ({"contender": "flex"}, {"shapes": [LONG]}):
        with pytest.raises(UnsupportedError, match="timed were flashcore, flashcore-portable, sdpa-auto on 1,8,512,64 fp16"):
            of_artifact(artifact, **nothing)


def test_a_memory_bound_shape_is_judged_by_the_slope(artifact: Artifact) -> None:
    ceilings = of_artifact(artifact).ceilings
    decode = parse_shape("16,32/8,1/8192,128")
    point = Point("flashcore", decode, 200.0)
    bound = ceilings.bound(decode)
    assert bound.limit == "memory" and bound.us == pytest.approx((decode.input_bytes + decode.output_bytes) / 4e6)
    assert Roofline("", ceilings, (point,)).share(point) == pytest.approx(bound.us / 200)


def test_a_profile_stands_beside_the_times(artifact: Artifact, record: ProfileRecord) -> None:
    roofline = with_profiles(of_artifact(artifact), [record])
    assert roofline.points[-1] == Point("flashcore-hopper (ncu)", MISSION, pytest.approx(5.12))
    assert "not a warm call's time" in roofline.notes[-1]
    assert with_profiles(of_artifact(artifact), []) == of_artifact(artifact)


def test_a_kernels_table_holds_what_matters(record: ProfileRecord) -> None:
    view = kernel_view(record, record.kernels[0])
    cells = {row[0]: row[1:] for row in view.rows}
    assert cells["duration"][0] == "5.12 us" and cells["tensor pipe"][1] == "41.5 %"
    # 3 MiB in 5.12 us, and 10.24 MB through L2
    assert cells["DRAM"][:2] == ("0.614 TB/s", "12.0 %") and cells["L2"][:2] == ("2.00 TB/s", "25.8 %")
    assert cells["occupancy"][1] == "18.7 %" and cells["registers"][0] == "168" and cells["shared memory"][0] == "200704 bytes"
    stalls = [name for name in cells if name.startswith("stall: ")]
    assert stalls == [f"stall: {reason}" for reason in (
        "gmma", "long_scoreboard", "math_pipe_throttle", "wait", "short_scoreboard",
    )]  # fmt: skip
    assert cells["stall: gmma"][:2] == ("4.00 cycles", "40.0 %") and all(row[-1] for row in view.rows)
    notes = " ".join(view.notes)
    assert (
        "moved 3.15 MB, 1.50 x the fewest" in notes and "no such metric, so it was not asked for: stall tex_throttle" in notes
    )
    assert "n/a from ncu for this kernel: stall branch_resolving" in notes


def test_what_ncu_did_not_say_is_shown_as_such(record: ProfileRecord) -> None:
    kernel = record.kernels[0]
    kept = {name: reading for name, reading in kernel.readings.items() if name.startswith(("gpu__", "launch__"))}
    view = kernel_view(record, kernel.model_copy(update={"readings": kept}))
    cells = {row[0]: row[1:] for row in view.rows}
    assert cells["tensor pipe"][1] == "n/a" and cells["DRAM"][:2] == ("n/a", "n/a")
    assert not any(name.startswith("stall") for name in cells) and any("n/a from ncu" in note for note in view.notes)


def test_tables_of_few_and_of_many_shapes(artifact: Artifact) -> None:
    roofline = of_artifact(artifact)
    view = roofline_view(roofline)
    assert view.rows[0] == ("flashcore", "1,8,512,64 fp16", "256", "0.839 (compute)", "4.00", "134", "21.0 %")
    assert "640 TFLOP/s" in view.notes[0] and not any("above 100 %" in note for note in view.notes)
    shapes = [replace(MISSION, batch=batch) for batch in (1, 2, 4)]
    many = replace(roofline, points=tuple(Point("flashcore", shape, 0.5) for shape in shapes))
    wide = roofline_view(many)
    assert [row[0] for row in wide.rows] == [shape.label for shape in shapes] and wide.rows[0][3] == "1074 (167.8 %)"
    assert any("above 100 %" in note for note in wide.notes)


def test_on_paper_is_said_everywhere() -> None:
    roofline = paper("l4", [MISSION, LONG])
    # 2 MiB at 300 GB/s; 2^38 FLOPs at 121 TFLOP/s
    assert [point.us for point in roofline.points] == pytest.approx([2**21 / 0.3e6, 2**38 / 121e6])
    view = roofline_view(roofline)
    assert "NOT a measurement" in view.title and "never a measurement" in " ".join(view.notes) and "TFLOP/s" not in view.columns
    axes = plot.draw(roofline).axes[0]
    assert "NOT a measurement" in axes.get_title() and "on paper" in axes.get_ylabel()
    with pytest.raises(ArgumentValueError, match="paper: 'h100' is unknown; allowed: l4"):
        paper("h100", [MISSION])
    with pytest.raises(ArgumentValueError, match="dtype: fp32 has no ceiling"):
        paper("l4", [replace(MISSION, dtype="fp32")])


def test_the_latest_recorded_run_with_all_the_shapes_is_found() -> None:
    run = recorded.find("flashcore-portable", [MISSION])
    assert any(record.shape == MISSION for record in run.shapes)
    grid = [parse_shape("8,32,2048,64"), parse_shape("4,16,4096,128")]
    assert recorded.find("flashcore", grid).settings.grid == "fa"
    with pytest.raises(UnsupportedError, match=r"no recorded run timed flashcore on 3,7,333,64 fp16; recorded are .*more$"):
        recorded.find("flashcore", [parse_shape("3,7,333,64")])


def _drawn(roofline: Roofline):
    figure = plot.draw(roofline)
    figure.canvas.draw()
    return figure, figure.axes[0]


def test_the_picture_has_every_point_under_its_roof(artifact: Artifact) -> None:
    roofline = of_artifact(artifact)
    _, axes = _drawn(roofline)
    drawn = [line for line in axes.lines if line.get_marker() != "None"]
    assert [line.get_ydata()[0] for line in drawn] == pytest.approx([point.tflops for point in roofline.points])
    # side by side, from the intensity to the right, where no point of a slope rises above it
    places = [line.get_xdata()[0] for line in drawn]
    assert places[0] == pytest.approx(256) and places == sorted(set(places)) and places[-1] < 256 * plot.SPREAD
    slope, flat = (line for line in axes.lines if line.get_marker() == "None")
    assert slope.get_ydata()[-1] == pytest.approx(640) and slope.get_xdata()[-1] == pytest.approx(160)
    assert list(flat.get_ydata()) == [640, 640]
    (low, high), (left, right) = axes.get_ylim(), axes.get_xlim()
    assert all(low < line.get_ydata()[0] < high and left < line.get_xdata()[0] < right for line in drawn)


@pytest.mark.parametrize("name", ["fa", "features"])
def test_the_legend_stands_beside_the_picture_and_within_it(name: str) -> None:
    from flashcore import evidence
    from flashcore.bench.artifact import load

    roofline = of_artifact(load(evidence.FOLDER / "nvidia-h200" / f"bench-{name}.json"))
    figure, axes = _drawn(roofline)
    legend = figure.legends[0]
    box = legend.get_window_extent()
    assert not box.overlaps(axes.get_tightbbox())
    assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 and box.x1 <= figure.bbox.x1
    labels = [text.get_text() for text in legend.get_texts()]
    assert len(labels) == len(set(labels)) and {point.name for point in roofline.points} <= set(labels)
    # no two that could be taken for one another
    looks = [
        (line.get_linestyle(), line.get_marker(), line.get_markerfacecolor(), line.get_color())
        for line, text in zip(legend.legend_handles, legend.get_texts(), strict=True)
        if text.get_fontweight() != "bold"
    ]
    assert len(set(looks)) == len(looks) == len(labels) - 3


def test_a_run_of_gradients_stands_by_the_work_of_gradients(artifact: Artifact) -> None:
    settings = artifact.settings.model_copy(update={"direction": "bwd"})
    forward, backward = of_artifact(artifact), of_artifact(artifact.model_copy(update={"settings": settings}))
    for one, other in zip(forward.points, backward.points, strict=True):
        assert other.tflops == pytest.approx(2.5 * one.tflops) and other.us == one.us
        assert other.intensity == work.flops(other.shape, "bwd") / work.min_bytes(other.shape, "bwd")
    shape = backward.shapes[0]
    assert backward.bound(shape).us > forward.bound(shape).us
