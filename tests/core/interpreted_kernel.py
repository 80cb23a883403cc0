"""The portable kernel in Triton's interpreter, against fp64; test_interpreted.py runs this file with TRITON_INTERPRET=1.

Only what `flashcore verify` does not run on a CPU or does not look at: addresses past 2^31, masks of odd strides, NaN beside
the band, what is refused, threads, and torch.compile.
"""

import math
import threading

import pytest
import torch

import flashcore
from flashcore.errors import UnsupportedError
from flashcore.reference import attention as reference


@pytest.fixture(autouse=True)
def _interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.manual_seed(0)


def _qkv(seqlen_q: int = 20, seqlen_k: int = 40, heads_k: int = 2, dim: int = 16, dtype: torch.dtype = torch.float16):
    sizes = ((1, seqlen_q, 2, dim), (1, seqlen_k, heads_k, dim), (1, seqlen_k, heads_k, dim))
    return [torch.randn(size).to(dtype) for size in sizes]


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    plan = flashcore.explain(q, k, v, impl="portable", **options)
    assert plan.interpreted and plan.kernel == "portable_forward"
    o, lse = flashcore.attention(q, k, v, impl="portable", return_lse=True, **options)
    expected, expected_lse = reference(q, k, v, **options)
    tolerance = 1e-5 if q.dtype == torch.float32 else 5e-3
    torch.testing.assert_close(o.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-4, rtol=1e-5)
    assert o.stride(-1) == 1 and o.dtype == q.dtype
    return o, lse


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("far", ["batch", "sequence", "head"])
def test_offsets_past_2_31_elements(far: str, dtype: torch.dtype) -> None:
    # the memory is reserved, and only the pages that hold the tensors are ever touched
    storage = torch.empty(2**31 + 2**16, dtype=dtype)
    # each stride is below 2^31 and twice it is not: only a product in 32 bits goes wrong
    strides = {"batch": (2**30, 32, 16, 1), "sequence": (64, 2**30, 16, 1), "head": (64, 16, 2**30, 1)}[far]
    tensors = []
    for i in range(3):
        t = storage[4096 * i :].as_strided(
            {"batch": (3, 3, 2, 16), "sequence": (1, 3, 2, 16), "head": (1, 3, 3, 16)}[far], strides
        )
        t.copy_(torch.randn(t.shape))
        tensors.append(t)
    _check(*tensors, causal=True)


def test_a_mask_past_2_31_elements() -> None:
    storage = torch.empty(2**31 + 2**16, dtype=torch.bool)
    mask = storage.as_strided((3, 1, 20, 40), (2**30, 0, 50, 1))
    mask.copy_(torch.rand(mask.shape) > 0.3)
    q, k, v = (t.expand(3, -1, -1, -1) for t in _qkv())
    _check(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("kind", ["bool", "same", "float32"])
@pytest.mark.parametrize("storage", ["transposed", "sliced", "row", "column", "heads", "scalar"])
def test_masks_of_any_strides(kind: str, storage: str) -> None:
    mask = {
        "transposed": lambda: torch.randn(40, 20).T,
        "sliced": lambda: torch.randn(1, 2, 40, 120)[:, :, ::2, ::3],
        "row": lambda: torch.randn(40),
        "column": lambda: torch.randn(2, 20, 1).expand(2, 20, 40),
        "heads": lambda: torch.randn(2, 1, 1),
        "scalar": lambda: torch.tensor(0.5),
    }[storage]()
    mask = {"bool": lambda m: m > -0.5, "same": lambda m: m.half(), "float32": lambda m: m}[kind](mask)
    q, k, v = _qkv()
    before = [t.clone() for t in (q, k, v, mask)]
    _check(q, k, v, attn_mask=mask)
    assert all(torch.equal(now, then) for now, then in zip((q, k, v, mask), before, strict=True))


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_nan_in_a_value_that_a_mask_hides_from_every_row(kind: str) -> None:
    q, k, v = _qkv()
    hidden = torch.zeros(40, dtype=torch.bool)
    hidden[[0, 7, 39]] = True
    v[:, hidden] = math.nan
    k[:, hidden] = math.inf
    mask = ~hidden if kind == "bool" else torch.where(hidden, -math.inf, 0.25).half()
    o, lse = _check(q, k, v, attn_mask=mask)
    assert o.isfinite().all() and lse.isfinite().all()


def test_nan_outside_the_window_of_every_row() -> None:
    q, k, v = _qkv(seqlen_q=4, seqlen_k=40)
    for t in (k, v):
        t[:, :30], t[:, 39:] = math.nan, math.nan  # rows attend keys 36 + i - 6 to 36 + i - 1, which are 30 to 38
    o, _ = _check(q, k, v, window=(6, 5), attn_mask=torch.arange(40) < 39)
    assert o.isfinite().all()
    o, _ = _check(q[:, :1], k[:, :33], v[:, :33], window=(2, 0))
    assert o.isfinite().all()


def test_rows_with_nothing_to_attend() -> None:
    q, k, v = _qkv(seqlen_q=40, seqlen_k=25)
    o, lse = _check(q, k, v, causal=True)
    assert o[:, :15].eq(0).all() and lse[..., :15].eq(-math.inf).all() and o[:, 15:].ne(0).any()
    mask = torch.ones(40, 25, dtype=torch.bool)
    mask[5] = mask[33] = False
    o, lse = _check(q, k, v, attn_mask=mask)
    assert o[:, [5, 33]].eq(0).all() and lse[..., [5, 33]].eq(-math.inf).all()
    o, lse = _check(q, k[:, :0], v[:, :0])
    assert o.eq(0).all() and lse.eq(-math.inf).all()


@pytest.mark.parametrize("low", [-1e4, torch.finfo(torch.float32).min])
def test_a_low_but_finite_additive_mask_is_a_plain_softmax(low: float) -> None:
    q, k, v = _qkv(dtype=torch.float32)
    o, lse = flashcore.attention(q, k, v, impl="portable", attn_mask=torch.full((20, 40), low), return_lse=True)
    assert o.isfinite().all() and lse.isfinite().all()
    if low == -1e4:
        torch.testing.assert_close(o, flashcore.attention(q, k, v, impl="portable"), atol=1e-2, rtol=1e-2)
    else:  # the scores vanish beside it: every key has the same weight
        torch.testing.assert_close(o, v.mean(1, keepdim=True).expand_as(o), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -0.4, 2])
def test_scales_that_are_not_positive_or_not_floats(scale: float) -> None:
    _check(*_qkv(), scale=scale, causal=True)


def test_a_window_beyond_32_bits() -> None:
    q, k, v = _qkv()
    o, _ = _check(q, k, v, window=(2**40, 3))
    torch.testing.assert_close(o, flashcore.attention(q, k, v, impl="portable", window=(-1, 3)))


def test_what_it_cannot_do_is_refused() -> None:
    q, k, v = _qkv()
    turned = q.transpose(1, 3).contiguous().transpose(1, 3)
    with pytest.raises(UnsupportedError, match="stride 1 in the last dimension"):
        flashcore.attention(turned, k, v, impl="portable")


def test_auto_prefers_torch_to_the_interpreter() -> None:
    plan = flashcore.explain(*_qkv())
    assert plan.impl == "torch" and "interpreter" in plan.reason


def test_compiled_with_dynamic_lengths() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(flashcore.attention, fullgraph=True, backend="aot_eager")
    for seqlen_q, seqlen_k in ((4, 9), (6, 21), (11, 33)):
        tensors = _qkv(seqlen_q, seqlen_k)
        found = compiled(*tensors, causal=True, impl="portable", return_lse=True)
        assert all(map(torch.equal, found, flashcore.attention(*tensors, causal=True, impl="portable", return_lse=True)))


def test_threads_wait_for_each_other() -> None:
    calls = [_qkv(seqlen_q=n) for n in (5, 9, 17)]
    found: dict[int, torch.Tensor] = {}

    def call(i: int) -> None:
        found[i] = flashcore.attention(*calls[i], impl="portable")

    threads = [threading.Thread(target=call, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(3):
        assert torch.equal(found[i], flashcore.attention(*calls[i], impl="portable"))


def test_bfloat16_is_rounded_to_the_nearest_as_on_a_gpu() -> None:
    q, k, v = _qkv(1, 2, dtype=torch.bfloat16)
    v[0, :, 0, 0] = torch.tensor([1 + 2**-7, 1 + 2**-6])  # the mean lies in the middle, and the nearest even number is above
    o = flashcore.attention(torch.zeros_like(q), k, v, impl="portable")
    assert torch.equal(o[:, 0], v.float().mean(1).to(torch.bfloat16)) and o[0, 0, 0, 0] == 1 + 2**-6
