"""Make a GPU's index.json from the records beside it, and say what is missing from it."""

from __future__ import annotations

from pathlib import Path

from flashcore import tuned
from flashcore.bench.artifact import Artifact, load
from flashcore.build.sets import BuiltSet
from flashcore.errors import BinaryError
from flashcore.evidence import FOLDER, Direction, Index, Peaks, Timing, kernels_of
from flashcore.kernels.registry import BINDINGS, KERNELS
from flashcore.sources import kernel_hashes
from flashcore.verify.record import VerifyRecord, read
from flashcore.verify.subject import OURS

SUITE = "all"
# The record of the gradients, beside verify.json; and earlier ones, for the binaries that are still the same, byte for byte,
# and that no case of the later one ran.
BACKWARD = "verify-bwd.json"
EARLIER_BACKWARD = "verify-bwd-*.json"


def slug(gpu: str) -> str:
    """The folder of a GPU's evidence: "NVIDIA H200" -> "nvidia-h200"."""
    return gpu.lower().replace(" ", "-")


def folders() -> list[Path]:
    """The folders that hold evidence, one a GPU."""
    return sorted(path.parent for path in FOLDER.glob("*/verify.json"))


def artifacts(folder: Path) -> list[Artifact]:
    """The benchmark artifacts of a folder, by name."""
    return [load(path) for path in sorted(folder.glob("bench-*.json"))]


def make_index(folder: Path) -> Index:
    """The index that the records of a folder add up to. Gradients may not have been verified yet.

    Raises:
        BinaryError: a verification record is no evidence: partial, interpreted, failing, not from a GPU or from another one.
    """
    forward = _evidence(folder / "verify.json", "fwd")
    backward = {
        path: _evidence(path, "bwd") for path in (folder / BACKWARD, *sorted(folder.glob(EARLIER_BACKWARD))) if path.exists()
    }
    gpu = forward.environment.gpu
    assert gpu is not None  # refusal() saw to it
    sources: dict[str, str] = {}
    verified: dict[str, tuple[str, int]] = {}
    for path, record in {folder / "verify.json": forward, **backward}.items():
        if record.device != forward.device:
            raise BinaryError(f"{path}: is of {record.device}, and verify.json is of {forward.device}")
        passed = {sha256: binary for sha256, binary in record.binaries.items() if not binary.failed}
        # a kernel that the record has no binary of, because the GPU does not run it say, was not verified there
        ran = {binary.kernel for binary in passed.values()} | {kernel.id for kernel in KERNELS.values() if not kernel.computes}
        found = record.environment.kernel_sources
        sources |= {kernel: source for kernel, source in found.items() if kernel in ran and kernel not in sources}
        # of a binary the first record that names it speaks: an earlier one adds what nobody else has
        verified = {sha256: (binary.specialisation or "", len(binary.passed)) for sha256, binary in passed.items()} | verified
    measured = artifacts(folder)
    return Index(
        gpu=gpu.name,
        arch=_arch(gpu.arch),
        sources=sources,
        verified=dict(sorted(verified.items())),
        peaks=_peaks(measured),
        timings=_timings(measured, _verified_sources(forward, backward.get(folder / BACKWARD, forward))),
    )


def _verified_sources(forward: VerifyRecord, backward: VerifyRecord) -> dict[str, str]:
    """The sources that were there when each kernel was verified, or would have been had the GPU run it."""
    of_calls = {binding.KERNEL for binding in BINDINGS.values()}
    found = forward.environment.kernel_sources
    return {**backward.environment.kernel_sources, **{name: source for name, source in found.items() if name in of_calls}}


def _evidence(path: Path, direction: str) -> VerifyRecord:
    """A verification record. Raises BinaryError when it is no evidence of this direction."""
    record = read(path)
    refuse = f"is of direction {record.direction}, not {direction}" if record.direction != direction else refusal(record)
    if refuse is not None:
        raise BinaryError(f"{path}: {refuse}")
    return record


def refusal(record: VerifyRecord) -> str | None:
    """Why a verification record proves nothing of the binaries it names; None when it does."""
    if record.environment.gpu is None or record.interpreted:
        return "was not made on a GPU"
    if record.suite != SUITE or record.only is not None:
        return f"is partial: suite {record.suite}, only {record.only}; evidence takes the whole suite"
    if record.implementation not in (OURS, *BINDINGS):
        return f"verified {record.implementation}, not our kernels"
    if record.failed:
        return f"has {record.failed} failed cases"
    if not record.passed or not record.binaries:
        return "names no binary that passed anything"
    return None


def _arch(torch_arch: str) -> str:
    # torch says sm_90; our binaries for it use the arch-specific instructions of sm_90a
    return f"{torch_arch}a" if torch_arch in ("sm_90", "sm_100", "sm_103", "sm_120", "sm_121") else torch_arch


def _peaks(measured: list[Artifact]) -> Peaks | None:
    if not measured:
        return None
    rates: dict[str, float] = {}
    for artifact in measured:
        for dtype, rate in artifact.peaks.matrix_tflops.items():
            rates[dtype] = max(rate, rates.get(dtype, 0.0))
    return Peaks(matrix_tflops=rates, copy_tbytes=max(artifact.peaks.copy_tbytes for artifact in measured))


def _stale(artifact: Artifact, direction: Direction, verified: dict[str, str]) -> set[str]:
    """The contenders of a benchmark of another source than was verified: they say nothing of this one."""
    timed = artifact.environment.kernel_sources
    changed = {
        impl for impl in BINDINGS if any(timed.get(kernel) != verified.get(kernel) for kernel in kernels_of(impl, direction))
    }
    names = {f"flashcore-{impl}{kind}" for impl in changed for kind in ("", "-deterministic")}
    # auto may have taken the kernel that changed
    return names | ({"flashcore"} if changed else set())


def _timings(measured: list[Artifact], verified: dict[str, str]) -> list[Timing]:
    timings = []
    for artifact in measured:
        direction = artifact.settings.direction
        stale = _stale(artifact, direction, verified)
        for record in artifact.shapes:
            us = {}
            for contender in record.contenders:
                series = contender.find("device_warm")
                if contender.status == "timed" and series is not None and contender.name not in stale:
                    us[contender.name] = round(series.stats.p50, 3)
            shape = record.shape
            timings.append(
                Timing(
                    batch=shape.batch,
                    heads=shape.heads_q,
                    seqlen_q=shape.seqlen_q,
                    seqlen_k=shape.seqlen_k,
                    head_dim=shape.head_dim,
                    causal=shape.causal,
                    precision="fp32" if shape.dtype == "fp32" else "half",
                    mask=shape.mask,
                    direction=direction,
                    us=us,
                )
            )
    return timings


def unproved(index: Index, built: BuiltSet) -> list[str]:
    """What keeps the shipped set of the index's arch from being verified, one line each; empty when all of it is."""
    found = []
    for kernel_id, source in kernel_hashes().items():
        kernel = KERNELS[kernel_id]
        if kernel.computes and kernel.shipped(index.arch) and index.sources.get(kernel_id) != source:
            why = "its source changed since it was" if kernel_id in index.sources else "was never"
            found.append(f"{kernel_id}: {why} verified on {index.gpu}")
    for binary in built.binaries:
        if KERNELS[binary.info.kernel].computes and binary.info.sha256 not in index.verified:
            found.append(f"{binary.info.name}: {binary.info.sha256} is not among the binaries verified on {index.gpu}")
    found += [f"{name}: does not build: {words}" for name, words in built.failures.items()]
    return found


def unproved_entries(index: Index, built: BuiltSet, *, whole: bool = True) -> list[str]:
    """What is wrong with the tuned configurations of the index's GPU, one line each; empty when all are in use and proved.

    whole: all that is shipped has been built, so that what is not there is not shipped.

    Raises:
        ArgumentValueError: a table is damaged, or a configuration does not fit.
    """
    from flashcore.search.promote import unfounded

    found = []
    of_package = {binary.info.sha256 for binary in built.binaries}
    for path, table in tuned.tables().items():
        for entry in table.entries if table.gpu == index.gpu else ():
            name = f"{path.name}: {entry.problem.name}"
            if entry.stale:
                found.append(f"{name}: is stale, and ignored: its kernel's source changed since the search")
                continue
            words = unfounded(entry, FOLDER / slug(table.gpu))
            if words is not None:
                found.append(f"{name}: its records do not bear it out: {words}")
            for dtype, sha256 in entry.sha256.items():
                if sha256 not in index.verified:
                    found.append(f"{name}: its {dtype} binary {sha256} is not among those verified on {index.gpu}")
                if whole and sha256 not in of_package:
                    found.append(f"{name}: its {dtype} binary {sha256} is not among those that are built")
    return found
