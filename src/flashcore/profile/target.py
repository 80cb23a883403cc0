"""The process that Nsight Compute profiles: `python -m flashcore.profile.target IMPL --shape ...`.

It checks the call's output, warms up, then makes the call once between cudaProfilerStart and cudaProfilerStop.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from flashcore.bench.contender import Contender
from flashcore.bench.gate import Oracle, verify
from flashcore.bench.inputs import InputSets
from flashcore.bench.shapes import Shape, override, parse_shape
from flashcore.errors import FlashCoreError, ProfilerError, UnsupportedError
from flashcore.profile.subjects import subject
from flashcore.verify.watchdog import watchdog

WARMUP = 3
# ncu replays every kernel many times within the call.
HANG_SECONDS = 300.0


def call_once(
    contender: Contender,
    shape: Shape,
    device: torch.device,
    seed: int,
    profiled: Callable[[], AbstractContextManager[object]],
) -> None:
    """Make one call inside `profiled()`, after the same call passed the benchmark's gate and was warmed up.

    Raises:
        UnsupportedError: the contender does not take the shape here.
        ProfilerError: its output is wrong; nothing is profiled then.
    """
    inputs = InputSets(shape, device, seed)[0]
    reason = contender.unavailable_reason(inputs)
    if reason is not None:
        raise UnsupportedError(f"{contender.name}: {reason}")
    call = contender.prepare(inputs)
    correctness = verify(contender, call, Oracle(inputs, seed), device)
    if not correctness.passed:
        raise ProfilerError(f"{contender.name} is wrong on {shape.label}: {correctness.reason}")
    with torch.no_grad(), contender.context():
        for _ in range(WARMUP):
            call()
        with watchdog(HANG_SECONDS, f"{contender.name}: the profiled call"), profiled():
            call()


@contextmanager
def between_start_and_stop() -> Iterator[None]:
    """Profile what the GPU does inside, and nothing else."""
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    try:
        yield
        torch.cuda.synchronize()
    finally:
        torch.cuda.profiler.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when the call was made, 2 with one line on stderr when not."""
    parser = argparse.ArgumentParser(prog="flashcore.profile.target", description=__doc__)
    parser.add_argument("impl")
    parser.add_argument("--shape", required=True)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--mask", default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--causal", action="store_true")
    given = parser.parse_args(arguments)
    try:
        (shape,) = override((parse_shape(given.shape),), causal=given.causal, dtype=given.dtype, mask=given.mask)
        if not torch.cuda.is_available():
            raise UnsupportedError("device: there is no NVIDIA GPU here, and nothing else is profiled")
        device = torch.device("cuda", torch.cuda.current_device())
        call_once(subject(given.impl), shape, device, given.seed, between_start_and_stop)
    except FlashCoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
