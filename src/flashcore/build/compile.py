"""The one compile path: a specialisation and an arch in, a byte-reproducible cubin out. Needs Triton; needs no GPU.

Runs in a worker process only (worker.py): some compiler faults end the process, and TRITON_DISABLE_LINE_INFO, without
which the cubin holds this machine's paths, must be set before Triton is imported.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from flashcore.build.machine_code import read_parameter_places
from flashcore.errors import CompileError
from flashcore.kernels.registry import find_kernel
from flashcore.kernels.specialisation import Parameter, Specialisation
from flashcore.runtime.binary import ELEMENT_SIZES, MAX_CLUSTER, Binary, BinaryInfo, KernelParameter, TensorMapLayout
from flashcore.sources import kernel_hash

# CUtensorMapSwizzle, by which the compiler names it, in bytes
_SWIZZLES = (0, 32, 64, 128)
# bytes of a parameter, where it is neither a pointer nor a tensor map
_SIZES = {"i32": 4, "fp32": 4, "i64": 8}
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

    kernel = find_kernel(specialisation.kernel)
    what = f"{specialisation.name} for {arch}"
    if arch not in kernel.archs:  # where a kernel is of another arch, the compiler may end the process and say nothing
        raise CompileError(f"{what}: {kernel.id} can be built for {', '.join(kernel.archs)}")
    if not 1 <= specialisation.cluster <= MAX_CLUSTER:
        raise CompileError(f"{what}: a cluster of {specialisation.cluster} blocks; allowed 1 to {MAX_CLUSTER}")
    try:
        function = getattr(importlib.import_module(kernel.module), kernel.function)
    except Exception as error:  # Gluon's names move between releases, so that an import may fail in any way
        raise CompileError(f"{what}: Triton {triton.__version__} cannot import {kernel.module}: {error!r}") from error
    try:
        with _ptxas_log() as log:
            compiled = triton.compile(
                _source(function, specialisation),
                target=GPUTarget("cuda", int(re.sub(r"\D", "", arch)), 32),
                options={
                    "num_warps": specialisation.num_warps,
                    "num_stages": specialisation.num_stages,
                    "enable_fp_fusion": True,  # stated, because Triton's default for it changed between releases
                },
            )
    except Exception as error:  # whatever the compiler throws becomes one kind of error, with its words kept
        raise CompileError(f"{what}: {type(error).__name__}: {error}") from error
    if function.is_gluon() and not specialisation.recorded:
        _refuse_lost_performance(log.getvalue(), what)
    if getattr(compiled.metadata, "global_scratch_size", 0):
        raise CompileError(f"{what}: needs scratch memory, which no launcher here gives")
    cubin = compiled.asm["cubin"]
    ptx = compiled.asm["ptx"]
    symbol = compiled.metadata.name
    tensor_maps = getattr(compiled.metadata, "tensordesc_meta", None) or ()
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
            symbol=symbol,
            parameters=_entry_parameters(ptx, read_parameter_places(cubin, symbol), specialisation, tensor_maps),
            threads=_threads(ptx),
            shared=compiled.metadata.shared,
            cluster=specialisation.cluster,
            programmatic="griddepcontrol.wait" in ptx,
            sha256=hashlib.sha256(cubin).hexdigest(),
            size=len(cubin),
            source_sha256=kernel_hash(specialisation.kernel),
            triton=triton.__version__,
        ),
    )


def _source(function: Any, specialisation: Specialisation) -> Any:
    """What triton.compile takes: the function with a type for each of its arguments."""
    parameters = {p.name: p for p in specialisation.parameters}
    if [name for name in function.arg_names if name in parameters] != list(parameters):
        raise ValueError(f"parameters {list(parameters)} are not in the order of the kernel's arguments {function.arg_names}")
    signature = {name: _triton_type(parameters[name]) if name in parameters else "constexpr" for name in function.arg_names}
    attributes = {
        (position,): [["tt.divisibility", parameters[name].divisor]]
        for position, name in enumerate(function.arg_names)
        if name in parameters and parameters[name].divisor > 1
    }
    if function.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as Source
    else:
        from triton.compiler import ASTSource as Source
    return Source(function, signature, dict(specialisation.constants), attributes)


def _triton_type(parameter: Parameter) -> str:
    """A parameter's type as Triton's signatures spell it: for a tensor map, Gluon's with the default shared layout."""
    tile = parameter.tile
    if tile is None:
        return parameter.type
    from triton.experimental.gluon import language as gl

    element, block = tile
    layout = gl.NVMMASharedLayout.get_default_for(list(block), gl.dtype(element))
    return f"tensordesc<{element}[{','.join(map(str, block))}],{layout!r}>"


@contextmanager
def _ptxas_log() -> Iterator[io.StringIO]:
    """What ptxas says of a compilation inside, which Triton shows only on demand, and only where its cache has no answer."""
    from triton import knobs

    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        yield log


def _refuse_lost_performance(log: str, what: str) -> None:
    """Raise CompileError where ptxas serialised wgmma or ignored setmaxnreg, which it mentions in its log and goes on.

    For Gluon kernels, whose authors place the waits. Where Triton places them, a slow kernel is better than none; so it is
    where a kernel records its stages, which costs it the registers that the waits were placed for.
    """
    if "Compiling entry function" not in log:
        raise CompileError(f"{what}: ptxas's log is not to be had from this Triton, so serialised wgmma would pass unseen")
    said = [line for line in log.splitlines() if "Potential Performance Loss" in line]
    if said:
        raise CompileError(f"{what}: ptxas lost performance in {len(said)} places; the first: {said[0]}")


def _entry_parameters(
    ptx: str, places: Sequence[tuple[int, int]], specialisation: Specialisation, tensor_maps: Sequence[dict[str, Any]]
) -> list[KernelParameter]:
    """Each parameter of the entry point: sizes by the PTX and the cubin, offsets by the cubin, names and types as specified.

    `places` is what the cubin says, (offset, size) of each parameter; `tensor_maps` is what the compiler says of each tensor
    map: how it will read memory through it.
    """
    entry = re.search(r"\.entry\s+[\w$]+\s*\((.*?)\)", ptx, re.DOTALL)
    if entry is None:
        raise CompileError(f"{specialisation.name}: the PTX has no .entry")
    # ".param .u64 .ptr .global .align 16 x" or ".param .align 64 .b8 x[128]"
    found = re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.([a-z]+\d+)\b[^,\[]*(?:\[(\d+)\])?", entry.group(1))
    sizes = [_PTX_SIZES[kind] * int(count or 1) for kind, count in found]
    if sizes != [size for _, size in places]:
        raise CompileError(f"{specialisation.name}: parameters of {sizes} bytes in the PTX, and in the cubin {places}")
    names: list[tuple[str, str, TensorMapLayout | None]] = []
    maps = iter(tensor_maps)
    for p in specialisation.parameters:
        tile = p.tile
        if tile is None:
            names.append((p.name, p.type, None))
            continue
        element, block = tile
        names.append((p.name, p.type, _layout(element, next(maps, {}), specialisation.name)))
        names += [(f"{p.name}_shape_{i}", "i32", None) for i in range(len(block))]
        names += [(f"{p.name}_stride_{i}", "i64", None) for i in range(len(block))]
    # Triton appends pointers to scratch memory, which our kernels do not need: null is right for them.
    scratch = len(sizes) - len(names)
    if scratch not in (0, 1, 2):
        raise CompileError(f"{specialisation.name}: {len(sizes)} parameters in the PTX for {len(names)} in the kernel")
    names += [(f"scratch_{i}", "*u8", None) for i in range(scratch)]
    parameters = [
        KernelParameter(name=name, type=kind, size=size, offset=offset, tensor_map=layout)
        for (name, kind, layout), (offset, size) in zip(names, places, strict=True)
    ]
    end = 0
    for made in parameters:
        expected = 128 if made.tensor_map else _SIZES.get(made.type, 8)
        if made.size != expected or made.offset < end or made.offset % min(expected, 8):
            raise CompileError(
                f"{specialisation.name}: {made.name} is {made.type}, and in the cubin {made.size} bytes "
                f"at offset {made.offset}, with {end} taken"
            )
        end = made.offset + made.size
    return parameters


def _layout(element: str, said: dict[str, Any], name: str) -> TensorMapLayout:
    """A tensor map as the compiler's `said` describes it (Triton's tensordesc_meta)."""
    if said.get("fp4_padded") or said.get("is_im2col") or said.get("elem_size") != ELEMENT_SIZES.get(element):
        raise CompileError(f"{name}: a tensor map of {element} that the compiler describes as {said}, which no host here makes")
    return TensorMapLayout(element=element, box=tuple(said["block_size"]), swizzle=_SWIZZLES[said["swizzle"]])


def _threads(ptx: str) -> int:
    """Threads of a block, as the entry point demands them (more than 32 * num_warps under warp specialisation)."""
    required = re.search(r"\.reqntid\s+(\d+)", ptx) or re.search(r"\.maxntid\s+(\d+)", ptx)
    if required is None:
        raise CompileError("the PTX states no block size")
    return int(required.group(1))
