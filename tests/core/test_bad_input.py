"""Bad input: the right builtin error, naming the argument, what came and what is allowed; eager, explained and compiled."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

import flashcore
from flashcore.errors import FlashCoreError
from flashcore.plan import IMPLS
from flashcore.spec import MAX_SEQLEN


class Bad(NamedTuple):
    name: str
    arguments: dict[str, Any]
    error: type[Exception]
    words: tuple[str, ...]


def _t(*shape: int, **options: Any) -> torch.Tensor:
    return torch.zeros(shape, **options)


HALF, META = torch.float16, torch.device("meta")
LONG = torch.zeros(1).expand(2, MAX_SEQLEN, 2, 8)

# Against the good call below: q (2, 5, 4, 8), k and v (2, 7, 2, 8), float32.
TENSORS = [
    Bad("q-rank-3", {"q": _t(5, 4, 8)}, ValueError, ("q:", "rank 3", "(5, 4, 8)", "rank 4, (B, S, H, D)")),
    Bad("k-rank-5", {"k": _t(1, 2, 7, 2, 8)}, ValueError, ("k:", "rank 5", "rank 4")),
    Bad("v-rank-0", {"v": _t()}, ValueError, ("v:", "rank 0", "rank 4")),
    Bad("q-float64", {"q": _t(2, 5, 4, 8, dtype=torch.float64)}, TypeError, ("q:", "torch.float64", "torch.bfloat16")),
    Bad("v-int32", {"v": _t(2, 7, 2, 8, dtype=torch.int32)}, TypeError, ("v:", "torch.int32", "torch.float16")),
    Bad("k-mixed", {"k": _t(2, 7, 2, 8, dtype=HALF)}, TypeError, ("k:", "torch.float16", "torch.float32", "q's dtype")),
    Bad("v-mixed", {"v": _t(2, 7, 2, 8, dtype=HALF)}, TypeError, ("v:", "torch.float16", "torch.float32", "q's dtype")),
    Bad("k-device", {"k": _t(2, 7, 2, 8, device=META)}, ValueError, ("k:", "meta", "cpu", "q's device")),
    Bad("v-device", {"v": _t(2, 7, 2, 8, device=META)}, ValueError, ("v:", "meta", "cpu", "q's device")),
    Bad("k-batch", {"k": _t(3, 7, 2, 8)}, ValueError, ("k:", "batch 3", "q of 2")),
    Bad("v-batch", {"v": _t(1, 7, 2, 8)}, ValueError, ("v:", "batch 1", "q of 2")),
    Bad("heads", {"k": _t(2, 7, 3, 8), "v": _t(2, 7, 3, 8)}, ValueError, ("k:", "3 heads", "q of 4", "divisor")),
    Bad("more-k-heads", {"k": _t(2, 7, 8, 8), "v": _t(2, 7, 8, 8)}, ValueError, ("k:", "8 heads", "q of 4", "divisor")),
    Bad("no-k-heads", {"k": _t(2, 7, 0, 8), "v": _t(2, 7, 0, 8)}, ValueError, ("k:", "0 heads", "at least 1")),
    Bad("no-q-heads", {"q": _t(2, 5, 0, 8)}, ValueError, ("q of 0", "at least 1")),
    Bad("v-heads", {"v": _t(2, 7, 4, 8)}, ValueError, ("v:", "4 heads", "k of 2")),
    Bad("v-length", {"v": _t(2, 6, 2, 8)}, ValueError, ("v:", "length 6", "k of 7")),
    Bad("k-dim", {"k": _t(2, 7, 2, 9)}, ValueError, ("k:", "head dim 9", "q of 8")),
    Bad("dim-0", {"q": _t(2, 5, 4, 0), "k": _t(2, 7, 2, 0)}, ValueError, ("q:", "head dim 0", "1 to 256")),
    Bad("dim-257", {"q": _t(2, 5, 4, 257), "k": _t(2, 7, 2, 257)}, ValueError, ("q:", "head dim 257", "1 to 256")),
    Bad("v-dim-0", {"v": _t(2, 7, 2, 0)}, ValueError, ("v:", "head dim 0", "1 to 256")),
    Bad("v-dim-257", {"v": _t(2, 7, 2, 257)}, ValueError, ("v:", "head dim 257", "1 to 256")),
    Bad("too-long", {"k": LONG, "v": LONG}, ValueError, ("k:", f"length {MAX_SEQLEN}", f"under {MAX_SEQLEN}")),
    Bad("q-none", {"q": None}, TypeError, ("q:", "NoneType", "torch.Tensor")),
    Bad("k-list", {"k": [[1.0]]}, TypeError, ("k:", "list", "torch.Tensor")),
    Bad("mask-shape", {"attn_mask": _t(3, 7, dtype=torch.bool)}, ValueError, ("attn_mask:", "(3, 7)", "(2, 4, 5, 7)")),
    Bad("mask-heads", {"attn_mask": _t(2, 2, 5, 7)}, ValueError, ("attn_mask:", "(2, 2, 5, 7)", "(2, 4, 5, 7)")),
    Bad("mask-rank", {"attn_mask": _t(1, 2, 4, 5, 7)}, ValueError, ("attn_mask:", "(1, 2, 4, 5, 7)", "(2, 4, 5, 7)")),
    Bad("mask-int", {"attn_mask": _t(5, 7, dtype=torch.int64)}, TypeError, ("attn_mask:", "torch.int64", "torch.bool")),
    Bad("mask-half", {"attn_mask": _t(5, 7, dtype=HALF)}, TypeError, ("attn_mask:", "torch.float16", "torch.float32")),
    Bad("mask-list", {"attn_mask": [[True]]}, TypeError, ("attn_mask:", "list", "torch.Tensor")),
    Bad("mask-device", {"attn_mask": _t(5, 7, device=META)}, ValueError, ("attn_mask:", "meta", "cpu")),
]
OPTIONS = [
    *(
        Bad(f"scale-{x}", {"scale": x}, ValueError, ("scale:", str(x), "finite number"))
        for x in (math.nan, math.inf, -math.inf, 1e39)
    ),
    *(Bad(f"scale-{x!r}", {"scale": x}, TypeError, ("scale:", repr(x), "None or a number")) for x in (True, "1", [0.5])),
    *(
        Bad(f"softcap-{x}", {"softcap": x}, ValueError, ("softcap:", str(x), ">= 0"))
        for x in (-1.0, math.nan, math.inf, -math.inf)
    ),
    *(Bad(f"softcap-{x!r}", {"softcap": x}, TypeError, ("softcap:", repr(x), ">= 0")) for x in (True, None, "30", {})),
    *(Bad(f"causal-{x!r}", {"causal": x}, TypeError, ("causal:", repr(x), "True or False")) for x in (1, 0, None, "y", [1])),
    *(
        Bad(f"window-{x!r}", {"window": x}, TypeError, ("window:", repr(x), "(left, right)"))
        for x in (5, "ab", (1,), (1, 2, 3), (1.0, 2), (True, 0), (None, 1), ([1], 2), {1: 2})
    ),
    *(Bad(f"window-{x!r}", {"window": x}, ValueError, ("window:", repr(x), ">= -1")) for x in ((-2, 0), (0, -2), [-5, -5])),
    *(Bad(f"layout-{x!r}", {"layout": x}, ValueError, ("layout:", repr(x), "'bshd' or 'bhsd'")) for x in ("sbhd", None, [1])),
    *(
        Bad(f"impl-{x!r}", {"impl": x}, ValueError, ("impl:", repr(x), ", ".join(map(repr, IMPLS))))
        for x in ("cuda", "", None, [1])
    ),
    Bad("portable-here", {"impl": "portable"}, NotImplementedError, ("portable", "NVIDIA GPU", "TRITON_INTERPRET=1", "cpu")),
]
ALL = [*TENSORS, *OPTIONS]
# one of each rule: a compile takes a quarter of a second
COMPILED_NAMES = [
    "q-rank-3",
    "q-float64",
    "k-mixed",
    "k-device",
    "k-batch",
    "heads",
    "v-heads",
    "v-length",
    "k-dim",
    "dim-257",
    "v-dim-0",
    "q-none",
    "mask-shape",
    "mask-int",
    "mask-list",
    "scale-nan",
    "scale-True",
    "softcap--1.0",
    "softcap-None",
    "causal-1",
    "causal-None",
    "window-5",
    "window-(-2, 0)",
    "layout-'sbhd'",
    "impl-'cuda'",
]
COMPILED = [bad for bad in ALL if bad.name in COMPILED_NAMES]
DYNAMIC = ["q-rank-3", "k-mixed", "k-batch", "heads", "v-length", "dim-257", "mask-shape", "scale-nan", "causal-1", "window-5"]


def _call(bad: Bad) -> dict[str, Any]:
    return {"q": _t(2, 5, 4, 8), "k": _t(2, 7, 2, 8), "v": _t(2, 7, 2, 8), **bad.arguments}


def _check(raised: pytest.ExceptionInfo, bad: Bad) -> None:
    assert isinstance(raised.value, FlashCoreError), raised.value
    message = str(raised.value)
    assert all(word in message for word in bad.words), message
    assert "\n" not in message


def _id(bad: Bad) -> str:
    return bad.name


@pytest.mark.parametrize("bad", ALL, ids=_id)
def test_attention(bad: Bad) -> None:
    with pytest.raises(bad.error) as raised:
        flashcore.attention(**_call(bad))
    _check(raised, bad)


@pytest.mark.parametrize("bad", ALL, ids=_id)
def test_explain(bad: Bad) -> None:
    with pytest.raises(bad.error) as raised:
        flashcore.explain(**_call(bad))
    _check(raised, bad)


def test_a_sparse_or_nested_tensor_is_refused() -> None:
    good = {"k": _t(2, 7, 2, 8), "v": _t(2, 7, 2, 8)}
    nested = torch.nested.nested_tensor([_t(5, 4, 8), _t(3, 4, 8)], layout=torch.jagged)
    for other in (_t(2, 5, 4, 8).to_sparse(), nested):
        with pytest.raises(TypeError, match=r"q: got a sparse or nested tensor; allowed: a dense"):
            flashcore.attention(q=other, **good)


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _compiled(dynamic: bool | None) -> Any:
    return torch.compile(flashcore.attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("bad", COMPILED, ids=_id)
def test_compiled(bad: Bad) -> None:
    with pytest.raises(bad.error) as raised:
        _compiled(None)(**_call(bad))
    _check(raised, bad)


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("bad", [bad for bad in COMPILED if bad.name in DYNAMIC], ids=_id)
def test_compiled_with_dynamic_shapes(bad: Bad) -> None:
    with pytest.raises(bad.error) as raised:
        _compiled(True)(**_call(bad))
    _check(raised, bad)


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compiled_named_impl_that_cannot_run_here() -> None:
    with pytest.raises(NotImplementedError, match=r"impl 'portable'.*NVIDIA GPU"):
        _compiled(None)(**_call(OPTIONS[-1]))


@pytest.mark.usefixtures("_fresh_dynamo")
def test_a_compiled_function_that_was_good_refuses_what_is_bad() -> None:
    function = _compiled(None)
    q = torch.randn(2, 5, 4, 8)
    assert function(q, q, q, causal=True).shape == q.shape
    with pytest.raises(TypeError, match="causal: got 1"):
        function(q, q, q, causal=1)
    with pytest.raises(ValueError, match="v: got length 4"):
        function(q, q, q[:, :4], causal=True)
    assert torch.equal(function(q, q, q, causal=True), flashcore.attention(q, q, q, causal=True))


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize(
    ("goods", "bad", "words"),
    [
        ([{"softcap": 1.0}, {"softcap": 2.0}], {"softcap": -1.0}, "softcap: got -1.0"),
        ([{"scale": 0.5}, {"scale": 0.25}], {"scale": math.inf}, "scale: got inf"),
        ([{"window": (1, 0)}, {"window": (2, 0)}], {"window": (-2, 0)}, r"window: got \(-2, 0\)"),
        ([{"window": [1, 0]}, {"window": [2, 0]}], {"window": [2, -3]}, r"window: got \[2, -3\]"),
    ],
)
def test_numbers_that_became_symbolic_are_still_checked(goods: list, bad: dict, words: str) -> None:
    # After two values of a number torch.compile treats it as a symbol, also when it turns out to be bad.
    function = _compiled(None)
    q = torch.randn(1, 5, 2, 8)
    for good in goods:
        torch.testing.assert_close(function(q, q, q, **good), flashcore.attention(q, q, q, **good))
    with pytest.raises(ValueError, match=words):
        function(q, q, q, **bad)


@pytest.mark.parametrize(
    ("good", "bad", "words"),
    [
        ({"causal": True}, {"causal": 1}, "causal: got 1"),
        ({"causal": False}, {"causal": 0}, "causal: got 0"),
        ({"scale": 1.0}, {"scale": True}, "scale: got True"),
        ({"softcap": 1.0}, {"softcap": True}, "softcap: got True"),
        ({"softcap": 0.0}, {"softcap": False}, "softcap: got False"),
        ({"window": (1, 0)}, {"window": (True, 0)}, "window: got"),
        ({"window": (1, 0)}, {"window": (1.0, 0)}, "window: got"),
        ({"window": (1, 0)}, {"window": frozenset((1, 0))}, "window: got"),
    ],
)
def test_a_good_call_lets_no_equal_looking_one_through(good: dict, bad: dict, words: str) -> None:
    q = torch.randn(1, 4, 2, 8)
    for _ in range(2):
        flashcore.attention(q, q, q, **good)
        with pytest.raises(TypeError, match=words):
            flashcore.attention(q, q, q, **bad)


SDPA = [
    Bad(
        "mask-and-causal", {"attn_mask": _t(5, 7), "is_causal": True}, ValueError, ("attn_mask:", "is_causal", "one of the two")
    ),
    *(Bad(f"dropout-{x}", {"dropout_p": x}, ValueError, ("dropout_p:", str(x), "0 to 1")) for x in (-0.1, 1.5, math.nan)),
    *(Bad(f"dropout-{x!r}", {"dropout_p": x}, TypeError, ("dropout_p:", repr(x), "0 to 1")) for x in (True, "0.1", None)),
    *(Bad(f"causal-{x!r}", {"is_causal": x}, TypeError, ("is_causal:", repr(x), "True or False")) for x in (1, None)),
    *(Bad(f"scale-{x}", {"scale": x}, ValueError, ("scale:", str(x), "finite")) for x in (math.nan, math.inf)),
    Bad("query", {"query": [1.0]}, TypeError, ("query:", "list", "torch.Tensor")),
    Bad("value", {"value": None}, TypeError, ("value:", "NoneType", "torch.Tensor")),
    Bad("mask-list", {"attn_mask": [[True]]}, TypeError, ("attn_mask:", "list", "torch.Tensor")),
    Bad("mask-shape", {"attn_mask": _t(3, 7)}, ValueError, ("attn_mask:", "(3, 7)", "(2, 4, 5, 7)")),
    Bad("key-dtype", {"key": _t(2, 4, 7, 8, dtype=HALF)}, TypeError, ("key:", "torch.float16", "torch.float32")),
    Bad("key-dim", {"key": _t(2, 4, 7, 9)}, ValueError, ("key:", "head dim 9", "8")),
    Bad("value-length", {"value": _t(2, 4, 6, 8)}, ValueError, ("value:", "length 6", "7")),
]


def _sdpa_call(bad: Bad) -> dict[str, Any]:
    return {"query": _t(2, 4, 5, 8), "key": _t(2, 4, 7, 8), "value": _t(2, 4, 7, 8), **bad.arguments}


@pytest.mark.parametrize("bad", SDPA, ids=_id)
@pytest.mark.parametrize("function", [flashcore.scaled_dot_product_attention, flashcore.explain_sdpa])
def test_sdpa(bad: Bad, function: Any) -> None:
    with pytest.raises(bad.error) as raised:
        function(**_sdpa_call(bad))
    _check(raised, bad)


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("bad", SDPA, ids=_id)
def test_sdpa_compiled(bad: Bad) -> None:
    function = torch.compile(flashcore.scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(bad.error) as raised:
        function(**_sdpa_call(bad))
    _check(raised, bad)
