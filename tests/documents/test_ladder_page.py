"""docs/ladder.md: a section for each step in order with its generated block, code that is in the files, links that lead."""

import re

import pytest

from flashcore.ladder.steps import STEPS
from flashcore.sources import PACKAGE

ROOT = PACKAGE.parents[1]
PAGE = (ROOT / "docs" / "ladder.md").read_text()
EXCERPTS = re.findall(r"^`(src/\S+\.py)`[^\n]*:\n\n```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_every_step_has_its_section_and_its_block_in_order() -> None:
    headings = re.findall(r"^## \d+\. `(\w+)`", PAGE, re.MULTILINE)
    blocks = re.findall(r"^<!-- generated: ladder-(\w+) -->$", PAGE, re.MULTILINE)
    assert headings == [step.name for step in STEPS] and blocks == [*headings, "table"]


@pytest.mark.parametrize(("file", "code"), EXCERPTS, ids=[file for file, _ in EXCERPTS])
def test_code_that_is_shown_is_in_its_file(file: str, code: str) -> None:
    source = (ROOT / file).read_text()
    end = 0
    for part in code.split("        ...\n"):
        end = source.find(part, end)
        assert end >= 0, part


def test_no_code_is_shown_without_its_file() -> None:
    assert len(EXCERPTS) == PAGE.count("```python") >= 8


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert links and [link for link in links if not (ROOT / "docs" / link).exists()] == []


def test_no_measured_figure_is_typed() -> None:
    written = re.sub(r"<!-- generated: .*?<!-- end generated -->", "", PAGE, flags=re.DOTALL)
    assert not re.search(r"\d\s*(us|ms|TFLOP/s|GB/s|TB/s|times as fast)\b", written)
