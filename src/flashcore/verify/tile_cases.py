"""Cases for kernels of large tiles fed by TMA and of persistent blocks: what lies at a tile's edges, and many tiles.

Every feature meets every head dim that has tiles of its own and both half dtypes; lengths lie around the multiples of 64,
128 and 192 rows and keys that tiles are made of. No case has a mask, an unaligned tensor or a scale that is not positive,
which such a kernel may refuse.
"""

from dataclasses import replace

import torch

from flashcore.verify.cases import Case

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
# q's and v's head dims
DIMS = ((64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128))
# These are loaded into the tiles of the next larger one.
BETWEEN_DIMS = (40, 72, 80, 104, 160, 200)
QUERIES = (1, 17, 33, 64, 65, 127, 128, 129, 191, 192, 193, 197, 513)
KEYS = (1, 17, 63, 64, 65, 127, 128, 129, 197, 333, 513, 1000)
GIB = 2**30


def tile_cases() -> list[Case]:
    """All of them, by group; those with many tiles and with huge strides are for GPUs only."""
    return [*_lengths(), *_features(), *_between(), *_many_tiles(), *_past_int32()]


def _each_dim(prefix: str, templates: tuple[Case, ...]) -> list[Case]:
    """Each template, which a feature names, at each pair of head dims; dtypes alternate, so that both meet all of both."""
    cases: list[Case] = []
    for row, (head_dim, dim_v) in enumerate(DIMS):
        for column, template in enumerate(templates):
            dtype_name = tuple(HALF)[(row + column) % 2]
            # what one buffer holds has one head dim
            storage = "strided" if template.storage == "packed" and head_dim != dim_v else template.storage
            cases.append(
                replace(
                    template,
                    name=f"{prefix}-{template.name}-{_dims_name(head_dim, dim_v)}-{dtype_name}",
                    head_dim=head_dim,
                    head_dim_v=dim_v,
                    dtype=HALF[dtype_name],
                    storage=storage,
                    seed=len(cases),
                )
            )
    return cases


def _dims_name(head_dim: int, dim_v: int) -> str:
    return f"d{head_dim}" if head_dim == dim_v else f"d{head_dim}v{dim_v}"


def _lengths() -> list[Case]:
    """Every length of queries and every length of keys at every head dim, paired differently at each."""
    cases = []
    for row, (head_dim, dim_v) in enumerate(DIMS):
        for column, seqlen_q in enumerate(QUERIES):
            seqlen_k = KEYS[(column + 2 * row) % len(KEYS)]
            dtype_name = tuple(HALF)[(row + column) % 2]
            causal = (row + column // 2) % 2 == 1
            dims = _dims_name(head_dim, dim_v)
            cases.append(
                Case(
                    name=f"tile-{seqlen_q}x{seqlen_k}{'-causal' if causal else ''}-{dims}-{dtype_name}",
                    seqlen_q=seqlen_q,
                    seqlen_k=seqlen_k,
                    head_dim=head_dim,
                    head_dim_v=dim_v,
                    dtype=HALF[dtype_name],
                    causal=causal,
                    seed=column,
                )
            )
    return cases


def _features() -> list[Case]:
    base = Case(name="", seqlen_q=129, seqlen_k=197)
    long = replace(base, seqlen_q=197, seqlen_k=513)
    square = replace(base, seqlen_q=257, seqlen_k=257)
    # more queries than keys: under causal and a right window the first rows attend nothing
    tall = replace(base, seqlen_q=333, seqlen_k=130)
    bhsd = replace(base, layout="bhsd")
    templates = (
        replace(base, name="plain"),
        replace(bhsd, name="plain-bhsd-no-lse", return_lse=False, batch=3, heads_q=7, heads_k=7),
        replace(square, name="causal-square", causal=True),
        replace(long, name="causal-long-keys", causal=True),
        replace(tall, name="causal-empty-rows", causal=True),
        replace(square, name="causal-bhsd-no-lse", causal=True, layout="bhsd", return_lse=False),
        replace(long, name="window-100.30", window=(100, 30)),
        replace(square, name="window-0.0", window=(0, 0)),
        replace(long, name="window-open.5", window=(-1, 5)),
        replace(square, name="window-5.open", window=(5, -1), layout="bhsd"),
        replace(long, name="window-3.200", window=(3, 200)),
        replace(square, name="window-70-causal", window=(70, -1), causal=True),
        replace(tall, name="window-empty-rows", window=(10, 5)),
        replace(tall, name="window-wide-empty-rows", window=(300, 40), layout="bhsd"),
        replace(base, name="softcap", softcap=20.0),
        replace(square, name="softcap-causal", softcap=5.0, causal=True, distribution="large"),
        replace(long, name="softcap-window", softcap=2.0, window=(60, 9)),
        replace(base, name="gqa-causal", causal=True, batch=2, heads_q=8, heads_k=2),
        replace(bhsd, name="gqa-bhsd", batch=3, heads_q=6, heads_k=2),
        replace(base, name="mqa-window", heads_q=5, heads_k=1, window=(40, 70)),
        replace(base, name="mqa-one-query", heads_q=12, heads_k=1, batch=2, seqlen_q=1, seqlen_k=1000, causal=True),
        replace(base, name="transposed", batch=2, heads_q=4, storage="transposed"),
        replace(bhsd, name="transposed-bhsd-causal", batch=2, storage="transposed", causal=True),
        replace(square, name="packed", batch=2, heads_q=3, heads_k=3, storage="packed"),
        replace(square, name="packed-bhsd-causal", batch=2, storage="packed", causal=True, layout="bhsd"),
        replace(base, name="strided-gqa", batch=2, heads_q=4, storage="strided"),
        # NaN beyond the lengths, between the heads and past the head dim
        replace(base, name="padded", batch=2, storage="padded"),
        replace(tall, name="padded-causal-bhsd", storage="padded", causal=True, layout="bhsd"),
        replace(long, name="padded-window", storage="padded", window=(100, 30)),
        # NaN in keys that nobody attends, in the same tile as keys that somebody does
        replace(base, name="dead-window", seqlen_q=67, window=(8, 8), dead_nan=True),
        replace(long, name="rising-causal", distribution="rising", causal=True),
        replace(base, name="large-logits", distribution="large"),
        replace(base, name="constant-scale", distribution="constant", scale=0.3),
    )
    return _each_dim("feature", templates)


def _between() -> list[Case]:
    """Head dims that fill no tile: the rest of the tile must count as zero, whatever lies beyond in memory."""
    base = Case(name="", batch=2, heads_q=4, heads_k=2, seqlen_q=130, seqlen_k=197)
    templates = (
        replace(base, name="padded", storage="padded"),
        replace(base, name="padded-causal", storage="padded", causal=True, layout="bhsd"),
        replace(base, name="window", window=(60, 20)),
        replace(base, name="softcap-causal", softcap=10.0, causal=True),
    )
    return [
        replace(
            template,
            name=f"between-{template.name}-d{head_dim}-{dtype_name}",
            head_dim=head_dim,
            dtype=HALF[dtype_name],
            seed=head_dim,
        )
        for row, head_dim in enumerate(BETWEEN_DIMS)
        for column, template in enumerate(templates)
        for dtype_name in (tuple(HALF)[(row + column) % 2],)
    ]


def _many_tiles() -> list[Case]:
    """More tiles than four times a GPU's 132 multiprocessors, so that each block of a persistent kernel takes several."""
    odd = Case(name="", batch=3, heads_q=45, heads_k=9, seqlen_q=641, seqlen_k=641, needs_bytes=2 * GIB)
    cases = _each_dim(
        "many",
        (
            replace(odd, name="gqa-causal", causal=True),
            replace(odd, name="gqa-causal-long-keys", causal=True, seqlen_k=777, layout="bhsd", return_lse=False),
            replace(odd, name="mha", heads_k=45, seqlen_k=197, layout="bhsd"),
            replace(odd, name="window", window=(100, 30)),
            replace(odd, name="softcap-empty-rows", softcap=20.0, causal=True, seqlen_k=300),
        ),
    )
    # The heaviest and the lightest tile of causal attention differ most here, and with them the blocks' turns.
    long = Case(name="", batch=3, heads_q=15, heads_k=5, seqlen_q=2617, seqlen_k=2617, causal=True, needs_bytes=6 * GIB)
    return cases + _each_dim("many", (replace(long, name="long-causal"),))


def _past_int32() -> list[Case]:
    """Offsets past 2^31 elements, which edge_cases.py has at head dim 64."""
    span = Case(name="", heads_q=1, heads_k=1, seqlen_q=129, seqlen_k=193, needs_bytes=12 * GIB)
    batch = replace(span, storage="far_batch", batch=3)
    sequence = replace(span, storage="far_sequence")
    return [
        replace(batch, name="far-batch-d128-bf16-causal", head_dim=128, dtype=torch.bfloat16, causal=True),
        replace(batch, name="far-batch-d192v128-fp16", head_dim=192, head_dim_v=128, layout="bhsd"),
        replace(sequence, name="far-sequence-d256-fp16-causal", head_dim=256, causal=True),
        replace(sequence, name="far-sequence-d96-bf16", head_dim=96, dtype=torch.bfloat16, layout="bhsd"),
    ]
