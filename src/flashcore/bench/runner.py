"""A run: for each shape draw inputs, verify every contender, time those that passed together, and record all of it."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from flashcore import environment
from flashcore.bench import peaks, timing, work
from flashcore.bench.artifact import Artifact, ContenderRecord, SeriesRecord, Settings, ShapeRecord, WorkRecord
from flashcore.bench.contender import Contender, Output
from flashcore.bench.gate import GradientOracle, Judge, Oracle, verify
from flashcore.bench.gradients import peak_bytes, run_of
from flashcore.bench.inputs import InputSets
from flashcore.bench.shapes import Shape
from flashcore.bench.stats import ratio_of_medians
from flashcore.bench.work import Direction
from flashcore.errors import FlashCoreError, UnsupportedError

FLOOR = "empty kernel"
COLD_MEMORY_BYTES = 4 * 2**30
SDPA_REFUSAL = "No available kernel"

SAMPLE_MEANINGS = {
    "device_warm": "one CUDA-graph replay of K launches on the same inputs, event time / K",
    "device_reversed": "as device_warm, right after it, with the contenders of each round in the reverse order",
    "device_cold": "as device_warm, each launch on its own inputs and output, after 3x L2 of other data was read",
    "eager_stream": "wall clock of N Python calls and one synchronisation after them, / N",
    "eager_latency": "wall clock of one Python call and the synchronisation after it",
    "wall": "wall clock of one call on the CPU",
}

# What is being done, and how much of the present shape is done.
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Request:
    """What to measure. `left_out` are contenders that are listed with a reason instead of run.

    retime: on a GPU, time the warm launches a second time, in the reverse order. direction: what of a call is timed; of
    gradients, caches are taken as they are.
    """

    shapes: Sequence[Shape]
    contenders: Sequence[Contender]
    left_out: dict[str, str]
    iters: int = 100
    seed: int = 0
    eager: bool = True
    cold: bool = True
    grid: str | None = None
    retime: bool = False
    direction: Direction = "fwd"


def run(request: Request, device: torch.device, progress: Callable[[int, str, float], None]) -> Artifact:
    """Measure. `progress` gets the shape's number, what is being done, and the fraction of the shape that is done."""
    found = environment.collect(device)
    dtypes = {shape.dtype for shape in request.shapes} | ({"fp16", "bf16"} if device.type == "cuda" else set())
    progress(0, "peaks", 0.0)
    measured = peaks.measure(device, dtypes)
    records = []
    for number, shape in enumerate(request.shapes):
        records.append(_run_shape(request, shape, device, measured, partial(progress, number)))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    settings = Settings(
        iters=request.iters,
        warmup=timing.WARMUP,
        seed=request.seed,
        eager=request.eager,
        cold=request.cold,
        retime=request.retime,
        grid=request.grid,
        direction=request.direction,
        samples=SAMPLE_MEANINGS,
    )
    return Artifact(environment=found, settings=settings, peaks=measured, shapes=records)


def _run_shape(request: Request, shape: Shape, device: torch.device, measured: peaks.Peaks, progress: Progress) -> ShapeRecord:
    gradients = request.direction != "fwd"
    sets = InputSets(shape, device, request.seed, gradients=gradients)
    oracle: Judge = (GradientOracle if gradients else Oracle)(sets[0], request.seed)
    records: dict[str, ContenderRecord] = {}
    candidates: list[timing.Candidate] = []
    for position, contender in enumerate(request.contenders):
        progress(f"verify {contender.name}", position / len(request.contenders))
        record, candidate = _admit(request.direction, contender, sets, oracle, device)
        records[contender.name] = record
        candidates.extend([candidate] if candidate else [])
    for name, reason in request.left_out.items():
        records[name] = ContenderRecord(name=name, kind="peer", status="not timed", reason=reason)
    cold_sets, cold = _cold(request, shape, device)
    if device.type == "cuda":
        records[FLOOR], floor = _floor(device)
        candidates.extend([floor] if floor else [])
    plan = timing.Plan(iters=request.iters, eager=request.eager, max_cold_sets=cold_sets, retime=request.retime)
    with torch.no_grad():
        outcomes = (
            timing.time_cuda(candidates, plan, device, progress)
            if device.type == "cuda"
            else timing.time_cpu(candidates, plan, progress)
        )
    for name, outcome in outcomes.items():
        records[name] = _with_outcome(records[name], outcome)
    leading: timing.Mode = "device_warm" if device.type == "cuda" else "wall"
    baseline = _baseline(list(records.values()), leading)
    return ShapeRecord(
        shape=shape,
        work=_work(shape, measured, request.direction),
        baseline=baseline,
        cold=cold,
        clocks_after=environment.read_clocks(device) if device.type == "cuda" else environment.Clocks(),
        contenders=[_with_ratios(record, records.get(baseline or ""), request.seed) for record in records.values()],
    )


def _admit(
    direction: Direction, contender: Contender, sets: InputSets, oracle: Judge, device: torch.device
) -> tuple[ContenderRecord, timing.Candidate | None]:
    """Verify one contender: its record, and what the timer runs if it passed. Nothing it raises ends the run."""
    base = ContenderRecord(name=contender.name, kind=contender.kind, status="not timed")
    inputs = sets[0]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            reason = contender.unavailable_reason(inputs)
            if reason:
                return base.model_copy(update={"reason": reason}), None
            call = run_of(direction, contender.prepare, inputs)
            correctness = verify(contender, call, oracle, device)
            detail = contender.detail(inputs)
            peak = None
            if direction != "fwd" and device.type == "cuda":
                with contender.context():
                    peak = peak_bytes(contender.prepare, inputs)
        except UnsupportedError as error:
            return base.model_copy(update={"reason": str(error)}), None
        except Exception as error:  # a contender may fail in any way; its row says how
            if SDPA_REFUSAL in str(error):
                return base.model_copy(update={"reason": _sdpa_reason(said) or timing.describe(error)}), None
            return base.model_copy(update={"status": "failed", "reason": timing.describe(error)}), None
    record = base.model_copy(update={"correctness": correctness, "detail": detail, "peak_bytes": peak})
    if not correctness.passed:
        return record.model_copy(update={"status": "wrong", "reason": correctness.reason}), None

    def check(output: Output) -> str | None:
        return oracle.check(output).reason or None

    candidate = timing.Candidate(
        name=contender.name,
        call=call,
        cold_call=(lambda number: contender.prepare(sets[number])) if direction == "fwd" else None,
        context=contender.context,
        check=check,
    )
    return record, candidate


def _floor(device: torch.device) -> tuple[ContenderRecord, timing.Candidate | None]:
    """The empty kernel, timed as the contenders are: no launch can take less."""
    from flashcore.runtime import empty_launch

    record = ContenderRecord(name=FLOOR, kind="floor", status="failed")
    try:
        return record, timing.Candidate(name=FLOOR, call=empty_launch(device))
    except FlashCoreError as error:
        return record.model_copy(update={"reason": timing.describe(error)}), None


def _cold(request: Request, shape: Shape, device: torch.device) -> tuple[int, str]:
    """How many input sets a cold replay may use (0: none is made), and the sentence that says what was done."""
    if device.type != "cuda":
        return 0, "not measured: a CPU run takes the caches as they are"
    if request.direction != "fwd":
        return 0, "not measured: a backward pass follows its forward pass, and finds what that left in the caches"
    if not request.cold:
        return 0, "not measured: left out on request"
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    if shape.input_bytes > 3 * l2_bytes:
        return 0, "not measured: one launch's inputs are already more than 3x L2, so warm is cold"
    sets = max(1, min(timing.MAX_LAUNCHES, COLD_MEMORY_BYTES // (shape.input_bytes + shape.output_bytes)))
    return sets, f"up to {sets} input sets, each used once a replay; 3 x {l2_bytes} bytes read before each replay"


def _sdpa_reason(said: Sequence[warnings.WarningMessage]) -> str:
    """SDPA refuses in one sentence whatever the cause, and says why in warnings, also about backends not asked for."""
    lines = (str(warning.message).strip().partition("\n")[0].partition(" (Triggered")[0] for warning in said)
    return "; ".join(dict.fromkeys(line for line in lines if "disabled" not in line and not line.endswith("because:")))


def _with_outcome(record: ContenderRecord, outcome: timing.Outcome) -> ContenderRecord:
    if outcome.failure is not None:
        return record.model_copy(update={"status": "failed", "reason": outcome.failure})
    series = [SeriesRecord.of(series) for series in outcome.series]
    first = next((s.stats.p50 for s in series if s.mode == "device_warm"), None)
    if first is not None:
        series = [s.model_copy(update={"to_first": s.stats.p50 / first}) if s.mode == "device_reversed" else s for s in series]
    return record.model_copy(update={"status": "timed", "reason": "", "series": series})


def _baseline(records: Sequence[ContenderRecord], mode: timing.Mode) -> str | None:
    """The fastest of SDPA's backends by this mode's median, None when none was timed."""
    medians = {r.name: series.stats.p50 for r in records if r.kind == "sdpa" and (series := r.find(mode))}
    return min(medians, key=medians.__getitem__, default=None)


def _with_ratios(record: ContenderRecord, baseline: ContenderRecord | None, seed: int) -> ContenderRecord:
    if baseline is None or record.kind == "floor":
        return record
    compared = []
    for series in record.series:
        other = baseline.find(series.mode)
        if other is None:
            compared.append(series)
            continue
        ratio = ratio_of_medians(series.samples, other.samples, baseline=baseline.name, seed=seed)
        compared.append(series.model_copy(update={"ratio": ratio}))
    return record.model_copy(update={"series": compared})


def _work(shape: Shape, measured: peaks.Peaks, direction: Direction) -> WorkRecord:
    rate = measured.matrix_tflops[shape.dtype]
    bound = work.roofline(shape, peak_tflops=rate, peak_tbytes=measured.copy_tbytes, direction=direction)
    return WorkRecord(
        flops=work.flops(shape, direction),
        min_bytes=work.min_bytes(shape, direction),
        bound_us=bound.us,
        bound_limit=bound.limit,
    )
