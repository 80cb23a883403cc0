"""The first and the last launch of the Hopper backward pass in Triton's interpreter, against torch in fp64.

test_hopper_backward_binding.py runs this file with TRITON_INTERPRET=1. The launches between them are Gluon's, which it has not.
"""

import math
from dataclasses import replace

import pytest
import torch

from flashcore.backward_spec import BackwardSpec
from flashcore.kernels.arguments import TENSORS, TensorName
from flashcore.kernels.hopper import backward_binding as binding
from flashcore.kernels.program import Program
from flashcore.runtime.interpret import interpret
from flashcore.spec import AttentionSpec, Options


@pytest.fixture(autouse=True)
def _interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


CASES = {
    "whole blocks": {"seqlen": 128},
    "an odd length": {"seqlen": 197},
    "one row": {"seqlen": 1},
    "wide": {"seqlen": 70, "dim": 128},
    "columns that are not there": {"seqlen": 70, "dim": 72, "dim_v": 104},
    "bf16": {"seqlen": 70, "dtype": torch.bfloat16},
    "heads before sequence": {"seqlen": 70, "layout": "bhsd"},
    "a gradient of the log-sum-exp": {"seqlen": 70, "dlse": True},
    "a strided gradient": {"seqlen": 70, "apart": 3},
    "a softcap": {"seqlen": 70, "softcap": 20.0},
    "in order": {"seqlen": 197, "deterministic": True},
    "in order, one block of rows": {"seqlen": 100, "deterministic": True},
    "in order, wide": {"seqlen": 60, "dim": 128, "deterministic": True},
}
# whose dq is summed by no atomics
WIDE = {"values of 128": {"seqlen": 197, "dim": 192, "dim_v": 128}, "values of 200": {"seqlen": 70, "dim": 72, "dim_v": 200}}


def _pass(
    seqlen: int,
    dim: int = 64,
    dim_v: int | None = None,
    dtype: torch.dtype = torch.float16,
    layout: str = "bshd",
    dlse: bool = False,
    apart: int = 1,
    deterministic: bool = False,
    dkv: bool = True,
    softcap: float = 0.0,
) -> tuple[BackwardSpec, Program, dict[TensorName, torch.Tensor | None]]:
    """A pass of 2 x 3 heads and its tensors: outputs and workspaces full of NaN, every 7th row one that attended nothing."""
    torch.manual_seed(0)

    def new(last: int) -> torch.Tensor:
        return torch.randn((2, seqlen, 3, last) if layout == "bshd" else (2, 3, seqlen, last)).to(dtype)

    q, o, do = new(dim), new(dim_v or dim), new(apart * (dim_v or dim))[..., : dim_v or dim]
    options = Options.check(causal=False, scale=0.25, window=None, softcap=softcap, layout=layout)
    call = AttentionSpec.from_tensors(q, q, o, None, options, return_lse=True)
    spec = BackwardSpec.of(call, do, dq=True, dkv=dkv, mask=None, dlse=dlse, deterministic=deterministic)
    program = binding.program(spec, "sm_90a", 132)
    lse = 3 * torch.randn(2, 3, seqlen)
    lse[..., ::7] = -math.inf
    _heads_first(do, spec)[lse == -math.inf] = math.nan
    tensors: dict[TensorName, torch.Tensor | None] = dict.fromkeys(TENSORS)
    tensors |= {"q": q, "o": o, "do": do, "lse": lse, "dlse": torch.randn_like(lse) if dlse else None}
    for name, like in (("dq", q), ("dk", q), ("dv", o)):
        tensors[name] = torch.full_like(like, math.nan)
    for workspace in program.workspaces:
        undefined = math.nan if workspace.dtype.is_floating_point else 7
        tensors[workspace.tensor] = torch.full(workspace.shape, undefined, dtype=workspace.dtype)
    return spec, program, tensors


def _heads_first(t: torch.Tensor, spec: BackwardSpec) -> torch.Tensor:
    return t.transpose(1, 2) if spec.call.layout == "bshd" else t


def _run(program: Program, kernel: str, tensors: dict[TensorName, torch.Tensor | None]) -> None:
    (launch,) = (launch for launch in program.launches if launch.specialisation.kernel == kernel)
    interpret(launch.specialisation, launch.grid, launch.arguments, tensors)


@pytest.mark.parametrize("case", (CASES | WIDE).values(), ids=CASES | WIDE)
def test_row_numbers(case: dict) -> None:
    spec, program, tensors = _pass(**case)
    _run(program, binding.PREPARE, tensors)
    o, do = (_heads_first(tensors[name].double(), spec) for name in ("o", "do"))
    lse, seqlen = tensors["lse"].flatten(0, 1), spec.call.seqlen_q
    delta = -(o * do).sum(-1).flatten(0, 1)
    if spec.dlse:
        delta += tensors["dlse"].flatten(0, 1)
    attended = lse != -math.inf
    assert attended.any() == (seqlen > 1)
    # beside products q k^T, or with a softcap in the exponent of 2
    row_lse = -lse.double() / (math.log(2) if spec.call.softcap else 0.25)
    for name, expected, absent in (("row_lse", row_lse, -math.inf), ("delta", delta, 0.0)):
        found = tensors[name].double()
        torch.testing.assert_close(found[:, :seqlen], expected.masked_fill(~attended, absent), atol=1e-5, rtol=1e-6)
        assert found.shape[1] % 128 == 0 and found[:, seqlen:].eq(absent).all()
    sums = tensors["dq_sum"]
    assert (sums is None) == (case in WIDE.values()) and (sums is None or sums.eq(0).all())
    assert sums is None or tensors["progress"].eq(0).all()


def test_sums_that_no_kernel_adds_to_are_not_touched() -> None:
    _, program, tensors = _pass(70, dkv=False)
    # as if there were some: the program has none
    tensors["dq_sum"] = torch.full((6, 128, 64), math.nan)
    _run(program, binding.PREPARE, tensors)
    assert tensors["delta"].isfinite().all() and tensors["dq_sum"].isnan().all()


def _in_fragments(whole: torch.Tensor, sums: torch.Tensor) -> None:
    """Lay (..., 64 row tiles, 64 column tiles) out as (..., row tiles, column tiles, 4096): a number where thread
    4 * (row % 8) + column % 8 // 2 of warp row // 16 holds it in a wgmma accumulator, four numbers a thread."""
    row, column = torch.arange(64)[:, None], torch.arange(64)[None, :]
    place = (((column // 8 * 4 + row // 16) * 8 + row % 8) * 4 + column % 8 // 2) * 4 + row // 8 % 2 * 2 + column % 2
    assert place.flatten().sort().values.equal(torch.arange(4096))
    for i in range(sums.shape[-3]):
        for j in range(sums.shape[-2]):
            sums[..., i, j, place.flatten()] = whole[..., 64 * i : 64 * (i + 1), 64 * j : 64 * (j + 1)].flatten(-2)


def _whole_numbers(*shape: int) -> torch.Tensor:
    """Exact in every dtype, because the interpreter cuts bfloat16 off and does not round it."""
    return torch.randint(-128, 129, shape).float()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sums_in_fragment_order_become_dq(case: dict) -> None:
    spec, program, tensors = _pass(**case)
    sums = tensors["dq_sum"]
    heads, row_tiles, column_tiles, _ = sums.shape
    whole = _whole_numbers(heads, 64 * row_tiles, 64 * column_tiles)
    _in_fragments(whole, sums)
    # what the kernel before has rounded is left as it is: here every third 64 rows
    kv_heads = spec.call.batch * spec.call.heads_k
    tensors["progress"].zero_()
    rounded = tensors["progress"][1 + kv_heads :][: heads * row_tiles]
    rounded[::3] = 1
    _run(program, binding.FINISH, tensors)
    call, dq = spec.call, _heads_first(tensors["dq"], spec).flatten(0, 1)
    expected = (whole * call.scale).to(call.dtype)[:, : call.seqlen_q, : call.head_dim]
    rounded = rounded.view(heads, row_tiles).repeat_interleave(64, 1)[:, : call.seqlen_q] != 0
    assert rounded.any() and dq[rounded].isnan().all()
    assert torch.equal(dq[~rounded], expected[~rounded])


@pytest.mark.parametrize("case", [{"seqlen": 197, "dim": 128}, {"seqlen": 128, "dim": 104, "dim_v": 72}], ids=str)
def test_sums_of_shared_keys_become_dk_and_dv(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding.main, "shared_tiles", lambda spec, sm_count: (3, 2))
    spec, program, tensors = _pass(**case)
    call, sums = spec.call, tensors["dkv_sum"]
    # (tile, warpgroup, dk or dv, columns)
    whole = _whole_numbers(3, 2, 2, 64, 128)
    _in_fragments(whole, sums.view(3, 2, 2, 1, 2, 4096))
    tensors["progress"].fill_(1)
    _run(program, binding.FINISH, tensors)
    tiles = -(-call.seqlen_k // 128)
    for name, factor, head_dim in (("dk", call.scale, call.head_dim), ("dv", 1.0, call.head_dim_v)):
        rows = whole[:, :, ("dk", "dv").index(name)].flatten(1, 2)[..., :head_dim]
        expected = torch.full((6 * tiles, 128, head_dim), math.nan, dtype=call.dtype)
        expected[-3:] = (rows * factor).to(call.dtype)
        expected = expected.view(6, 128 * tiles, head_dim)[:, : call.seqlen_k]
        found = _heads_first(tensors[name], spec).flatten(0, 1)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_neither_writes_beside_its_tensors() -> None:
    _, program, tensors = _pass(197, dim=72)
    names = ("row_lse", "delta", "dq_sum", "progress", "dq")
    for name in names:
        tensors[name] = _guarded(tensors[name])
    program = replace(program, launches=(program.launches[0], program.launches[-1]))
    for launch in program.launches:
        interpret(launch.specialisation, launch.grid, launch.arguments, tensors)
    for name in names:
        t = tensors[name]
        behind = torch.as_strided(t, (256,), (1,), t.numel())
        assert behind.eq(7).all(), name
    assert tensors["dq"].eq(0).all()


def _guarded(t: torch.Tensor) -> torch.Tensor:
    """The same with 256 sevens behind it."""
    storage = torch.full((t.numel() + 256,), 7, dtype=t.dtype)
    found = storage[: t.numel()].view(t.shape)
    found.copy_(t)
    return found
