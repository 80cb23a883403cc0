"""What the generated blocks of docs/ladder.md hold, made from the ladder's and the debug views' records."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

from flashcore import evidence
from flashcore.bench.markdown import view_to_markdown
from flashcore.debug.artifact import DebugArtifact
from flashcore.debug.artifact import load as load_debug
from flashcore.debug.compare import PartVerdict
from flashcore.debug.subjects import SUBJECTS
from flashcore.debug.views import VIEWS
from flashcore.document_parts import NOTHING, each, origin, place, table
from flashcore.kernels.registry import BINDINGS
from flashcore.ladder.artifact import LadderArtifact
from flashcore.ladder.artifact import load as load_ladder
from flashcore.ladder.bar import bar_view as ladder_bar_view
from flashcore.ladder.steps import STEPS
from flashcore.ladder.table import brought
from flashcore.ladder.table import to_markdown as ladder_to_markdown


def ladder() -> str:
    """The ladder's tables, a shape each, and the plot of them where it was drawn."""
    return each("ladder", _ladder)


def _ladder(path: Path) -> str:
    artifact = load_ladder(path)
    plot = f"img/ladder-{path.parent.name.rpartition('-')[2]}.png"
    drawn = (evidence.FOLDER.parents[2] / "docs" / plot).exists()
    picture = (
        f"![The rate of each step on {artifact.environment.device_name}]({plot})" if drawn else f"docs/{plot}: not drawn yet"
    )
    tables = ladder_to_markdown(artifact).rstrip() or "no shape was timed"
    return f"{picture}\n\n{tables}\n- {_ladder_origin(path, artifact)}"


def ladder_bar() -> str:
    """The ladder's bar beside what was measured."""
    return each("ladder", _ladder_bar)


def _ladder_bar(path: Path) -> str:
    artifact = load_ladder(path)
    return f"{view_to_markdown(ladder_bar_view(artifact)).rstrip()}\n- {_ladder_origin(path, artifact)}"


def ladder_step(name: str) -> str:
    """What one step came to, a line a shape."""
    return each("ladder", partial(_ladder_step, name))


def _ladder_step(name: str, path: Path) -> str:
    artifact = load_ladder(path)
    found = artifact.environment
    lines = "\n".join(f"- {sentence}" for sentence in brought(artifact, name))
    return f"On {found.device_name}, {found.time_utc:%Y-%m-%d} (`{place(path)}`):\n\n{lines}"


def _ladder_origin(path: Path, artifact: LadderArtifact) -> str:
    production = {BINDINGS[step.impl].KERNEL for step in STEPS if step.impl is not None}
    sources = {kernel: source for kernel, source in artifact.environment.kernel_sources.items() if kernel in production}
    return origin(path, artifact.environment, sources | artifact.sources)


def debug_views() -> str:
    """What the debug views said of each kernel, a table a GPU: a row for each run."""
    folders = sorted(evidence.FOLDER.glob("*/debug"))
    return "\n\n".join(map(_debug_views, folders)) if folders else f"debug/: {NOTHING}"


def _debug_views(folder: Path) -> str:
    paths = {path: load_debug(path) for path in folder.glob("*.json")}
    ordered = sorted(paths.items(), key=lambda item: (SUBJECTS.index(item[1].subject), item[1].shape.causal))
    first, artifact = ordered[0]
    sources = {kernel: source for found in paths.values() for kernel, source in found.sources.items()}
    rows = [_debug_row(found) for _, found in ordered]
    columns = ("kernel", "shape", "tiles", "wrong", *VIEWS)
    return (
        f"{table(columns, rows)}\n\n- {', '.join(VIEWS)}: the largest error of the view, over its bound\n"
        f"- {origin(first, artifact.environment, sources)}, and {len(rows) - 1} more beside it"
    )


def _debug_row(found: DebugArtifact) -> tuple[str, ...]:
    parts = [part for view in found.views for part in view.parts]
    shares = {view.view: max(map(_share, view.parts)) for view in found.views}
    return (
        found.subject,
        found.shape.label,
        str(sum(part.tiles for part in parts)),
        str(sum(part.wrong for part in parts)),
        *(f"{shares[view]:.2f}" for view in VIEWS),
    )


def _share(part: PartVerdict) -> float:
    """The error over its bound, which is 0 where a part must be exact; infinite where there is no number."""
    if part.error is None or (part.bound == 0 < part.error):
        return math.inf
    return part.error / part.bound if part.bound else 0.0
