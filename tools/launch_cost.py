"""Measure what a launch costs the host: our launcher with each kernel, Triton's own `fn[grid](...)` and SDPA.

The call is of the mission shape; a kernel that cannot run on this GPU is left out.

    python tools/launch_cost.py OUT.json        # on a machine with an NVIDIA GPU and Triton

A sample is the wall time of 200 calls over their number; the GPU is idle before each sample and its queue (1024 launches)
never fills within one. The figures are quoted by docs/notes/host-overhead.md.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import flashcore
from flashcore.environment import collect
from flashcore.errors import UnsupportedError
from flashcore.kernels.arguments import TENSORS
from flashcore.kernels.portable import binding as portable
from flashcore.kernels.registry import BINDINGS, EMPTY, KERNELS
from flashcore.runtime import empty_launch
from flashcore.runtime.driver import bindings, load_function
from flashcore.runtime.engine import plan_call
from flashcore.runtime.launch import Launcher
from flashcore.runtime.store import obtain
from flashcore.spec import Options
from flashcore.target import Target
from flashcore.verify.watchdog import watchdog

CALLS, SAMPLES = 200, 40


def host_us(call: Callable[[], object]) -> float:
    """The host's time per call, in microseconds, from an idle GPU."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def bare_launch(device: torch.device) -> Callable[[], object]:
    """The driver's call alone, everything about it fixed beforehand: what no launcher on cuda-bindings can go below."""
    binary = obtain(EMPTY, Target.of(device))
    function = load_function(binary.cubin, binary.info.symbol, binary.info.shared, "the empty kernel")
    stream = torch.cuda.current_stream(device).cuda_stream
    scratch = ctypes.create_string_buffer(8 * len(binary.info.parameters))
    size = ctypes.c_size_t(len(scratch))
    extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(scratch), 2, ctypes.addressof(size), 0)
    driver = bindings()
    config = driver.CUlaunchConfig()
    config.gridDimX = config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
    config.blockDimX, config.numAttrs, config.hStream = binary.info.threads, 0, driver.CUstream(stream)
    address, launch_kernel = ctypes.addressof(extra), driver.cuLaunchKernelEx

    def launch(keep: object = (scratch, size, extra)) -> None:
        launch_kernel(config, function, 0, address)

    return launch


def main() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    q, k, v = (torch.randn(1, 8, 512, 64, device=device, dtype=torch.float16) for _ in range(3))
    o, lse = torch.empty_like(q), torch.empty(1, 8, 512, device=device)
    options = Options.check(causal=False, scale=None, window=None, softcap=0.0, layout="bhsd")
    # zero for the first launch only: a kernel that takes its tiles by it then finds none left, which the host does not notice
    counter = torch.zeros(1, dtype=torch.int32, device=device)
    tensors = {"q": q, "k": k, "v": v, "o": o, "lse": lse, "counter": counter}
    addresses = tuple(tensors[name].data_ptr() if name in tensors else 0 for name in TENSORS)
    calls: dict[str, Callable[[], object]] = {
        "cuLaunchKernelEx through cuda-bindings, empty kernel": bare_launch(device),
        "our launcher, empty kernel": empty_launch(device),
    }
    for impl, binding in BINDINGS.items():
        try:
            spec, plan = plan_call(q, k, v, None, options, False, impl)
        except UnsupportedError as error:
            print(f"left out: {error}")
            continue
        assert plan.specialisation is not None
        arguments = binding.arguments(spec, plan.specialisation)
        launch = Launcher(obtain(plan.specialisation, Target.of(device)), device, grid=plan.grid, arguments=arguments).launch
        calls[f"our launcher, {impl} kernel"] = partial(launch, addresses)
        calls[f"flashcore.attention, impl {impl}"] = partial(flashcore.attention, q, k, v, layout="bhsd", impl=impl)
    spec, plan = plan_call(q, k, v, None, options, False, portable.IMPL)
    specialisation = plan.specialisation
    assert specialisation is not None
    kernel = KERNELS[specialisation.kernel]
    triton_launch = getattr(importlib.import_module(kernel.module), kernel.function)[(plan.grid,)]
    scalars = portable.arguments(spec, specialisation)[len(portable.POINTERS) :]
    constants = dict(specialisation.constants)
    shape = {"num_warps": specialisation.num_warps, "num_stages": specialisation.num_stages}
    calls |= {
        "triton fn[grid], the portable kernel": lambda: triton_launch(q, k, v, q, o, lse, *scalars, **constants, **shape),
        "SDPA called plainly": lambda: F.scaled_dot_product_attention(q, k, v),
        "torch.empty_like": lambda: torch.empty_like(q),
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with watchdog(120, "measuring launches"):
        for call in calls.values():
            host_us(call)
        for _ in range(SAMPLES):  # interleaved: what slows the host down slows all of them down
            for name, call in calls.items():
                samples[name].append(host_us(call))
    results = {name: {"median": statistics.median(of), "min": min(of), "max": max(of)} for name, of in samples.items()}
    for name, result in results.items():
        print(f"{name:50s} {result['median']:7.2f} us  (min {result['min']:.2f})")
    record = {"schema_version": 1, "environment": collect().model_dump(mode="json"), "host_us_per_call": results}
    Path(sys.argv[1]).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
