"""Cases for kernels of short sequences, in which a cluster of blocks shares the keys of a tile and combines what each found.

Lengths are all there are up to two tiles, and lie around the edges of tiles of 64 and 128 rows, of chunks of 64 and 128 keys
and of the shares of 2 and 4 blocks. A block may have no key of a row, or none at all; a grid fewer blocks than a GPU has
multiprocessors, or more. Small on purpose, but for those with many heads, which are for GPUs only.
"""

from dataclasses import replace
from itertools import product

import torch

from flashcore.verify.cases import Case

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
ODD_LENGTHS = range(1, 130, 2)
# Where a tile or its last chunk begins or ends: these odd lengths run causal and not.
TURNING = (1, 63, 65, 127, 129)
EDGES = (64, 128, 256, 512, 1024)
HEAD_DIMS = (32, 40, 64, 72, 80, 96, 120, 128)
OTHER_HEAD_DIMS = (8, 16, 24, 48, 56, 88, 104, 112)
VALUE_DIMS = ((64, 128), (128, 64), (64, 32), (40, 72), (96, 80), (80, 96), (128, 8), (8, 128))
# Batch times heads of one tile each: an H200's 132 multiprocessors, less and more, by clusters of 1, 2 and 4 blocks.
GRIDS = (1, 3, 33, 65, 66, 67, 131, 132, 133, 264, 300)
# Interpreted, more programs than these take too long.
MANY_HEADS = 67
GIB = 2**30


def short_cases() -> list[Case]:
    """All of them, by group."""
    return [
        *_odd_lengths(),
        *_unequal_lengths(),
        *_edges(),
        *_head_dims(),
        *_forms(),
        *_grids(),
        *_features(),
        *_dead_keys(),
        *_values(),
    ]


def _causal(causal: bool) -> str:
    return "-causal" if causal else ""


def _odd_lengths() -> list[Case]:
    """Self-attention of every odd length, half of them causal, and these of every residue of a power of two."""
    return [
        Case(name=f"short-self-{length}{_causal(causal)}", seqlen_q=length, seqlen_k=length, causal=causal, seed=length)
        for length in ODD_LENGTHS
        for causal in (False, True)
        if length in TURNING or causal == (length.bit_count() % 2 == 0)
    ]


def _unequal_lengths() -> list[Case]:
    """More queries than keys, of which causal leaves some nothing to attend, and fewer; even and odd, causal and not."""
    cases = []
    for row, seqlen_k in enumerate((*range(1, 131, 5), 64, 65, 127, 128, 129, 130)):
        more = row // 2 % 2 == 0
        seqlen_q = seqlen_k + (1, 17, 63, 130)[row // 4 % 4] if more else max(1, seqlen_k * 3 // 7)
        causal = (row // 4 + row) % 2 == 1
        dtype_name = tuple(HALF)[row // 8 % 2]
        cases.append(
            Case(
                name=f"short-{seqlen_q}x{seqlen_k}{_causal(causal)}-{dtype_name}",
                seqlen_q=seqlen_q,
                seqlen_k=seqlen_k,
                dtype=HALF[dtype_name],
                causal=causal,
                seed=row,
            )
        )
    return cases


def _edges() -> list[Case]:
    """One more and one less than an edge: every pair of both lengths at the edges of tiles, some at those of shares."""
    cases = []
    for edge in EDGES:
        pairs = list(product((-1, 0, 1), repeat=2)) if edge <= 128 else [(-1, 1), (0, 0), (1, -1)]
        for number, (beyond_q, beyond_k) in enumerate(pairs):
            for causal in (False, True) if edge > 128 else (number % 2 == 0,):
                seqlen_q, seqlen_k = edge + beyond_q, edge + beyond_k
                name = f"short-edge-{seqlen_q}x{seqlen_k}{_causal(causal)}"
                cases.append(Case(name=name, seqlen_q=seqlen_q, seqlen_k=seqlen_k, causal=causal, seed=number))
    return cases


def _head_dims() -> list[Case]:
    """What lies past a head dim in memory is NaN where a case is padded, and the next row where it is not."""
    shape = Case(name="", batch=2, heads_q=4, heads_k=2, seqlen_q=67, seqlen_k=131)
    cases = []
    for row, head_dim in enumerate(HEAD_DIMS):
        for column, (dtype_name, dtype) in enumerate(HALF.items()):
            causal = (row + column) % 2 == 1
            padded = (row // 2 + column) % 2 == 0
            cases.append(
                replace(
                    shape,
                    name=f"short-dim-{head_dim}{_causal(causal)}-{dtype_name}",
                    head_dim=head_dim,
                    dtype=dtype,
                    causal=causal,
                    storage="padded" if padded else "contiguous",
                    layout="bhsd" if row % 2 else "bshd",
                )
            )
    for row, head_dim in enumerate(OTHER_HEAD_DIMS):
        name = f"short-dim-{head_dim}"
        cases.append(replace(shape, name=name, head_dim=head_dim, dtype=HALF[tuple(HALF)[row % 2]], storage="padded"))
    for row, (head_dim, dim_v) in enumerate(VALUE_DIMS):
        causal = row % 2 == 1
        name = f"short-dim-{head_dim}v{dim_v}{_causal(causal)}"
        dtype = HALF[tuple(HALF)[row // 2 % 2]]
        cases.append(replace(shape, name=name, head_dim=head_dim, head_dim_v=dim_v, dtype=dtype, causal=causal))
    return cases


def _forms() -> list[Case]:
    """Each head dim that may have tiles of its own, dtype and mask, with few tiles, with some of many keys and with many."""
    sizes = (
        Case(name="few", heads_q=3, heads_k=3, seqlen_q=100, seqlen_k=150),
        Case(name="some", heads_q=8, heads_k=4, seqlen_q=257, seqlen_k=513),
        Case(name="many", batch=3, heads_q=48, heads_k=16, seqlen_q=129, seqlen_k=193, needs_bytes=GIB),
    )
    # at head dims 64 and 128 the lengths and edges reach these
    shorter = (
        Case(name="least", heads_q=2, heads_k=1, seqlen_q=70, seqlen_k=61),
        Case(name="less", heads_q=2, heads_k=2, seqlen_q=100, seqlen_k=115),
        Case(name="half", heads_q=4, heads_k=2, seqlen_q=300, seqlen_k=401),
    )
    return [
        replace(
            size,
            name=f"short-{size.name}-d{head_dim}{_causal(causal)}-{dtype_name}",
            head_dim=head_dim,
            dtype=dtype,
            causal=causal,
            seed=head_dim,
        )
        for head_dim, taken in ((32, (*shorter, *sizes)), (64, sizes), (128, sizes))
        for size in taken
        for dtype_name, dtype in HALF.items()
        for causal in (False, True)
    ]


def _grids() -> list[Case]:
    """A tile a head, of more keys than a chunk holds."""
    cases = []
    for number, heads in enumerate(GRIDS):
        batch = 3 if heads % 3 == 0 else 1
        causal = number % 2 == 1
        cases.append(
            Case(
                name=f"short-heads-{heads}{_causal(causal)}",
                batch=batch,
                heads_q=heads // batch,
                heads_k=heads // batch,
                seqlen_q=57,
                seqlen_k=140,
                causal=causal,
                needs_bytes=GIB if heads > MANY_HEADS else 0,
            )
        )
    return cases


def _features() -> list[Case]:
    shape = Case(name="", batch=2, heads_q=4, heads_k=4, seqlen_q=99, seqlen_k=173)
    square = replace(shape, seqlen_k=99)
    bhsd = replace(shape, layout="bhsd")
    return [
        replace(shape, name="short-gqa-causal", heads_q=8, heads_k=2, causal=True),
        replace(bhsd, name="short-gqa-bf16", batch=3, heads_q=6, heads_k=3, dtype=torch.bfloat16),
        replace(shape, name="short-gqa-d128", heads_q=32, heads_k=8, batch=1, head_dim=128),
        replace(shape, name="short-mqa-causal-no-lse", heads_q=5, heads_k=1, causal=True, return_lse=False),
        replace(bhsd, name="short-mqa-one-query", heads_q=12, heads_k=1, seqlen_q=1, seqlen_k=1023, causal=True),
        replace(shape, name="short-one-query-one-key", seqlen_q=1, seqlen_k=1),
        replace(shape, name="short-many-queries-one-key-causal", seqlen_q=333, seqlen_k=1, causal=True),
        replace(shape, name="short-few-queries-many-keys", seqlen_q=5, seqlen_k=1025, causal=True),
        replace(shape, name="short-no-lse", return_lse=False),
        replace(bhsd, name="short-no-lse-causal-bhsd-bf16", return_lse=False, causal=True, dtype=torch.bfloat16),
        replace(shape, name="short-transposed", storage="transposed"),
        replace(bhsd, name="short-transposed-bhsd-causal", storage="transposed", causal=True, head_dim=128),
        replace(square, name="short-packed-causal", storage="packed", causal=True),
        replace(square, name="short-packed-bhsd", storage="packed", layout="bhsd", dtype=torch.bfloat16),
        replace(shape, name="short-strided-gqa", storage="strided", heads_k=2),
        replace(bhsd, name="short-strided-bhsd-causal", storage="strided", causal=True),
        replace(shape, name="short-padded", storage="padded"),
        replace(bhsd, name="short-padded-causal-empty-rows", storage="padded", causal=True, seqlen_q=197, seqlen_k=70),
        replace(shape, name="short-expanded", storage="expanded", batch=3),
    ]


def _dead_keys() -> list[Case]:
    """NaN and inf past the keys that causal lets anyone attend, which only torch's alignment has."""
    shape = Case(name="", entry="sdpa", layout="bhsd", return_lse=False, causal=True, dead_nan=True)
    return [
        replace(shape, name="short-dead-1x130", seqlen_q=1, seqlen_k=130),
        replace(shape, name="short-dead-64x65", seqlen_q=64, seqlen_k=65),
        replace(shape, name="short-dead-67x131-bf16", seqlen_q=67, seqlen_k=131, dtype=torch.bfloat16),
        replace(shape, name="short-dead-17x513-gqa", seqlen_q=17, seqlen_k=513, heads_q=6, heads_k=2),
        replace(shape, name="short-dead-129x256-d128", seqlen_q=129, seqlen_k=256, head_dim=128),
        replace(shape, name="short-dead-200x1024-d40", seqlen_q=200, seqlen_k=1024, head_dim=40, dtype=torch.bfloat16),
    ]


def _values() -> list[Case]:
    """Scores whose maxima lie far apart, so that what the blocks of a cluster found weighs unequally."""
    shape = Case(name="", seqlen_q=130, seqlen_k=197)
    long = replace(shape, seqlen_q=65, seqlen_k=1000)
    cases = []
    for name, dtype in HALF.items():
        cases += [
            replace(shape, name=f"short-large-{name}", dtype=dtype, distribution="large"),
            replace(long, name=f"short-large-causal-{name}", dtype=dtype, distribution="large", causal=True),
            replace(shape, name=f"short-rising-causal-{name}", dtype=dtype, distribution="rising", causal=True),
            replace(long, name=f"short-rising-{name}", dtype=dtype, distribution="rising"),
            replace(long, name=f"short-constant-{name}", dtype=dtype, distribution="constant"),
            replace(shape, name=f"short-scale-uneven-{name}", dtype=dtype, scale=0.3, head_dim=40),
        ]
    return [
        *cases,
        replace(shape, name="short-scale-zero", scale=0.0),
        replace(shape, name="short-scale-negative", scale=-0.125),
        replace(shape, name="short-scale-negative-causal", scale=-0.5, causal=True, dtype=torch.bfloat16),
    ]
