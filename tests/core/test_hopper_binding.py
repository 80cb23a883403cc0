"""The Hopper kernel's table of forms, and what its binding makes of a call: binary, grid, tensor maps, numbers, refusals."""

import ast
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from flashcore.build.pool import compile_one
from flashcore.kernels.arguments import Argument, Pointer, TensorMap
from flashcore.kernels.hopper import binding, config
from flashcore.kernels.hopper.binding import Features
from flashcore.kernels.hopper.config import HEAD_DIMS, REGISTERS, HopperConfig, configurations
from flashcore.kernels.specialisation import Specialisation
from flashcore.sources import PACKAGE
from flashcore.spec import AttentionSpec

BANDS = ("none", "causal", "window")
LOG2_E = math.log2(math.e)
MakeSpec = Callable[..., AttentionSpec]


def _specialise(spec: AttentionSpec) -> Specialisation:
    return binding.specialise_call(spec, "sm_90a", 132)


def _values(spec: AttentionSpec) -> dict[str, Argument]:
    """The arguments of a call by the names of the parameters."""
    specialisation = _specialise(spec)
    names = [parameter.name for parameter in specialisation.parameters]
    return dict(zip(names, binding.arguments(spec, specialisation), strict=True))


@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
def test_every_form_of_the_table_fits(head_dims: tuple[int, int]) -> None:
    for band in BANDS:
        for form in configurations(head_dims, band):
            assert form.fits(*head_dims), (band, form.name)


def test_the_registers_of_all_warpgroups_are_there() -> None:
    for warpgroups, counts in REGISTERS.items():
        consumer, producer = counts
        assert 128 * (warpgroups * consumer + producer) <= 65536 and all(count % 8 == 0 for count in counts)


@pytest.mark.parametrize(
    ("form", "fits"),
    [
        (HopperConfig(2, 128, 2, 2), True),
        (HopperConfig(4, 64, 1, 2), False),  # no registers for it
        # the next tile's first scores while this tile's queries are still needed
        (HopperConfig(2, 128, 1, 2, join_tiles=True), False),
        (HopperConfig(2, 128, 2, 2, join_tiles=True), True),
        (HopperConfig(2, 128, 1, 2, join_tiles=True, q_registers=True), True),
        # ... which are then overwritten by no output
        (HopperConfig(2, 128, 2, 2, join_tiles=True, o_shares_q=True), False),
        # the output goes where the queries are, once they are done with
        (HopperConfig(2, 128, 1, 2, o_shares_q=True), True),
        (HopperConfig(2, 128, 2, 2, o_shares_q=True), False),
        (HopperConfig(2, 128, 1, 2, o_shares_q=True, q_registers=True), False),
        # 2 bytes * 128 * (128 rows of q, 128 of o, 128 keys and values of each of 3 slots) are 256 KiB of 227
        (HopperConfig(2, 128, 1, 3), False),
    ],
    ids=lambda value: value.name if isinstance(value, HopperConfig) else str(value),
)
def test_what_does_not_go_together_does_not_fit(form: HopperConfig, fits: bool) -> None:
    assert form.fits(128, 128) == fits


def test_an_output_wider_than_the_queries_does_not_fit_into_their_memory() -> None:
    form = HopperConfig(2, 64, 1, 2, o_shares_q=True)
    assert form.fits(128, 64) and not form.fits(64, 128)


def test_names_of_forms_tell_them_apart() -> None:
    forms = {form for head_dims in HEAD_DIMS for band in BANDS for form in configurations(head_dims, band)}
    assert len({form.name for form in forms}) == len(forms) > 5
    assert replace(config.D64, emulate_exp2=False).name != config.D64.name


def test_the_compiled_kernel_is_as_described(make_spec: MakeSpec) -> None:
    spec = make_spec(head_dim=96)
    specialisation = _specialise(spec)
    info = compile_one(specialisation, "sm_90a").info
    (form,) = configurations((96, 96), "none")
    estimate = form.shared_memory(96, 96)
    assert estimate <= info.shared <= estimate + 1024
    # the consumers, and the producer's warp rounded up to a warpgroup
    assert info.threads == 32 * (4 * form.warpgroups + 4)
    expected = []
    for parameter, value in zip(specialisation.parameters, binding.arguments(spec, specialisation), strict=True):
        described = range(4) if isinstance(value, TensorMap) else ()
        expected += [parameter.name, *(f"{parameter.name}_{what}_{i}" for what in ("shape", "stride") for i in described)]
    assert [p.name for p in info.parameters if not p.name.startswith("scratch_")] == expected
    boxes = {p.name: p.tensor_map.box for p in info.parameters if p.tensor_map is not None}
    assert boxes["q_map"] == (1, 1, 64, 64) and boxes["v_tail_map"] == (1, 1, form.block_n, 32)


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "padded"),
    [
        (8, 8, (64, 64)),
        (64, 64, (64, 64)),
        (72, 72, (96, 96)),
        (64, 72, (96, 96)),
        (96, 104, (128, 128)),
        (136, 64, (192, 128)),
        (192, 128, (192, 128)),
        (128, 136, (192, 192)),
        (200, 8, (256, 256)),
    ],
)
def test_head_dims_are_padded_to_the_next_that_there_are(
    head_dim: int, head_dim_v: int, padded: tuple[int, int], make_spec: MakeSpec
) -> None:
    assert Features.of(make_spec(head_dim=head_dim, head_dim_v=head_dim_v)).head_dims == padded


def test_a_softcap_takes_the_most_general_band(make_spec: MakeSpec) -> None:
    calls = ({}, {"causal": True}, {"window": (9, 9)}, {"softcap": 1.0}, {"causal": True, "softcap": 1.0})
    assert [Features.of(make_spec(**options)).band for options in calls] == ["none", "causal", "window", "window", "window"]


def test_arguments_are_the_kernels_in_its_order(make_spec: MakeSpec) -> None:
    tree = ast.parse((PACKAGE / "kernels/hopper/forward.py").read_text())
    (function,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == binding.KERNEL)
    of_kernel = [a.arg for a in function.args.args]
    for head_dim in (64, 96):
        specialisation = _specialise(make_spec(head_dim=head_dim)).recording()
        names = [p.name for p in specialisation.parameters]
        assert sorted([*names, *dict(specialisation.constants)]) == sorted(of_kernel)
        assert names == [name for name in of_kernel if name in names]
    values = _values(make_spec(2, 6, 3, 30, 50, 72, 40, causal=True, scale=0.3, return_lse=True))
    assert values["q_map"] == values["q_tail_map"] == TensorMap("q", (2, 6, 30, 72), (30 * 6 * 72, 72, 6 * 72, 1))
    assert values["k_map"] == TensorMap("k", (2, 3, 50, 72), (50 * 3 * 72, 72, 3 * 72, 1))
    assert values["v_map"] == TensorMap("v", (2, 3, 50, 40), (50 * 3 * 40, 40, 3 * 40, 1))
    assert values["o_map"] == TensorMap("o", (2, 6, 30, 40), (30 * 6 * 40, 40, 6 * 40, 1))
    assert {name: value for name, value in values.items() if not name.endswith("_map")} == {
        "lse_ptr": Pointer("lse"), "counter_ptr": Pointer("counter"),
        "heads": 12, "heads_q": 6, "heads_per_kv": 2, "seqlen_q": 30, "seqlen_k": 50, "band_lo": -30, "band_hi": 20,
        "group_heads": 12, "scale": pytest.approx(0.3 * LOG2_E), "cap_scale": 0.0, "store_lse": 1,
    }  # fmt: skip
    assert _values(make_spec(2, 6, 3, 30, 50, layout="bhsd"))["o_map"].strides == (30 * 6 * 64, 30 * 64, 64, 1)


def test_a_softcap_scales_twice(make_spec: MakeSpec) -> None:
    # c * tanh(s x / c) in base 2: tanh(y) = 1 - 2 / (2^(2 log2(e) y) + 1)
    values = _values(make_spec(softcap=20.0, scale=0.5))
    assert values["scale"] == pytest.approx(20 * LOG2_E) and values["cap_scale"] == pytest.approx(2 * LOG2_E * 0.5 / 20)


@pytest.mark.parametrize(
    ("lengths", "options", "first", "keys", "band"),
    [
        ((8, 100), {}, 0, 100, (-8, 100)),  # limits that exclude nothing
        ((8, 100), {"causal": True}, 0, 100, (-8, 92)),
        # row 0 is aligned with key 92, and its window begins at 82
        ((8, 100), {"window": (10, 0)}, 82, 18, (0, 10)),
        ((8, 100), {"window": (10, 3)}, 82, 18, (0, 13)),
        # the first 92 rows come before the first key
        ((100, 8), {"causal": True}, 0, 8, (-100, -92)),
        ((100, 100), {"window": (10, 10)}, 0, 100, (-10, 10)),
        # aligned with row 0, no row reaches beyond key 7
        ((8, 100), {"causal": True, "top_left": True}, 0, 8, (-8, 0)),
    ],
)
def test_keys_that_no_row_attends_are_left_out(lengths, options, first, keys, band, make_spec: MakeSpec) -> None:
    spec = make_spec(1, 2, 2, *lengths, **options)
    values = _values(spec)
    assert (values["seqlen_k"], values["band_lo"], values["band_hi"]) == (keys, *band)
    for name in ("k_map", "v_map"):
        assert values[name].shape == (1, 2, keys, 64) and values[name].offset == first * 2 * 64
    # the same keys for each row as the band of the call says, counted from the first that is there
    lo, hi = spec.band.lo, spec.band.hi
    for i in range(lengths[0]):
        wanted = {j for j in range(lengths[1]) if (lo is None or j >= i + lo) and (hi is None or j <= i + hi)}
        assert {first + j for j in range(keys) if (lo is None or j >= i + band[0]) and j <= i + band[1]} == wanted


@pytest.mark.parametrize(
    ("call", "group"),
    [
        ({}, 1),
        ({"heads_k": 8}, 4),  # without a band: those that share keys and values
        ({"causal": True, "seqlen_k": 512}, 64),
        # 64 KiB of keys and of values a head at 512 keys, 16 MiB at 128k: a budget of 32 MiB holds fewer than the least
        ({"causal": True, "seqlen_k": 2**17}, 16),
        ({"causal": True, "seqlen_k": 2**12}, 32),
        ({"causal": True, "seqlen_k": 2**12, "heads_k": 16}, 64),
        # whole groups of 24
        ({"causal": True, "heads_q": 48, "heads_k": 2, "seqlen_k": 2**17}, 24),
        ({"causal": True, "batch": 1, "heads_q": 4, "heads_k": 4}, 4),  # no more than there are
    ],
    ids=str,
)
def test_heads_whose_tiles_are_taken_together(call: dict, group: int, make_spec: MakeSpec) -> None:
    call = {"batch": 4, "heads_q": 32, "heads_k": 32, **call}
    assert binding.group_heads(_described(make_spec(), **call)) == group


def _described(spec: AttentionSpec, causal: bool = False, **sizes: int) -> AttentionSpec:
    """The spec with other sizes, of which no tensor need exist."""
    return replace(spec, **sizes, band=replace(spec.band, hi=0) if causal else spec.band)


def test_the_grid_is_one_block_a_multiprocessor_or_fewer(make_spec: MakeSpec) -> None:
    for length, tiles in ((0, 0), (1, 8), (128, 8), (129, 16), (2049, 17 * 8)):
        spec = make_spec(2, 4, 2, length, 64)
        for sm_count in (1, 10, 132):
            assert binding.grid(spec, _specialise(spec), sm_count) == min(sm_count, tiles)
    assert binding.grid(make_spec(0), _specialise(make_spec()), 132) == 0


def test_tiles_are_high_only_where_they_fill_the_gpu(make_spec: MakeSpec) -> None:
    for heads, warpgroups, tiles in ((12, 3, 132), (11, 2, 11 * 17)):
        spec = make_spec(1, heads, heads, 11 * 192 - 1, 4096)
        specialisation = _specialise(spec)
        assert dict(specialisation.constants)["WARPGROUPS"] == warpgroups, f"{heads} heads"
        assert binding.grid(spec, specialisation, 10_000) == tiles, f"{heads} heads"


@pytest.mark.parametrize(
    ("options", "length", "sm_count", "counter"),
    [
        ({"causal": True}, 256, 132, False),  # a tile for each block
        ({"causal": True}, 256, 8, False),  # 16 tiles for 8 blocks
        ({"causal": True}, 257, 8, True),  # 24
        ({"causal": True}, 257, 11, True),
        ({"causal": True}, 257, 12, False),
        ({"window": (-1, 5)}, 257, 8, True),
        ({"window": (5, -1)}, 257, 8, True),
        ({"window": (5, 5)}, 256, 8, False),
        ({}, 1024, 8, False),  # all tiles are as long: 64 for 8 blocks
        ({}, 1025, 8, True),  # 72
        ({"softcap": 9.0}, 1024, 8, False),
        ({"softcap": 9.0}, 1025, 8, True),
        ({"causal": True}, 0, 8, False),
    ],
    ids=str,
)
def test_tiles_of_many_rounds_are_drawn_from_a_counter_those_of_unequal_lengths_earlier(
    options: dict, length: int, sm_count: int, counter: bool, make_spec: MakeSpec
) -> None:
    spec = make_spec(2, 4, 2, length, max(1, length), **options)
    specialisation = _specialise(spec)
    grid = binding.grid(spec, specialisation, sm_count)
    assert binding.needs_counter(spec, specialisation, grid) == counter


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": torch.float32}, "takes float16 and bfloat16; got float32"),
        ({"mask": torch.ones(128, 128, dtype=torch.bool)}, "takes no mask"),
        ({"scale": 0.0}, "needs a scale > 0; got 0.0"),
        ({"offset": 1}, "needs stride 1 in the last dimension, and head dims"),
        ({"head_dim": 60}, "multiples of 16 bytes"),
        ({"seqlen_k": 0}, "needs a key that some query may attend"),
    ],
    ids=str,
)
def test_what_is_refused_and_why(options: dict, words: str, make_spec: MakeSpec) -> None:
    assert words in (binding.reject(make_spec(**options), "sm_90a", False) or "")


def test_where_it_does_not_run_and_how_much_it_takes(make_spec: MakeSpec) -> None:
    spec = make_spec()
    assert binding.reject(spec, "sm_90a", False) is None
    assert "needs a Hopper GPU (sm_90a); got sm_80" in binding.reject(spec, "sm_80", False)
    assert "got device cpu" in binding.reject(spec, None, False) and "got the interpreter" in binding.reject(spec, None, True)
    assert "stride 1" in binding.reject(replace(spec, contiguous_last=False), "sm_90a", False)
    most = replace(spec, batch=2**20, heads_q=2**5, seqlen_q=2**11)
    assert binding.reject(most, "sm_90a", False) is None
    assert "at most 1073741824 tiles" in binding.reject(replace(most, seqlen_q=2**11 + 1), "sm_90a", False)
