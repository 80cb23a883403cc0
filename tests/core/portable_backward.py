"""The portable backward kernels in Triton's interpreter, against float64; test_portable_backward.py runs this file.

What `flashcore verify` runs on a GPU at length is here once each, at sizes that cross a tile's edge; and what it does not look
at: addresses past 2^31, gradients with strides of 0, NaN beside the band.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import flashcore
from flashcore.backward_spec import BackwardSpec
from flashcore.kernels.arguments import TENSORS
from flashcore.kernels.portable import backward_binding as binding
from flashcore.memory_order import dense_strides
from flashcore.reference_gradients import Call, gradients, terms, twin_gradients
from flashcore.runtime.interpret import interpret
from flashcore.spec import AttentionSpec, Options
from flashcore.verify.tolerance import Comparison, compare_gradient


@pytest.fixture(autouse=True)
def _interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.manual_seed(0)


@dataclass
class Sizes:
    """Of a call; the defaults leave a partial tile in both directions."""

    batch: int = 1
    seqlen_q: int = 70
    seqlen_k: int = 133
    heads_q: int = 2
    heads_k: int = 2
    head_dim: int = 64
    head_dim_v: int | None = None
    dtype: torch.dtype = torch.float16


def _call(sizes: Sizes | None = None, mask: torch.Tensor | None = None, *, dlse: bool = False, **options: Any) -> Call:
    s = sizes or Sizes()

    def randn(heads: int, length: int, dim: int) -> torch.Tensor:
        drawn = torch.randn(s.batch, length, heads, dim).to(s.dtype)
        return drawn.transpose(1, 2).contiguous() if options.get("layout") == "bhsd" else drawn

    dim_v = s.head_dim_v or s.head_dim
    return Call(
        randn(s.heads_q, s.seqlen_q, s.head_dim),
        randn(s.heads_k, s.seqlen_k, s.head_dim),
        randn(s.heads_k, s.seqlen_k, dim_v),
        randn(s.heads_q, s.seqlen_q, dim_v),
        dlse=torch.randn(s.batch, s.heads_q, s.seqlen_q) if dlse else None,
        attn_mask=mask,
        **options,
    )


def _run(call: Call, arch: str = "sm_90a") -> dict[str, torch.Tensor]:
    """Every gradient of a call, in memory that held NaN."""
    given = {name: getattr(call, name) for name in ("causal", "scale", "window", "softcap", "layout")}
    mask = call.attn_mask
    o, lse = flashcore.attention(call.q, call.k, call.v, attn_mask=mask, return_lse=True, impl="portable", **given)
    biased = mask is not None and mask.dtype != torch.bool
    spec = BackwardSpec.of(
        AttentionSpec.from_tensors(call.q, call.k, call.v, mask, Options.check(**given), return_lse=True),
        call.do,
        dq=True,
        dkv=True,
        mask=mask if biased else None,
        dlse=call.dlse is not None,
        deterministic=True,
    )
    assert binding.reject(spec, None, True) is None and binding.reproducible(spec)
    program = binding.program(spec, arch, 132)
    of = {"dq": call.q, "dk": call.k, "dv": call.v} | ({"dmask": mask} if biased else {})
    found = {name: _nan(like, name == "dmask") for name, like in of.items()}
    inputs = {"q": call.q, "k": call.k, "v": call.v, "mask": mask, "o": o, "lse": lse, "do": call.do, "dlse": call.dlse}
    workspaces = {w.tensor: torch.full(w.shape, math.nan, dtype=w.dtype) for w in program.workspaces}
    tensors = {**dict.fromkeys(TENSORS), **inputs, **found, **workspaces}
    before = {name: tensor.clone() for name, tensor in inputs.items() if tensor is not None}
    for launch in program.launches:
        interpret(launch.specialisation, launch.grid, launch.arguments, tensors)
    assert all(torch.equal(tensors[name].isnan(), then.isnan()) for name, then in before.items())
    assert all(torch.equal(tensors[name].nan_to_num(), then.nan_to_num()) for name, then in before.items())
    return found


def _nan(like: torch.Tensor, contiguous: bool) -> torch.Tensor:
    """NaN in memory that lies as a gradient does."""
    strides = torch.empty(like.shape, device="meta").stride() if contiguous else dense_strides(like.shape, like.stride())
    return torch.empty_strided(like.shape, strides, dtype=like.dtype).fill_(math.nan)


def _compare(call: Call, found: dict[str, torch.Tensor]) -> dict[str, Comparison]:
    wanted, twins, sums = gradients(call), twin_gradients(call), terms(call)
    compared = {}
    for name, out in found.items():
        # a mask of a narrower dtype than its twin's maths is rounded to it, as autograd does; and a mask may have any rank
        ref, twin = getattr(wanted, name).double(), getattr(twins, name).to(out.dtype)
        compared[name] = compare_gradient(*(t.reshape(1, -1) for t in (out, ref, twin)), getattr(sums, name))
    return compared


def _check(call: Call, arch: str = "sm_90a") -> dict[str, torch.Tensor]:
    found = _run(call, arch)
    assert {name: c.reason for name, c in _compare(call, found).items() if not c.passed} == {}
    return found


@pytest.mark.parametrize("seqlen", [1, 17, 33, 197])
@pytest.mark.parametrize("causal", [False, True])
def test_odd_lengths(seqlen: int, causal: bool) -> None:
    _check(_call(Sizes(seqlen_q=seqlen, seqlen_k=seqlen), causal=causal))


@pytest.mark.parametrize("arch", ["sm_89", "sm_90a"])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window": (40, 3)}, {"window": (0, 0)}, {"softcap": 3.0, "causal": True}, {"scale": -0.3}],
    ids=str,
)
def test_features(arch: str, options: dict[str, Any]) -> None:
    _check(_call(**options), arch)


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(heads_q=4, heads_k=2, batch=2),
        Sizes(heads_q=3, heads_k=1),
        Sizes(seqlen_q=133, seqlen_k=70),
        Sizes(head_dim=40, head_dim_v=24),
        Sizes(head_dim=72, head_dim_v=129, seqlen_q=9, seqlen_k=21),
        Sizes(head_dim=1, head_dim_v=3),
        Sizes(head_dim=128),
        Sizes(dtype=torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_sizes(sizes: Sizes, layout: str) -> None:
    _check(_call(sizes, causal=True, layout=layout))


@pytest.mark.parametrize("options", [{"causal": True}, {"softcap": 2.0}, {"window": (9, 4), "layout": "bhsd"}], ids=str)
def test_float32(options: dict[str, Any]) -> None:
    _check(_call(Sizes(dtype=torch.float32, heads_q=2, heads_k=1, head_dim=40, seqlen_q=33, seqlen_k=50), **options))


def test_nothing_to_sum() -> None:
    for sizes in (Sizes(seqlen_k=0), Sizes(seqlen_q=0), Sizes(batch=0)):
        found = _run(_call(sizes))
        assert all(gradient.eq(0).all() for gradient in found.values())


def test_a_gradient_of_the_log_sum_exp() -> None:
    call = _call(causal=True, dlse=True)
    found = _check(call)
    # and the comparison sees it
    assert not _compare(replace(call, dlse=None), found)["dq"].passed


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_bool_mask_with_empty_rows_and_keys(dtype: torch.dtype) -> None:
    mask = torch.rand(1, 2, 40, 70) < 0.6
    mask[..., [0, 33, 69]] = False
    mask[..., [5, 39], :] = False
    found = _check(_call(Sizes(seqlen_q=40, seqlen_k=70, dtype=dtype), mask))
    assert found["dq"][:, [5, 39]].eq(0).all() and found["dk"][:, [0, 33, 69]].eq(0).all()


@pytest.mark.parametrize("shape", [(2, 2, 70, 90), (1, 1, 70, 90), (2, 1, 1, 90), (90,), (2, 70, 1), (2, 2, 1, 1), ()], ids=str)
@pytest.mark.parametrize("options", [{"causal": True}, {"softcap": 3.0, "dlse": True}], ids=str)
def test_additive_masks_and_their_gradients(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    mask = torch.randn(shape).half()
    _check(_call(Sizes(batch=2, seqlen_q=70, seqlen_k=90, head_dim=16), mask, **options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_float32_mask_of_odd_strides_with_minus_infinity(dtype: torch.dtype) -> None:
    mask = torch.randn(1, 2, 120, 66)[:, :, ::3, ::2].masked_fill(torch.rand(40, 33) < 0.3, -math.inf)
    mask[:, :, 7] = -math.inf
    # as contiguous as it is: the gradient is in the mask's shape, not its strides
    _check(_call(Sizes(seqlen_q=40, seqlen_k=33, dtype=dtype), mask.transpose(2, 3).contiguous().transpose(2, 3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("low", [-1e4, -1e30, torch.finfo(torch.float32).min])
def test_a_low_but_finite_additive_mask_is_a_plain_softmax(low: float, dtype: torch.dtype) -> None:
    mask = torch.zeros(33, 40)
    mask[::2] = low
    _check(_call(Sizes(seqlen_q=33, seqlen_k=40, dtype=dtype), mask))


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_nan_in_what_a_mask_hides(kind: str) -> None:
    call = _call(Sizes(seqlen_q=20, seqlen_k=40))
    rows, keys = [3, 19], [0, 7, 39]
    mask = torch.ones(20, 40, dtype=torch.bool)
    mask[rows], mask[:, keys] = False, False
    call.k[:, keys], call.v[:, keys] = math.inf, math.nan
    call.q[:, rows], call.do[:, rows] = math.nan, -math.inf
    additive = torch.where(mask, 0.25, -math.inf).half()
    found = _check(replace(call, attn_mask=mask if kind == "bool" else additive))
    assert found["dq"][:, rows].eq(0).all() and found["dk"][:, keys].eq(0).all() and found["dv"][:, keys].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_nan_beside_the_band(dtype: torch.dtype) -> None:
    # rows attend keys 36 + i - 6 to 36 + i - 1, which are 30 to 38
    call = _call(Sizes(seqlen_q=4, seqlen_k=40, dtype=dtype), window=(6, -1), causal=True)
    for t in (call.k, call.v):
        t[:, :30] = math.nan
    _check(call)
    # the first 40 rows attend nothing
    call = _call(Sizes(seqlen_q=60, seqlen_k=20, dtype=dtype), causal=True)
    call.q[:, :40], call.do[:, :40] = math.nan, math.nan
    found = _check(call)
    assert found["dq"][:, :40].eq(0).all() and found["dq"][:, 40:].ne(0).any()


def test_gradients_of_the_output_with_any_strides() -> None:
    call = _call(Sizes(seqlen_q=20, seqlen_k=30), causal=True)
    for do in (
        torch.randn(1, 1, 1, 64).half().expand(1, 20, 2, 64),
        torch.randn(1, 20, 2, 130).half()[..., 1:65],
        torch.randn(2, 20, 1, 64).half().transpose(0, 2),
    ):
        _check(replace(call, do=do))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("far", ["batch", "sequence", "head"])
def test_offsets_past_2_31_elements(far: str, dtype: torch.dtype) -> None:
    # the memory is reserved, and only the pages that hold the tensors are ever touched
    storage = torch.empty(2**31 + 2**16, dtype=dtype)
    # each stride is below 2^31 and twice it is not: only a product in 32 bits goes wrong
    strides = {"batch": (2**30, 32, 16, 1), "sequence": (64, 2**30, 16, 1), "head": (64, 16, 2**30, 1)}[far]
    size = {"batch": (3, 3, 2, 16), "sequence": (1, 3, 2, 16), "head": (1, 3, 3, 16)}[far]
    tensors = [storage[4096 * i :].as_strided(size, strides) for i in range(4)]
    for t in tensors:
        t.copy_(torch.randn(t.shape))
    call = Call(*tensors, causal=True)
    # contiguous copies for the oracle: what is judged is where the kernels read
    near = Call(*(t.contiguous() for t in tensors), causal=True)
    found = _run(call)
    assert {name: c.reason for name, c in _compare(near, found).items() if not c.passed} == {}
