"""Where our kernels change places: for each shape of grid `crossover` the time of each, and which is the fastest."""

from __future__ import annotations

from flashcore.bench.artifact import Artifact, ContenderRecord, ShapeRecord
from flashcore.bench.view import EMPTY, View, figure, measured_where, not_timed
from flashcore.kernels.registry import BINDINGS

GRID = "crossover"
# The rows in which the query tiles of a shape are counted: the fewest that any of our kernels takes on a tensor core of Hopper.
TILE_ROWS = 64
OURS = tuple(f"flashcore-{impl}" for impl in BINDINGS)


def crossover_view(artifact: Artifact) -> View | None:
    """The table of a run of its grid on a GPU, by head dim, causality and number of tiles; None for any other run."""
    if artifact.settings.grid != GRID or artifact.environment.gpu is None:
        return None
    records = sorted(artifact.shapes, key=lambda r: (r.shape.head_dim, r.shape.causal, _tiles(r), r.shape.seqlen_k))
    columns = ("shape", f"tiles of {TILE_ROWS}", *(f"{name} us" for name in OURS), "fastest", "x the next", "fastest SDPA us")
    notes = (
        f"tiles of {TILE_ROWS}: batch * heads * length / {TILE_ROWS}; the GPU has {artifact.environment.gpu.sm_count} "
        "multiprocessors",
        f"times: {artifact.leading_mode} medians; x the next: how many times as fast the fastest of ours is as the next",
        "auto takes the fastest at the nearest measured shape, of this grid and the others",
    )
    return View(f"crossover, {measured_where(artifact)}", columns, tuple(_row(artifact, record) for record in records), notes)


def _tiles(record: ShapeRecord) -> int:
    shape = record.shape
    return shape.batch * shape.heads_q * -(-shape.seqlen_q // TILE_ROWS)


def _row(artifact: Artifact, record: ShapeRecord) -> tuple[str, ...]:
    by_name = {contender.name: contender for contender in record.contenders}
    times = {c.name: s.stats.p50 for c in record.contenders if (s := c.find(artifact.leading_mode))}
    ours = sorted((times[name], name) for name in OURS if name in times)
    sdpa = [times[c.name] for c in record.contenders if c.kind == "sdpa" and c.name in times]
    return (
        record.shape.label,
        str(_tiles(record)),
        *(_time(times, by_name.get(name), name) for name in OURS),
        ours[0][1] if ours else EMPTY,
        f"{ours[1][0] / ours[0][0]:.2f}" if len(ours) > 1 else EMPTY,
        figure(min(sdpa)) if sdpa else EMPTY,
    )


def _time(times: dict[str, float], contender: ContenderRecord | None, name: str) -> str:
    return figure(times[name]) if name in times else not_timed(contender)
