"""A machine that needs no GPU: binaries are texts that say how a candidate behaves, and time is what they say it takes.

As a program it is the judging process on that machine: `python tests/search/stub.py`.
"""

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from flashcore.bench.beside import Samples
from flashcore.bench.timing import Candidate, WrongOutputError
from flashcore.runtime.binary import Binary, BinaryInfo
from flashcore.search.batch import write_batch
from flashcore.search.checks import Call, Check, Output
from flashcore.search.judge import INCUMBENT, main
from flashcore.search.kernels import SEARCHABLE, Config
from flashcore.search.schema import Batch, Built, Problem
from flashcore.sources import kernel_hash
from flashcore.spec import AttentionSpec
from flashcore.target import Target

PROBLEM = Problem(impl="small", batch=1, heads=2, heads_k=2, seqlen_q=64, seqlen_k=64, head_dim=64, head_dim_v=64)
INCUMBENT_US = 10.0


def binary_of(problem: Problem, config: Config, behaviour: str) -> tuple[Binary, str]:
    """A "cubin" that holds how it behaves, with the record and the key that the real one has."""
    specialisation = SEARCHABLE[problem.impl].specialise(problem, config)
    cubin = f"{behaviour} {config.name}".encode()
    info = BinaryInfo(
        kernel=specialisation.kernel,
        name=specialisation.name,
        key=specialisation.key,
        arch="sm_90a",
        symbol=specialisation.kernel,
        parameters=[],
        threads=128,
        shared=0,
        cluster=specialisation.cluster,
        programmatic=False,
        sha256=hashlib.sha256(cubin).hexdigest(),
        size=len(cubin),
        source_sha256=kernel_hash(specialisation.kernel),
        triton="3.9.0",
    )
    return Binary(cubin, info), specialisation.key


def write_stub_batch(folder: Path, behaviours: list[str], problem: Problem = PROBLEM, rounds: int = 8) -> Batch:
    """A batch whose candidates behave so: forms of the space, in its order, numbered from 0."""
    searchable = SEARCHABLE[problem.impl]
    hand_chosen = searchable.incumbent(problem, 132)
    configs = [hand_chosen, *(config for config in searchable.space(problem) if config != hand_chosen)]
    binaries, built = [], []
    for number, (config, behaviour) in enumerate(zip(configs, [f"us={INCUMBENT_US}", *behaviours], strict=False), -1):
        binary, key = binary_of(problem, config, behaviour)
        binaries.append(binary)
        values = searchable.values(config)
        built.append(Built(number=number, config=values, name=binary.info.name, key=key, sha256=binary.info.sha256))
    assert len(built) == len(behaviours) + 1, "the space is too small for so many behaviours"
    batch = Batch(problem=problem, arch="sm_90a", incumbent=built[0], candidates=built[1:], rounds=rounds)
    write_batch(folder, batch, binaries)
    return batch


def attend(check: Check, spec: AttentionSpec) -> Output:
    """What is expected, in memory that was allocated as a kernel's output is."""
    o = torch.empty(spec.output_shape, dtype=spec.dtype)
    o.copy_(check.ref.to(spec.dtype))
    return o, check.lse.to(torch.float32) if spec.return_lse else None


class StubTimer:
    """Times by what the binaries say; backends of SDPA take 20 us."""

    def __init__(self, machine: "StubMachine") -> None:
        self._machine = machine
        self._kept: dict[str, float] = {}

    def keep(self, candidate: Candidate) -> None:
        self._kept[candidate.name] = self._us(candidate)

    def drop(self, name: str) -> None:
        del self._kept[name]

    def time(
        self,
        rounds: int,
        candidate: Candidate | None = None,
        *,
        warmup: int = 0,
        go_on: Callable[[Mapping[str, list[float]]], bool] = lambda samples: True,
    ) -> Samples:
        us = dict(self._kept)
        if candidate is not None:
            us[candidate.name] = self._us(candidate)
        few = {name: [value] * 3 for name, value in us.items()}
        return {name: [value] * rounds for name, value in us.items()} if go_on(few) else few

    def _us(self, candidate: Candidate) -> float:
        self._machine.us = 20.0
        with candidate.context():
            wrong = candidate.check(candidate.call())
        if wrong:
            raise WrongOutputError(wrong)
        assert candidate.name != INCUMBENT or self._machine.us == INCUMBENT_US
        return self._machine.us


class StubMachine:
    """Behaves as the binaries say: right (us=TIME), wrong, unwritten, flaky, rare, hang, crash, refused, dies, spoils."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.target = Target("stub", "sm_90a", (9, 0), 132, False)
        self.us = 0.0
        self.lost = self.turn = False
        self.tidied = self.runs = 0
        self.launched: list[str] = []

    def launch(self, spec: AttentionSpec, check: Check, built: Built, binary: Binary) -> Call:
        behaviour = binary.cubin.decode().split()[0]
        self.launched.append(check.problem.name)
        if behaviour == "refused":
            raise RuntimeError("the driver refused the binary")

        def call() -> Output:
            o, lse = attend(check, spec)
            if behaviour.startswith("us="):
                self.us = float(behaviour[3:])
            elif behaviour == "wrong" or (behaviour == "wrong_when_odd" and check.spec.seqlen_q % 2):
                o *= 0.95
            elif behaviour == "wrong_lse" and lse is not None:
                lse += 0.01
            elif behaviour == "unwritten":
                o = torch.where(torch.arange(o.shape[-1]) == 3, torch.empty_like(o), o)
            elif behaviour == "flaky":
                # within the tolerance, and not the same from run to run
                self.turn = not self.turn
                o[0, 0, 0, 0] += self.turn * 1e-3
            elif behaviour == "rare":
                self.us = 5.0
                self.runs += 1
                o[0, 0, 0, 0] += (self.runs == 12) * 1e-3
            elif behaviour == "hang":
                time.sleep(3600)
            elif behaviour == "crash":
                self.lost = True
                raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")
            elif behaviour == "dies":
                os.abort()
            elif behaviour == "spoils":
                check.k.zero_()
                o.zero_()
            return o, lse

        return call

    def timer(self) -> StubTimer:
        return StubTimer(self)

    def synchronize(self) -> None:
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def tidy(self) -> None:
        self.tidied += 1


if __name__ == "__main__":
    main(StubMachine)
