"""Runs a Gluon kernel of the package on the CPU, from its source: a thread for each partition of each block, shared memory as
tensors. The blocks of a launch run side by side, because some wait for each other.

Triton's interpreter has no Gluon. What this shows is a kernel's maths, its coordinates and its barriers: shared memory begins
as NaN, barriers count arrivals and bytes, a wait that never ends raises, and a product that was started is computed either
`early`, when it starts, or else when it is waited for, so that operands that come too late or go too soon give wrong results.
What it does not show: layouts, swizzles, fences, and how the copy engine is timed.
"""

import importlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from flashcore.kernels.arguments import Pointer, TensorMap
from flashcore.kernels.program import Launch
from flashcore.kernels.registry import KERNELS

PACKAGE = "flashcore.kernels.hopper"
# seconds that a barrier is waited for: then it never completes
PATIENCE = 20.0
_counting = threading.Lock()
# what a null pointer points to
_ABSENT = torch.empty(0)
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class _Tile(torch.Tensor):
    """A tensor in registers. Layouts are not modelled."""

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(layout=None)


def _tile(t: torch.Tensor | float) -> _Tile:
    return torch.as_tensor(t).as_subclass(_Tile)


class _Constexpr:
    """A constant is its value."""

    def __new__(cls, value: Any) -> Any:
        return value


class _Product:
    """A matrix product under way."""

    def __init__(self, compute: Callable[[], torch.Tensor]) -> None:
        self._compute = compute
        self.value: _Tile | None = None

    def finish(self) -> None:
        if self.value is None:
            self.value = _tile(self._compute())


class _Barrier:
    def __init__(self) -> None:
        self.count = self.arrived = self.bytes = self.phase = 0
        self._changed = threading.Condition()

    def change(self, arrivals: int, num_bytes: int) -> None:
        with self._changed:
            self.arrived += arrivals
            self.bytes += num_bytes
            assert self.arrived <= self.count, "more arrivals than a phase has"
            if self.arrived == self.count and self.bytes == 0:
                self.phase, self.arrived = self.phase + 1, 0
                self._changed.notify_all()

    def wait(self, parity: int) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self.phase % 2 != parity, PATIENCE):
                raise TimeoutError(f"a barrier of {self.count} with {self.arrived} arrivals and {self.bytes} bytes hangs")


class _Shared:
    """A view of shared memory, or of barriers in it."""

    def __init__(self, data: Any) -> None:
        self._data = data

    @property
    def shape(self) -> list[int]:
        return list(self._data.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self._data.dtype

    def index(self, slot: int) -> Any:
        return self._data[slot] if isinstance(self._data, list) else _Shared(self._data[int(slot)])

    def reshape(self, shape: list[int]) -> "_Shared":
        return _Shared(self._data.view(shape))

    def permute(self, order: tuple[int, ...]) -> "_Shared":
        return _Shared(self._data.permute(order))

    def slice(self, start: int, length: int, *, dim: int) -> "_Shared":
        return _Shared(self._data.narrow(dim, start, length))

    def load(self, layout: object) -> _Tile:
        return _tile(self._data.clone())

    def store(self, tile: torch.Tensor) -> None:
        assert tile.dtype == self._data.dtype and tile.shape == self._data.shape
        self._data.copy_(tile)

    @property
    def data(self) -> torch.Tensor:
        return self._data


class _Pointer:
    def __init__(self, memory: torch.Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset

    def __add__(self, offset: Any) -> "_Pointer":
        return _Pointer(self.memory, self.offset + offset)

    def add(self, number: int) -> _Tile:
        """Atomically; returns what was there."""
        with _counting:
            place = self.memory.view(-1)[int(self.offset) :][:1]
            found = _tile(place[0].clone())
            place += number
            return found


class _Map:
    """A tensor map: what lies outside the tensor is read as 0 and not written."""

    layout = None

    def __init__(self, tensor: torch.Tensor, map: TensorMap, tile: tuple[str, tuple[int, ...]]) -> None:
        element, block = tile
        self.tensor = torch.as_strided(tensor, map.shape, map.strides, tensor.storage_offset() + map.offset)
        self.dtype, self.block_shape = _DTYPES[element], list(block)
        self.nbytes_per_cta = math.prod(block) * self.dtype.itemsize

    def inside(self, coordinates: list[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """(of the tensor, of the tile): what of a tile at these coordinates is there."""
        there, here = [], []
        for at, extent, size in zip(map(int, coordinates), self.block_shape, self.tensor.shape, strict=True):
            begin, end = min(max(at, 0), size), max(min(at + extent, size), 0)
            end = max(begin, end)
            there.append(slice(begin, end))
            here.append(slice(begin - at, end - at) if end > begin else slice(0, 0))
        return tuple(there), tuple(here)


def _side_by_side(tasks: list[Callable[[], None]]) -> None:
    """Run each in a thread of its own; raises what one of them raises."""
    faults: list[BaseException] = []

    def work(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as fault:  # raised in the caller's thread
            faults.append(fault)

    threads = [threading.Thread(target=work, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]


class _Machine:
    """The blocks of a launch: which block a thread is of, its number of warps, and the products that it has under way."""

    def __init__(self, early: bool, programs: int) -> None:
        self.early = early
        self.programs = programs
        self.local = threading.local()
        self.adding = threading.Lock()

    @property
    def warps(self) -> int:
        return getattr(self.local, "warps", 4)

    @property
    def program(self) -> int:
        return self.local.program

    def run_blocks(self, block: Callable[[], None]) -> None:
        def work(program: int) -> None:
            self.local.program = program
            block()

        _side_by_side([partial(work, program) for program in range(self.programs)])

    def poll(self, reported: _Pointer, count: int) -> _Tile:
        """Whether so many have reported; who keeps asking the same in vain hangs."""
        asked = (int(reported.offset), count)
        if reported.add(0) >= count:
            self.local.asked = None
            return _tile(1)
        last, since = getattr(self.local, "asked", None) or (asked, time.monotonic())
        self.local.asked = asked, (since if last == asked else time.monotonic())
        if last == asked and time.monotonic() - since > PATIENCE:
            raise TimeoutError(f"count {asked[0]} never reaches {count}: this hangs")
        time.sleep(0)
        return _tile(0)

    def run(self, tasks: list[tuple[Callable, tuple]], warps: list[int]) -> None:
        def work(program: int, function: Callable, arguments: tuple, count: int) -> None:
            self.local.program, self.local.warps, self.local.products = program, count, []
            function(*arguments)
            assert not self.local.products, "ends with products under way"

        _side_by_side([partial(work, self.program, *task, count) for task, count in zip(tasks, warps, strict=True)])

    def multiply(self, a: Any, b: _Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> _Product:
        def compute() -> torch.Tensor:
            left = (a.data if isinstance(a, _Shared) else a).float()
            product = left @ b.data.float()
            if not use_acc:
                return product
            if isinstance(acc, _Product):
                assert acc.value is not None
                return acc.value + product
            return acc + product

        product = _Product(compute)
        if self.early:
            product.finish()
        self.local.products.append(product)
        return product

    def wait(self, pending: int, *, deps: tuple[_Product, ...]) -> Any:
        products = self.local.products
        while len(products) > pending:
            products.pop(0).finish()
        assert not any(dep in products for dep in deps), "a product is read while it is under way"
        values = tuple(dep.value if isinstance(dep, _Product) else dep for dep in deps)
        return values if len(values) > 1 else values[0]


def _aggregate(cls: type) -> type:
    names = list(cls.__annotations__)

    def __init__(self: Any, *values: Any) -> None:
        for name, value in zip(names, values, strict=True):
            setattr(self, name, value)

    cls.__init__ = __init__
    return cls


def _gluon_api(machine: _Machine) -> ModuleType:
    """What kernels/hopper/gluon_api.py exports, here."""
    mbarriers = object()

    def allocate(dtype: Any, shape: list[int], layout: object) -> _Shared:
        if layout is mbarriers:
            return _Shared([_Barrier() for _ in range(shape[0])])
        return _Shared(torch.full(shape, math.nan if dtype.is_floating_point else -(2**31), dtype=dtype))

    def inline_asm(text: Any, constraints: object = None, arguments: Any = (), *_: object) -> Any:
        if callable(text):
            assert text.__name__ == "_reciprocals", text
            return 1 / arguments[0]
        if "mbarrier.arrive" in text:
            arguments[0].change(machine.warps, 0)
        elif "cp.async.bulk" in text:
            target, source, num_bytes, barrier = arguments
            target.data.copy_(source.memory.flatten()[int(source.offset) :][: num_bytes // 4])
            barrier.change(0, -num_bytes)
        elif "mov.u32" in text:
            return arguments[0]
        elif "atom.global.add" in text or "red.release" in text:
            (count,) = arguments
            return count.add(1)
        elif "ld.acquire" in text:
            reported, count = arguments
            return machine.poll(reported, int(count))
        elif "redux" in text:
            (number,) = arguments
            return number
        else:
            assert "griddepcontrol" in text, text
        return None

    def load(pointer: _Pointer, mask: torch.Tensor, other: float = math.nan, cache_modifier: str = "") -> _Tile:
        found = pointer.memory.flatten()[torch.where(mask, pointer.offset, 0)]
        return _tile(torch.where(mask, found, other))

    def store(pointer: _Pointer, value: int) -> None:
        pointer.memory.view(-1)[int(pointer.offset)] = value

    def atomic_add(pointer: _Pointer, value: torch.Tensor, sem: str) -> None:
        with machine.adding:
            pointer.memory.view(-1).index_put_((torch.as_tensor(pointer.offset).long(),), value, accumulate=True)

    def init(barrier: _Barrier, count: int) -> None:
        barrier.count = count

    def async_load(map: _Map, coordinates: list, barrier: _Barrier, target: _Shared) -> None:
        there, here = map.inside(coordinates)
        box = torch.zeros(map.block_shape, dtype=map.dtype)
        box[here] = map.tensor[there]
        target.data.copy_(box)
        barrier.change(0, -map.nbytes_per_cta)

    def async_store(map: _Map, coordinates: list, source: _Shared) -> None:
        there, here = map.inside(coordinates)
        map.tensor[there] = source.data[here]

    gl = SimpleNamespace(
        constexpr=_Constexpr, tensor=object, shared_memory_descriptor=object,
        float32=torch.float32, int32=torch.int32, int64=torch.int64, uint32=torch.int64,
        allocate_shared_memory=allocate, inline_asm=inline_asm, load=load, store=store, atomic_add=atomic_add,
        static_range=range,
        program_id=lambda axis: _tile(machine.program), num_programs=lambda axis: _tile(machine.programs),
        num_warps=lambda: machine.warps,
        zeros=lambda shape, dtype, layout: _tile(torch.zeros(shape, dtype=dtype)),
        full=lambda shape, value, dtype, layout: _tile(torch.full(shape, int(value), dtype=dtype)),
        max=lambda t, axis: _tile(t.amax(axis)), BlockedLayout=lambda *_: None,
        arange=lambda begin, end, layout: _tile(torch.arange(begin, end)),
        where=lambda c, a, b: _tile(torch.where(torch.as_tensor(c), a, b)),
        minimum=lambda a, b: _tile(torch.minimum(torch.as_tensor(a), torch.as_tensor(b))),
        maximum=lambda a, b: _tile(torch.maximum(torch.as_tensor(a), torch.as_tensor(b))),
        exp2=torch.exp2, reshape=lambda t, shape: t.reshape(shape), convert_layout=lambda t, layout: t,
        SliceLayout=lambda *_: None, SwizzledSharedLayout=lambda *_: None,
        NVMMADistributedLayout=lambda **_: None, DotOperandLayout=lambda **_: None,
        NVMMASharedLayout=SimpleNamespace(get_default_for=lambda *_: None),
        warp_specialize=lambda tasks, warps, registers: machine.run(tasks, [4, *warps]),
    )  # fmt: skip
    gluon = SimpleNamespace(jit=lambda f: f, constexpr_function=lambda f: f, aggregate=_aggregate)
    module = ModuleType(f"{PACKAGE}.gluon_api")
    module.gl, module.gluon = gl, gluon
    module.fence_async_shared = lambda: None
    module.mbarrier = SimpleNamespace(
        MBarrierLayout=lambda: mbarriers,
        init=init,
        expect=lambda barrier, num_bytes: barrier.change(1, num_bytes),
        wait=lambda barrier, parity, pred=True: barrier.wait(int(parity)) if pred else None,
    )
    module.tma = SimpleNamespace(
        tensor_descriptor=object, async_load=async_load, async_store=async_store, store_wait=lambda pending: None
    )
    module.warpgroup_mma, module.warpgroup_mma_wait = machine.multiply, machine.wait
    return module


@contextmanager
def _sources_over(api: ModuleType, sources: tuple[str, ...]) -> Iterator[None]:
    """Modules of these sources are imported anew inside, over this API, and as they were outside."""
    names = [source.removesuffix(".py").replace("/", ".") for source in sources]
    names = [f"flashcore.{name}" for name in names if name.startswith("kernels.hopper.")]
    package = sys.modules[PACKAGE]
    kept = {name: sys.modules.pop(name, None) for name in names}
    attributes = dict(vars(package))
    sys.modules[api.__name__] = api
    try:
        yield
    finally:
        for name, module in kept.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
        for name in set(vars(package)) - set(attributes):
            delattr(package, name)
        vars(package).update(attributes)


def run_on_cpu(launch: Launch, tensors: Mapping[str, torch.Tensor], *, early: bool) -> None:
    """Run a launch of a kernel of kernels/hopper on tensors by name. Raises what a partition raises, a hang included."""
    specialisation = launch.specialisation
    kernel = KERNELS[specialisation.kernel]
    given: dict[str, Any] = dict(specialisation.constants)
    for parameter, argument in zip(specialisation.parameters, launch.arguments, strict=True):
        if isinstance(argument, TensorMap):
            assert parameter.tile is not None
            given[parameter.name] = _Map(tensors[argument.tensor], argument, parameter.tile)
        elif isinstance(argument, Pointer):
            given[parameter.name] = _Pointer(tensors.get(argument.tensor, _ABSENT))
        else:
            given[parameter.name] = argument if isinstance(argument, float) else _tile(argument)
    machine = _Machine(early, launch.grid)
    with _sources_over(_gluon_api(machine), kernel.sources):
        function = getattr(importlib.import_module(kernel.module), kernel.function)
        machine.run_blocks(partial(function, **given))
