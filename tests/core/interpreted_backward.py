"""Calls whose gradients are ours, in Triton's interpreter; test_backward_interpreted.py runs this file with TRITON_INTERPRET=1.

What the kernels compute is tested beside them; here it is how a call gets to them and what stands around it: autograd,
torch.compile, checkpointing, hooks, modes, transforms, autocast.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.autograd.gradcheck import GradcheckError
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import flashcore
from flashcore import ops, plan, tracing
from flashcore.errors import ArgumentTypeError, UnsupportedError
from flashcore.runtime import backward, engine

# of all rounding between our float32 and the oracle's float64, at these sizes
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def _interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch._dynamo.reset()
    engine.forget()
    torch.manual_seed(0)


@pytest.fixture
def auto_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto takes the interpreter for a GPU's kernels, measured to be as fast as PyTorch's."""
    monkeypatch.setattr(plan, "_refuse", lambda found, target: None)
    monkeypatch.setattr(plan, "_compare", lambda *arguments: None)


def _qkv(seqlen_q: int = 6, seqlen_k: int = 9, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    sizes = ((1, seqlen_q, 2, 8), (1, seqlen_k, 1, 8), (1, seqlen_k, 1, 8))
    return [torch.randn(size, dtype=dtype).requires_grad_() for size in sizes]


def _ours(*tensors: torch.Tensor, **options: Any) -> Any:
    return flashcore.attention(*tensors, **{"impl": "portable", "causal": True, "return_lse": True, **options})


def _loss(result: Any) -> torch.Tensor:
    """Something of o and of the log-sum-exp whose gradient differs from element to element."""
    o, lse = result if isinstance(result, tuple) else (result, torch.zeros(()))
    weights = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)
    return (o * weights).sum() + lse.masked_fill(lse == -math.inf, 0).sin().sum()


def _gradients(function: Callable[..., Any], tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(_loss(function(*tensors)), tensors)


def _same(found: Any, expected: Any) -> None:
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def _oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None = None, causal: bool = False):
    """Attention of (B, S, H, D) in float64, differentiable; a row with nothing to attend has output and gradients 0."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[3])
    if attn_mask is not None:
        s = s.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else s + attn_mask
    if causal:
        s = s.masked_fill(~torch.ones(s.shape[2:], dtype=torch.bool).tril(s.shape[3] - s.shape[2]), -math.inf)
    empty = (s == -math.inf).all(-1, keepdim=True)
    p = torch.softmax(s.masked_fill(empty, 0), -1).masked_fill(empty, 0)
    return (p @ v).transpose(1, 2), torch.logsumexp(s.masked_fill(empty, 0), -1).masked_fill(empty[..., 0], -math.inf)


def test_the_gradients_are_the_oracles() -> None:
    for options in ({"causal": True}, {"causal": False}, {"causal": False, "attn_mask": torch.rand(6, 9) > 0.4}):
        tensors = _qkv()
        found = _gradients(lambda *t, o=options: _ours(*t, **o), tensors)
        expected = _gradients(lambda *t, o=options: _oracle(*t, **o), tensors)
        torch.testing.assert_close(found, expected, **CLOSE)


def _gradcheck() -> bool:
    # by differences of a float32 call, whose rounding divided by this step is far below the tolerance
    tensors = [torch.randn(1, length, 1, 4, dtype=torch.float64, requires_grad=True) for length in (2, 3, 3)]

    def function(*t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        o, lse = _ours(*(one.float() for one in t), causal=False)
        return o.double(), lse.double()

    return torch.autograd.gradcheck(function, tensors, eps=1e-2, atol=1e-3, rtol=1e-3)


def test_gradcheck() -> None:
    assert _gradcheck()


def test_a_wrong_gradient_would_fail_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = backward.prepare_backward

    def wrong(*arguments: Any) -> Any:
        run = prepare(*arguments)
        return lambda tensors: {name: t * (1.1 if name == "dk" else 1) for name, t in run(tensors).items()}

    monkeypatch.setattr(backward, "prepare_backward", wrong)
    with pytest.raises(GradcheckError, match="with respect to input 1"):
        _gradcheck()


@pytest.mark.parametrize("shape", [(6, 9), (2, 1, 9), (1, 1, 6, 1), (1, 2, 6, 9), (9,), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_an_additive_mask_has_a_gradient_of_its_own_shape_and_dtype(shape: tuple, dtype: torch.dtype) -> None:
    mask = torch.randn(shape).half().to(dtype).requires_grad_()
    tensors = [t.detach().half() for t in _qkv()]
    (found,) = torch.autograd.grad(_loss(_ours(*tensors, attn_mask=mask, causal=False)), [mask])
    (expected,) = torch.autograd.grad(_loss(_oracle(*tensors, attn_mask=mask)), [mask])
    assert (found.shape, found.dtype) == (mask.shape, dtype)
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)


def test_only_the_gradients_that_are_needed_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[set[str]] = []
    prepare = backward.prepare_backward

    def spy(*arguments: Any) -> Any:
        run = prepare(*arguments)
        return lambda tensors: (made.append(set(found := run(tensors))), found)[1]

    monkeypatch.setattr(backward, "prepare_backward", spy)
    for which, names in (("q", {"dq"}), ("k", {"dk", "dv"}), ("v", {"dk", "dv"}), ("qv", {"dq", "dk", "dv"})):
        leaves = dict(zip("qkv", (t.detach() for t in _qkv()), strict=True))
        asked = [leaves[name].requires_grad_() for name in which]
        found = torch.autograd.grad(_loss(_ours(*leaves.values())), asked)
        expected = torch.autograd.grad(_loss(_oracle(*leaves.values(), causal=True)), asked)
        torch.testing.assert_close(found, expected, **CLOSE)
        assert made.pop() == names and not made


@pytest.mark.parametrize("used", ["o", "lse"])
def test_one_of_the_outputs_may_go_unused(used: str) -> None:
    tensors = _qkv()
    which = ("o", "lse").index(used)
    found = torch.autograd.grad(_ours(*tensors)[which].sum(), tensors, allow_unused=True)
    expected = torch.autograd.grad(_oracle(*tensors, causal=True)[which].sum(), tensors, allow_unused=True)
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient) if other is None else other, **CLOSE)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_the_outputs_gradient_may_have_any_strides(layout: str) -> None:
    tensors = [(t if layout == "bshd" else t.transpose(1, 2)).detach().contiguous().requires_grad_() for t in _qkv()]
    o = _ours(*tensors, layout=layout, return_lse=False)
    dense = torch.randn(o.shape)
    expected = torch.autograd.grad(o, tensors, dense, retain_graph=True)
    assert all(gradient.is_contiguous() for gradient in expected)
    spread = torch.zeros(*o.shape[:3], 16)[..., ::2]
    others = (dense.transpose(1, 2).contiguous().transpose(1, 2), spread.copy_(dense), torch.zeros(129)[1:].view(1, 8, 16))
    for do in (others[0], others[1], others[2].view(-1)[: o.numel()].view(o.shape).copy_(dense)):
        _same(torch.autograd.grad(o, tensors, do, retain_graph=True), expected)
    _same(
        torch.autograd.grad(o.sum(), tensors, retain_graph=True),  # expanded
        torch.autograd.grad(o, tensors, torch.ones_like(o), retain_graph=True),
    )
    _same(torch.autograd.grad(o, tensors, torch._neg_view(-dense)), expected)


def test_what_has_no_elements_has_gradients_all_the_same() -> None:
    for seqlen_q, seqlen_k in ((0, 9), (6, 0), (0, 0)):
        tensors = _qkv(seqlen_q, seqlen_k)
        found = torch.autograd.grad(_ours(*tensors)[0].sum(), tensors)
        assert all(one.shape == t.shape and one.eq(0).all() for one, t in zip(found, tensors, strict=True))


def test_rows_and_keys_that_take_part_in_nothing_have_gradient_0() -> None:
    q, k, v = _qkv(9, 4)  # the first 5 rows come before the first key
    found = _gradients(_ours, [q, k, v])
    assert found[0][:, :5].eq(0).all() and found[0][:, 5:].ne(0).any()
    assert all(gradient.isfinite().all() for gradient in found)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    tensors = _qkv()
    expected = _gradients(_ours, tensors)
    _loss(checkpoint(_ours, *tensors, use_reentrant=reentrant)).backward()
    _same([t.grad for t in tensors], expected)


def test_what_is_kept_is_the_inputs_and_two_of_the_outputs_size() -> None:
    tensors = _qkv()
    mask = torch.randn(6, 9)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        o, lse = _ours(*tensors, attn_mask=mask)
    assert kept == [*(t.shape for t in tensors), mask.shape, o.shape, lse.shape]
    with torch.autograd.graph.save_on_cpu():
        found = _gradients(_ours, tensors)
    _same(found, _gradients(_ours, tensors))


def test_an_input_that_was_changed_is_refused() -> None:
    q, k, v = _qkv()
    scaled = q * 1
    loss = _loss(_ours(scaled, k, v))
    scaled.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def _compiled(function: Callable[..., Any]) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter


def test_compiled_with_dynamic_lengths_it_is_one_graph_and_the_same() -> None:
    compiled, counter = _compiled(_ours)
    counts = []
    for lengths in ((6, 9), (10, 14), (13, 17), (15, 21)):
        tensors = _qkv(*lengths)
        _same(_gradients(compiled, tensors), _gradients(_ours, tensors))
        counts.append(counter.frame_count)
    assert counts[1] == counts[2] == counts[3], counts


def test_compiled_as_a_part_of_more() -> None:
    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        o, lse = _ours(q * 2, k + 1, v)
        return o.relu(), lse

    tensors = _qkv()
    torch.testing.assert_close(_gradients(_compiled(block)[0], tensors), _gradients(block, tensors))


def test_compiled_by_inductor() -> None:
    tensors = _qkv()
    _same(_gradients(torch.compile(_ours, fullgraph=True), tensors), _gradients(_ours, tensors))


def test_compiled_with_checkpointing() -> None:
    compiled, _ = _compiled(lambda *tensors: checkpoint(_ours, *tensors, use_reentrant=False))
    tensors = _qkv()
    _same(_gradients(compiled, tensors), _gradients(_ours, tensors))


@pytest.mark.usefixtures("auto_is_ours")
def test_auto_decides_while_it_is_compiled_and_keeps_lengths_dynamic(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[str] = []
    run = engine.run_recorded
    monkeypatch.setattr(engine, "run_recorded", lambda *given: (recorded.append(given[-1]), run(*given))[1])

    def auto(*tensors: torch.Tensor) -> Any:
        return flashcore.attention(*tensors, causal=True, return_lse=True)

    assert flashcore.explain(*_qkv(), causal=True).impl == "portable"
    compiled, counter = _compiled(auto)
    counts = []
    for lengths in ((6, 9), (10, 14), (13, 17), (15, 21)):
        tensors = _qkv(*lengths)
        _same(_gradients(compiled, tensors), _gradients(_ours, tensors))
        counts.append(counter.frame_count)
    assert counts[1] == counts[2] == counts[3], counts
    assert recorded == ["auto"] * 4


@pytest.mark.usefixtures("auto_is_ours")
def test_a_recorded_call_that_ours_cannot_run_after_all_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, _ = _compiled(lambda *tensors: flashcore.attention(*tensors, causal=True, return_lse=True))
    tensors, longer = _qkv(), _qkv(12, 15)
    _gradients(compiled, tensors)
    refuse = plan.BINDINGS["portable"].reject
    monkeypatch.setattr(
        plan.BINDINGS["portable"],
        "reject",
        lambda spec, *rest: "takes no such length" if spec.seqlen_q == 12 else refuse(spec, *rest),
    )
    expected = _gradients(lambda *t: flashcore.attention(*t, causal=True, return_lse=True, impl="torch"), longer)
    torch.testing.assert_close(_gradients(compiled, longer), expected)


def test_a_named_implementation_that_does_not_take_a_compiled_call_raises_when_it_runs() -> None:
    compiled, _ = _compiled(lambda *tensors: _ours(*tensors, impl="small"))
    with pytest.raises(UnsupportedError, match="impl 'small'"):
        compiled(*_qkv())


def test_the_operators_pass_opcheck() -> None:
    q, k, v = (t.detach() for t in _qkv())
    options = ("bshd", True, None, False, -1, -1, 0.0, "portable", False)
    wanted = [True, True, True, False]
    torch.library.opcheck(ops.attention_forward, (q, k, v, None, wanted, *options))
    o, lse = ops.attention_forward(q, k, v, None, wanted, *options)
    arguments = (torch.randn_like(o), torch.randn_like(lse), q, k, v, None, o, lse, wanted, *options)
    torch.library.opcheck(ops.attention_backward, arguments)


class Sees(TorchDispatchMode):
    """Writes down which of our operators it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if "flashcore" in str(function):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_both_passes() -> None:
    tensors = _qkv()
    expected = _gradients(_ours, tensors)
    with Sees() as seen:
        _same(_gradients(_ours, tensors), expected)
    assert seen.names == ["flashcore.attention_forward.default", "flashcore.attention_backward.default"]
    loss = _loss(_ours(*tensors))
    with Sees() as seen:
        _same(torch.autograd.grad(loss, tensors), expected)
    assert seen.names == ["flashcore.attention_backward.default"]


def test_the_operator_is_differentiable_itself() -> None:
    tensors = _qkv()
    found = _gradients(lambda *t: ops.attention_with_lse(*t, None, "bshd", True, None, False, -1, -1, 0.0, "portable"), tensors)
    _same(found, _gradients(_ours, tensors))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_second_derivative_is_refused_by_name(compiled: bool) -> None:
    tensors = _qkv()
    if compiled:
        result = _compiled(_ours)[0](*tensors)
        with pytest.raises(RuntimeError):  # torch.compile's own refusal
            torch.autograd.grad(torch.autograd.grad(_loss(result), tensors, create_graph=True)[0].sum(), tensors)
        return
    gradients = torch.autograd.grad(_loss(_ours(*tensors)), tensors, create_graph=True)
    _same([t.detach() for t in gradients], _gradients(_ours, tensors))
    with pytest.raises(UnsupportedError, match="double backward"):
        gradients[0].sum().backward()


def test_transforms_and_tangents_are_torchs_or_refused() -> None:
    q, k, v = (t.detach() for t in _qkv())

    def function(impl: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda q: _loss(_ours(q, k, v, impl=impl))

    (expected,) = torch.autograd.grad(_loss(_oracle(leaf := q.clone().requires_grad_(), k, v, causal=True)), [leaf])
    torch.testing.assert_close(torch.func.grad(function("auto"))(q), expected, **CLOSE)
    with pytest.raises(UnsupportedError, match=r"impl 'portable': .*torch\.func"):
        torch.func.grad(function("portable"))(q)
    for _ in range(3):
        _ours(q, k, v)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        tangent = forward_ad.unpack_dual(function("auto")(dual)).tangent
        torch.testing.assert_close(tangent, expected.sum(), **CLOSE)
        with pytest.raises(UnsupportedError, match=r"impl 'portable': .*forward-mode"):
            _ours(dual, k, v)
        _ours(q, k, v)
    assert not tracing.has_tangent(q)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("entry", ["attention", "sdpa"])
def test_autocast_casts_as_sdpa_does(entry: str, compiled: bool) -> None:
    tensors = _qkv(6, 6)
    if entry == "sdpa":
        tensors = [t.detach().expand(-1, -1, 2, -1).transpose(1, 2).contiguous().requires_grad_() for t in tensors]

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if entry == "sdpa":
            return flashcore.scaled_dot_product_attention(q, k, v, is_causal=True)
        return _ours(q, k, v, return_lse=False)

    run = _compiled(function)[0] if compiled else function
    with torch.autocast("cpu", torch.bfloat16):
        o = run(*tensors)
        assert o.dtype == torch.bfloat16
        found = torch.autograd.grad(_loss(o), tensors)
        wide = function(*(t.double() for t in tensors)) if entry == "sdpa" else None
    assert all(gradient.dtype == torch.float32 for gradient in found)
    assert wide is None or wide.dtype == torch.float64  # autocast leaves it alone
    halves = [t.detach().bfloat16().requires_grad_() for t in tensors]
    torch.testing.assert_close(found, tuple(t.float() for t in _gradients(function, halves)))


def test_autocast_leaves_the_float32_products_of_torchs_side_alone() -> None:
    tensors = [t.detach().bfloat16() for t in _qkv()]
    with torch.autocast("cpu", torch.bfloat16):
        _, lse = _ours(*tensors, impl="torch")
    assert torch.equal(lse, _ours(*tensors, impl="torch")[1])


@pytest.mark.usefixtures("auto_is_ours")
def test_the_sdpa_entry_trains_through_ours() -> None:
    tensors = [t.detach().expand(-1, -1, 2, -1).transpose(1, 2).requires_grad_() for t in _qkv(6, 9)]
    found = _gradients(lambda *t: flashcore.scaled_dot_product_attention(*t, is_causal=True), tensors)
    torch.testing.assert_close(
        found, _gradients(lambda *t: torch.nn.functional.scaled_dot_product_attention(*t, is_causal=True), tensors), **CLOSE
    )
    assert flashcore.explain_sdpa(*tensors, is_causal=True).backward.impl == "portable"


@pytest.mark.parametrize("value", [1, 0, "yes", torch.tensor(True)])
def test_deterministic_is_a_bool_or_none(value: object) -> None:
    q, k, v = (t.detach() for t in _qkv())
    for wrong in (lambda: _ours(q, k, v, deterministic=value), lambda: flashcore.explain(q, k, v, deterministic=value)):
        with pytest.raises(ArgumentTypeError, match=r"deterministic: got .*; allowed: None, True or False"):
            wrong()


@pytest.mark.parametrize("compiled", [False, True])
def test_deterministic_is_what_it_was_when_the_call_was_made(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    prepare = backward.prepare_backward
    monkeypatch.setattr(
        backward, "prepare_backward", lambda spec, plan: (asked.append(spec.deterministic), prepare(spec, plan))[1]
    )
    tensors = _qkv()
    try:
        for flag, given, expected in ((False, None, False), (True, None, True), (True, False, False), (False, True, True)):
            run = _compiled(_ours)[0] if compiled else _ours
            torch.use_deterministic_algorithms(flag)
            loss = _loss(run(*tensors, deterministic=given))
            if not compiled:  # torch.compile itself refuses another setting in the backward pass
                torch.use_deterministic_algorithms(not flag)
            loss.backward()
            assert asked == [expected], (flag, given)
            asked.clear()
            backward.forget()
    finally:
        torch.use_deterministic_algorithms(False)


def test_torch_by_name_is_deterministic_where_it_is_asked_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = _qkv()
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **o: pytest.fail("a fused kernel"))
    found = _gradients(lambda *t: _ours(*t, impl="torch", return_lse=False, deterministic=True), tensors)
    torch.testing.assert_close(found, _gradients(lambda *t: _oracle(*t, causal=True)[0], tensors), **CLOSE)
    with torch.no_grad(), pytest.raises(pytest.fail.Exception):
        _ours(*tensors, impl="torch", return_lse=False, deterministic=True)  # no gradient, so nothing to promise
