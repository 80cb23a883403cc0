"""Calls that are remembered, and what stands around them: gradients, modes, transforms, subclasses, threads, devices."""

import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import flashcore
from flashcore import ops
from flashcore.errors import UnsupportedError
from flashcore.kernels.arguments import TENSORS
from flashcore.runtime import engine, fast_path
from flashcore.verify.poison import poisoned_memory


def test_a_tensor_that_comes_to_need_a_gradient(launched: Any) -> None:
    call = launched.call(q=launched.tensor(90))
    for auto in (call | {"impl": "auto"}, call):
        launched.remember(auto)
        before = len(launched)
        auto["q"].requires_grad_()
        with torch.no_grad():
            flashcore.attention(**auto)
        assert len(launched) == before + 1
        o = flashcore.attention(**auto)
        # for want of measurements auto hands it to PyTorch; one by name keeps the log-sum-exp for its backward pass
        forward = [addresses[TENSORS.index("lse")] != 0 for _, addresses in launched[before + 1 :]]
        assert forward == ([True] if auto is call else [])
        o.sum().backward()
        assert auto["q"].grad.shape == auto["q"].shape and (len(launched) > before + 2) == (auto is call)
        auto["q"].requires_grad_(False)


def test_a_tangent_is_seen_by_a_call_that_was_remembered_without_it(launched: Any) -> None:
    call = launched.call()
    launched.remember(call)
    before = len(launched)
    with forward_ad.dual_level(), pytest.raises(UnsupportedError, match="forward-mode"):
        flashcore.attention(**call | {"q": forward_ad.make_dual(call["q"], call["q"])})
    assert len(launched) == before


class Records(TorchDispatchMode):
    """Writes down which operators it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), kwargs: dict | None = None) -> Any:
        self.seen.append(str(function))
        return function(*arguments, **(kwargs or {}))


class Unheeded(Records):
    """One that torch.compile, and so its guards, are not to see."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


@pytest.mark.parametrize("mode", [Records, Unheeded])
def test_a_dispatch_mode_sees_a_call_that_was_remembered_without_it(mode: type[Records], launched: Any) -> None:
    launched.remember(launched.call())
    for _ in range(3):
        with mode() as records:
            flashcore.attention(**launched.call())
        assert "flashcore.attention.default" in records.seen
    before = len(launched)
    flashcore.attention(**launched.call())
    assert len(launched) == before + 1


def test_fake_tensors_after_real_ones_run_nothing(launched: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    launched.remember(launched.call())
    before = len(launched)
    with FakeTensorMode():
        call = launched.call()
        assert type(flashcore.attention(**call)) is type(call["q"])
    assert len(launched) == before


def test_a_function_transform_sees_a_call_that_was_remembered_without_it(launched: Any) -> None:
    call = launched.call(impl="auto")
    launched.remember(call)
    before = len(launched)
    gradient = torch.func.grad(lambda q: flashcore.attention(**(call | {"q": q})).sum())(call["q"])
    assert gradient.shape == call["q"].shape and len(launched) == before  # PyTorch's attention has it


class Subclass(torch.Tensor):
    """A tensor that wants to be asked."""

    seen: list[str]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        cls.seen.append(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_subclass_is_not_taken_for_a_tensor(name: str, launched: Any) -> None:
    call = launched.call()
    launched.remember(call)
    Subclass.seen = []
    flashcore.attention(**call | {name: call[name].as_subclass(Subclass)})
    assert any("flashcore.attention" in function for function in Subclass.seen)
    before = len(launched)
    flashcore.attention(**call | {name: torch.nn.Parameter(call[name], requires_grad=False)})
    assert len(launched) == before + 1


def test_a_negation_that_is_still_to_be_done_is_done(launched: Any) -> None:
    call = launched.call()
    launched.remember(call)
    negative = torch._neg_view(call["k"])
    for _ in range(3):
        flashcore.attention(**call | {"k": negative})
        assert launched[-1][1][1] != negative.data_ptr()


@pytest.mark.parametrize(
    "mode",
    [
        nullcontext,
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
        torch.overrides.BaseTorchFunctionMode,
    ],
    ids=["none", "no-grad", "inference", "autocast", "device", "function-mode"],
)
def test_a_call_is_remembered_in_each_mode(mode: Callable, launched: Any, no_keys: Callable[[], None]) -> None:
    call = launched.call()
    launched.remember(call)
    with mode():
        launched.remember(call)
        no_keys()
        assert flashcore.attention(**call).device == call["q"].device
    flashcore.attention(**call)
    assert launched.last is launched[0][0]


def test_an_output_of_inference_mode_is_an_inference_tensor(launched: Any) -> None:
    call = launched.call()
    launched.remember(call)
    with torch.inference_mode():
        launched.remember(call)
        assert flashcore.attention(**call).is_inference()
    assert not flashcore.attention(**call).is_inference()


def test_uninitialised_memory_is_poisoned_where_that_is_asked_for(launched: Any) -> None:
    call = launched.call(return_lse=True)
    launched.remember(call)
    with poisoned_memory(torch.device("cpu")):
        o, lse = flashcore.attention(**call)
    assert o.isnan().all() and lse.isnan().all()  # the fake launcher writes nothing


def test_threads_do_not_mix_their_calls(launched: Any) -> None:
    calls = [launched.call(q=launched.tensor(length), causal=causal) for length in (10, 20, 30, 40) for causal in (True, False)]

    def work(which: int) -> None:
        for i in range(400):
            flashcore.attention(**calls[(which + i) % len(calls)])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(which,)) for which in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(launched) == 1600
    for call in calls:
        made = {(one.grid, one.binary, one.arguments) for one, addresses in launched if addresses[0] == call["q"].data_ptr()}
        assert len(made) == 1, "a launch of another call"


def test_memory_is_allocated_and_launched_on_the_tensors_device(launched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.index

        def __exit__(self, *error: object) -> None:
            current[0] = self.before

    seen: list[int] = []
    empty = fast_path.empty_directly(torch.device("cpu"))
    monkeypatch.setattr(engine, "empty_directly", lambda device: lambda *given: (seen.append(current[0]), empty(*given))[1])
    monkeypatch.setattr(launched.launcher, "launch_here", lambda self, addresses: seen.append(current[0]))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[0], raising=False)
    monkeypatch.setattr(torch.cuda, "device", Device)
    launched.remember(launched.call())
    current[0] = 1
    flashcore.attention(**launched.call())
    assert current == [1] and seen == [0] * 8


def test_the_operator_is_remembered_and_asks_for_gradients_still(launched: Any, no_keys: Callable[[], None]) -> None:
    call = launched.call()
    q, k, v = call["q"], call["k"], call["v"]

    def both() -> None:
        ops.attention(q, k, v, None, "bshd", True)
        ops.attention_with_lse(q, k, v, None, "bshd", True)

    for _ in range(3):
        both()
    q.requires_grad_()
    ops.attention(q, k, v, None, "bshd", True).sum().backward()
    assert q.grad is not None
    q.requires_grad_(False)
    no_keys()
    both()
    assert launched[-2][1][5] == 0 and launched[-1][1][5] != 0


@pytest.mark.parametrize("made", [nullcontext, torch.inference_mode], ids=["normal", "inference"])
def test_the_operator_is_remembered_in_inference_mode(made: Callable, launched: Any, no_keys: Callable[[], None]) -> None:
    with made():
        call = launched.call()
    with torch.inference_mode():
        for _ in range(3):
            ops.attention(call["q"], call["k"], call["v"])
        no_keys()
        assert ops.attention(call["q"], call["k"], call["v"]).is_inference()


def test_the_operator_of_a_tensor_without_memory_gets_some(launched: Any) -> None:
    call = launched.call()
    zero = torch._efficientzerotensor(call["q"].shape, dtype=torch.float16)
    for q in (call["q"], zero) * 3:
        ops.attention(q, call["k"], call["v"])
        assert launched[-1][1][0] != 0
