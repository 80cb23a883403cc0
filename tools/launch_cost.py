"""Measure what a call costs the host, boundary by boundary, for each of our kernels; beside it Triton's own launch and SDPA.

The call is of the mission shape; a kernel that cannot run on this GPU is left out.

    python tools/launch_cost.py OUT.json        # on a machine with an NVIDIA GPU and Triton; some 30 s

A sample is 200 calls in a row from an idle GPU, whose queue (1024 launches) never fills within one. It gives two figures: the
host's time per call, and the wall time per call with the synchronisation after the last (a stream of calls, as `flashcore
bench` has it in eager_stream). They are quoted by docs/notes/host-overhead.md.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashcore
from flashcore import ops
from flashcore.environment import collect
from flashcore.errors import UnsupportedError
from flashcore.kernels.arguments import TENSORS
from flashcore.kernels.portable import binding as portable
from flashcore.kernels.registry import BINDINGS, EMPTY, KERNELS
from flashcore.runtime import empty_launch, engine, fast_path
from flashcore.runtime.driver import bindings, load_function
from flashcore.runtime.launch import Launcher
from flashcore.runtime.store import obtain
from flashcore.spec import Options
from flashcore.target import Target
from flashcore.verify.watchdog import watchdog

CALLS, SAMPLES = 200, 40
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Timed:
    """A call, and what is entered around a sample of it and never within."""

    call: Callable[[], object]
    context: Callable[[], AbstractContextManager[object]] = nullcontext

    def sample(self) -> tuple[float, float]:
        """(host, wall) time per call, in microseconds, from an idle GPU."""
        call = self.call
        with self.context():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            queued = time.perf_counter()
            torch.cuda.synchronize()
            return (queued - start) / CALLS * 1e6, (time.perf_counter() - start) / CALLS * 1e6


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


def our_boundaries(impl: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Timed]:
    """From the launch outwards to what a user writes; each call does all that the one before it does, and more."""
    options = Options.check(causal=False, scale=None, window=None, softcap=0.0, layout="bhsd")
    spec, plan = engine.plan_call(q, k, v, None, options, False, impl)
    assert plan.specialisation is not None
    device = q.device
    # zero for the first launch only: a kernel that takes its tiles by it then finds none left, which the host does not notice
    tensors = {"q": q, "k": k, "v": v, "o": torch.empty_like(q), "counter": torch.zeros(1, dtype=torch.int32, device=device)}
    addresses = tuple(tensors[name].data_ptr() if name in tensors else 0 for name in TENSORS)
    launcher = Launcher(
        obtain(plan.specialisation, Target.of(device)),
        device,
        grid=plan.grid,
        arguments=BINDINGS[impl].arguments(spec, plan.specialisation),
    )
    bare = partial(launcher.launch_here, addresses)
    bare.__dict__["keep"] = tensors  # addresses alone keep no memory
    launch = engine.prepare(spec, plan, options).launch
    assert launch is not None
    calls: fast_path.Calls = {}
    fast_path.remember(calls, launch, q, k, v, None)
    given = {"causal": False, "scale": None, "window": None, "softcap": 0.0, "return_lse": False, "top_left": False}
    attention = torch.compile(lambda q, k, v: flashcore.attention(q, k, v, layout="bhsd", impl=impl), fullgraph=True)
    boundaries: dict[str, Callable[[], object]] = {
        "our launcher": bare,
        "and the output's allocation": partial(launch, *addresses[:3], 0),
        "and the guard (a remembered call)": partial(fast_path.recall, calls, q, k, v, None),
        "flashcore.attention": partial(flashcore.attention, q, k, v, layout="bhsd", impl=impl),
        "the engine by its key, without the guard": partial(engine.run, q, k, v, None, layout="bhsd", impl=impl, **given),
        "torch.ops.flashcore.attention": partial(ops.attention, q, k, v, None, "bhsd", False, None, False, -1, -1, 0.0, impl),
        "torch.compile of flashcore.attention": partial(attention, q, k, v),
    }
    return {f"{impl}: {name}": Timed(call) for name, call in boundaries.items()}


def triton_launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Timed:
    """Triton's own launch of the portable kernel."""
    options = Options.check(causal=False, scale=None, window=None, softcap=0.0, layout="bhsd")
    spec, plan = engine.plan_call(q, k, v, None, options, False, portable.IMPL)
    specialisation = plan.specialisation
    assert specialisation is not None
    kernel = KERNELS[specialisation.kernel]
    launch = getattr(importlib.import_module(kernel.module), kernel.function)[(plan.grid,)]
    scalars = portable.arguments(spec, specialisation)[len(portable.POINTERS) :]
    constants = dict(specialisation.constants)
    shape = {"num_warps": specialisation.num_warps, "num_stages": specialisation.num_stages}
    o, lse = torch.empty_like(q), torch.empty(q.shape[:3], device=q.device)
    return Timed(lambda: launch(q, k, v, q, o, lse, *scalars, **constants, **shape))


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Timed]:
    """SDPA as users call it, compiled, and with each backend that runs the call here."""
    attend = partial(F.scaled_dot_product_attention, q, k, v)
    found = {"SDPA": Timed(attend)}
    for name, backend in BACKENDS.items():
        only = Timed(attend, partial(sdpa_kernel, [backend]))
        try:
            with only.context():
                attend()
        except RuntimeError as error:
            print(f"left out: SDPA, {name}: {str(error).splitlines()[0]}")
        else:
            found[f"SDPA, {name}"] = only
    compiled = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), fullgraph=True)
    return found | {"torch.compile of SDPA": Timed(partial(compiled, q, k, v))}


def contenders(device: torch.device) -> dict[str, Timed]:
    """Everything that is measured, by name."""
    q, k, v = (torch.randn(1, 8, 512, 64, device=device, dtype=torch.float16) for _ in range(3))
    found = {
        "cuLaunchKernelEx through cuda-bindings, empty kernel": Timed(bare_launch(device)),
        "our launcher, empty kernel": Timed(empty_launch(device)),
    }
    for impl in BINDINGS:
        try:
            found |= our_boundaries(impl, q, k, v)
        except UnsupportedError as error:
            print(f"left out: {error}")
    entry = f"flashcore.scaled_dot_product_attention, by which auto calls {flashcore.explain_sdpa(q, k, v).impl}"
    return found | {
        entry: Timed(partial(flashcore.scaled_dot_product_attention, q, k, v)),
        **sdpa(q, k, v),
        "triton fn[grid], the portable kernel": triton_launch(q, k, v),
        "torch.empty_like": Timed(partial(torch.empty_like, q)),
    }


def main() -> None:
    samples: dict[str, list[tuple[float, float]]] = {}
    with watchdog(240, "measuring launches"):
        timed = contenders(torch.device("cuda", torch.cuda.current_device()))
        for one in timed.values():
            one.sample()
        for _ in range(SAMPLES):  # interleaved: what slows the host down slows all of them down
            for name, one in timed.items():
                samples.setdefault(name, []).append(one.sample())
    host, stream = ({name: _spread(pairs, which) for name, pairs in samples.items()} for which in (0, 1))
    for name, result in host.items():
        print(f"{name:75s} {result['median']:7.2f} us (min {result['min']:.2f}), in a stream {stream[name]['median']:.2f}")
    record = {
        "schema_version": 2,
        "environment": collect().model_dump(mode="json"),
        "host_us_per_call": host,
        "stream_us_per_call": stream,
    }
    Path(sys.argv[1]).write_text(json.dumps(record, indent=1) + "\n")


def _spread(samples: list[tuple[float, float]], which: int) -> dict[str, float]:
    figures = [sample[which] for sample in samples]
    return {"median": statistics.median(figures), "min": min(figures), "max": max(figures)}


if __name__ == "__main__":
    main()
