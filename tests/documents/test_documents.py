"""The generated blocks of the documents: what they hold, and that a stale or malformed document is noticed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flashcore import evidence
from flashcore.document_blocks import BLOCKS
from flashcore.document_parts import NOTHING
from flashcore.documents import DOCUMENTS, DocumentError, render, render_all
from flashcore.errors import ArgumentValueError, FlashCoreError
from flashcore.evidence.build import artifacts
from flashcore.kernels.registry import KERNELS
from flashcore.ladder.steps import STEPS

Record = Callable[[], Path]
STEP_BLOCKS = [f"ladder-{step.name}" for step in STEPS]


def _rows(text: str) -> dict[str, list[str]]:
    """First cell -> the other cells, of every row of every table."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def _marked(name: str, old: str = "old") -> str:
    return f"before\n\n<!-- generated: {name} -->\n{old}\n<!-- end generated -->\n\nafter\n"


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_every_block_renders_without_evidence(name: str, checkout: Path) -> None:
    assert NOTHING in BLOCKS[name]()


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_every_block_names_what_it_was_made_from(name: str, record: Record) -> None:
    record()
    text = BLOCKS[name]()
    assert "`src/flashcore/evidence/nvidia-h200/" in text and NOTHING not in text
    if name in STEP_BLOCKS:  # the table at the page's end says the rest
        assert "On NVIDIA H200, 2026-11-20 (`src/flashcore/evidence/nvidia-h200/ladder.json`):" in text
        return
    for words in ("2026-11-20", "NVIDIA H200", "driver 580.159.04", "CUDA 13.0", "cuDNN 9.19.0", "torch 2.11.0+cu130"):
        assert words in text or (name, words) == ("search", "cuDNN 9.19.0")  # which a search's record does not have
    assert "commit abcdef012345 and changes" in text


def test_mission_shows_every_contender(record: Record) -> None:
    record()
    rows = _rows(BLOCKS["mission"]())
    assert rows["flashcore-portable"][:2] == ["5.00 (4.96-5.04)", "10.0"]
    assert {"flashcore", "sdpa-flash", "sdpa-cudnn", "unfused"} <= rows.keys()


def test_the_wheel_block_says_what_was_absent_and_what_ran(record: Record) -> None:
    record()
    rows = _rows(BLOCKS["wheel"]())
    assert rows["Triton importable"] == ["no"] and rows["compilers on the PATH"] == ["none"]
    assert rows["wheel"] == ["flashcore-0.1.0-py3-none-any.whl, 3.0 MB"]


@pytest.mark.parametrize(("name", "shapes"), [("small", 7), ("fa", 4), ("decode", 4)])
def test_a_grid_is_one_short_row_a_shape(name: str, shapes: int, record: Record) -> None:
    record()
    text = BLOCKS[name]()
    rows = _rows(text)
    ours = ["flashcore", "flashcore-small", "flashcore-hopper", "flashcore-portable"]
    assert rows["shape"][:6] == [*ours, "sdpa-flash", "sdpa-cudnn"]
    assert len(rows) == shapes + 2  # the header and the line under it
    assert "unfused" not in text and "device_cold" not in text
    # flash takes 10 us and ours 5 on every shape
    assert f"2.00 (least 2.00, most 2.00) times as fast as sdpa-flash: geometric mean of {shapes} shapes" in text
    # and cuDNN 9 us and the kernel for Hopper 4.5
    assert f"flashcore-hopper is 2.00 (least 2.00, most 2.00) times as fast as sdpa-cudnn: geometric mean of {shapes}" in text
    assert "flashcore-small is 2.25 (least 2.25, most 2.25) times as fast as sdpa-cudnn" in text


def test_the_full_grid_leaves_nothing_out(record: Record) -> None:
    record()
    text = BLOCKS["small-full"]()
    assert "unfused" in text and "device_cold" in text
    # 3 times and 4 times the device's
    assert "eager_stream on NVIDIA H200" in text and "| 24.0 (32.0) |" in text


def test_verification_counts_by_kernel_and_group_and_lists_what_did_not_pass(record: Record) -> None:
    record()
    portable, hopper = BLOCKS["verify"]().split("**hopper on NVIDIA H200, suite all**")
    rows = _rows(portable)
    assert rows["cases"] == ["passed", "failed", "skipped", "rejected", "largest error / its bound"]
    assert rows["the 15 of the mission"] == ["1", "0", "0", "0", "0.25"]
    assert rows["mask"] == ["1", "1", "0", "0", "1.50"]
    assert rows["far"] == ["0", "0", "1", "0", "0.00"]
    assert rows["all"] == ["2", "1", "1", "0", "1.50"]
    assert "- failed: mask-add: mask-add is failed" in portable and "- skipped: far-batch" in portable
    rows = _rows(hopper)
    assert rows["far"] == ["1", "0", "0", "0", "0.25"] and "mask" not in rows
    assert rows["all"] == ["2", "0", "0", "2", "0.50"]
    assert "- hopper rejected 1: mask-add is rejected" in hopper and "- 1 binaries of hopper ran" in hopper


def test_a_record_from_when_there_was_one_kernel_can_be_read(record: Record) -> None:
    path = record() / "verify.json"
    old = json.loads(path.read_text())
    del old["rejected"]
    old["cases"] = [case for case in old["cases"] if case["implementation"] == "portable"]
    for case in old["cases"]:
        del case["implementation"]
    path.write_text(json.dumps(old | {"implementation": "portable"}))
    text = BLOCKS["verify"]()
    assert "**portable on NVIDIA H200, suite all**" in text and "hopper" not in text


def test_the_bar_stands_beside_what_was_measured(record: Record) -> None:
    record()
    rows = _rows(BLOCKS["bar-fa"]())
    # cuDNN takes 9 us and ours 4.5 on every shape; a length of 2048 is no cell of the bar
    assert rows["32,32,512,64 fp16"][:2] == ["1.02", "2.000 [2.000, 2.000]"]
    assert rows["32,32,512,64 fp16"][3] == "met, in one order"
    assert rows["8,32,2048,64 fp16"][0] == rows["8,32,2048,64 fp16"][3] == "-"
    # four of the grid's shapes make no mean of 24 cells
    assert rows["geometric mean of the bar's 24 cells"][:4] == ["1.10", "-", "-", "not timed"]


def test_the_bar_of_small_shapes_stands_beside_what_was_measured(record: Record) -> None:
    record()
    text = BLOCKS["bar-small"]()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| 1,8,512,64 fp16 |")]
    # auto takes 8 us and cuDNN 9; a call 24 and 27, where not every way to call SDPA was timed
    assert [(series, bar, ratio[:5], words) for _, series, bar, ratio, words, *_ in rows] == [
        ("device_warm", "0.44", "0.889", "missed"),
        ("device_cold", "1.00", "0.889", "met"),
        ("eager_stream", "0.60", "-", "not timed"),
        ("eager_stream", "10.0 us", "-", "missed"),
    ]
    assert "- 7 of the bar's 16 cells met; 8 missed; 1 not timed" in text


def test_the_crossover_names_the_fastest_of_ours(record: Record) -> None:
    path = record() / "bench-crossover.json"
    text = BLOCKS["crossover"]()
    assert _rows(text)["1,8,128,64 fp16"][0] == "16" and "**crossover, NVIDIA H200" in text
    assert text.count("| flashcore-") > 28
    # the planner reads every benchmark of the folder
    assert "crossover" in {artifact.settings.grid for artifact in artifacts(path.parent)}
    path.unlink()
    assert BLOCKS["crossover"]() == f"bench-crossover.json: {NOTHING}"


def test_a_run_of_other_shapes_is_no_grid(record: Record) -> None:
    folder = record()
    for name, block in (("bench-small", "bar-small"), ("bench-crossover", "crossover")):
        artifact = json.loads((folder / f"{name}.json").read_text())
        artifact["settings"]["grid"] = None
        (folder / f"{name}.json").write_text(json.dumps(artifact))
        assert BLOCKS[block]().startswith("no run of the grid on a GPU\n")


def test_a_grid_without_the_kernel_misses_no_cell_silently(record: Record) -> None:
    path = record() / "bench-fa.json"
    artifact = json.loads(path.read_text())
    for shape in artifact["shapes"]:
        shape["contenders"] = [c for c in shape["contenders"] if c["name"] != "flashcore-hopper"]
    path.write_text(json.dumps(artifact))
    assert _rows(BLOCKS["bar-fa"]())["32,32,512,64 fp16"][:4] == ["1.02", "-", "-", "not timed"]


def test_the_ladder_is_a_table_a_shape_and_a_line_for_each_step(record: Record) -> None:
    path = record() / "ladder.json"
    text = BLOCKS["ladder-table"]()
    assert text.count("| step | us |") == 2 and _rows(text)["tensor_core_qk"][0] == "64.0"
    # each step takes half the time of the one before, and the first half that of PyTorch
    assert BLOCKS["ladder-scalar"]().splitlines()[2:] == [
        "- 1,8,512,64 fp16: 256 us, 0.3 % of the ceiling; 2.00 times as fast as the step before; "
        "4.00 times as fast as unfused PyTorch",
        "- 4,16,4096,64 fp16: 256 us, 165.2 % of the ceiling; 2.00 times as fast as the step before; "
        "4.00 times as fast as unfused PyTorch",
    ]
    assert "before" not in BLOCKS["ladder-unfused"]()
    artifact = json.loads(path.read_text())
    artifact["steps"].remove("scalar")
    artifact["shapes"] = artifact["shapes"][:1]
    path.write_text(json.dumps(artifact))
    assert BLOCKS["ladder-scalar"]().splitlines()[2:] == ["- 1,8,512,64 fp16: not in this run"]
    artifact["shapes"] = []
    path.write_text(json.dumps(artifact))
    assert "no shape was timed" in BLOCKS["ladder-table"]() and "no shape was timed" in BLOCKS["ladder-scalar"]()


def test_the_ladders_plot_is_shown_where_it_was_drawn(checkout: Path, record: Record) -> None:
    record()
    assert BLOCKS["ladder-table"]().startswith("docs/img/ladder-h200.png: not drawn yet\n")
    (checkout / "docs" / "img" / "ladder-h200.png").touch()
    assert BLOCKS["ladder-table"]().startswith("![The rate of each step on NVIDIA H200](img/ladder-h200.png)\n")


def test_the_ladders_bar_stands_beside_what_was_measured(record: Record) -> None:
    record()
    text = BLOCKS["bar-ladder"]()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(("| top", "| fastest", "| steps"))]
    assert [(row[1], row[3], row[5]) for row in rows] == [
        ("1,8,512,64 fp16", "256.0 [256.0, 256.0]", "met"),
        ("4,16,4096,64 fp16", "256.0 [256.0, 256.0]", "met"),
        ("4,16,4096,64 fp16", "1024.0 [1024.0, 1024.0]", "met"),
        ("-", str(len(STEPS)), "met"),
    ]


def test_a_ladder_of_an_earlier_source_is_marked(record: Record) -> None:
    path = record() / "ladder.json"
    assert "present source" not in BLOCKS["ladder-table"]()
    artifact = json.loads(path.read_text())
    artifact["sources"]["ladder_scalar"] = "0" * 64
    artifact["environment"]["kernel_sources"]["portable_forward"] = "0" * 64  # no step of the ladder
    path.write_text(json.dumps(artifact))
    assert "**before the present source of ladder_scalar**" in BLOCKS["ladder-table"]()


def test_the_ladder_is_no_benchmark_of_the_index(record: Record) -> None:
    folder = record()
    before = artifacts(folder)
    (folder / "ladder.json").unlink()
    assert artifacts(folder) == before


def test_launch(record: Record) -> None:
    record()
    assert _rows(BLOCKS["launch"]())["our launcher"] == ["4.50", "4.25", "6.00", "7.50"]


def test_figures_of_an_earlier_source_are_marked(record: Record) -> None:
    path = record() / "bench-mission.json"
    assert "present source" not in BLOCKS["mission"]()
    artifact = json.loads(path.read_text())
    # forward, no kernel of gradients was run
    artifact["environment"]["kernel_sources"]["portable_backward_dq"] = "0" * 64
    path.write_text(json.dumps(artifact))
    assert "present source" not in BLOCKS["mission"]()
    artifact["settings"]["direction"] = "bwd"
    path.write_text(json.dumps(artifact))
    assert "**before the present source of portable_backward_dq**" in BLOCKS["mission"]()
    artifact["environment"]["kernel_sources"]["portable_forward"] = "0" * 64
    path.write_text(json.dumps(artifact))
    assert "**before the present source of portable_forward, portable_backward_dq**" in BLOCKS["mission"]()


def test_support_counts_verified_binaries_of_the_present_source(record: Record) -> None:
    folder = record()
    table = [line.strip("| ").split(" | ") for line in BLOCKS["support"]().splitlines() if line.startswith("|")]
    rows = {(kernel, arch): cells for kernel, arch, *cells in table if arch.startswith("sm_")}
    counts = {place: len(KERNELS[place[0]].shipped(place[1])) for place in rows}
    shipped = counts["portable_forward", "sm_90a"]
    assert rows["portable_forward", "sm_90a"] == ["9.0", str(shipped), f"2 of {shipped}", "verified on NVIDIA H200"]
    assert rows["portable_forward", "sm_89"][2:] == [f"0 of {counts['portable_forward', 'sm_89']}", "compiled"]
    assert rows["portable_forward", "sm_100a"][1].startswith("none")
    assert rows["hopper_forward", "sm_90a"][2:] == [f"0 of {counts['hopper_forward', 'sm_90a']}", "compiled"]
    assert [arch for kernel, arch in rows if kernel == "hopper_forward"] == ["sm_90a"]
    index = json.loads((folder / "index.json").read_text())
    index["sources"]["portable_forward"] = "0" * 64  # the evidence is of another source
    (folder / "index.json").write_text(json.dumps(index))
    evidence.indexes.cache_clear()
    text = BLOCKS["support"]()
    assert f"0 of {shipped} | experimental" in text and "verified on" not in text


def test_render_replaces_blocks_only(record: Record) -> None:
    record()
    text = render(_marked("launch"), "README.md")
    assert text.startswith("before\n\n<!-- generated: launch -->\n\n| call |")
    assert text.endswith("<!-- end generated -->\n\nafter\n") and "old" not in text
    assert render(text, "README.md") == text


def test_a_stale_document_is_detected(checkout: Path, record: Record) -> None:
    folder = record()
    for name in DOCUMENTS:
        (checkout / name).write_text(_marked("launch"))
    for path, text in render_all().items():
        assert path.read_text() != text  # hand-written figures
        path.write_text(text)
    assert all(path.read_text() == text for path, text in render_all().items())
    cost = (folder / "launch-cost.json").read_text()
    (folder / "launch-cost.json").write_text(cost.replace("4.5", "4.75"))
    assert all(path.read_text() != text for path, text in render_all().items())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (_marked("misson"), "line 3: unknown generated block 'misson'; allowed: support, mission"),
        ("<!-- generated: launch -->\n", "block 'launch' is never closed"),
        ("<!-- generated: launch -->\n<!-- generated: fa -->\n", "line 2: block 'launch' is not closed before 'fa'"),
        ("text\n<!-- end generated -->\n", "line 2: the end of a generated block that was not begun"),
    ],
)
def test_wrong_markers_are_errors(text: str, words: str, checkout: Path) -> None:
    with pytest.raises(DocumentError, match=r"README\.md") as caught:
        render(text, "README.md")
    assert words in str(caught.value)


def test_outside_a_checkout_it_says_so(checkout: Path) -> None:
    with pytest.raises(FlashCoreError, match=r"no source checkout of FlashCore \(without README.md, EVALUATION.md, docs/"):
        render_all()


def test_a_report_of_searches_that_are_not_there_as_they_were_is_an_error(record: Record) -> None:
    folder = record()
    BLOCKS["search"]()
    (folder / "search-small.json").write_text("{} ")
    with pytest.raises(ArgumentValueError, match=r"was made from search-small\.json, which is not beside it as it was"):
        BLOCKS["search"]()
    (folder / "search-small.json").unlink()
    with pytest.raises(ArgumentValueError, match="which is not beside it"):
        BLOCKS["search"]()


def test_debug_views_show_wrong_tiles_and_errors(record: Record) -> None:
    assert f"debug/: {NOTHING}" == BLOCKS["debug-views"]()
    record()
    (row,) = (line for line in BLOCKS["debug-views"]().splitlines() if line.startswith("| scalar"))
    assert row == "| scalar | 1,8,512,64 fp16 | 15 | 1 | 0.25 | 0.25 | 0.25 |"


@pytest.mark.parametrize("name", ["verify", "launch-cost", "bench-mission", "ladder", "debug/scalar"])
def test_a_damaged_artifact_is_an_error_that_names_it(name: str, record: Record) -> None:
    path = record() / f"{name}.json"
    path.write_text("{}")
    block = {
        "verify": "verify",
        "launch-cost": "launch",
        "bench-mission": "mission",
        "ladder": "ladder-scalar",
        "debug/scalar": "debug-views",
    }[name]
    with pytest.raises(ArgumentValueError, match=f"{name}.json"):
        BLOCKS[block]()


def test_the_documents_of_this_checkout_render() -> None:
    for path, text in render_all().items():
        assert "<!-- generated: support -->" in text or path.name != "README.md"
