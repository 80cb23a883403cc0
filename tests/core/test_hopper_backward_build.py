"""The main kernel of the Hopper backward pass: which query blocks its blocks visit, and what its binaries hold."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flashcore.backward_spec import BackwardSpec
from flashcore.build.machine_code import disassemble, read_machine_code
from flashcore.build.pool import Request, compile_all
from flashcore.kernels.arguments import Argument, TensorMap
from flashcore.kernels.hopper import backward_main as main
from flashcore.spec import AttentionSpec, Band, Options
from flashcore.target import SHARED_MEMORY_LIMIT

KEYS = main.BLOCK_KEYS


def _spec(seqlen_q: int, seqlen_k: int, band: Band, head_dim: int = 64, softcap: float = 0.0) -> BackwardSpec:
    """A pass of a call with two batches, of which no tensor need exist."""
    q = torch.empty(2, 4, seqlen_q, head_dim, dtype=torch.float16)
    k = torch.empty(2, 2, seqlen_k, head_dim, dtype=torch.float16)
    options = Options.check(causal=False, scale=None, window=None, softcap=softcap, layout="bhsd")
    call = replace(AttentionSpec.from_tensors(q, k, k, None, options, return_lse=True), band=band)
    return BackwardSpec.of(call, q, dq=True, dkv=True, mask=None, dlse=False, deterministic=False)


def _values(spec: BackwardSpec) -> dict[str, Argument]:
    launch = main.launch(spec, 132, fused=True)
    return dict(zip((p.name for p in launch.specialisation.parameters), launch.arguments, strict=True))


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The kernel's own arithmetic (kernels/hopper/tiles.py, backward_turns.py) on Python's integers."""
    import flashcore.kernels.hopper.backward_turns as turns
    import flashcore.kernels.hopper.tiles as source

    gl = SimpleNamespace(minimum=min, maximum=max, where=lambda condition, a, b: a if condition else b)
    for module in (source, turns):
        monkeypatch.setattr(module, "gl", gl)
    found = {name: getattr(source.Tiles, name).fn for name in ("locate", "visited", "unmasked")}
    return SimpleNamespace(**found, turn=turns._turn.fn)


@pytest.mark.parametrize("head_dim", main.BLOCK_ROWS)
@pytest.mark.parametrize("seqlens", [(1, 1), (1, 300), (300, 1), (128, 128), (129, 127), (200, 517), (517, 200)], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_every_pair_that_takes_part_is_visited_once(
    softcap: float, head_dim: int, seqlens: tuple[int, int], tiles: SimpleNamespace
) -> None:
    seqlen_q, seqlen_k = seqlens
    rows, keys = np.arange(seqlen_q)[None, :], np.arange(seqlen_k)[:, None]
    last = seqlen_k - seqlen_q
    limits = (None, -seqlen_q + 1, last - 70, last, 0, 3, last + 65, seqlen_k - 1)
    for lo, hi in ((lo, hi) for lo in limits for hi in limits):
        attended = np.ones((seqlen_k, seqlen_q), dtype=bool)
        if lo is not None:
            attended &= keys >= rows + lo
        if hi is not None:
            attended &= keys <= rows + hi
        if not attended.any():
            continue
        spec = _spec(seqlen_q, seqlen_k, Band(lo, hi), head_dim, softcap)
        values, launch = _values(spec), main.launch(spec, 132, fused=True)
        has_limit = dict(launch.specialisation.constants)["HAS_LO"]
        assert has_limit == (softcap > 0 or lo is not None or hi is not None)
        rows_of_block = main.BLOCK_ROWS[head_dim]
        tiles_per_head = -(-seqlen_k // KEYS)
        given = SimpleNamespace(
            tiles_per_head=tiles_per_head, group_heads=values["group_heads"], heads_q=values["heads_k"],
            heads=values["kv_heads"], seqlen_q=values["seqlen_k"], seqlen_k=values["seqlen_q"], band_lo=values["band_lo"],
            band_hi=values["band_hi"], BLOCK_M=KEYS, BLOCK_N=rows_of_block, HAS_LO=has_limit, HAS_HI=has_limit,
        )  # fmt: skip
        places = [tiles.locate(given, tile) for tile in range(4 * tiles_per_head)]
        assert sorted(places) == sorted((n * KEYS, b, h) for n in range(tiles_per_head) for b in range(2) for h in range(2))
        assert launch.grid == min(132, len(places))
        visits = np.zeros((tiles_per_head * KEYS, values["blocks_per_head"] * rows_of_block), dtype=int)
        turns = [0] * int(values["blocks_per_head"])
        for n0 in range(0, tiles_per_head * KEYS, KEYS):
            begin, end = tiles.visited(given, n0)
            assert 0 <= begin < end <= values["blocks_per_head"]
            # where tiles add in turn: how many of the head's have visited the block before
            assert [tiles.turn(SimpleNamespace(tiles=given), n0, block) for block in range(begin, end)] == turns[begin:end]
            turns[begin:end] = [turn + 1 for turn in turns[begin:end]]
            visits[n0 : n0 + KEYS, begin * rows_of_block : end * rows_of_block] += 1
            for key0 in (n0, n0 + main.WARPGROUP_KEYS):
                plain_begin, plain_end = tiles.unmasked(given, key0, main.WARPGROUP_KEYS) if has_limit else (0, 0)
                plain = attended[key0 : key0 + main.WARPGROUP_KEYS, max(begin, plain_begin) * rows_of_block :]
                assert plain[:, : max(0, (min(end, plain_end) - max(begin, plain_begin)) * rows_of_block)].all()
        assert (visits[:seqlen_k, :seqlen_q][attended] == 1).all()
        # what the mask lets through, and what the copies bring: all that takes part, and no row or key that does not
        band = (rows >= keys + values["band_lo"]) & (rows <= keys + values["band_hi"])
        assert np.array_equal(band | ~np.full_like(band, has_limit), attended)
        q_map, k_map = values["q_map"], values["k_map"]
        assert isinstance(q_map, TensorMap) and isinstance(k_map, TensorMap)
        for map, taking_part, name in ((q_map, attended.any(0), "first_query"), (k_map, attended.any(1), "first_key")):
            first = values[name]
            assert isinstance(first, int) and map.offset == first * head_dim
            assert np.flatnonzero(taking_part).tolist() == list(range(first, first + map.shape[2]))


def test_numbers_are_padded_to_whole_blocks_of_either_head_dim() -> None:
    for seqlen_q in (1, 64, 65, 128, 129, 1000):
        rows = main.padded_rows(seqlen_q)
        assert rows >= seqlen_q and rows - seqlen_q < 128
        assert all(rows % block == 0 for block in main.BLOCK_ROWS.values())


# HGMMA of a step for dp, s, dv, dk and dq
_PRODUCTS = {64: (4, 4, 8, 8, 8), 128: (8, 8, 4, 4, 8)}


def test_binaries_hold_what_is_meant() -> None:
    features = (
        main.MainFeatures(torch.float16, 64, False, True),
        main.MainFeatures(torch.bfloat16, 128, True, True),
        main.MainFeatures(torch.float16, 128, False, False),
        main.MainFeatures(torch.bfloat16, 64, True, True, softcap=True),
        main.MainFeatures(torch.float16, 128, True, True, ordered=True),
    )
    asked = [Request(main.specialise(feature), "sm_90a") for feature in features]
    for feature, outcome in zip(features, compile_all(asked, jobs=2), strict=True):
        assert outcome.binary is not None, outcome.error
        code = read_machine_code(outcome.binary)
        assert code.spills_in_loops == 0
        dp, scores, dv, dk, dq = _PRODUCTS[feature.head_dim]
        step = dp + dv + dk + (dq if feature.dq else 0)
        # of two warpgroups: the first scores, and the loop, whose step computes the next ones; the last block's own step
        assert code.matrix == {"HGMMA": 2 * (scores + (step + scores) + (step if feature.own_last else 0))}
        assert code.shared <= SHARED_MEMORY_LIMIT["sm_90a"] and outcome.binary.info.threads == 384
        adds = re.findall(r"\bREDG?\.\S+|\bATOMG?\.\S+", disassemble(outcome.binary))
        # sums of dq go as vectors, and the last after the loop, without a softcap, as do those of shared keys' dk and dv;
        # without sums nothing depends on the order in which blocks run
        places = (1 if feature.softcap else 2 + feature.own_last) if feature.dq else 0
        shared = 2 * feature.head_dim // 64 if feature.shares_tiles else 0
        vectors = [add for add in adds if ".F32x4." in add]
        assert len(vectors) == 2 * 8 * (places + shared)
        # the others are numbers of progress: drawn tiles, and what a tile has added
        assert all(re.match(r"(ATOMG|REDG?)\.E\.ADD\.STRONG\.GPU", add) for add in adds if add not in vectors)


def test_the_main_loop_moves_nothing_to_uniform_registers() -> None:
    """Where ptxas cannot tell that a matrix descriptor is the same for a whole warp, it computes it in vector registers and
    moves it for every product: 4 % of the speed, and nothing else shows it."""
    features = [main.MainFeatures(torch.float16, d, banded, True) for d in main.BLOCK_ROWS for banded in (False, True)]
    features.append(main.MainFeatures(torch.float16, 128, True, True, ordered=True))
    asked = [Request(main.specialise(feature), "sm_90a") for feature in features]
    for feature, outcome in zip(features, compile_all(asked, jobs=2), strict=True):
        assert outcome.binary is not None, outcome.error
        loops = _loops_of(disassemble(outcome.binary), sum(_PRODUCTS[feature.head_dim]))
        assert len(loops) == 2, feature.name  # one a warpgroup
        assert not any("R2UR" in line for loop in loops for line in loop), feature.name


def _loops_of(sass: str, products: int) -> list[list[str]]:
    """The innermost loops with so many matrix instructions, as lists of instructions."""
    places: dict[str, int] = {}
    code: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            places[label.group(1)] = len(code)
        elif re.search(r"/\*[0-9a-f]{4,6}\*/\s", line):
            code.append(line)
    jumps = ((i, re.search(r"BRA.*`\((\.L_x_\d+)\)", line)) for i, line in enumerate(code))
    ranges = [(places[to.group(1)], i) for i, to in jumps if to and places.get(to.group(1), i) < i]
    loops = [(a, b) for a, b in ranges if sum("HGMMA" in line for line in code[a : b + 1]) == products]
    return [code[a : b + 1] for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]
