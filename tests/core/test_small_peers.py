"""What the blocks of a cluster copy from one another stays as it is until the copies are done, whatever the compiler knows."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from flashcore.kernels.small.binding import Features, specialise
from flashcore.kernels.small.config import ROWS, SmallConfig
from flashcore.kernels.specialisation import Specialisation
from flashcore.sources import PACKAGE

# The compiler as far as it gives shared memory its places: a line of JSON for each specialisation's key on standard input.
ALLOCATE = """
import importlib, json, sys
from triton._C.libtriton import ir, nvidia, passes
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from flashcore.build.compile import _source
from flashcore.kernels.registry import find_kernel
from flashcore.kernels.specialisation import Specialisation

for line in sys.stdin:
    specialisation = Specialisation.from_key(json.loads(line))
    kernel, target = find_kernel(specialisation.kernel), GPUTarget("cuda", 90, 32)
    source = _source(getattr(importlib.import_module(kernel.module), kernel.function), specialisation)
    backend = CUDABackend(target)
    options = backend.parse_options({"num_warps": specialisation.num_warps, "num_stages": specialisation.num_stages})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    stages = {}
    backend.add_stages(stages, options, source.language)
    for name in ("glir", "ttgir"):
        module = stages[name](module, {"target": target, **vars(options)})
    manager = ir.pass_manager(module.context)
    passes.ttgpuir.add_allocate_warp_groups(manager, False)
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, 90, 90)
    manager.run(module, "allocate")
    print(json.dumps(str(module)))
"""
SENDS = "cp.async.bulk.shared::cluster.shared::cta"
# Head dim and form. With tiles of less than 128 keys the outbox is the largest buffer, and lies where scratch would go.
FORMS = [
    (64, SmallConfig(4, 128, 32)),
    (128, SmallConfig(4, 128, 64)),
    (32, SmallConfig(2, 64, 64)),
    (64, SmallConfig(2, 256, 64)),
    (64, SmallConfig(4, 256, 128)),
]


def _allocate(specialisations: list[Specialisation]) -> list[str]:
    """The compiler's code for each of these, every buffer in its place."""
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATE],
        input="".join(json.dumps(specialisation.key) + "\n" for specialisation in specialisations),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def _outbox(code: str, head_dim: int, form: SmallConfig) -> range:
    """The bytes of shared memory that others copy from."""
    part = head_dim // form.cluster
    (first,) = re.findall(rf"local_alloc {{allocation.offset = (\d+) .*<{form.cluster}x{ROWS}x{part}xf32,", code)
    return range(int(first), int(first) + 4 * ROWS * head_dim)


def _put_into(memory: range, code: str) -> list[str]:
    """What the compiler puts into this memory from the first copy that is begun to the block's last wait for the cluster."""
    lines = code.splitlines()
    sends = next(number for number, line in enumerate(lines) if SENDS in line)
    leaves = max(number for number, line in enumerate(lines) if "barrier.cluster.wait" in line)
    found = []
    for line in lines[sends:leaves]:
        if "allocation.offset" in line:
            (first, size), *_ = re.findall(r"allocation.offset = (\d+) : i32, allocation.size = (\d+)", line)
            if int(first) < memory.stop and memory.start < int(first) + int(size):
                found.append(line)
    return found


def test_nothing_is_put_where_others_still_copy_from() -> None:
    asked = [(head_dim, form, specialise(Features(torch.float16, head_dim, True), form)) for head_dim, form in FORMS]
    asked += [(head_dim, form, specialisation.recording()) for head_dim, form, specialisation in asked[:2]]
    codes = _allocate([specialisation for *_, specialisation in asked])
    for (head_dim, form, specialisation), code in zip(asked, codes, strict=True):
        outbox = _outbox(code, head_dim, form)
        assert _put_into(outbox, code) == [], specialisation.name
        # Something is put somewhere meanwhile, and were it put there, it would be seen.
        moved = re.sub(r"\d+( : i32, allocation.size)", rf"{outbox.start}\1", code)
        assert _put_into(outbox, moved) != [], specialisation.name
