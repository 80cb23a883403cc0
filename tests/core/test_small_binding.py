"""The small kernel's table of forms, and what its binding makes of a call: binary, grid, tensor maps, numbers, refusals."""

import ast
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from flashcore.build.gates import violations
from flashcore.build.machine_code import read_machine_code
from flashcore.build.pool import compile_one
from flashcore.kernels.arguments import Argument, Pointer, TensorMap
from flashcore.kernels.small import binding
from flashcore.kernels.small.binding import Features
from flashcore.kernels.small.config import (
    COMPILER_SHARED,
    FORMS,
    HEAD_DIMS,
    SmallConfig,
    capacity,
    choose_config,
    padded_head_dim,
)
from flashcore.kernels.specialisation import Specialisation
from flashcore.sources import PACKAGE
from flashcore.spec import AttentionSpec

LOG2_E = math.log2(math.e)
MakeSpec = Callable[..., AttentionSpec]


def _specialise(spec: AttentionSpec) -> Specialisation:
    return binding.specialise_call(spec, "sm_90a", 132)


def _grid(spec: AttentionSpec) -> int:
    return binding.grid(spec, _specialise(spec), 132)


def _values(spec: AttentionSpec) -> dict[str, Argument]:
    """The arguments of a call by the names of the parameters."""
    specialisation = _specialise(spec)
    names = [parameter.name for parameter in specialisation.parameters]
    return dict(zip(names, binding.arguments(spec, specialisation), strict=True))


def _reject(spec: AttentionSpec) -> str | None:
    return binding.reject(spec, "sm_90a", False)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_form_of_the_table_fits_and_the_next_holds_more_keys(head_dim: int) -> None:
    forms = FORMS[head_dim]
    assert all(form.fits(head_dim) for form in forms)
    capacities = [form.capacity for form in forms]
    assert capacities == sorted(set(capacities)) and capacity(head_dim) == capacities[-1]
    assert len({form.name for form in forms}) == len(forms)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_call_takes_the_first_form_that_holds_its_keys_and_none_beyond_the_last(head_dim: int, make_spec: MakeSpec) -> None:
    fewest = 1
    for form in FORMS[head_dim]:
        for keys in (fewest, form.capacity):
            assert choose_config(head_dim, keys) == form
            spec = make_spec(1, 1, 1, 100, keys, head_dim)
            assert _reject(spec) is None and _specialise(spec).cluster == form.cluster
            assert _specialise(spec).name.endswith(f"-{form.name}")
        fewest = form.capacity + 1
    refusal = f"takes at most {fewest - 1} keys at head dim {head_dim}; got {fewest} that some row attends"
    assert _reject(make_spec(1, 1, 1, 100, fewest, head_dim)) == refusal


@pytest.mark.parametrize(
    ("head_dim", "keys", "form"),
    [
        # as docs/notes/small-forward.md measured them
        (64, 512, SmallConfig(2, 256, 128)),
        (64, 128, SmallConfig(1, 128, 128)),
        (64, 197, SmallConfig(2, 128, 128)),
        (64, 1024, SmallConfig(4, 256, 128)),
        (128, 512, SmallConfig(4, 128, 128)),
        (32, 64, SmallConfig(1, 64, 64)),
    ],
    ids=str,
)
def test_the_forms_of_measured_shapes(head_dim: int, keys: int, form: SmallConfig) -> None:
    assert choose_config(head_dim, keys) == form


@pytest.mark.parametrize(
    ("form", "head_dim", "fits"),
    [
        (SmallConfig(2, 256, 128), 64, True),
        (SmallConfig(2, 256, 128), 128, False),  # it compiles with spills
        (SmallConfig(2, 512, 128), 32, False),
        (SmallConfig(3, 128, 128), 64, False),  # 64 columns are no multiple of 3
        (SmallConfig(8, 128, 128), 64, False),  # 64 columns would be 8 blocks of 8, which no layout was made for
        (SmallConfig(1, 96, 64), 64, False),  # a part of a tile of keys
    ],
    ids=str,
)
def test_what_does_not_fit(form: SmallConfig, head_dim: int, fits: bool) -> None:
    assert form.fits(head_dim) == fits
    if not fits:
        with pytest.raises(ValueError, match=f"{form.name} does not fit head dim {head_dim}"):
            binding.specialise(Features(torch.float16, head_dim, False), form)


def test_shared_memory_counts_what_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    # 2 bytes * 64 columns of 64 queries, 256 keys and 256 values; 4 bytes * 64 rows of 64 columns to send and of 32 that come;
    # a maximum and a sum of 64 rows that come
    used = 2 * 64 * (64 + 512) + 4 * 64 * (64 + 32) + 8 * 64
    form = SmallConfig(2, 256, 128)
    assert form.shared_memory(64) == used and SmallConfig(1, 256, 128).shared_memory(64) == 2 * 64 * (64 + 512)
    for limit, fits in ((used + COMPILER_SHARED, True), (used + COMPILER_SHARED - 1, False)):
        monkeypatch.setattr("flashcore.kernels.small.config.SHARED_MEMORY_LIMIT", {"sm_90a": limit})
        assert form.fits(64) == fits


@pytest.mark.parametrize(("length", "causal"), [(512, True), (64, False)])
def test_the_compiled_kernel_is_as_described(length: int, causal: bool, make_spec: MakeSpec) -> None:
    spec = make_spec(1, 8, 8, length, length, causal=causal)
    specialisation, form = _specialise(spec), choose_config(64, length)
    binary = compile_one(specialisation, "sm_90a")
    info = binary.info
    estimate = form.shared_memory(64)
    assert estimate <= info.shared <= estimate + COMPILER_SHARED
    assert (info.threads, info.cluster, info.programmatic) == (128, form.cluster, True)
    expected = []
    for parameter, value in zip(specialisation.parameters, binding.arguments(spec, specialisation), strict=True):
        described = range(4) if isinstance(value, TensorMap) else ()
        expected += [parameter.name, *(f"{parameter.name}_{what}_{i}" for what in ("shape", "stride") for i in described)]
    assert [p.name for p in info.parameters if not p.name.startswith("scratch_")] == expected
    boxes = {p.name: p.tensor_map.box for p in info.parameters if p.tensor_map is not None}
    assert boxes == {"q_map": (1, 1, 64, 64), "k_map": (1, 1, form.block_n, 64), "v_map": (1, 1, form.block_n, 64)}
    assert violations(specialisation, "sm_90a", read_machine_code(binary)) == []


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "padded"),
    [(8, 8, 32), (32, 32, 32), (40, 40, 64), (32, 40, 64), (64, 8, 64), (72, 64, 128), (64, 128, 128), (128, 120, 128)],
)
def test_head_dims_are_padded_to_the_next_that_there_is(
    head_dim: int, head_dim_v: int, padded: int, make_spec: MakeSpec
) -> None:
    spec = make_spec(head_dim=head_dim, head_dim_v=head_dim_v)
    assert Features.of(spec).head_dim == padded == padded_head_dim(max(head_dim, head_dim_v)) and _reject(spec) is None
    tiles = {p.name: p.tile for p in _specialise(spec).parameters if p.tile is not None}
    assert {name: tile[1][-1] for name, tile in tiles.items()} == dict.fromkeys(("q_map", "k_map", "v_map"), padded)


def test_different_code_has_a_different_name_and_the_same_code_the_same_key(make_spec: MakeSpec) -> None:
    calls = ({}, {"causal": True}, {"dtype": torch.bfloat16}, {"head_dim": 32}, {"head_dim": 128}, {"seqlen_k": 129})
    found = [_specialise(make_spec(**options)) for options in calls]
    assert len({s.name for s in found}) == len({s.key for s in found}) == len(calls)
    for options in ({"seqlen_q": 77}, {"layout": "bhsd"}, {"heads_k": 2}, {"return_lse": True}, {"scale": 3.0}):
        assert _specialise(make_spec(**options)).key == found[0].key
    # limits to the right all share the code of causal
    assert _specialise(make_spec(window=(-1, 3))).key == _specialise(make_spec(causal=True)).key


def test_what_is_shipped_is_distinct_fits_and_is_what_calls_take(make_spec: MakeSpec) -> None:
    shipped = binding.shipped("sm_90a")
    assert len(shipped) == len({s.name for s in shipped}) == len({s.key for s in shipped})
    assert all(binding.shipped(arch) == () for arch in ("sm_80", "sm_89", "sm_100a", "sm_120a"))
    taken = set()
    for dtype in (torch.float16, torch.bfloat16):
        for head_dim in (8, 32, 48, 64, 72, 96, 128):
            for keys in range(1, capacity(padded_head_dim(head_dim)) + 1, 21):
                for causal in (False, True):
                    spec = make_spec(1, 1, 1, 70, keys, head_dim, dtype=dtype, causal=causal)
                    assert _reject(spec) is None
                    taken.add(_specialise(spec))
    assert set(shipped) == taken


def test_arguments_are_the_kernels_in_its_order(make_spec: MakeSpec) -> None:
    tree = ast.parse((PACKAGE / "kernels/small/forward.py").read_text())
    (function,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == binding.KERNEL)
    specialisation = _specialise(make_spec())
    # with what it may be asked to record last of all
    parameters = [p.name for p in specialisation.recording().parameters]
    assert parameters == [a.arg for a in function.args.args if a.annotation is None]
    constants = sorted(a.arg for a in function.args.args if a.annotation is not None)
    assert sorted(dict(specialisation.constants)) == constants

    values = _values(make_spec(2, 6, 3, 130, 150, 72, 40, causal=True, scale=0.3, return_lse=True))
    assert values == {
        "q_map": TensorMap("q", (2, 6, 130, 72), (130 * 6 * 72, 72, 6 * 72, 1)),
        "k_map": TensorMap("k", (2, 3, 150, 72), (150 * 3 * 72, 72, 3 * 72, 1)),
        "v_map": TensorMap("v", (2, 3, 150, 40), (150 * 3 * 40, 40, 3 * 40, 1)),
        "o_ptr": Pointer("o"), "lse_ptr": Pointer("lse"),
        # 2^30 over 3 tiles of 64 rows, 6 heads and 2 heads that share keys, rounded up
        "tiles_factor": 357913942, "tiles": 3, "heads_factor": 178956971, "heads_q": 6, "group_factor": 536870912,
        "seqlen_q": 130, "seqlen_k": 150, "band_hi": 20, "head_dim_v": 40,
        "o_stride_b": 130 * 6 * 40, "o_stride_h": 40, "o_stride_s": 6 * 40,
        "scale": pytest.approx(0.3 * LOG2_E), "store_lse": 1,
    }  # fmt: skip
    other = _values(make_spec(2, 6, 6, 130, 150, 64, layout="bhsd"))
    assert other["q_map"].strides == (6 * 130 * 64, 130 * 64, 64, 1)
    assert other["k_map"].strides == other["v_map"].strides == (6 * 150 * 64, 150 * 64, 64, 1)
    assert [other[f"o_stride_{d}"] for d in "bhs"] == [6 * 130 * 64, 130 * 64, 64]
    assert (other["store_lse"], other["group_factor"], other["scale"]) == (0, 2**30, pytest.approx(0.125 * LOG2_E))


@pytest.mark.parametrize("options", [{}, {"head_dim": 72}, {"head_dim_v": 8}, {"layout": "bhsd", "heads_q": 3, "heads_k": 1}])
def test_divisors_promised_to_the_compiler_hold(options: dict, make_spec: MakeSpec) -> None:
    spec = make_spec(**options)
    specialisation = _specialise(spec)
    for parameter, value in zip(specialisation.parameters, binding.arguments(spec, specialisation), strict=True):
        assert not isinstance(value, int) or value % parameter.divisor == 0, parameter
        assert parameter.divisor in {"*": (1, 16), "i": (1, 8)}.get(parameter.type[0], (1,))


@pytest.mark.parametrize(
    ("lengths", "options", "keys", "hi"),
    [
        ((8, 100), {}, 100, 100),  # a limit that excludes nothing
        ((8, 100), {"causal": True}, 100, 92),
        # the first 92 rows come before the first key
        ((100, 8), {"causal": True}, 8, -92),
        ((100, 100), {"causal": True}, 100, 0),
        # aligned with row 0, no row reaches beyond key 7
        ((8, 100), {"causal": True, "top_left": True}, 8, 0),
        ((100, 8), {"causal": True, "top_left": True}, 8, 0),
        ((100, 8), {"window": (-1, 9), "top_left": True}, 8, 8),
        ((8, 2000), {"causal": True, "top_left": True}, 8, 0),
        ((8, 100), {"window": (-1, 3), "top_left": True}, 11, 3),
        ((70, 100), {"window": (-1, 3)}, 100, 33),
        ((1, 1), {"causal": True}, 1, 1),
    ],
)
def test_keys_that_no_row_reaches_are_left_out(lengths, options, keys, hi, make_spec: MakeSpec) -> None:
    spec = make_spec(1, 2, 2, *lengths, **options)
    assert _reject(spec) is None
    values = _values(spec)
    assert (values["seqlen_k"], values["band_hi"]) == (keys, hi)
    for name in ("k_map", "v_map"):
        assert values[name].shape == (1, 2, keys, 64) and values[name].offset == 0
    limited = dict(_specialise(spec).constants)["HAS_HI"]
    for i in range(lengths[0]):
        wanted = {j for j in range(lengths[1]) if spec.band.hi is None or j <= i + spec.band.hi}
        assert {j for j in range(keys) if not limited or j <= i + hi} == wanted


def test_the_grid_has_a_cluster_for_each_tile(make_spec: MakeSpec) -> None:
    for keys, cluster in ((64, 1), (512, 2), (1024, 4)):
        for length, tiles in ((1, 8), (64, 8), (65, 16), (197, 32)):
            spec = make_spec(2, 4, 2, length, keys)
            assert _grid(spec) == cluster * tiles
            # however many multiprocessors there are: blocks wait for nothing that has not started
            assert binding.grid(spec, _specialise(spec), 1) == cluster * tiles


@pytest.mark.parametrize("sizes", [(0, 4, 4, 128, 128), (2, 4, 4, 0, 128), (0, 4, 4, 0, 1024)])
@pytest.mark.parametrize("causal", [False, True])
def test_an_output_of_nothing_is_a_grid_of_nothing(sizes: tuple, causal: bool, make_spec: MakeSpec) -> None:
    spec = make_spec(*sizes, causal=causal, return_lse=True)
    assert _reject(spec) is None and _grid(spec) == 0
    assert len(_values(spec)) == len(_specialise(spec).parameters)


def test_no_counter_and_always_wgmma(make_spec: MakeSpec) -> None:
    spec = make_spec(2, 32, 32, 512, 512, causal=True)
    specialisation, grid = _specialise(spec), _grid(spec)
    assert grid == 1024 and not binding.needs_counter(spec, specialisation, grid)
    assert "counter" not in {value.tensor for value in _values(spec).values() if isinstance(value, Pointer)}
    assert binding.matrix_instruction(specialisation, "sm_90a") == "HGMMA"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": torch.float32}, "takes float16 and bfloat16; got float32"),
        ({"mask": torch.ones(128, 128, dtype=torch.bool)}, "takes no mask"),
        ({"scale": 0.0}, "needs a scale > 0; got 0.0"),
        ({"scale": -1.0}, "needs a scale > 0; got -1.0"),
        ({"offset": 1}, "needs stride 1 in the last dimension, and head dims, other strides and addresses that are multiples"),
        ({"head_dim": 60}, "multiples of 16 bytes (8 elements)"),
        ({"head_dim": 64, "head_dim_v": 36}, "multiples of 16 bytes (8 elements)"),
        ({"seqlen_k": 0}, "needs a key that some query may attend"),
        ({"window": (10, 0)}, "takes no window to the left and no softcap"),
        ({"window": (10, -1)}, "takes no window to the left and no softcap"),
        ({"softcap": 20.0}, "takes no window to the left and no softcap"),
        ({"head_dim": 136}, "takes head dims up to 128; got 136"),
        ({"head_dim": 64, "head_dim_v": 192}, "takes head dims up to 128; got 192"),
        ({"seqlen_k": 1025}, "takes at most 1024 keys at head dim 64; got 1025 that some row attends"),
        ({"seqlen_k": 513, "head_dim": 72}, "takes at most 512 keys at head dim 128; got 513 that some row attends"),
        ({"seqlen_k": 513, "head_dim": 64, "head_dim_v": 72}, "takes at most 512 keys at head dim 128"),
        # aligned with the last key, the last row reaches all of them
        ({"seqlen_k": 2000, "causal": True}, "takes at most 1024 keys at head dim 64; got 2000"),
        # 8 heads of as many tiles as two rounds of 5, 3 and 2 blocks a multiprocessor take, and one more
        (
            {"seqlen_q": 64 * 165 + 1},
            "takes at most 1320 blocks for so many keys at head dim 64; got 1328 for tiles of 64 rows",
        ),
        ({"seqlen_q": 64 * 50, "seqlen_k": 129}, "takes at most 792 blocks for so many keys at head dim 64; got 800 for"),
        ({"batch": 65, "seqlen_k": 513}, "takes at most 528 blocks for so many keys at head dim 64; got 2080 for"),
        (
            {"seqlen_q": 64 * 17, "seqlen_k": 256, "head_dim": 96},
            "takes at most 264 blocks for so many keys at head dim 128; got",
        ),
    ],
    ids=str,
)
def test_what_is_refused_and_why(options: dict, words: str, make_spec: MakeSpec) -> None:
    assert words in (_reject(make_spec(**options)) or "")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.bfloat16},
        {"causal": True, "seqlen_q": 77, "seqlen_k": 1023},
        {"causal": True, "seqlen_q": 1023, "seqlen_k": 77},
        {"heads_q": 32, "heads_k": 1},
        {"head_dim": 8, "head_dim_v": 128},
        {"seqlen_k": 2000, "seqlen_q": 900, "causal": True, "top_left": True},
        {"seqlen_q": 64 * 165},
        {"seqlen_q": 64 * 49, "seqlen_k": 129},
        {"seqlen_q": 64 * 33, "seqlen_k": 512},
        {"seqlen_q": 64 * 16, "seqlen_k": 1024},
        {"window": (200, 200)},  # limits that exclude nothing
        {"return_lse": True, "layout": "bhsd"},
    ],
    ids=str,
)
def test_what_it_takes(options: dict, make_spec: MakeSpec) -> None:
    assert _reject(make_spec(**options)) is None


def test_where_it_runs(make_spec: MakeSpec) -> None:
    spec = make_spec()
    assert "needs a Hopper GPU (sm_90a); got sm_80" in binding.reject(spec, "sm_80", False)
    assert "got sm_100a" in binding.reject(spec, "sm_100a", False)
    assert "got device cpu" in binding.reject(spec, None, False) and "got the interpreter" in binding.reject(spec, None, True)
    assert "stride 1" in _reject(replace(spec, contiguous_last=False))
