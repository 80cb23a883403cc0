"""The process that is profiled: one call of a checked implementation inside the profiler's range, and none otherwise."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch

from flashcore.bench.shapes import parse_shape
from flashcore.errors import ArgumentValueError, ProfilerError, UnsupportedError
from flashcore.kernels.registry import BINDINGS
from flashcore.ladder.steps import STEPS
from flashcore.plan import IMPLS
from flashcore.profile import target
from flashcore.profile.subjects import CONTENDERS, contender_name, subject

TINY = parse_shape("tiny")
CPU = torch.device("cpu")


class Counted:
    """A contender that counts its calls, by where they were made."""

    def __init__(self, factor: float = 1.0) -> None:
        self.inside, self.calls, self.profiled_calls, self.ranges = False, 0, 0, 0
        real = subject("torch")

        def prepare(inputs):
            attend = real.prepare(inputs)

            def call() -> torch.Tensor:
                self.calls += 1
                self.profiled_calls += self.inside
                return attend() * factor

            return call

        self.contender = replace(real, prepare=prepare)

    @contextmanager
    def profiled(self) -> Iterator[None]:
        self.inside = True
        self.ranges += 1
        yield
        self.inside = False


def test_one_checked_and_warm_call_is_profiled() -> None:
    counted = Counted()
    target.call_once(counted.contender, TINY, CPU, 0, counted.profiled)
    assert (counted.ranges, counted.profiled_calls) == (1, 1) and counted.calls == 2 + target.WARMUP


def test_a_wrong_call_is_never_profiled() -> None:
    counted = Counted(factor=0.95)
    with pytest.raises(ProfilerError, match="sdpa-auto is wrong on 1,1,32,64 fp16"):
        target.call_once(counted.contender, TINY, CPU, 0, counted.profiled)
    assert counted.ranges == 0


def test_what_does_not_take_the_shape_says_why() -> None:
    counted = Counted()
    with pytest.raises(UnsupportedError, match="sdpa-auto: SDPA's is_causal"):
        target.call_once(counted.contender, replace(parse_shape("1,1,8/32,64"), causal=True), CPU, 0, counted.profiled)
    assert counted.calls == 0


def test_without_a_gpu_the_process_refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert target.main(["auto", "--shape", "tiny"]) == 2
    assert capsys.readouterr().err.startswith("error: device: there is no NVIDIA GPU")
    assert target.main(["auto", "--shape", "1,2,3"]) == 2
    assert capsys.readouterr().err.startswith("error: shape: '1,2,3'")


@pytest.mark.parametrize("fails", [False, True])
def test_the_profilers_range_holds_all_that_was_launched_and_is_always_closed(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("synchronize"))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: seen.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: seen.append("stop"))
    with pytest.raises(RuntimeError) if fails else nullcontext(), target.between_start_and_stop():
        seen.append("call")
        if fails:
            raise RuntimeError
    assert seen == ["synchronize", "start", "call", *([] if fails else ["synchronize"]), "stop"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("impl", ["auto", "portable", "torch", "tuned_tiles"])
def test_on_a_gpu_the_call_is_made(impl: str, capsys: pytest.CaptureFixture[str]) -> None:
    causal = [] if impl in {step.name for step in STEPS} else ["--causal"]
    assert target.main([impl, "--shape", "mission", *causal]) == 0, capsys.readouterr().err


def test_every_implementation_can_be_profiled_by_the_name_that_impl_takes() -> None:
    assert set(IMPLS) <= set(CONTENDERS) and {f"flashcore-{impl}" for impl in BINDINGS} <= set(CONTENDERS.values())
    assert all(subject(impl).name == contender_name(impl) for impl in CONTENDERS)
    with pytest.raises(ArgumentValueError, match="impl: 'flash' is unknown; allowed: auto, small, hopper, portable, torch"):
        subject("flash")


def test_a_step_of_the_ladder_says_what_it_does_not_take() -> None:
    step = subject("tensor_core_pv")
    for given, words in (
        (replace(TINY, causal=True), "neither causal nor masked"),
        (replace(TINY, head_dim=80, head_dim_v=80), "head_dim: got 80"),
    ):
        with pytest.raises(UnsupportedError, match=f"ladder-tensor_core_pv: .*{words}"):
            target.call_once(step, given, torch.device("cpu"), 0, nullcontext)


def test_every_step_of_the_ladder_can_be_profiled_by_its_name() -> None:
    assert {step.name for step in STEPS} <= set(CONTENDERS)
    assert subject("tensor_core_pv").name == "ladder-tensor_core_pv"
    assert subject("hopper").name == "flashcore-hopper", "a step that is an implementation is profiled as that"
