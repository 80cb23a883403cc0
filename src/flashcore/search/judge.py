"""Judging a batch on a GPU, candidate after candidate: right first, then timed beside the incumbent and PyTorch's SDPA.

A kernel that hangs, or that breaks the CUDA context, takes its process with it. So this runs in a process of its own
(`python -m flashcore.search.judge`, which measure.py starts, and starts again for what is left): a JSON request a line in, and
JSON lines out: "ready" once a batch's references are there, "started" and "judged" for each candidate, "done" at the end, or
"refused". Exit codes: the watchdog's for a hang, BROKEN for a context that can do nothing more, DAMAGED where a wrong candidate
wrote over what the next ones are judged by.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from pydantic import BaseModel, ConfigDict

from flashcore import environment
from flashcore.bench.stats import ratio_of_medians
from flashcore.bench.timing import Candidate, WrongOutputError, describe
from flashcore.bench.torch_contenders import torch_contenders
from flashcore.errors import BinaryError, FlashCoreError
from flashcore.runtime.binary import Binary
from flashcore.search.batch import read_batch, read_binary
from flashcore.search.checks import Check, Output, checks_of, run_twice, serves, without_lse
from flashcore.search.kernels import SEARCHABLE
from flashcore.search.machine import CudaMachine, Machine, Timer
from flashcore.search.schema import Built, Environment, Judged
from flashcore.verify.suite import same_bits
from flashcore.verify.watchdog import watchdog

BROKEN, DAMAGED = 4, 5
# Drawing inputs, the float64 results, SDPA's backends; then a candidate, of which the slowest that is of interest takes 2 s.
SETUP_SECONDS = 180.0
CANDIDATE_SECONDS = 10.0
INCUMBENT = "incumbent"
CANDIDATE = "candidate"
# A candidate has run on every check before it is timed, and the GPU is busy all the time.
WARMUP = 5
SDPA_ROUNDS = 10
# One that takes so many times as long as the incumbent gets no more samples than say so.
SLOW = 1.5
# Runs of one that is not slow, back to back, after it was timed: a race shows in few of many.
REPEATS = 20
# Graphs keep their memory until it is asked for; this often costs next to nothing.
TIDY_EVERY = 16

Say = Callable[[Mapping[str, object]], None]


class Request(BaseModel):
    """What to judge: these candidates of a batch's folder, until `deadline` (time.time). sdpa: the backend that an earlier
    process of the same visit found to be the fastest; "" for none, None where that is still to be found out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    numbers: list[int]
    deadline: float | None = None
    sdpa: str | None = None


class Judge:
    """A batch with its references, its incumbent and SDPA's fastest backend, ready to judge candidates.

    Raises:
        BinaryError: the batch cannot be read, is for another GPU, or its incumbent is not the hand-chosen form or not right.
    """

    def __init__(self, folder: Path, machine: Machine, sdpa: str | None = None) -> None:
        self._folder, self._machine = folder, machine
        self.batch = read_batch(folder)
        problem, incumbent, target = self.batch.problem, self.batch.incumbent, machine.target
        if target.arch != self.batch.arch:
            raise BinaryError(f"{folder}: is for {self.batch.arch}, and {target.name} is {target.arch}")
        searchable = SEARCHABLE[problem.impl]
        hand_chosen = searchable.values(searchable.incumbent(problem, target.sm_count))
        if hand_chosen != incumbent.config:
            raise BinaryError(
                f"{folder}: the incumbent is {incumbent.config}, and hand-chosen for {target.name} is {hand_chosen}: "
                "build it again"
            )
        self._checks = checks_of(problem, machine.device, target)
        self._problem = self._checks[0]
        if len([check for check in self._checks if serves(incumbent, check)]) < 2:
            raise BinaryError(f"{folder}: {incumbent.name} serves no call that it could be checked by")
        self._timer: Timer = machine.timer()
        output, wrong = self._right(incumbent, self._binary(incumbent))
        if wrong is not None:
            raise BinaryError(f"{folder}: the incumbent {incumbent.name} is wrong: {wrong}")
        self._timer.keep(self._timed(INCUMBENT, incumbent, self._binary(incumbent), output))
        self.sdpa = self._find_sdpa() if sdpa is None else sdpa
        if sdpa:
            self._timer.keep(self._sdpa_candidate(sdpa))

    def judge(self, built: Built) -> Judged:
        """Judge one candidate. Raises what the device raises."""
        result = partial(Judged, number=built.number, sha256=built.sha256)
        binary = self._binary(built)
        output, wrong = self._right(built, binary)
        if wrong is not None:
            return result(verdict="wrong", words=wrong)
        timed = self._timed(CANDIDATE, built, binary, output)
        try:
            samples = self._timer.time(self.batch.rounds, timed, warmup=WARMUP, go_on=_worth_more)
        except WrongOutputError as error:
            return result(verdict="wrong", words=str(error))
        if _worth_more(samples):
            differ = sum(timed.check(o) is not None for o in [timed.call() for _ in range(REPEATS)])
            if differ:
                return result(verdict="wrong", words=f"{differ} of {REPEATS} runs after it was timed differ from the first")
        us, incumbent_us = samples[CANDIDATE], samples[INCUMBENT]
        ratio = ratio_of_medians(us, incumbent_us, baseline=INCUMBENT)
        return result(
            verdict="measured",
            us=us,
            incumbent_us=incumbent_us,
            sdpa_us=samples.get(self.sdpa, []),
            ratio=ratio.value,
            ratio_low=ratio.low,
            ratio_high=ratio.high,
        )

    def damaged(self) -> str | None:
        """Why nothing more can be judged here: a candidate has written over inputs, or the incumbent is no longer right."""
        if not all(check.intact() for check in self._checks):
            return "inputs are no longer what was drawn"
        incumbent = self.batch.incumbent
        return self._right(incumbent, self._binary(incumbent))[1]

    def _binary(self, built: Built) -> Binary:
        return read_binary(self._folder, built, self.batch.arch)

    def _right(self, built: Built, binary: Binary) -> tuple[Output, str | None]:
        """What a candidate makes of the problem, and what of the first check that it fails is wrong."""
        launch, synchronize = self._machine.launch, self._machine.synchronize
        outputs = []
        for check in self._checks:
            if not serves(built, check):
                continue
            first = launch(check.spec, check, built, binary)
            second = launch(without_lse(check.spec), check, built, binary) if check is self._problem else first
            output, wrong = run_twice(check, first, second, synchronize)
            if wrong is not None:
                return output, wrong
            outputs.append(output)
        if not outputs:
            raise BinaryError(f"{built.name}: is not a binary of {self.batch.problem.name}")
        return outputs[0], None

    def _timed(self, name: str, built: Built, binary: Binary, output: Output) -> Candidate:
        """The problem's call as it is timed, whose output must stay what was found right."""
        call = self._machine.launch(without_lse(self._problem.spec), self._problem, built, binary)

        def check(o: torch.Tensor) -> str | None:
            return None if same_bits(o, output[0]) else "it differs from that of a launch outside a graph"

        return Candidate(name, lambda: call()[0], check=check)

    def _find_sdpa(self) -> str:
        """The fastest backend of SDPA for the problem, now kept in the timer; "" where it has none."""
        names = []
        for name in _sdpa_names(self._problem):
            try:
                self._timer.keep(self._sdpa_candidate(name))
            except Exception as error:  # a backend may refuse in any way; the others go on
                self._machine.synchronize()
                print(f"{name}: {describe(error)}", file=sys.stderr)
                continue
            names.append(name)
        if not names:
            return ""
        samples = self._timer.time(SDPA_ROUNDS)
        fastest = min(names, key=lambda name: median(samples[name]))
        for name in names:
            if name != fastest:
                self._timer.drop(name)
        return fastest

    def _sdpa_candidate(self, name: str) -> Candidate:
        contender = next(one for one in torch_contenders() if one.name == name)
        call = contender.prepare(self._problem.inputs)
        return Candidate(name, call, context=contender.context, check=lambda o: self._problem.wrong(o, None))


def _sdpa_names(check: Check) -> list[str]:
    """SDPA's fused backends that can run a call; none where it has no such feature."""
    if check.problem.window is not None or check.problem.softcap:
        return []
    backends = [one for one in torch_contenders() if one.kind == "sdpa" and one.name != "sdpa-math"]
    return [one.name for one in backends if one.unavailable_reason(check.inputs) is None]


def _worth_more(samples: Mapping[str, Sequence[float]]) -> bool:
    return median(samples[CANDIDATE]) < SLOW * median(samples[INCUMBENT])


def serve(requests: Iterator[Request], say: Say, machine: Machine) -> None:
    """Judge what each request asks for. Ends the process where that cannot go on; see the top of this file."""
    found = _environment(machine).model_dump()
    for request in requests:
        try:
            with watchdog(SETUP_SECONDS, f"{request.folder}: references and the incumbent"):
                judge = Judge(request.folder, machine, request.sdpa)
        except FlashCoreError as error:
            _still_there(machine)
            say({"refused": str(error)})
            continue
        say({"ready": {"environment": found, "sdpa": judge.sdpa}})
        built = {one.number: one for one in judge.batch.candidates}
        for count, number in enumerate(request.numbers, 1):
            if request.deadline is not None and time.time() >= request.deadline:
                break
            say({"started": number})
            with watchdog(CANDIDATE_SECONDS, built[number].name):
                judged = _judge_one(judge, built[number], machine)
                say({"judged": judged.model_dump()})
                damage = None if judged.verdict == "measured" else judge.damaged()
                if damage is not None:
                    sys.stderr.write(f"{built[number].name} wrote over what others are judged by: {damage}\n")
                    _exit(DAMAGED)
                if count % TIDY_EVERY == 0:
                    machine.tidy()
        del judge
        machine.tidy()
        say({"done": True})


def _judge_one(judge: Judge, built: Built, machine: Machine) -> Judged:
    """A candidate that raises has crashed; whether the process may go on is for the device to say."""
    try:
        return judge.judge(built)
    except Exception as error:  # whatever a broken kernel makes of the driver
        words = describe(error)
        sys.stderr.write(f"{built.name}: {words}\n")
    _still_there(machine)
    return Judged(number=built.number, sha256=built.sha256, verdict="crash", words=words)


def _still_there(machine: Machine) -> None:
    """End the process unless the device can go on: an error that stays is every later candidate's."""
    try:
        machine.synchronize()
        torch.ones(1, device=machine.device).sum().item()
    except Exception as error:  # the context is lost
        sys.stderr.write(f"the CUDA context is lost: {describe(error)}\n")
        _exit(BROKEN)


def _exit(code: int) -> None:
    """At once: a lost context makes an orderly end hang or raise."""
    sys.stderr.flush()
    os._exit(code)


def _environment(machine: Machine) -> Environment:
    found = environment.collect(machine.device)
    git = found.git
    return Environment(
        gpu=found.device_name,
        sm_count=machine.target.sm_count,
        driver=(found.gpu and found.gpu.driver) or "unknown",
        torch=found.torch,
        cuda=found.cuda or "none",
        # not to be learnt in a copy of the tree: then nothing says that it is clean
        git_sha="unknown" if git is None else git.sha,
        git_dirty=True if git is None else git.dirty,
        time=found.time_utc.isoformat(),
        command=found.command,
    )


def main(machine: Callable[[], Machine] = CudaMachine) -> None:
    """Serve requests until standard input ends."""
    # What libraries print goes to stderr: standard output belongs to the protocol.
    protocol = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(message: Mapping[str, object]) -> None:
        protocol.write(json.dumps(message) + "\n")

    requests = (Request.model_validate_json(line) for line in sys.stdin)
    try:
        found = machine()
    except FlashCoreError as error:
        for _ in requests:
            say({"refused": str(error)})
        return
    with torch.no_grad():
        serve(requests, say, found)


if __name__ == "__main__":
    main()
