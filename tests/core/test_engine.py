"""What the engine hands the launcher: a binding's arguments once, and for each call the addresses in the order of TENSORS."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flashcore
from flashcore.kernels.arguments import TENSORS, Argument, Pointer
from flashcore.kernels.portable import binding
from flashcore.runtime import launch, store
from flashcore.target import Target


class FakeLauncher:
    """In the Launcher's place: keeps what it was given, and calls `seen` with the addresses of each launch."""

    made: list["FakeLauncher"]
    seen: Callable[[dict[str, int]], None]

    def __init__(self, binary: object, device: torch.device, *, grid: int, arguments: Sequence[Argument]) -> None:
        self.binary, self.device, self.grid, self.arguments = binary, device, grid, arguments
        self.made.append(self)

    def launch(self, addresses: tuple[int, ...]) -> None:
        type(self).seen(dict(zip(TENSORS, addresses, strict=True)))


@pytest.fixture
def launches(h200: Target, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """The addresses of each launch, of CPU tensors that the engine takes for tensors on an H200."""
    found: list[dict[str, int]] = []
    monkeypatch.setattr(FakeLauncher, "made", [], raising=False)
    monkeypatch.setattr(FakeLauncher, "seen", found.append, raising=False)
    monkeypatch.setattr(launch, "Launcher", FakeLauncher)
    location = store.Location("shipped", SimpleNamespace(sha256="5" * 64), Path("somewhere.cubin"))
    monkeypatch.setattr(Target, "of", classmethod(lambda cls, device: h200))
    monkeypatch.setattr(store, "locate", lambda specialisation, arch: location)
    monkeypatch.setattr(store, "obtain", lambda specialisation, target: specialisation)
    return found


def _qkv() -> list[torch.Tensor]:
    return [torch.zeros(2, length, 4, 64, dtype=torch.float16) for length in (70, 90, 90)]


def test_what_a_call_lacks_is_0(launches: list[dict[str, int]]) -> None:
    q, k, v = _qkv()
    o = flashcore.attention(q, k, v, impl="portable")
    (plain,) = launches
    addresses = {"q": q.data_ptr(), "k": k.data_ptr(), "v": v.data_ptr(), "o": o.data_ptr()}
    assert plain == {**addresses, "mask": 0, "lse": 0, "counter": 0} and tuple(plain) == TENSORS
    mask = torch.ones(70, 90, dtype=torch.bool)
    o, lse = flashcore.attention(q, k, v, attn_mask=mask, return_lse=True, impl="portable")
    addresses |= {"o": o.data_ptr(), "mask": mask.data_ptr(), "lse": lse.data_ptr()}
    assert launches[1] == {**addresses, "counter": 0}


def test_the_arguments_are_the_bindings_and_made_once(launches: list[dict[str, int]]) -> None:
    q, k, v = _qkv()
    for _ in range(3):
        flashcore.attention(q, k, v, impl="portable")
    (made,) = FakeLauncher.made
    assert len(launches) == 3 and made.device == q.device
    # the launcher got the specialisation in the place of its binary
    plan = flashcore.explain(q, k, v, impl="portable")
    assert (made.binary, made.grid) == (plan.specialisation, plan.grid)
    assert made.arguments[:6] == tuple(Pointer(name) for name in TENSORS[:6])
    assert made.arguments[6:9] == (70 * 4 * 64, 64, 4 * 64)


def test_a_kernel_that_counts_gets_a_fresh_zero_at_each_launch(launches: list[dict[str, int]], monkeypatch) -> None:
    monkeypatch.setattr(binding, "needs_counter", lambda specialisation: True)
    made: list[torch.Tensor] = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **options: made.append(zeros(*a, **options)) or made[-1])
    monkeypatch.setattr(FakeLauncher, "seen", lambda addresses: (launches.append(addresses), made[-1].add_(7)))
    q, k, v = (t.clone() for t in _qkv())
    made.clear()
    for _ in range(3):
        flashcore.attention(q, k, v, impl="portable")
    assert [addresses["counter"] for addresses in launches] == [t.data_ptr() for t in made]
    assert len(set(t.data_ptr() for t in made)) == 3
    assert all((t.dtype, t.shape, t.device, t.item()) == (torch.int32, (1,), q.device, 7) for t in made)
