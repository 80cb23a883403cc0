"""What Nsight Compute is asked for: the metrics by the names that chips have for them, and what each one means.

Names are those of ncu's PerfWorks metrics on sm_80, sm_89 and sm_90 (NVIDIA, Nsight Compute Profiling Guide, "Metrics
Structure" and "Warp Stall Reasons").
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# What a launch is made of is no counter of the chip: ncu has it everywhere and lists it nowhere.
LAUNCH_PREFIX = "launch__"
STALL_NAME = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"


@dataclass(frozen=True)
class Metric:
    """One quantity. `names`: what it is called, the first that a chip has; `meaning`: how to read its value."""

    label: str
    names: tuple[str, ...]
    meaning: str = ""


DURATION = Metric("duration", ("gpu__time_duration.sum",), "under the profiler, with L2 flushed before the launch")
TENSOR = Metric(
    "tensor pipe",
    (
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
        "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed",
        "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_elapsed",
    ),
    "cycles in which the matrix units worked; what is missing to 100 % is softmax, waiting and idle SMs",
)
ISSUE = Metric(
    "issue slots",
    ("smsp__issue_active.avg.pct_of_peak_sustained_active",),
    "cycles in which a scheduler issued an instruction; low with a low tensor pipe means latency, not work",
)
DRAM = Metric(
    "DRAM",
    ("dram__throughput.avg.pct_of_peak_sustained_elapsed",),
    "near 100 % the kernel waits for device memory, and only fewer bytes make it faster",
)
DRAM_READ = Metric("DRAM bytes read", ("dram__bytes_read.sum", "dram__bytes_op_read.sum"))
DRAM_WRITE = Metric("DRAM bytes written", ("dram__bytes_write.sum", "dram__bytes_op_write.sum"))
L2 = Metric(
    "L2",
    ("lts__throughput.avg.pct_of_peak_sustained_elapsed",),
    "keys and values that many blocks read come from here; larger tiles or clusters that share them lower it",
)
L2_BYTES = Metric("L2 bytes", ("lts__t_bytes.sum",))
OCCUPANCY = Metric(
    "occupancy",
    ("sm__warps_active.avg.pct_of_peak_sustained_active",),
    "warp slots that held a warp; low is no fault where few warps keep the tensor pipe busy",
)
REGISTERS = Metric("registers", ("launch__registers_per_thread",), "of a thread, 255 at most; they bound the blocks of an SM")
SHARED = Metric("shared memory", ("launch__shared_mem_per_block",), "of a block; it bounds the blocks of an SM too")

STALLS = {
    "barrier": "waits at a barrier for the block's other warps",
    "branch_resolving": "waits for a branch's target",
    "dispatch_stall": "the dispatcher holds the issued instruction back",
    "drain": "has ended and waits for its stores to leave",
    "gmma": "waits for a warp group's matrix products (WARPGROUP.ARRIVE or its wait)",
    "imc_miss": "waits for a constant that was not cached",
    "lg_throttle": "the queue of global and local memory instructions is full: wider accesses make fewer",
    "long_scoreboard": "waits for data from L2 or device memory: load earlier, or have more warps",
    "math_pipe_throttle": "the arithmetic pipe it needs is busy: this is work, not waiting",
    "membar": "waits at a memory fence",
    "mio_throttle": "the queue of shared memory and special instructions is full",
    "misc": "another reason of the hardware's",
    "no_instruction": "waits for its next instruction to be fetched",
    "not_selected": "was ready while another warp was issued: there are warps enough",
    "short_scoreboard": "waits for shared memory or a special function such as exp2",
    "sleeping": "sleeps or has yielded",
    "tex_throttle": "the queue of texture instructions is full",
    "wait": "waits a fixed number of cycles for the instruction before: more independent work hides it",
}
STALL_METRICS = {reason: Metric(f"stall {reason}", (STALL_NAME.format(reason),), STALLS[reason]) for reason in STALLS}
METRICS = (
    DURATION, TENSOR, ISSUE, DRAM, DRAM_READ, DRAM_WRITE, L2, L2_BYTES, OCCUPANCY, REGISTERS, SHARED,
    *STALL_METRICS.values(),
)  # fmt: skip


def choose(listed: Iterable[str] | None) -> tuple[list[str], list[str]]:
    """The names to ask for, and the labels of what the chip does not have.

    listed: base names of the chip's metrics (without `.sum` and the like); None where they could not be learnt, and then
    everything is asked for by its first name.
    """
    known = None if listed is None else frozenset(listed)
    asked, absent = [], []
    for metric in METRICS:
        there = [name for name in metric.names if known is None or _base(name) in known or name.startswith(LAUNCH_PREFIX)]
        if there:
            asked.append(there[0])
        else:
            absent.append(metric.label)
    return asked, absent


def _base(name: str) -> str:
    return name.partition(".")[0]
