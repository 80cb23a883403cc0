"""What the engine hands the launcher: a binding's arguments once, and for each call the addresses in the order of TENSORS."""

from typing import Any

import pytest
import torch

import flashcore
from flashcore.kernels.arguments import TENSORS, Pointer
from flashcore.kernels.portable import binding


def test_what_a_call_lacks_is_0(launched: Any) -> None:
    call = launched.call()
    o = flashcore.attention(**call)
    # not strict: the last name, workspace, is of no call
    plain = dict(zip(TENSORS, launched[0][1], strict=False))
    addresses = {name: call[name].data_ptr() for name in "qkv"} | {"o": o.data_ptr()}
    assert plain == {**addresses, "mask": 0, "lse": 0, "counter": 0}
    mask = torch.ones(70, 90, dtype=torch.bool)
    o, lse = flashcore.attention(**call, attn_mask=mask, return_lse=True)
    addresses |= {"o": o.data_ptr(), "mask": mask.data_ptr(), "lse": lse.data_ptr()}
    assert dict(zip(TENSORS, launched[1][1], strict=False)) == {**addresses, "counter": 0}


def test_the_arguments_are_the_bindings_and_made_once(launched: Any) -> None:
    call = launched.call()
    launched.remember(call)
    ((made,),) = [{launcher for launcher, _ in launched}]
    assert len(launched) == 3 and made.given_device == call["q"].device
    # the launcher got the specialisation in the place of its binary
    plan = flashcore.explain(**call)
    assert (made.binary, made.grid) == (plan.specialisation, plan.grid)
    assert made.arguments[:6] == tuple(Pointer(name) for name in TENSORS[:6])
    assert made.arguments[6:9] == (70 * 4 * 64, 64, 4 * 64)


def test_a_kernel_that_counts_gets_a_fresh_zero_at_each_launch(launched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "needs_counter", lambda *arguments: True)
    made: list[torch.Tensor] = []
    found: list[int] = []
    zeros = torch.zeros
    call = launched.call()
    monkeypatch.setattr(torch, "zeros", lambda *a, **options: made.append(zeros(*a, **options)) or made[-1])

    def launch_here(self: object, addresses: tuple[int, ...]) -> None:
        found.append(addresses[TENSORS.index("counter")])
        made[-1].add_(7)

    monkeypatch.setattr(launched.launcher, "launch_here", launch_here)
    launched.remember(call)
    assert found == [t.data_ptr() for t in made] and len(set(found)) == 3
    assert all((t.dtype, t.shape, t.device, t.item()) == (torch.int32, (1,), call["q"].device, 7) for t in made)
