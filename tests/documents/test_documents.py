"""The generated blocks of the documents: what they hold, and that a stale or malformed document is noticed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flashcore import evidence
from flashcore.document_blocks import BLOCKS, NOTHING
from flashcore.documents import DOCUMENTS, DocumentError, render, render_all
from flashcore.errors import ArgumentValueError, FlashCoreError
from flashcore.kernels.registry import KERNELS

Record = Callable[[], Path]


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
    for words in ("2026-11-20", "NVIDIA H200", "driver 580.159.04", "CUDA 13.0", "cuDNN 9.19.0", "torch 2.11.0+cu130"):
        assert words in text
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
    assert rows["shape"][:4] == ["flashcore", "flashcore-portable", "sdpa-flash", "sdpa-cudnn"]
    assert len(rows) == shapes + 2  # the header and the line under it
    assert "unfused" not in text and "device_cold" not in text
    # flash takes 10 us and ours 5 on every shape
    assert f"2.00 (least 2.00, most 2.00) times as fast as sdpa-flash: geometric mean of {shapes} shapes" in text


def test_the_full_grid_leaves_nothing_out(record: Record) -> None:
    record()
    text = BLOCKS["small-full"]()
    assert "unfused" in text and "device_cold" in text


def test_verification_counts_by_group_and_lists_what_did_not_pass(record: Record) -> None:
    record()
    text = BLOCKS["verify"]()
    rows = _rows(text)
    assert rows["the 15 of the mission"] == ["1", "0", "0", "0.25"]
    assert rows["mask"] == ["1", "1", "0", "1.50"]
    assert rows["far"] == ["0", "0", "1", "0.00"]
    assert rows["all"] == ["2", "1", "1", "1.50"]
    assert "- failed: mask-add: mask-add is failed" in text and "- skipped: far-batch" in text


def test_launch(record: Record) -> None:
    record()
    assert _rows(BLOCKS["launch"]())["our launcher"] == ["4.50", "4.25", "6.00"]


def test_figures_of_an_earlier_source_are_marked(record: Record) -> None:
    path = record() / "bench-mission.json"
    assert "present source" not in BLOCKS["mission"]()
    artifact = json.loads(path.read_text())
    artifact["environment"]["kernel_sources"]["portable_forward"] = "0" * 64
    path.write_text(json.dumps(artifact))
    assert "**before the present source of portable_forward**" in BLOCKS["mission"]()


def test_support_counts_verified_binaries_of_the_present_source(record: Record) -> None:
    folder = record()
    rows = {cells[0]: cells[1:] for line in BLOCKS["support"]().splitlines() if (cells := line.strip("| ").split(" | ")[1:])}
    shipped = len(KERNELS["portable_forward"].shipped("sm_90a"))
    assert rows["sm_90a"] == ["9.0", str(shipped), f"2 of {shipped}", "verified on NVIDIA H200"]
    assert rows["sm_89"][2:] == [f"0 of {len(KERNELS['portable_forward'].shipped('sm_89'))}", "compiled"]
    assert rows["sm_100a"][1].startswith("none")
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
    with pytest.raises(FlashCoreError, match=r"no source checkout of FlashCore \(without README.md, EVALUATION.md\)"):
        render_all()


@pytest.mark.parametrize("name", ["verify", "launch-cost", "bench-mission"])
def test_a_damaged_artifact_is_an_error_that_names_it(name: str, record: Record) -> None:
    path = record() / f"{name}.json"
    path.write_text("{}")
    block = {"verify": "verify", "launch-cost": "launch", "bench-mission": "mission"}[name]
    with pytest.raises(ArgumentValueError, match=f"{name}.json"):
        BLOCKS[block]()


def test_the_documents_of_this_checkout_render() -> None:
    for path, text in render_all().items():
        assert "<!-- generated: support -->" in text or path.name != "README.md"
