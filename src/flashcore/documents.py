"""The generated tables of the documents: README.md, EVALUATION.md, docs/ladder.md and docs/notes/search.md have
blocks made from evidence alone.

<!-- generated: mission -->
... replaced by `flashcore evidence`, compared by `flashcore evidence --check` ...
<!-- end generated -->
"""

from __future__ import annotations

import re
from pathlib import Path

from flashcore import evidence
from flashcore.document_blocks import BLOCKS
from flashcore.errors import FlashCoreError
from flashcore.sources import PACKAGE

DOCUMENTS = ("README.md", "EVALUATION.md", "docs/ladder.md", "docs/notes/search.md")
_MARKER = re.compile(r"<!-- (?:generated: (?P<name>\S+)|end generated) -->")


class DocumentError(FlashCoreError, ValueError):
    """A document cannot be rendered: not a source checkout, or markers that are unknown or do not pair."""


def render_all() -> dict[Path, str]:
    """Each document of the source checkout with its generated blocks made anew; nothing is written.

    Raises:
        DocumentError: the package does not run from a source checkout, or a document's markers are wrong.
        ArgumentValueError: a recorded artifact cannot be read.
    """
    root = PACKAGE.parents[1]
    missing = [name for name in (*DOCUMENTS, "pyproject.toml") if not (root / name).is_file()]
    if missing:
        raise DocumentError(
            f"documents: {root} is no source checkout of FlashCore (without {', '.join(missing)}); "
            "run this from a git clone, installed with `pip install --editable .`"
        )
    evidence.indexes.cache_clear()  # `flashcore evidence` has just written them
    return {root / name: render((root / name).read_text(), name) for name in DOCUMENTS}


def render(text: str, name: str) -> str:
    """The text with every generated block made from the evidence.

    Raises:
        DocumentError: an unknown block, one that is not closed, or an end without a beginning; names `name` and the line.
    """
    lines: list[str] = []
    block: str | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        marker = _MARKER.fullmatch(line)
        where = f"{name}, line {number}"
        if marker is None:
            if block is None:
                lines.append(line)
            continue
        if marker["name"] is None:
            if block is None:
                raise DocumentError(f"{where}: the end of a generated block that was not begun")
            # Markdown wants blank lines around a table
            lines += ["", BLOCKS[block]().strip(), "", line]
            block = None
            continue
        if block is not None:
            raise DocumentError(f"{where}: block {block!r} is not closed before {marker['name']!r}")
        block = marker["name"]
        if block not in BLOCKS:
            raise DocumentError(f"{where}: unknown generated block {block!r}; allowed: {', '.join(BLOCKS)}")
        lines.append(line)
    if block is not None:
        raise DocumentError(f"{name}: block {block!r} is never closed")
    return "\n".join(lines) + "\n"
