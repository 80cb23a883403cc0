"""Calls that are remembered: nothing else is ever taken for one, and a remembered call enters few functions."""

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import flashcore
from flashcore import ops
from flashcore.errors import ArgumentTypeError, FlashCoreError
from flashcore.kernels.arguments import TENSORS
from flashcore.kernels.registry import BINDINGS
from flashcore.runtime import engine, fast_path
from flashcore.spec import Options

HALF = torch.float16


def _t(length: int = 90, *, heads: int = 4, batch: int = 2, dim: int = 64, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.zeros(batch, length, heads, dim, dtype=dtype)


def _shifted(t: torch.Tensor) -> torch.Tensor:
    """The same, 2 bytes further on in memory."""
    return torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)


MASK = torch.ones(70, 90, dtype=torch.bool)
# each differs from launched.call() in one thing; most have the number of elements of k by which calls are told apart first
OTHERS = {
    "q-length": {"q": _t(60)},
    "q-heads": {"q": _t(70, heads=8)},
    "k-and-v-heads": {"k": _t(180, heads=2), "v": _t(180, heads=2)},
    "batch-and-length": {"q": _t(70, batch=1), "k": _t(180, batch=1), "v": _t(180, batch=1)},
    "v-dim": {"v": _t(dim=32)},
    "q-strides": {"q": _t(4, heads=70).transpose(1, 2)},
    "k-strides": {"k": _t(4, heads=90).transpose(1, 2)},
    "v-strides": {"v": _t(90, dim=128)[..., :64]},
    "dtype": {name: _t(length, dtype=torch.bfloat16) for name, length in (("q", 70), ("k", 90), ("v", 90))},
    "q-address": {"q": _shifted(_t(70))},
    "k-address": {"k": _shifted(_t())},
    "v-address": {"v": _shifted(_t())},
    "causal": {"causal": True},
    "scale": {"scale": 0.5},
    "no-scale": {"scale": 0.0},
    "window": {"window": (5, 0)},
    "window-list": {"window": [5, 1]},
    "softcap": {"softcap": 3.0},
    "lse": {"return_lse": True},
    "layout": {"q": _t(4, heads=70), "k": _t(4, heads=90), "v": _t(4, heads=90), "layout": "bhsd"},
    "impl": {"impl": "hopper"},
    "mask": {"attn_mask": MASK},
    "mask-kind": {"attn_mask": MASK.half()},
    "mask-broadcast": {"attn_mask": MASK[:1]},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_call_that_differs_in_one_thing_has_a_launch_of_its_own(name: str, launched: Any) -> None:
    base, other = launched.call(), launched.call(**OTHERS[name])
    of: dict[int, set[Any]] = {0: set(), 1: set()}
    for _ in range(4):
        for which, call in enumerate((base, other)):
            flashcore.attention(**call)
            of[which].add(launched.last)
            addresses = dict(zip(TENSORS, launched[-1][1], strict=False))  # the last name, workspace, is of no call
            assert [addresses[tensor] for tensor in "qkv"] == [call[tensor].data_ptr() for tensor in "qkv"]
            assert addresses["mask"] == (call["attn_mask"].data_ptr() if "attn_mask" in call else 0)
    assert len(of[0]) == len(of[1]) == 1 and not of[0] & of[1]
    (found,) = of[1]
    options = {"causal": False, "scale": None, "window": None, "softcap": 0.0, "layout": "bshd"}
    options |= {option: value for option, value in other.items() if option in options}
    tensors = other["q"], other["k"], other["v"], other.get("attn_mask")
    spec, plan = engine.plan_call(*tensors, Options.check(**options), other.get("return_lse", False), other["impl"])
    assert plan.specialisation is not None and (found.binary, found.grid) == (plan.specialisation, plan.grid)
    assert found.arguments == BINDINGS[plan.impl].arguments(spec, plan.specialisation)


@pytest.mark.parametrize("mask", [None, MASK], ids=["plain", "masked"])
def test_a_remembered_call_goes_by_no_key(mask: torch.Tensor | None, launched: Any, no_keys: Callable[[], None]) -> None:
    call = launched.call(attn_mask=mask, return_lse=True)
    launched.remember(call)
    no_keys()
    o, lse = flashcore.attention(**launched.call(attn_mask=mask, return_lse=True))
    assert (o.shape, o.stride(), o.dtype) == (call["q"].shape, call["q"].stride(), HALF)
    assert (lse.shape, lse.dtype) == ((2, 4, 70), torch.float32) and lse.is_contiguous()
    assert launched[-1][1][4:6] == (o.data_ptr(), lse.data_ptr())


def test_many_shapes_in_turn_are_all_remembered(launched: Any, no_keys: Callable[[], None]) -> None:
    alike = [{name: _t(length) for name in "qkv"} for length in range(1, 40)]
    calls = [launched.call(**tensors, causal=causal) for tensors in alike for causal in (True, False)]
    calls += [launched.call(q=_t(70, heads=heads)) for heads in (4, 8, 12, 16, 20)]  # of one size of k
    for _ in range(2):
        for call in calls:
            flashcore.attention(**call)
    no_keys()
    for call in calls:
        flashcore.attention(**call)
        assert launched[-1][1][0] == call["q"].data_ptr()


def test_more_shapes_of_one_size_than_are_remembered_are_right(launched: Any) -> None:
    calls = [launched.call(q=_t(length)) for length in range(1, 30)]
    for _ in range(3):
        for call in calls:
            flashcore.attention(**call)
    by_shape = [{launcher for launcher, addresses in launched if addresses[0] == call["q"].data_ptr()} for call in calls]
    assert all(len(launchers) == 1 for launchers in by_shape) and len(set.union(*by_shape)) == len(calls)


def test_equal_options_of_another_object_are_the_same_call(launched: Any, no_keys: Callable[[], None]) -> None:
    launched.remember(launched.call(scale=0.25, window=[3, 4], layout="bshd"))
    no_keys()
    flashcore.attention(**launched.call(scale=float("0.25"), window=tuple([3, 4]), layout="".join(["bs", "hd"])))


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"causal": True}, {"causal": 1}),
        ({"causal": False}, {"causal": 0.0}),
        ({"scale": 1.0}, {"scale": True}),
        ({"softcap": 0.0}, {"softcap": False}),
        ({"window": (1, 0)}, {"window": (True, 0)}),
        ({"window": (1, 0)}, {"window": (1.0, 0)}),
        ({"scale": 0.5}, {"scale": torch.tensor(0.5)}),
        ({}, {"layout": ["bshd"]}),
        ({}, {"k": [[1.0]]}),
        ({}, {"q": None}),
        ({}, {"attn_mask": [[True]]}),
        ({"attn_mask": MASK}, {"attn_mask": "mask"}),
    ],
    ids=str,
)
def test_what_looks_like_a_remembered_call_and_is_wrong_is_refused(good: dict, bad: dict, launched: Any) -> None:
    launched.remember(launched.call(**good))
    before = len(launched)
    with pytest.raises(FlashCoreError):
        flashcore.attention(**launched.call(**{**good, **bad}))
    assert len(launched) == before


def test_a_list_that_changed_is_not_what_it_was(launched: Any) -> None:
    window = [5, 0]
    launched.remember(launched.call(window=window))
    first = launched.last
    window[0] = 6
    flashcore.attention(**launched.call(window=window))
    assert launched.last is not first
    window[0] = -7
    with pytest.raises(ValueError, match=r"window: got \[-7, 0\]"):
        flashcore.attention(**launched.call(window=window))


def test_allow_tf32_is_heard_at_every_call(launched: Any) -> None:
    call = launched.call(q=_t(70, dtype=torch.float32), k=_t(dtype=torch.float32), v=_t(dtype=torch.float32))
    found = []
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True, False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            launched.remember(call)
            found.append(launched.last)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert found[0] is found[2] and found[1] is found[3] and found[0] is not found[1]


@pytest.fixture
def no_guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """A function that puts something else in the place of torch's private module."""
    tried = (fast_path.guarded, fast_path._direct)

    def replace(module: Any) -> None:
        monkeypatch.setattr(fast_path, "_private", module)
        for one in tried:
            one.cache_clear()

    yield replace
    for one in tried:
        one.cache_clear()


def _guards(check: Callable[..., bool]) -> Any:
    return SimpleNamespace(TensorGuards=lambda *tensors, **options: SimpleNamespace(check=check))


@pytest.mark.parametrize(
    "module",
    [None, SimpleNamespace(), _guards(lambda *tensors: True), _guards(lambda *tensors: False), _guards(lambda: True)],
    ids=["no module", "no guards", "that take all", "that take none", "another signature"],
)
def test_without_guards_that_work_a_call_goes_by_its_key(module: Any, no_guards: Callable, launched: Any) -> None:
    no_guards(module)
    for name in ("causal", "q-address", "dtype", "mask"):
        for call in (launched.call(), launched.call(**OTHERS[name])):
            launched.remember(call)
            assert launched[-1][1][0] == call["q"].data_ptr() and launched[-1][0] is launched[-2][0]
    assert len({launcher for launcher, _ in launched}) == 5
    assert "keys" in fast_path.ways(torch.device("cpu")) and "by the dispatcher" in fast_path.ways(torch.device("cpu"))


def test_an_allocation_that_does_not_work_is_not_used(no_guards: Callable, launched: Any) -> None:
    def refuse(*given: object) -> torch.Tensor:
        raise TypeError("another signature")

    no_guards(SimpleNamespace(TensorGuards=fast_path._private.TensorGuards, _empty_strided_cpu=refuse))
    launched.remember(launched.call())
    assert len(launched) == 3 and "guards" in fast_path.ways(torch.device("cpu"))


def _sdpa(**changes: Any) -> dict[str, Any]:
    q, k = torch.zeros(2, 4, 70, 64, dtype=HALF), torch.zeros(2, 4, 90, 64, dtype=HALF)
    return {"query": q, "key": k, "value": k.clone(), **changes}


def test_sdpa_is_remembered_with_all_that_its_signature_has(launched: Any, no_keys: Callable[[], None]) -> None:
    grouped = _sdpa(key=torch.zeros(2, 2, 180, 64, dtype=HALF), value=torch.zeros(2, 2, 180, 64, dtype=HALF))
    calls = [_sdpa(), _sdpa(is_causal=True), _sdpa(scale=0.5), _sdpa(attn_mask=MASK), grouped | {"enable_gqa": True}]
    for _ in range(3):
        for call in calls:
            flashcore.scaled_dot_product_attention(**call)
    assert len({launcher for launcher, _ in launched}) == len(calls)
    with pytest.raises(RuntimeError):  # torch's own, which wants enable_gqa
        flashcore.scaled_dot_product_attention(**grouped)
    for wrong in ({"dropout_p": False}, {"dropout_p": None}, {"is_causal": 0}, {"scale": [1]}):
        with pytest.raises(ArgumentTypeError):
            flashcore.scaled_dot_product_attention(**_sdpa(**wrong))
    with pytest.raises(ValueError, match="one of the two"):
        flashcore.scaled_dot_product_attention(**_sdpa(attn_mask=MASK, is_causal=True))
    before = len(launched)
    flashcore.scaled_dot_product_attention(**_sdpa(dropout_p=0.5))
    assert len(launched) == before
    no_keys()
    for call in calls:
        flashcore.scaled_dot_product_attention(**call)
        assert launched[-1][1][0] == call["query"].data_ptr()


def test_top_left_and_bottom_right_are_not_one_call(launched: Any) -> None:
    call = _sdpa(is_causal=True)
    for _ in range(3):
        flashcore.scaled_dot_product_attention(**call)
        ours = flashcore.explain_sdpa(**call).impl
        flashcore.attention(*(call[name] for name in ("query", "key", "value")), causal=True, layout="bhsd", impl=ours)
        (sdpas, _), (flash, _) = launched[-2:]
        assert sdpas.arguments != flash.arguments


def _calls_within(function: Callable[[], object]) -> dict[str, list[str]]:
    """The functions that a call enters: Python's ("call"), itself left out, and C's ("c_call")."""
    entered: dict[str, list[str]] = {"call": [], "c_call": []}

    def watch(frame: Any, event: str, argument: Any) -> None:
        if event in entered:
            entered[event].append(frame.f_code.co_name if event == "call" else argument.__name__)

    sys.setprofile(watch)
    try:
        function()
    finally:
        sys.setprofile(None)
    del entered["call"][0], entered["c_call"][-1]  # the function itself and sys.setprofile
    return entered


def test_a_remembered_call_enters_few_functions(launched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # each is a few hundredths of what a call costs: one more must be worth it
    monkeypatch.setattr(launched.launcher, "launch_here", id)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", int, raising=False)
    call, sdpa = launched.call(), _sdpa()
    entries: dict[str, Callable[[], object]] = {
        "attention": lambda: flashcore.attention(**call),
        "sdpa": lambda: flashcore.scaled_dot_product_attention(**sdpa),
        "operator": lambda: ops.attention(call["q"], call["k"], call["v"]),
    }
    for name, entry in entries.items():
        for _ in range(3):
            entry()
        entered = _calls_within(entry)
        assert len(entered["call"]) <= 6 and len(entered["c_call"]) <= 12, f"{name}: {entered}"
