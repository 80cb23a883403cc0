"""A benchmark artifact with made-up times, what Nsight Compute prints, and an executable that stands in for it."""

import csv
import io
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flashcore import evidence
from flashcore.bench.artifact import Artifact, ContenderRecord, SeriesRecord, load
from flashcore.bench.peaks import Peaks
from flashcore.bench.timing import Series
from flashcore.profile import metrics

RECORDED = evidence.FOLDER / "nvidia-h200"
PEAKS = Peaks(copy_bytes=2**31, copy_tbytes=4.0, matrix_size=8192, matrix_tflops={"fp16": 640.0, "bf16": 650.0})
# of the mission shape, 1,8,512,64 fp16: 2^29 FLOPs over 2^21 bytes
MEDIANS = {"flashcore": 4.0, "flashcore-portable": 8.0, "sdpa-auto": 16.0}

COLUMNS = {
    "ID": "0",
    "Process ID": "4242",
    "Process Name": "python3.12",
    "Host Name": "127.0.0.1",
    "Kernel Name": "hopper_forward",
    "Context": "1",
    "Stream": "7",
    "Block Size": "(384, 1, 1)",
    "Grid Size": "(132, 1, 1)",
    "Device": "0",
    "CC": "9.0",
}
# each metric's unit and value in the page
READINGS = {
    "gpu__time_duration.sum": ("nsecond", "5,120"),
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": ("%", "41.50"),
    "smsp__issue_active.avg.pct_of_peak_sustained_active": ("%", "33.25"),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "12.00"),
    "dram__bytes_read.sum": ("byte", "2,097,152"),
    "dram__bytes_write.sum": ("byte", "1,048,576"),
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "25.75"),
    "lts__t_bytes.sum": ("byte", "10,240,000"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "18.70"),
    "launch__registers_per_thread": ("register/thread", "168"),
    "launch__shared_mem_per_block": ("byte/block", "200,704"),
    metrics.STALL_NAME.format("long_scoreboard"): ("inst", "2.00"),
    metrics.STALL_NAME.format("barrier"): ("inst", "0.50"),
    metrics.STALL_NAME.format("gmma"): ("inst", "4.00"),
    metrics.STALL_NAME.format("wait"): ("inst", "1.00"),
    metrics.STALL_NAME.format("math_pipe_throttle"): ("inst", "1.50"),
    metrics.STALL_NAME.format("short_scoreboard"): ("inst", "0.75"),
    metrics.STALL_NAME.format("sleeping"): ("inst", "0.25"),
}
BEFORE = "==PROF== Connected to process 4242 (/usr/bin/python3.12)\nUserWarning: a line of the program's, with one \" in it\n"
PASSES = '==PROF== Profiling "hopper_forward" - 0: 0%....50%....100% - 12 passes\n==PROF== Disconnected from process 4242\n'
AFTER = "==WARNING== Found outstanding GPU clock reset, trying to revert...Success.\n"

# The stand-in: `{answers}` holds what it prints for a profile, and its exit code; what it was asked is written beside itself.
FAKE = """#!{python}
import pathlib, subprocess, sys
here = pathlib.Path(__file__).parent
if "--version" in sys.argv:
    print("NVIDIA (R) Nsight Compute Command Line Profiler\\nVersion 2025.3.1.0 (build 36398880) (public-release)")
elif "--query-metrics" in sys.argv:
    print((here / "listed").read_text())
else:
    (here / "asked").write_text("\\n".join(sys.argv[1:]))
    code = {code}
    if {runs_target}:
        code = subprocess.run(sys.argv[sys.argv.index("--metrics") + 2:]).returncode
    sys.stdout.write((here / "page").read_text())
    sys.exit(code)
"""

Page = Callable[..., str]


@pytest.fixture
def page() -> Page:
    """A function that makes a raw page as ncu prints it, its own lines around it.

    kernels: for each, the columns that differ; readings: name -> (unit, value), in place of some; without: left out.
    """

    def make(
        kernels: tuple[dict[str, str], ...] = ({},),
        readings: dict[str, tuple[str, str]] | None = None,
        without: tuple[str, ...] = (),
    ) -> str:
        values = {name: value for name, value in (READINGS | (readings or {})).items() if name not in without}
        out = io.StringIO()
        writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow([*COLUMNS, *values])
        writer.writerow([*("" for _ in COLUMNS), *(unit for unit, _ in values.values())])
        for number, changed in enumerate(kernels):
            cells = COLUMNS | {"ID": str(number)} | {name: value for name, (_, value) in values.items()} | changed
            writer.writerow(cells.values())
        return BEFORE + PASSES + out.getvalue() + AFTER

    return make


@pytest.fixture
def fake_ncu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that puts an ncu on PATH which prints a page and exits with a code; returns its folder.

    listed: the metrics that it says the chip has; runs_target: it runs its child too, and takes its exit code.
    """

    def make(text: str, *, code: int = 0, listed: str | None = None, runs_target: bool = False) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        script = folder / "ncu"
        script.write_text(FAKE.format(python=sys.executable, code=code, runs_target=runs_target))
        script.chmod(script.stat().st_mode | stat.S_IEXEC)
        (folder / "page").write_text(text)
        names = [name.partition(".")[0] for name in READINGS if not name.startswith("launch__")]
        lines = [f"{name:70} Counter   inst   # what it counts" for name in names]
        (folder / "listed").write_text("\n".join(["Device NVIDIA H200 (GH100)", *lines]) if listed is None else listed)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        return folder

    return make


@pytest.fixture
def artifact() -> Artifact:
    """A GPU's run over the mission shape: three contenders with known medians, a wrong one and a floor."""
    recorded = load(RECORDED / "bench-mission.json")
    (record,) = recorded.shapes
    timed = [
        ContenderRecord(
            name=name,
            kind="ours" if name.startswith("flashcore") else "peer",
            status="timed",
            series=[SeriesRecord.of(Series("device_warm", 100, (us, us, us)))],
        )
        for name, us in MEDIANS.items()
    ]
    floor = SeriesRecord.of(Series("device_warm", 512, (1.0, 1.0, 1.0)))
    others = [
        ContenderRecord(name="flex", kind="peer", status="wrong", reason="NaN"),
        ContenderRecord(name="empty kernel", kind="floor", status="timed", series=[floor]),
    ]
    changed = record.model_copy(update={"contenders": [*timed, *others]})
    return recorded.model_copy(update={"peaks": PEAKS, "shapes": [changed]})
