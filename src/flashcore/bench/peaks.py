"""The machine's two ceilings, measured in the run that quotes them: copy bandwidth and matrix rate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import torch
from pydantic import BaseModel, ConfigDict

from flashcore.bench.shapes import DTYPES
from flashcore.verify.watchdog import watchdog

COPY_BYTES = {"cuda": 2**31, "cpu": 2**28}
MATRIX_SIZE = {"cuda": 8192, "cpu": 1024}
REPEATS = {"cuda": 20, "cpu": 5}
WARMUP = 3
HANG_SECONDS = 120.0


class Peaks(BaseModel):
    """Medians. Copy counts the bytes read and the bytes written; a matrix product of size n counts 2 n^3 operations."""

    model_config = ConfigDict(frozen=True)

    copy_bytes: int
    copy_tbytes: float
    matrix_size: int
    matrix_tflops: dict[str, float]


def measure(device: torch.device, dtypes: Iterable[str]) -> Peaks:
    """Copy bandwidth in TB/s and the matrix rate in TFLOP/s of each dtype ("fp16", ...), on random data."""
    kind = device.type
    size = MATRIX_SIZE[kind]
    with watchdog(HANG_SECONDS, "measuring the machine's peaks"):
        copy_us = _copy_us(device, COPY_BYTES[kind])
        matrix = {dtype: 2 * size**3 / _matrix_us(device, size, dtype) * 1e-6 for dtype in sorted(set(dtypes))}
    if kind == "cuda":
        torch.cuda.empty_cache()
    return Peaks(
        copy_bytes=COPY_BYTES[kind],
        copy_tbytes=2 * COPY_BYTES[kind] / copy_us * 1e-6,
        matrix_size=size,
        matrix_tflops=matrix,
    )


def _copy_us(device: torch.device, size: int) -> float:
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    return _median_us(lambda: target.copy_(source), device)


def _matrix_us(device: torch.device, size: int, dtype: str) -> float:
    kind = getattr(torch, DTYPES[dtype])
    left, right = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    result = torch.empty(size, size, device=device, dtype=kind)
    return _median_us(lambda: torch.mm(left, right, out=result), device)


def _median_us(step: Callable[[], object], device: torch.device) -> float:
    """Each step takes milliseconds, so one step between two events (a CPU: two clock readings) is a sample."""
    for _ in range(WARMUP):
        step()
    samples = []
    for _ in range(REPEATS[device.type]):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            samples.append(float(start.elapsed_time(end)) * 1e3)
        else:
            began = time.perf_counter_ns()
            step()
            samples.append((time.perf_counter_ns() - began) * 1e-3)
    return statistics.median(samples)
