"""The one compile path: a specialisation and an arch in, a byte-reproducible cubin out. Needs Triton; needs no GPU.

Runs in a worker process only (worker.py): some compiler faults end the process, and TRITON_DISABLE_LINE_INFO, without
which the cubin holds this machine's paths, must be set before Triton is imported.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re

from flashcore.errors import CompileError
from flashcore.kernels.registry import KERNELS
from flashcore.kernels.specialisation import Specialisation
from flashcore.runtime.binary import Binary, BinaryInfo, KernelParameter
from flashcore.sources import kernel_hash

_PTX_SIZES = {
    "u64": 8,
    "b64": 8,
    "s64": 8,
    "u32": 4,
    "b32": 4,
    "s32": 4,
    "f32": 4,
    "u16": 2,
    "b16": 2,
    "u8": 1,
    "b8": 1,
}


def triton_version() -> str | None:
    """The version of the Triton that would compile here, or None where there is none. Does not import it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def compile_specialisation(specialisation: Specialisation, arch: str) -> Binary:
    """Compile one specialisation for one arch.

    Raises:
        CompileError: Triton or ptxas refused it; the message holds their words.
    """
    if os.environ.get("TRITON_DISABLE_LINE_INFO") != "1" or os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise CompileError("compile in flashcore.build.worker: it needs TRITON_DISABLE_LINE_INFO=1 and no interpreter")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = KERNELS[specialisation.kernel]
    function = getattr(importlib.import_module(kernel.module), kernel.function)
    constants = dict(specialisation.constants)
    parameters = {p.name: p for p in specialisation.parameters}
    signature = {name: parameters[name].type if name in parameters else "constexpr" for name in function.arg_names}
    attributes = {
        (position,): [["tt.divisibility", parameters[name].divisor]]
        for position, name in enumerate(function.arg_names)
        if name in parameters and parameters[name].divisor > 1
    }
    capability = int(re.sub(r"\D", "", arch))
    try:
        compiled = triton.compile(
            ASTSource(function, signature, constants, attributes),
            target=GPUTarget("cuda", capability, 32),
            options={
                "num_warps": specialisation.num_warps,
                "num_stages": specialisation.num_stages,
                "enable_fp_fusion": True,  # stated, because Triton's default for it changed between releases
            },
        )
    except Exception as error:  # whatever the compiler throws becomes one kind of error, with its words kept
        raise CompileError(f"{specialisation.name} for {arch}: {type(error).__name__}: {error}") from error
    cubin = compiled.asm["cubin"]
    ptx = compiled.asm["ptx"]
    built_for = re.search(r"^\.target (\S+?),?$", ptx.replace(", debug", ""), re.MULTILINE)
    if built_for is None or built_for.group(1) != arch:
        raise CompileError(f"{specialisation.name}: asked for {arch}, the compiler made {built_for and built_for.group(1)}")
    return Binary(
        cubin=cubin,
        info=BinaryInfo(
            kernel=specialisation.kernel,
            name=specialisation.name,
            key=specialisation.key,
            arch=arch,
            symbol=compiled.metadata.name,
            parameters=_entry_parameters(ptx, specialisation),
            threads=_threads(ptx),
            shared=compiled.metadata.shared,
            sha256=hashlib.sha256(cubin).hexdigest(),
            size=len(cubin),
            source_sha256=kernel_hash(specialisation.kernel),
            triton=triton.__version__,
        ),
    )


def _entry_parameters(ptx: str, specialisation: Specialisation) -> list[KernelParameter]:
    """Name, type and size of each parameter of the entry point; the PTX has the truth, the specialisation the names."""
    entry = re.search(r"\.entry\s+[\w$]+\s*\((.*?)\)", ptx, re.DOTALL)
    if entry is None:
        raise CompileError(f"{specialisation.name}: the PTX has no .entry")
    sizes = [_PTX_SIZES[t] for t in re.findall(r"\.param\s+\.(\w+)", entry.group(1))]
    names = [(p.name, p.type) for p in specialisation.parameters]
    # Triton appends pointers to scratch memory, which our kernels do not use: null is right for them.
    scratch = len(sizes) - len(names)
    if scratch not in (0, 1, 2):
        raise CompileError(f"{specialisation.name}: {len(sizes)} parameters in the PTX for {len(names)} in the kernel")
    names += [(f"scratch_{i}", "*u8") for i in range(scratch)]
    return [KernelParameter(name=name, type=kind, size=size) for (name, kind), size in zip(names, sizes, strict=True)]


def _threads(ptx: str) -> int:
    """Threads of a block, as the entry point demands them (more than 32 * num_warps under warp specialisation)."""
    required = re.search(r"\.reqntid\s+(\d+)", ptx) or re.search(r"\.maxntid\s+(\d+)", ptx)
    if required is None:
        raise CompileError("the PTX states no block size")
    return int(required.group(1))
