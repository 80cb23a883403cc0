"""What is printed: the table of a roofline, and what a profile says of each kernel."""

from __future__ import annotations

from rich.console import Console

from flashcore.bench import work
from flashcore.bench.report import print_view
from flashcore.bench.view import EMPTY, View, figure
from flashcore.profile import metrics
from flashcore.profile.metrics import Metric
from flashcore.profile.records import KernelRecord, ProfileRecord
from flashcore.profile.roofline import Roofline, intensity

TOP_STALLS = 5
# Up to this many shapes, a row is a contender on a shape; beyond, it is a shape and its cells are the contenders.
MAX_LONG = 2


def print_roofline(roofline: Roofline, console: Console) -> None:
    """Print where every point stands under the ceilings."""
    print_view(roofline_view(roofline), console)


def print_profile(record: ProfileRecord, console: Console) -> None:
    """Print a table for each kernel of the call."""
    for kernel in record.kernels:
        print_view(kernel_view(record, kernel), console)


def roofline_view(roofline: Roofline) -> View:
    """The table of a roofline: of few shapes a row for each contender, of many a row for each shape."""
    rates = ", ".join(f"{dtype} {value:.3g} TFLOP/s" for dtype, value in roofline.ceilings.tflops.items())
    ceilings = f"ceilings: {roofline.ceilings.tbytes:.3g} TB/s, {rates}; {roofline.ceilings.source}"
    notes = [ceilings, *roofline.notes]
    if any(roofline.share(point) > 1 for point in roofline.points):
        notes.append("above 100 %: faster than the matrix product or copy that the ceiling was measured by")
    columns, rows = _long(roofline) if len(roofline.shapes) <= MAX_LONG or roofline.on_paper else _wide(roofline)
    return View(roofline.title, tuple(columns), tuple(map(tuple, rows)), tuple(notes))


def _long(roofline: Roofline) -> tuple[list[str], list[list[str]]]:
    rows = []
    for point in sorted(roofline.points, key=lambda point: (roofline.shapes.index(point.shape), point.us)):
        bound = roofline.bound(point.shape)
        row = [point.name, point.shape.label, figure(point.intensity), f"{figure(bound.us)} ({bound.limit})"]
        if not roofline.on_paper:
            row += [figure(point.us), figure(point.tflops), _percent(roofline.share(point))]
        rows.append(row)
    columns = ["who", "shape", "FLOP/byte", "bound us (set by)"]
    return (columns if roofline.on_paper else [*columns, "us", "TFLOP/s", "% of roof"]), rows


def _wide(roofline: Roofline) -> tuple[list[str], list[list[str]]]:
    names = list(dict.fromkeys(point.name for point in roofline.points))
    cells = {
        (point.shape, point.name): f"{figure(point.tflops)} ({_percent(roofline.share(point))})" for point in roofline.points
    }
    rows = []
    for shape in roofline.shapes:
        bound = roofline.bound(shape)
        row = [shape.label, figure(intensity(shape, roofline.direction)), f"{figure(bound.us)} ({bound.limit})"]
        rows.append(row + [cells.get((shape, name), EMPTY) for name in names])
    return ["shape", "FLOP/byte", "bound us (set by)", *(f"{name}: TFLOP/s (% of roof)" for name in names)], rows


def kernel_view(record: ProfileRecord, kernel: KernelRecord) -> View:
    """One kernel: what was counted, how much of the chip's peak that is, and what it means."""
    rows = [("duration", f"{figure(kernel.us)} us", EMPTY, metrics.DURATION.meaning)]
    rows += [_share_row(metric, kernel, "") for metric in (metrics.TENSOR, metrics.ISSUE)]
    rows.append(_share_row(metrics.DRAM, kernel, _dram_rate(kernel)))
    rows.append(_share_row(metrics.L2, kernel, _rate(kernel.value(metrics.L2_BYTES), kernel.us)))
    rows.append(_share_row(metrics.OCCUPANCY, kernel, ""))
    rows.append(_count_row(metrics.REGISTERS, kernel, ""))
    rows.append(_count_row(metrics.SHARED, kernel, " bytes"))
    stalls = kernel.stalls[:TOP_STALLS]
    rows += [
        (f"stall: {reason}", f"{figure(cycles)} cycles", _percent(share), metrics.STALLS[reason])
        for reason, cycles, share in stalls
    ]
    columns = ("what", "value", "% of peak", "meaning")
    title = f"{kernel.name} {kernel.grid} x {kernel.block}, in {record.impl} on {record.shape.label}"
    return View(title, columns, tuple(rows), tuple(_notes(record, kernel, bool(stalls))))


def _notes(record: ProfileRecord, kernel: KernelRecord, stalled: bool) -> list[str]:
    notes = []
    if stalled:
        notes.append("stall: cycles warps waited for each instruction issued, and the share of all waiting (not of a peak)")
    moved, least = kernel.dram_bytes, work.min_bytes(record.shape)
    if moved is not None and len(record.kernels) == 1:
        notes.append(f"device memory moved {figure(moved / 1e6)} MB, {moved / least:.2f} x the fewest that must move")
    unread = [m.label for m in metrics.METRICS if m.label not in record.absent and kernel.value(m) is None]
    if unread:
        notes.append(f"n/a from ncu for this kernel: {', '.join(unread)}")
    if record.absent:
        notes.append(f"this GPU has no such metric, so it was not asked for: {', '.join(record.absent)}")
    return [*notes, f"{record.ncu}; clocks not locked, caches flushed before each pass"]


def _share_row(metric: Metric, kernel: KernelRecord, value: str) -> tuple[str, str, str, str]:
    share = kernel.value(metric)
    return metric.label, value or EMPTY, "n/a" if share is None else f"{share:.1f} %", metric.meaning


def _count_row(metric: Metric, kernel: KernelRecord, unit: str) -> tuple[str, str, str, str]:
    count = kernel.value(metric)
    return metric.label, "n/a" if count is None else f"{count:.0f}{unit}", EMPTY, metric.meaning


def _dram_rate(kernel: KernelRecord) -> str:
    return _rate(kernel.dram_bytes, kernel.us)


def _rate(size: float | None, us: float) -> str:
    return "n/a" if size is None else f"{figure(size / us * 1e-6)} TB/s"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
