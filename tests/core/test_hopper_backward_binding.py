"""What the Hopper backward's binding makes of a pass: launches, grids, memory, numbers, refusals; and its smaller kernels."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flashcore.backward_spec import BackwardSpec
from flashcore.build.gates import violations
from flashcore.build.machine_code import read_machine_code
from flashcore.build.pool import Request, compile_all
from flashcore.kernels.arguments import Argument, TensorMap, TensorName
from flashcore.kernels.hopper import backward_binding as binding
from flashcore.kernels.hopper import backward_dq_launch as dq
from flashcore.kernels.hopper import backward_main as main
from flashcore.kernels.hopper.backward_config import DQ_CONFIGS, DqConfig
from flashcore.kernels.hopper.backward_features import BackwardFeatures
from flashcore.kernels.program import Launch, Program
from flashcore.kernels.registry import BACKWARDS, KERNELS
from flashcore.spec import AttentionSpec
from flashcore.target import SHARED_MEMORY_LIMIT

MakeSpec = Callable[..., AttentionSpec]
PREPARE, MAIN, WIDE, DQ, FINISH = binding.KERNELS


def _backward(call: AttentionSpec, **changes: object) -> BackwardSpec:
    """A pass of a call that wants all three gradients, whose output's gradient lies as the output does."""
    plain = BackwardSpec(call, call.o_strides, True, dq=True, dkv=True, dmask_shape=None, dlse=False, deterministic=False)
    return replace(plain, **changes)


def _program(spec: BackwardSpec) -> Program:
    assert binding.reject(spec, "sm_90a", False) is None
    return binding.program(spec, "sm_90a", 132)


def _values(launch: Launch) -> dict[str, Argument]:
    """The arguments by the names of the parameters."""
    return dict(zip((p.name for p in launch.specialisation.parameters), launch.arguments, strict=True))


@pytest.mark.parametrize(
    ("wanted", "kernels", "reproducible"),
    [
        ({}, (PREPARE, MAIN, FINISH), False),
        ({"deterministic": True}, (PREPARE, MAIN, FINISH), True),
        ({"dkv": False}, (PREPARE, DQ), True),
        ({"dkv": False, "deterministic": True}, (PREPARE, DQ), True),
        ({"dq": False}, (PREPARE, MAIN), True),
        ({"dq": False, "dkv": False}, (), True),
    ],
    ids=str,
)
def test_the_launches_are_those_that_the_wanted_gradients_need(
    wanted: dict, kernels: tuple[str, ...], reproducible: bool, make_spec: MakeSpec
) -> None:
    spec = _backward(make_spec(), **wanted)
    program = _program(spec)
    assert tuple(launch.specialisation.kernel for launch in program.launches) == kernels
    assert binding.reproducible(spec) == reproducible
    # sums are there, and zeroed, just where something adds to them and something reads them; numbers of progress where tiles
    # are drawn
    names = {workspace.tensor for workspace in program.workspaces}
    expected = {"row_lse", "delta"} if kernels else set()
    expected |= {"progress"} if MAIN in kernels else set()
    assert names == expected | ({"dq_sum"} if FINISH in kernels else set())
    for launch in program.launches:
        values = _values(launch)
        if launch.specialisation.kernel == PREPARE:
            assert values["zero_dq_sum"] == (FINISH in kernels)
            sizes = {workspace.tensor: workspace.shape[0] for workspace in program.workspaces}
            assert values["progress_size"] == sizes.get("progress", 0)
        if launch.specialisation.kernel == MAIN:
            constants = dict(launch.specialisation.constants)
            assert constants["DQ"] == (FINISH in kernels)
            assert constants["ORDERED"] == (reproducible and FINISH in kernels)


@pytest.mark.parametrize(
    ("call", "rows", "columns"),
    [
        ({}, 128, 64),
        ({"seqlen_q": 1}, 128, 64),
        ({"seqlen_q": 129, "head_dim": 128}, 256, 128),
        ({"seqlen_q": 300, "head_dim": 72, "heads_q": 8}, 384, 128),
    ],
    ids=str,
)
def test_workspaces_and_grids(call: dict, rows: int, columns: int, make_spec: MakeSpec) -> None:
    spec = _backward(make_spec(**call))
    program = _program(spec)
    heads = 2 * call.get("heads_q", 4)
    shapes = {workspace.tensor: workspace.shape for workspace in program.workspaces}
    kv_heads, progress = 2 * spec.call.heads_k, 1 + 2 * spec.call.heads_k + heads * rows // 64
    assert shapes == {
        "row_lse": (heads, rows),
        "delta": (heads, rows),
        "dq_sum": (heads, rows // 64, columns // 64, 4096),
        "progress": (progress,),
    }
    dtypes = {workspace.tensor: workspace.dtype for workspace in program.workspaces}
    assert all(dtype == (torch.int32 if name == "progress" else torch.float32) for name, dtype in dtypes.items())
    assert program.workspace_bytes == 4 * (heads * rows * (columns + 2) + progress)
    prepare, launch, finish = program.launches
    assert launch.grid == min(132, kv_heads * -(-spec.call.seqlen_k // 128))
    constants = dict(prepare.specialisation.constants)
    # every row once, and memory of every row
    assert prepare.grid * constants["ROWS"] == heads * rows and constants["COLUMNS"] == columns
    constants = dict(finish.specialisation.constants)
    assert finish.grid * constants["TILES"] * 64 == heads * rows and constants["COLUMNS"] == columns
    assert _values(prepare)["padded_rows"] == 64 * _values(finish)["row_tiles"] == rows
    # a count more for each block of rows, of those that have added to it
    in_order = _program(replace(spec, deterministic=True))
    blocks = heads * rows // main.BLOCK_ROWS[columns]
    assert {workspace.tensor: workspace.shape for workspace in in_order.workspaces} == shapes | {
        "progress": (progress + blocks,)
    }
    by_itself = _program(replace(spec, dkv=False)).launches[-1]
    height = DQ_CONFIGS[(columns, columns), False].block_m
    assert by_itself.grid == heads * -(-spec.call.seqlen_q // height) and _values(by_itself)["padded_rows"] == rows


def test_tiles_beyond_whole_rounds_are_shared_where_that_is_worth_it(make_spec: MakeSpec) -> None:
    def shared(heads: int, seqlen: int, head_dim: int = 128, **options: Any) -> tuple[int, int]:
        spec = _backward(make_spec(1, heads, heads, seqlen, seqlen, head_dim, head_dim, **options))
        return main.shared_tiles(spec, 132)

    # 2048 tiles: 15 rounds, and 68 tiles
    assert shared(16, 16384) == (68, 4)
    # 124 tiles keep nearly all of 132 blocks busy as they are, and 60 are shared by two where a third is too little
    assert shared(2, 16384) == (0, 1)
    assert shared(12, 2048) == (60, 2)
    assert shared(16, 16384, causal=True) == (0, 1)
    assert shared(16, 16384, 64) == (0, 1)
    # a part would have fewer than 16 blocks of 64 rows
    assert shared(256, 1024) == (0, 1)
    # whole rounds
    assert shared(33, 512) == (0, 1) == shared(132, 2048)
    spec = _backward(make_spec(1, 16, 16, 16384, 16384, 128, 128))
    program = _program(spec)
    assert ("dkv_sum", (68, 4, 2, 4096)) in {(workspace.tensor, workspace.shape) for workspace in program.workspaces}
    prepare, launch, finish = program.launches
    assert _values(launch)["shared_tiles"] == 68 and _values(launch)["sharers"] == 4
    assert _values(prepare)["dkv_sum_tiles"] == 68 * 4 * 2
    assert _values(finish)["first_shared"] == 2048 - 68 and finish.grid == _values(finish)["query_programs"] + 4 * 68


def test_heads_are_taken_together_as_l2_has_room(make_spec: MakeSpec) -> None:
    def group(heads_q: int, heads_k: int, seqlen: int, deterministic: bool = False, **options: Any) -> int:
        call = make_spec(4, heads_q, heads_k, seqlen, seqlen, 128, 128, **options)
        features = main.MainFeatures.of(_backward(call, deterministic=deterministic), fused=True)
        return main.group_heads(call, features, 132)

    # queries and gradients in 2 bytes, sums in 4: a kilobyte a row, of 32 MB
    assert group(16, 16, 4096, causal=True) == 8
    assert group(16, 4, 4096, causal=True) == 6  # not two, of which two thirds of the blocks would have a tile
    assert group(4, 4, 65536, causal=True) == 1
    assert group(2, 2, 128, causal=True) == 8
    assert group(16, 16, 4096) == 1
    # no group has fewer tiles than there are blocks: 32 heads of 16 tiles
    assert group(32, 8, 2048, causal=True) == 11
    assert group(16, 2, 4096, causal=True) == 8
    # In turn. 2048 rows a key: tiles of 16 heads are 16 / 132 of that apart, which is 4 MB of 16 heads
    assert group(16, 16, 2048, deterministic=True) == 16
    assert group(16, 16, 4096, causal=True, deterministic=True) == 32
    assert group(16, 16, 16384, causal=True, deterministic=True) == 16
    # a window of 512 rows
    assert group(16, 16, 16384, window=(511, 0), deterministic=True) == 64


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_numbers_of_a_pass(layout: str, make_spec: MakeSpec) -> None:
    call = make_spec(2, 4, 2, 100, 200, 72, 104, scale=0.25, layout=layout)
    spec = _backward(call, do_strides=(8000, 16, 160), dlse=True)
    prepare, _, finish = _program(spec).launches
    values = _values(prepare)
    assert (values["lse_factor"], values["has_dlse"], values["seqlen_q"], values["head_dim_v"]) == (-4.0, 1, 100, 104)
    assert tuple(values[f"stride_o{d}"] for d in "bhs") == call.o_strides
    assert tuple(values[f"stride_do{d}"] for d in "bhs") == spec.do_strides
    values = _values(finish)
    assert (values["scale"], values["seqlen_q"], values["head_dim"], values["heads_q"]) == (0.25, 100, 72, 4)
    assert tuple(values[f"dq_stride_{d}"] for d in "bhs") == spec.dq_strides
    assert tuple(values[f"dk_stride_{d}"] for d in "bhs") == spec.dk_strides
    assert tuple(values[f"dv_stride_{d}"] for d in "bhs") == spec.dv_strides
    assert (values["heads_k"], values["kv_heads"], values["seqlen_k"], values["head_dim_v"]) == (2, 4, 200, 104)
    values = _values(_program(replace(spec, dkv=False)).launches[-1])
    expected: dict[str, tuple[TensorName, tuple[int, ...], tuple[int, ...]]] = {
        "q_map": ("q", (2, 4, 100, 72), call.q_strides),
        "do_map": ("do", (2, 4, 100, 104), spec.do_strides),
        "k_map": ("k", (2, 2, 200, 72), call.k_strides),
        "v_map": ("v", (2, 2, 200, 104), call.v_strides),
        "dq_map": ("dq", (2, 4, 100, 72), spec.dq_strides),
    }
    for name, (tensor, shape, strides) in expected.items():
        assert values[name] == TensorMap(tensor, shape, (*strides, 1), 0)
    assert (values["heads"], values["heads_q"], values["heads_per_kv"]) == (8, 4, 2)
    assert values["scale"] == 0.25 and values["exponent_scale"] == pytest.approx(0.25 / math.log(2))
    assert (values["band_lo"], values["band_hi"]) == (-100, 200)


@pytest.mark.parametrize(
    ("lengths", "options", "first", "keys", "band"),
    [
        ((128, 128), {"causal": True}, 0, 128, (-128, 0)),
        ((100, 300), {"causal": True}, 0, 300, (-100, 200)),
        ((300, 100), {"causal": True}, 0, 100, (-300, -200)),
        # the last row attends keys up to 99
        ((100, 300), {"causal": True, "top_left": True}, 0, 100, (-100, 0)),
        # the first row attends keys from 180 on, counted as 0
        ((100, 300), {"window": (20, 10)}, 180, 120, (0, 30)),
    ],
    ids=str,
)
def test_the_dq_kernel_sees_the_keys_that_some_row_attends(
    lengths: tuple[int, int], options: dict, first: int, keys: int, band: tuple[int, int], make_spec: MakeSpec
) -> None:
    call = make_spec(1, 2, 2, *lengths, **options)
    launch = dq.launch(_backward(call))
    values = _values(launch)
    assert (values["seqlen_q"], values["seqlen_k"], (values["band_lo"], values["band_hi"])) == (lengths[0], keys, band)
    for name in ("k_map", "v_map"):
        tensor_map = values[name]
        assert isinstance(tensor_map, TensorMap)
        assert tensor_map.shape == (1, 2, keys, 64) and tensor_map.offset == first * 2 * 64
    assert dict(launch.specialisation.constants)["HAS_HI"] is True
    unlimited = dq.launch(_backward(make_spec())).specialisation
    assert dict(unlimited.constants)["HAS_HI"] is dict(unlimited.constants)["HAS_LO"] is False


@pytest.mark.parametrize(
    ("options", "changes", "words"),
    [
        ({"dtype": torch.float32}, {}, "takes float16 and bfloat16; got float32"),
        ({"mask": torch.ones(128, 128, dtype=torch.bool)}, {}, "takes no mask"),
        ({"scale": -1.0}, {}, "needs a scale > 0"),
        ({"scale": 1e-35}, {}, "needs a scale of at least 1e-30 backwards; got 1e-35"),
        ({"offset": 1}, {}, "needs stride 1 in the last dimension, and head dims"),
        ({}, {"do_aligned": False}, "address of the output's gradient that are multiples of 16 bytes"),
        ({"seqlen_q": 0}, {}, "needs a query"),
        ({"seqlen_k": 0}, {}, "needs a key that some query may attend"),
    ],
    ids=str,
)
def test_what_it_does_not_take(options: dict, changes: dict, words: str, make_spec: MakeSpec) -> None:
    refusal = binding.reject(_backward(make_spec(**options), **changes), "sm_90a", False)
    assert refusal is not None and words in refusal


def test_where_it_does_not_run_and_how_much_is_too_much(make_spec: MakeSpec) -> None:
    spec = _backward(make_spec())
    for arch, interpreted in (("sm_80", False), ("sm_100a", False), (None, True), ("sm_90a", True)):
        assert "needs a Hopper GPU" in (binding.reject(spec, arch, interpreted) or "")
    for length in ("seqlen_q", "seqlen_k"):
        vast = replace(spec, call=replace(spec.call, batch=2**20, **{length: 2**15}))
        assert "takes at most" in (binding.reject(vast, "sm_90a", False) or "")


def test_a_batch_of_none_launches_nothing(make_spec: MakeSpec) -> None:
    assert {launch.grid for launch in _program(_backward(make_spec(batch=0))).launches} == {0}


def test_a_wheel_holds_what_any_pass_that_it_takes_runs(make_spec: MakeSpec) -> None:
    shipped = binding.shipped("sm_90a")
    assert len({s.name for s in shipped}) == len(shipped) == 82
    assert binding.shipped("sm_80") == ()
    assert BACKWARDS["hopper"] is binding
    assert {s.kernel for s in shipped} == set(binding.KERNELS)
    taken = set()
    for dtype in (torch.float16, torch.bfloat16):
        for head_dim, head_dim_v in ((8, 8), (64, 64), (72, 40), (64, 128), (136, 128), (192, 64), (192, 192), (8, 256)):
            for options in ({}, {"causal": True, "seqlen_k": 300}, {"window": (5, 6)}, {"softcap": 5.0}):
                for wanted in ({}, {"deterministic": True}, {"dkv": False}, {"dq": False}, {"dlse": True}):
                    spec = _backward(make_spec(dtype=dtype, head_dim=head_dim, head_dim_v=head_dim_v, **options), **wanted)
                    taken |= {launch.specialisation for launch in _program(spec).launches}
    assert taken == set(shipped)
    for specialisation in shipped:
        instruction = binding.matrix_instruction(specialisation, "sm_90a")
        assert instruction == (None if specialisation.kernel in (PREPARE, FINISH) else "HGMMA")
        assert KERNELS[specialisation.kernel].archs == ("sm_90a",)


def test_forms_of_the_dq_kernel() -> None:
    for (head_dims, _), config in DQ_CONFIGS.items():
        assert config.fits(head_dims)
    assert not DqConfig(2, 64, 1).fits((64, 64))  # no room for the next keys
    assert not DqConfig(2, 128, 3).fits((128, 128))  # 64 KiB of rows and three slots of 64 are 256 KiB of 227
    assert not DqConfig(4, 64, 2).fits((64, 64))  # no registers for it
    features = BackwardFeatures(torch.float16, (128, 128), False)
    with pytest.raises(ValueError, match=r"w2n128k3 does not fit head dims \(128, 128\)"):
        dq.specialise(features, DqConfig(2, 128, 3))
    forms = [
        DqConfig(2, 64, 4),
        DqConfig(3, 64, 4),
        DqConfig(2, 64, 4, q_registers=True),
        DqConfig(2, 64, 4, do_registers=True),
    ]
    assert len({dq.specialise(features, form).key for form in forms}) == len({form.name for form in forms}) == 4


def test_tiles_of_any_height_cover_the_rows(make_spec: MakeSpec) -> None:
    for length, tiles in ((1, 1), (192, 1), (193, 2), (384, 2)):
        launch = dq.launch(_backward(make_spec(1, 2, 2, length)))
        assert dict(launch.specialisation.constants)["WARPGROUPS"] == 3 and launch.grid == 2 * tiles


def test_compiled_they_keep_the_limits(make_spec: MakeSpec) -> None:
    call = make_spec(head_dim=128, causal=True, dtype=torch.bfloat16)
    prepare, _, finish = (launch.specialisation for launch in _program(_backward(call)).launches)
    by_itself = dq.launch(_backward(call)).specialisation
    matrix = {}
    for outcome in compile_all([Request(s, "sm_90a") for s in (prepare, by_itself, finish)], jobs=1):
        assert outcome.binary is not None, outcome.error
        specialisation, code = outcome.request.specialisation, read_machine_code(outcome.binary)
        assert violations(specialisation, "sm_90a", code) == []
        matrix[specialisation.kernel] = code.matrix
        info = outcome.binary.info
        assert [p.type for p in info.parameters if "map" not in p.name and not p.name.startswith("scratch")] == [
            p.type for p in specialisation.parameters if p.tile is None
        ]
        if specialisation is by_itself:
            estimate = DQ_CONFIGS[(128, 128), True].shared_memory((128, 128))
            assert estimate <= info.shared <= estimate + 1024 <= SHARED_MEMORY_LIMIT["sm_90a"]
            # two consumer warpgroups, and the producer's warp rounded up to a third
            assert info.threads == 384 and info.programmatic
    # for each warpgroup: the first scores, 8 products each; three loops, and the last step without next scores; dq has 4
    assert matrix == {PREPARE: {}, FINISH: {}, DQ: {"HGMMA": 2 * (8 + 3 * (8 + 8 + 4) + 8 + 4)}}


def test_the_first_and_the_last_launch_in_the_interpreter() -> None:
    checks = Path(__file__).with_name("interpreted_hopper_backward.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--show-capture=no", str(checks)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    environment = {**kept, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
