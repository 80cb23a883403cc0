"""What judging needs of a machine: a launch of a given binary, and a timer. Tests pass one that needs no GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import torch

from flashcore.bench.beside import Beside, Samples
from flashcore.bench.timing import Candidate
from flashcore.errors import UnsupportedError
from flashcore.kernels.specialisation import Specialisation
from flashcore.runtime import engine
from flashcore.runtime.binary import Binary
from flashcore.search.checks import Call, Check
from flashcore.search.kernels import SEARCHABLE
from flashcore.search.schema import Built
from flashcore.spec import AttentionSpec
from flashcore.target import Target, interpreting


class Timer(Protocol):
    """`flashcore.bench.beside.Beside`."""

    def keep(self, candidate: Candidate) -> None: ...

    def drop(self, name: str) -> None: ...

    def time(
        self,
        rounds: int,
        candidate: Candidate | None = None,
        *,
        warmup: int = ...,
        go_on: Callable[[Mapping[str, list[float]]], bool] = ...,
    ) -> Samples: ...


class Machine(Protocol):
    """Where candidates are judged."""

    device: torch.device
    target: Target

    def launch(self, spec: AttentionSpec, check: Check, built: Built, binary: Binary) -> Call:
        """A candidate's binary on a check's tensors, by a spec of its call. Raises what loading it raises."""

    def timer(self) -> Timer:
        """One that times nothing yet."""

    def synchronize(self) -> None:
        """Wait for what was launched. Raises where the device can do nothing more."""

    def tidy(self) -> None:
        """Give back the memory that past candidates' graphs had."""


class CudaMachine:
    """One GPU, which the given binaries are launched on as the engine launches its own.

    Raises:
        UnsupportedError: there is no GPU that kernels of ours are built for, or Triton's interpreter was asked for.
    """

    def __init__(self) -> None:
        if interpreting():
            raise UnsupportedError("search measure: launches binaries, and TRITON_INTERPRET=1 asks for none; unset it")
        if not torch.cuda.is_available():
            raise UnsupportedError(
                f"search measure: needs an NVIDIA GPU; this torch ({torch.__version__}) sees none. Build batches here and "
                "measure them on a machine that has one"
            )
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.target = Target.of(self.device)

    def launch(self, spec: AttentionSpec, check: Check, built: Built, binary: Binary) -> Call:
        impl, specialisation = check.problem.impl, Specialisation.from_key(built.key)
        grid = SEARCHABLE[impl].binding.grid(spec, specialisation, self.target.sm_count)
        mask = check.inputs.mask
        tensors = [check.q.data_ptr(), check.k.data_ptr(), check.v.data_ptr(), 0 if mask is None else mask.data_ptr()]
        return partial(engine.prepare_launch(spec, impl, specialisation, grid, binary), *tensors)

    def timer(self) -> Timer:
        return Beside(self.device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def tidy(self) -> None:
        torch.cuda.empty_cache()
