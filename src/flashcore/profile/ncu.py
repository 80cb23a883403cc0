"""Nsight Compute as a child process: what it is asked, and what its failures mean."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import flashcore.environment as environment
from flashcore.bench.shapes import Shape
from flashcore.errors import ProfilerError, UnsupportedError
from flashcore.profile import metrics
from flashcore.profile.ncu_page import parse
from flashcore.profile.records import ProfileRecord

TOOL = "ncu"
# The clocks stay as they are: locking them needs rights, and a time at other clocks is not comparable with any of bench's.
# Caches are flushed before each pass, so that device memory is seen to serve at least what must move.
FLAGS = (
    "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none", "--cache-control", "all",
    "--profile-from-start", "off", "--target-processes", "application-only",
)  # fmt: skip
QUERY_SECONDS = 60.0
PROFILE_SECONDS = 420.0
INSTEAD = "`--no-ncu` places the call under the roofline by its time alone"

# What ncu or the target says, what that means, and what to do. The first found in what was printed is told.
FAILURES = (
    (
        "ERR_NVGPUCTRPERM",
        "this user may not read the GPU's performance counters (ERR_NVGPUCTRPERM). Run as root, or load the driver with "
        "NVreg_RestrictProfilingToAdminUsers=0; in a container, start it with --cap-add=SYS_ADMIN",
    ),
    (
        "driver resource was unavailable",
        "another tool holds the GPU's performance counters. Stop it: for DCGM, `dcgmi profile --pause`, later `--resume`",
    ),
    ("stub libcuda", "the libcuda that is found first is the toolkit's stub. Take its folder out of LD_LIBRARY_PATH"),
    (
        "Failed to initialize the profiler",
        "this ncu does not go with the driver. Install the Nsight Compute of the driver's CUDA version",
    ),
)
_UNKNOWN_METRIC = re.compile(r"Failed to find metric (?:regex:\^)?([A-Za-z0-9_.]+)")
_METRIC_NAME = re.compile(r'^\s*"?([a-z0-9]+__[a-z0-9_]+)')


def find() -> str | None:
    """The path of ncu, or None where it is not on PATH."""
    return shutil.which(TOOL)


def profile(tool: str, impl: str, shape: Shape, seed: int) -> ProfileRecord:
    """One call of an implementation under Nsight Compute, checked for correctness before it is profiled.

    Raises:
        ProfilerError: ncu or the call failed, or ncu's table is not what it should be.
    """
    asked, absent = metrics.choose(_listed(tool))
    command = [tool, *FLAGS, "--metrics", ",".join(asked), *target_command(impl, shape, seed)]
    printed = _run(command)
    return ProfileRecord(
        environment=environment.collect(),
        ncu=_version(tool),
        # without the paths of this machine
        command=[Path(part).name if part in (tool, sys.executable) else part for part in command],
        impl=impl,
        shape=shape,
        absent=absent,
        kernels=parse(printed, asked),
    )


def target_command(impl: str, shape: Shape, seed: int) -> list[str]:
    """How the process that makes the call is started."""
    sizes = shape.label.partition(" ")[0]
    arguments = ["--shape", sizes, "--dtype", shape.dtype, "--mask", shape.mask, "--seed", str(seed)]
    causal = ["--causal"] if shape.causal else []
    return [sys.executable, "-m", "flashcore.profile.target", impl, *arguments, *causal]


def absence() -> str:
    """Why there is no profile where ncu is not installed."""
    return (
        "Nsight Compute is not installed here (no `ncu` on PATH; it comes with the CUDA toolkit, in its bin folder, or with "
        "the package nsight-compute): no counters are read, and the roofline is drawn from times alone."
    )


def _listed(tool: str) -> set[str] | None:
    """Base names of the metrics that this machine's GPUs have, or None where ncu does not say or is not understood."""
    try:
        done = subprocess.run([tool, "--query-metrics"], capture_output=True, text=True, timeout=QUERY_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    names = {found[1] for line in done.stdout.splitlines() if (found := _METRIC_NAME.match(line))}
    # a list without the time that every chip has is no list of metrics
    return names if done.returncode == 0 and "gpu__time_duration" in names else None


def _version(tool: str) -> str:
    try:
        done = subprocess.run([tool, "--version"], capture_output=True, text=True, timeout=QUERY_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return next((line.strip() for line in reversed(done.stdout.splitlines()) if line.strip()), "unknown")


def _run(command: list[str]) -> str:
    """What ncu and its child printed. Raises ProfilerError where either failed."""
    try:
        # a session of its own, so that a hang ends with its child and not with the child left on the GPU; the C locale, so
        # that numbers have no thousands separators
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            env={**os.environ, "LC_ALL": "C"},
        )
    except OSError as error:
        raise UnsupportedError(f"{TOOL} cannot be started: {error}; {INSTEAD}") from error
    try:
        out, errors = child.communicate(timeout=PROFILE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        raise ProfilerError(f"ncu did not finish in {PROFILE_SECONDS:g} s and was ended; {INSTEAD}") from None
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        raise
    failure = _failure(f"{out}\n{errors}", child.returncode)
    if failure is not None:
        raise ProfilerError(failure)
    return out


def _failure(printed: str, code: int) -> str | None:
    """What went wrong, by what was printed; None for a profile."""
    said = " | ".join(line.strip() for line in printed.splitlines() if line.startswith("==ERROR=="))
    empty = "No kernels were profiled" in printed
    if code == 0 and not said and not empty:
        return None
    for sign, meaning in FAILURES:
        if sign in printed:
            return f"ncu: {meaning}; {INSTEAD}"
    if unknown := _UNKNOWN_METRIC.search(printed):
        advice = "Update Nsight Compute, or report its version and the GPU"
        return f"ncu: it does not know the metric {unknown[1].rstrip('.')} on this GPU. {advice}; {INSTEAD}"
    # the target's own last word is the cause of what ncu says after it
    own = [line for line in printed.splitlines() if line.startswith("error: ")]
    if own:
        return f"the call that was to be profiled failed: {own[-1].removeprefix('error: ')}"
    if empty and code == 0 and not said:
        return f"ncu: no kernel was launched between the profiler's start and its stop; {INSTEAD}"
    return f"ncu: it failed with exit code {code}: {said or _tail(printed)}; {INSTEAD}"


def _tail(printed: str) -> str:
    return " | ".join(line.strip() for line in printed.splitlines()[-3:] if line.strip()) or "nothing was printed"
