"""torch.compile, torch.library and autograd: the same results as eager, no recompiles, gradients where there are some."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import flashcore
from flashcore import ops
from flashcore.errors import UnsupportedError


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def _qkv(seqlen_q: int, seqlen_k: int, heads_k: int = 2, **options: object) -> list[torch.Tensor]:
    return [
        torch.randn(2, length, heads, 8, **options)
        for length, heads in ((seqlen_q, 4), (seqlen_k, heads_k), (seqlen_k, heads_k))
    ]


def _compile(function: Callable) -> tuple[Callable, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter


def _additive(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.arange(q.shape[1])[:, None] / 7.0 - torch.arange(k.shape[1])[None, :] / 5.0


CALLS = {
    "plain": lambda q, k, v: flashcore.attention(q, k, v),
    "causal": lambda q, k, v: flashcore.attention(q, k, v, causal=True),
    "window": lambda q, k, v: flashcore.attention(q, k, v, window=(3, 1)),
    "lse": lambda q, k, v: flashcore.attention(q, k, v, causal=True, softcap=3.0, return_lse=True),
    "mask": lambda q, k, v: flashcore.attention(q, k, v, attn_mask=_additive(q, k), scale=0.3),
    "bhsd": lambda q, k, v: flashcore.attention(*(t.transpose(1, 2) for t in (q, k, v)), layout="bhsd", return_lse=True),
    "torch": lambda q, k, v: flashcore.attention(q, k, v, causal=True, impl="torch"),
    "sdpa": lambda q, k, v: flashcore.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_third_length_does_not_compile_again(name: str) -> None:
    function = CALLS[name]
    compiled, counter = _compile(function)
    counts = []
    for seqlen_q, seqlen_k in ((6, 9), (12, 15), (17, 33), (21, 40)):
        tensors = _qkv(seqlen_q, seqlen_k)
        torch.testing.assert_close(compiled(*tensors), function(*tensors))
        counts.append(counter.frame_count)
    assert counts[1] == counts[2] == counts[3], counts


@pytest.mark.parametrize("numbers", [{"scale": (0.1, 0.2, 0.3, 0.4)}, {"softcap": (1.0, 2.0, 3.0, 4.0)}], ids=str)
def test_a_third_number_gives_the_right_result(numbers: dict) -> None:
    compiled, _ = _compile(flashcore.attention)
    tensors = _qkv(5, 7)
    for name, values in numbers.items():
        for value in values:
            expected = flashcore.attention(*tensors, **{name: value})
            torch.testing.assert_close(compiled(*tensors, **{name: value}), expected)


def test_a_part_of_a_larger_graph() -> None:
    def block(x: torch.Tensor) -> torch.Tensor:
        o, lse = flashcore.attention(x * 2, x, x + 1, causal=True, return_lse=True)
        return o.mean() + lse.sum()

    compiled, _ = _compile(block)
    x = torch.randn(2, 9, 4, 8)
    torch.testing.assert_close(compiled(x), block(x))


def test_export_with_a_dynamic_length() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return flashcore.attention(q, k, v, causal=True)

    queries, keys = torch.export.Dim("queries", min=2, max=64), torch.export.Dim("keys", min=2, max=64)
    shapes = {"q": {1: queries}, "k": {1: keys}, "v": {1: keys}}
    program = torch.export.export(Module(), tuple(_qkv(6, 9)), dynamic_shapes=shapes)
    tensors = _qkv(11, 21)
    torch.testing.assert_close(program.module()(*tensors), flashcore.attention(*tensors, causal=True))


def test_fake_tensors_get_shapes_and_run_nothing() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k, v = _qkv(6, 9, dtype=torch.float16)
        o, lse = flashcore.attention(q, k, v[..., :5], return_lse=True)
    assert (o.shape, o.dtype, o.stride()) == ((2, 6, 4, 5), torch.float16, (120, 20, 5, 1))
    assert (lse.shape, lse.dtype) == ((2, 4, 6), torch.float32)


def _arguments(q, k, v, mask=None, causal=False, scale=None, left=-1, right=-1, softcap=0.0, layout="bshd"):
    return q, k, v, mask, layout, causal, scale, False, left, right, softcap, "auto"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"left": 2, "right": 1, "scale": 0.5, "softcap": 2.0},
        {"mask": torch.ones(5, 9, dtype=torch.bool).tril(4)},
        {"layout": "bhsd"},
    ],
    ids=["plain", "causal", "window", "mask", "bhsd"],
)
@pytest.mark.parametrize("name", ["attention", "attention_with_lse"])
def test_opcheck(name: str, options: dict) -> None:
    tensors = _qkv(5, 9)
    if options.get("layout") == "bhsd":
        tensors = [t.transpose(1, 2) for t in tensors]
    torch.library.opcheck(getattr(ops, name), _arguments(*tensors, **options))


def test_opcheck_of_inputs_that_need_a_gradient() -> None:
    tensors = _qkv(5, 9, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.attention, _arguments(*tensors), test_utils=checks)


def _gradients(function: Callable, *tensors: torch.Tensor) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    o = function(*leaves)
    weights = torch.linspace(-1, 1, o.numel()).view(o.shape)
    return [o, *torch.autograd.grad((o * weights).sum(), leaves)]


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_sdpas(compiled: bool) -> None:
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flashcore.attention(q, k, v, causal=True)

    tensors = _qkv(6, 9)
    found = _gradients(_compile(function)[0] if compiled else function, *tensors)
    torch.testing.assert_close(found, _gradients(_sdpa, *tensors))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_lse_and_an_additive_mask_have_gradients(compiled: bool) -> None:
    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        o, lse = flashcore.attention(q, k, v, attn_mask=bias, return_lse=True)
        return torch.cat([o.flatten(), lse.flatten()])

    def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        s = torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5 + bias
        o = torch.einsum("bhij,bjhd->bihd", torch.softmax(s, -1), v)
        return torch.cat([o.flatten(), torch.logsumexp(s, -1).flatten()])

    tensors = [*_qkv(6, 9, heads_k=4), torch.randn(6, 9)]
    found = _gradients(_compile(ours)[0] if compiled else ours, *tensors)
    torch.testing.assert_close(found, _gradients(by_hand, *tensors))


def test_a_row_with_nothing_to_attend_has_gradient_0() -> None:
    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flashcore.attention(q, k, v, causal=True, return_lse=True, impl="torch")[0]

    o, dq, dk, dv = _gradients(ours, *_qkv(9, 4))  # the first 5 rows come before the first key
    assert o[:, :5].eq(0).all() and dq[:, :5].eq(0).all() and o[:, 5:].ne(0).any()
    assert all(gradient.isfinite().all() for gradient in (dq, dk, dv))


def test_a_function_transform_differentiates_it() -> None:
    q, k, v = _qkv(4, 4, heads_k=4)
    found = torch.func.grad(lambda q: flashcore.attention(q, k, v).sum())(q)
    torch.testing.assert_close(found, torch.func.grad(lambda q: _sdpa_plain(q, k, v).sum())(q))


def _sdpa_plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def test_auto_says_that_a_gradient_goes_to_torch() -> None:
    q, k, v = _qkv(4, 4, requires_grad=True)
    with torch.no_grad():
        assert "gradient" not in flashcore.explain(q, k, v).reason
    target = flashcore.explain(q, k, v, impl="torch")
    assert target.impl == "torch" and target.reason == "asked for by name"


@pytest.mark.parametrize("compiled", [False, True])
def test_a_kernel_without_a_backward_pass_raises_where_a_gradient_is_needed(compiled: bool, launched: object) -> None:
    function = _compile(flashcore.attention)[0] if compiled else flashcore.attention
    q, k, v = (torch.zeros(1, 64, 2, 64, dtype=torch.float16, requires_grad=True) for _ in range(3))
    with pytest.raises(UnsupportedError, match=r"impl 'small'.*no backward pass.*use 'hopper', 'portable', 'torch' or 'auto'"):
        function(q, k, v, impl="small")


def test_the_operator_has_sdpas_gradients_where_auto_goes_to_torch() -> None:
    tensors = _qkv(6, 9)
    found = _gradients(lambda *t: torch.ops.flashcore.attention(*_arguments(*t, causal=True)), *tensors)
    torch.testing.assert_close(found, _gradients(_sdpa, *tensors))


def test_the_operator_needs_no_gradient_under_no_grad() -> None:
    q, k, v = _qkv(4, 4, requires_grad=True)
    with torch.no_grad():
        o, lse = torch.ops.flashcore.attention_with_lse(*_arguments(q, k, v))
    torch.testing.assert_close((o, lse), tuple(t.detach() for t in flashcore.attention(q, k, v, return_lse=True)))
    assert not o.requires_grad


def test_a_dispatch_mode_sees_the_operator() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = {}

    class Records(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            seen[str(function)] = arguments
            return function(*arguments, **(kwargs or {}))

    q, k, v = _qkv(4, 6)
    with Records():
        plain = flashcore.attention(q, k, v)
        assert len(seen.pop("flashcore.attention.default")) == 3  # what is the default is not converted, nor given to the mode
        causal = flashcore.attention(q, k, v, causal=True)
        assert len(seen["flashcore.attention.default"]) == 6
    torch.testing.assert_close((plain, causal), (flashcore.attention(q, k, v), flashcore.attention(q, k, v, causal=True)))


@pytest.mark.parametrize("name", ["attention", "attention_with_lse"])
def test_the_schemas_defaults_are_those_that_the_operator_fills_in(name: str) -> None:
    arguments = getattr(torch.ops.flashcore, name).default._schema.arguments
    assert {argument.name: argument.default_value for argument in arguments[4:]} == ops._OPTIONS
