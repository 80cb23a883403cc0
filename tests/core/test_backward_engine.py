"""What a backward pass hands its launchers: memory, addresses in the order of TENSORS, one launch after the other."""

import threading
from typing import Any

import pytest
import torch

import flashcore
from flashcore.kernels.arguments import TENSORS
from flashcore.runtime import backward
from flashcore.verify.poison import poisoned_memory


def _addresses(launched: Any) -> list[dict[str, int]]:
    """Of each launch, by name, those that are there."""
    return [{name: at for name, at in zip(TENSORS, one, strict=False) if at} for _, one in launched]


def _trained(launched: Any, **changes: Any) -> tuple[dict[str, Any], torch.Tensor]:
    """A call whose q, k and v need gradients, and its output."""
    call = launched.call(**changes)
    for name in "qkv":
        call[name].requires_grad_()
    o = flashcore.attention(**call)
    return call, o[0] if isinstance(o, tuple) else o


@pytest.mark.parametrize("impl", ["portable", "hopper"])
def test_a_pass_is_its_programs_launches_on_the_calls_memory(impl: str, launched: Any) -> None:
    call, o = _trained(launched, impl=impl)
    plan = flashcore.explain(**call).backward
    do = torch.ones_like(o)
    dq, dk, dv = torch.autograd.grad(o, [call[name] for name in "qkv"], do)
    program = plan.program
    assert len(launched) == 1 + len(program.launches)
    for (launcher, _), launch in zip(launched[1:], program.launches, strict=True):
        assert (launcher.binary, launcher.grid, launcher.arguments) == (launch.specialisation, launch.grid, launch.arguments)
    forward, *passes = _addresses(launched)
    made = {"o": o, "do": do, "dq": dq, "dk": dk, "dv": dv, **{name: call[name] for name in "qkv"}}
    expected = {name: t.data_ptr() for name, t in made.items()} | {"lse": forward["lse"]}
    workspaces = {workspace.tensor for workspace in program.workspaces}
    for addresses in passes:
        assert addresses == passes[0]  # one memory for all of them
        assert addresses.keys() == expected.keys() | workspaces
        assert {name: addresses[name] for name in expected} == expected
    assert len(set(passes[0].values())) == len(passes[0])
    assert all(
        (t.shape, t.dtype, t.is_contiguous()) == (call[n].shape, torch.float16, True)
        for n, t in zip("qkv", (dq, dk, dv), strict=True)
    )


def test_a_pass_is_prepared_once_for_each_kind_of_it(launched: Any) -> None:
    call, o = _trained(launched)
    tensors = [call[name] for name in "qkv"]
    do = torch.ones_like(o)
    turned = do.transpose(1, 2).contiguous().transpose(1, 2)
    of: list[set[Any]] = []
    for gradient in (do, turned):
        launchers = set()
        for _ in range(3):
            launched.clear()
            torch.autograd.grad(o, tensors, gradient, retain_graph=True)
            launchers.add(tuple(id(launcher) for launcher, _ in launched))
            assert _addresses(launched)[0]["do"] == gradient.data_ptr()
        of.append(launchers)
    assert len(of[0]) == len(of[1]) == 1 and of[0] != of[1]
    assert len(backward._prepared) == 2
    flashcore.runtime.engine.forget()
    assert not backward._prepared


def _misaligned(o: torch.Tensor) -> torch.Tensor:
    return torch.ones(o.numel() + 1, dtype=o.dtype)[1:].view(o.shape)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.ones((), dtype=o.dtype).expand(o.shape),
        lambda o: torch.ones(*o.shape[:3], 128, dtype=o.dtype)[..., ::2],
        lambda o: torch.ones(*o.shape[:3], 68, dtype=o.dtype)[..., :64],
        lambda o: torch.ones(o.shape[::-1], dtype=o.dtype).permute(3, 2, 1, 0),
        _misaligned,
    ],
    ids=["expanded", "strided", "rows of 68", "turned around", "misaligned"],
)
def test_a_gradient_that_no_kernel_could_load_is_copied(make: Any, launched: Any) -> None:
    call, o = _trained(launched, impl="hopper")
    plain = torch.ones_like(o)
    launched.clear()
    torch.autograd.grad(o, [call[name] for name in "qkv"], plain, retain_graph=True)
    launchers = [launcher for launcher, _ in launched]
    launched.clear()
    do = make(o)
    torch.autograd.grad(o, [call[name] for name in "qkv"], do, retain_graph=True)
    assert [launcher.arguments for launcher, _ in launched] == [launcher.arguments for launcher in launchers]
    assert _addresses(launched)[0]["do"] not in (do.data_ptr(), 0)


def test_gradients_and_workspaces_are_poisoned_where_that_is_asked_for(launched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []
    direct = backward.empty_by_dispatcher

    def empty(device: torch.device) -> Any:
        make = direct(device)
        return lambda *given: (made.append(make(*given)), made[-1])[1]

    monkeypatch.setattr(backward, "empty_by_dispatcher", empty)
    call, o = _trained(launched, impl="hopper", deterministic=False)
    with poisoned_memory(torch.device("cpu")):
        gradients = torch.autograd.grad(o, [call[name] for name in "qkv"], torch.ones_like(o))
    assert all(t.isnan().all() for t in gradients)  # the fake launcher writes nothing
    workspaces = flashcore.explain(**call).backward.program.workspaces
    assert len(made) == 3 + len(workspaces)
    assert all(t.isnan().all() if t.is_floating_point() else t.eq(torch.iinfo(t.dtype).max).all() for t in made)


def test_what_a_call_needs_decides_what_is_made(launched: Any) -> None:
    for wanted in ("q", "v"):
        call = launched.call()
        call[wanted].requires_grad_()
        launched.clear()
        flashcore.attention(**call).sum().backward()
        made = _addresses(launched)[-1]
        assert ("dq" in made, "dk" in made, "dv" in made) == (wanted == "q", wanted == "v", wanted == "v")


def test_a_gradient_of_the_log_sum_exp_comes_contiguous(launched: Any) -> None:
    call = launched.call(return_lse=True)
    call["q"].requires_grad_()
    lse = flashcore.attention(**call)[1]
    torch.autograd.grad(lse.sum(), [call["q"]])
    forward, *passes = _addresses(launched)
    assert all("dlse" in addresses and "do" in addresses for addresses in passes)
    assert forward["lse"] == passes[0]["lse"] == lse.data_ptr()


def test_a_pass_runs_in_autograds_thread_and_in_others(launched: Any) -> None:
    calls = [_trained(launched, q=launched.tensor(length)) for length in (10, 20, 30)]
    found: dict[int, Any] = {}

    def work(i: int) -> None:
        call, o = calls[i]
        for _ in range(20):
            found[i] = torch.autograd.grad(o, [call["q"]], torch.ones_like(o), retain_graph=True)[0].shape

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: call["q"].shape for i, (call, _) in enumerate(calls)}
