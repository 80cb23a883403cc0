"""The edge cases: every way found so far in which an attention kernel goes wrong, one or a few small cases each.

Small on purpose: but for the last group, Triton's interpreter does each in a second or two.
"""

from dataclasses import replace

import torch

from flashcore.verify.cases import Case, MaskCase, Storage

LENGTHS = (1, 17, 33, 197, 513, 1000)
GIB = 2**30
HALF_TYPES = (torch.float16, torch.bfloat16)
ALL_TYPES = (torch.float16, torch.bfloat16, torch.float32)


def edge_cases() -> list[Case]:
    """All of them, by group; names are unique and begin with their group's."""
    return [
        *_lengths(),
        *_heads(),
        *_head_dims(),
        *_dtypes(),
        *_storages(),
        *_empty(),
        *_values(),
        *_causal_and_windows(),
        *_masks(),
        *_mask_broadcasts(),
        *_dead_keys(),
        *_sdpa_entry(),
        *_past_int32(),
    ]


def _short(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.bool: "bool"}[dtype]


def _lengths() -> list[Case]:
    cases = []
    for seqlen_q in LENGTHS:
        for seqlen_k in LENGTHS:
            # One head where it is long; causal on alternate pairs, so that both meet every length.
            heads = 1 if max(seqlen_q, seqlen_k) > 500 else 2
            causal = (LENGTHS.index(seqlen_q) + LENGTHS.index(seqlen_k)) % 2 == 1
            cases.append(
                Case(
                    name=f"length-{seqlen_q}x{seqlen_k}{'-causal' if causal else ''}",
                    heads_q=heads,
                    heads_k=heads,
                    seqlen_q=seqlen_q,
                    seqlen_k=seqlen_k,
                    causal=causal,
                    seed=seqlen_q,
                )
            )
    cases.append(Case(name="length-1000x1000-causal", heads_q=1, heads_k=1, seqlen_q=1000, seqlen_k=1000, causal=True))
    return cases


def _heads() -> list[Case]:
    gqa = Case(name="", heads_q=32, heads_k=8, seqlen_q=33, seqlen_k=65)
    return [
        replace(gqa, name="heads-gqa-32-8"),
        replace(gqa, name="heads-gqa-32-8-causal-bhsd", causal=True, layout="bhsd"),
        replace(gqa, name="heads-gqa-32-8-bf16", dtype=torch.bfloat16, head_dim=128),
        Case(name="heads-mqa-8-1", heads_q=8, heads_k=1, seqlen_q=33, seqlen_k=65),
        Case(name="heads-gqa-6-2-mask", batch=2, heads_q=6, heads_k=2, seqlen_q=33, seqlen_k=65, mask=MaskCase("bool")),
        Case(name="heads-odd-7", batch=3, heads_q=7, heads_k=7, seqlen_q=17, seqlen_k=33),
    ]


def _head_dims() -> list[Case]:
    shape = Case(name="", heads_q=1, heads_k=1, seqlen_q=67, seqlen_k=131)
    cases = [
        replace(shape, name=f"dim-{d}-{_short(dtype)}", head_dim=d, dtype=dtype, causal=dtype != torch.float16)
        for d in (1, 8, 16, 32, 33, 40, 64, 72, 80, 96, 111, 128, 160, 192, 256)
        for dtype in HALF_TYPES
    ]
    cases += [
        replace(shape, name=f"dim-{d}-fp32", head_dim=d, dtype=torch.float32, causal=True)
        for d in (1, 33, 40, 64, 96, 128, 192, 256)
    ]
    for d, dim_v in ((192, 128), (64, 128), (128, 64), (40, 24), (256, 1), (1, 256), (33, 65)):
        for dtype in HALF_TYPES:
            name = f"dim-{d}-v{dim_v}-{_short(dtype)}"
            cases.append(replace(shape, name=name, head_dim=d, head_dim_v=dim_v, dtype=dtype))
    return cases


def _dtypes() -> list[Case]:
    shape = Case(name="", heads_q=1, heads_k=1, seqlen_q=129, seqlen_k=197)
    return [
        *(replace(shape, name=f"dtype-{_short(t)}", dtype=t) for t in ALL_TYPES),
        *(replace(shape, name=f"dtype-{_short(t)}-causal", dtype=t, causal=True) for t in ALL_TYPES),
        *(replace(shape, name=f"dtype-{_short(t)}-softcap", dtype=t, softcap=15.0) for t in ALL_TYPES),
        *(replace(shape, name=f"dtype-{_short(t)}-bhsd", dtype=t, layout="bhsd", head_dim=128) for t in ALL_TYPES),
    ]


def _storages() -> list[Case]:
    shape = Case(name="", batch=2, seqlen_q=67, seqlen_k=67)
    cases = []
    storage: Storage
    for storage in ("contiguous", "transposed", "strided", "packed", "unaligned", "padded", "expanded"):
        for layout in ("bshd", "bhsd"):
            cases.append(replace(shape, name=f"storage-{storage}-{layout}", storage=storage, layout=layout))
    for dtype in (torch.bfloat16, torch.float32):
        for storage in ("strided", "unaligned", "padded"):
            cases.append(replace(shape, name=f"storage-{storage}-{_short(dtype)}", storage=storage, dtype=dtype, head_dim=80))
    cases += [
        replace(shape, name="storage-padded-causal", storage="padded", causal=True, head_dim=40),
        replace(shape, name="storage-padded-window", storage="padded", window=(20, 3), head_dim=33),
        replace(shape, name="storage-padded-no-lse", storage="padded", return_lse=False),
        replace(shape, name="storage-unaligned-no-lse", storage="unaligned", return_lse=False, causal=True),
    ]
    return cases


def _empty() -> list[Case]:
    return [
        Case(name="empty-keys", seqlen_q=33, seqlen_k=0),
        Case(name="empty-keys-causal-bhsd", seqlen_q=33, seqlen_k=0, causal=True, layout="bhsd"),
        Case(name="empty-keys-no-lse", seqlen_q=33, seqlen_k=0, return_lse=False),
        Case(name="empty-queries", seqlen_q=0, seqlen_k=33),
        Case(name="empty-both", seqlen_q=0, seqlen_k=0),
        Case(name="empty-batch", batch=0, seqlen_q=33, seqlen_k=33),
        Case(name="empty-keys-mask", seqlen_q=33, seqlen_k=0, mask=MaskCase("bool")),
    ]


def _values() -> list[Case]:
    shape = Case(name="", heads_q=1, heads_k=1, seqlen_q=130, seqlen_k=197)
    cases = []
    for dtype in ALL_TYPES:
        cases += [
            replace(shape, name=f"large-logits-{_short(dtype)}", dtype=dtype, distribution="large"),
            replace(shape, name=f"large-logits-causal-{_short(dtype)}", dtype=dtype, distribution="large", causal=True),
            replace(shape, name=f"rising-logits-{_short(dtype)}", dtype=dtype, distribution="rising"),
            replace(shape, name=f"constant-logits-{_short(dtype)}", dtype=dtype, distribution="constant"),
            replace(shape, name=f"scale-negative-{_short(dtype)}", dtype=dtype, scale=-0.125),
            replace(shape, name=f"scale-zero-{_short(dtype)}", dtype=dtype, scale=0.0),
            # 1/sqrt(40) is no power of two: a scale rounded into a half q shows in the LSE.
            replace(shape, name=f"scale-uneven-{_short(dtype)}", dtype=dtype, scale=0.3, head_dim=40),
        ]
    cases += [
        replace(shape, name="scale-negative-causal", scale=-0.5, causal=True),
        replace(shape, name="scale-negative-window", scale=-0.5, window=(33, 5)),
        Case(name="scale-zero-causal", seqlen_q=197, seqlen_k=130, scale=0.0, causal=True),
        replace(shape, name="scale-negative-large-logits", scale=-0.125, distribution="large"),
        replace(shape, name="softcap-large-logits", softcap=20.0, distribution="large"),
        replace(shape, name="softcap-small", softcap=0.5),
        replace(shape, name="softcap-causal", softcap=5.0, causal=True),
        replace(shape, name="softcap-window", softcap=5.0, window=(50, 10)),
        replace(shape, name="softcap-mask-add", softcap=2.0, mask=MaskCase("add")),
        replace(shape, name="softcap-mask-bool", softcap=2.0, mask=MaskCase("bool_empty_rows")),
        replace(shape, name="softcap-negative-scale", softcap=2.0, scale=-0.25),
    ]
    return cases


def _causal_and_windows() -> list[Case]:
    cases = []
    for seqlen_q, seqlen_k in ((33, 197), (197, 33), (130, 130), (1, 197), (197, 1)):
        lengths = Case(name="", seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        cases.append(replace(lengths, name=f"causal-{seqlen_q}x{seqlen_k}", causal=True, dtype=torch.bfloat16))
        for left, right in ((0, 0), (-1, 0), (0, -1), (16, 16), (64, -1), (-1, 7), (1000, 1000), (-1, -1), (5, 40)):
            name = f"window-{left}.{right}-{seqlen_q}x{seqlen_k}"
            cases.append(replace(lengths, name=name, window=(left, right), heads_q=1, heads_k=1))
            if left >= 0:
                cases.append(replace(lengths, name=f"{name}-causal", window=(left, right), causal=True, heads_q=1, heads_k=1))
    return cases


def _masks() -> list[Case]:
    shape = Case(name="", heads_q=1, heads_k=1, seqlen_q=67, seqlen_k=131)
    cases = [
        replace(shape, name=f"mask-{kind}", mask=MaskCase(kind))
        for kind in ("bool", "bool_empty_rows", "bool_padding", "bool_none")
    ]
    for kind in (
        "add",
        "add_empty_rows",
        "add_padding",
        "add_none",
        "add_low",
        "add_lowest",
        "add_lows",
        "add_low_keys",
    ):
        for dtype in ALL_TYPES:
            if kind in ("add_low", "add_low_keys") and dtype == torch.float16:
                continue  # -1e30 is -inf in float16
            cases.append(replace(shape, name=f"mask-{kind}-{_short(dtype)}", dtype=dtype, mask=MaskCase(kind)))
        cases.append(replace(shape, name=f"mask-{kind}-fp32-on-fp16", mask=MaskCase(kind, dtype=torch.float32)))
    square = Case(name="", heads_q=1, heads_k=1, seqlen_q=130, seqlen_k=130)
    cases += [
        replace(square, name="mask-bool-causal", causal=True, mask=MaskCase("bool")),
        Case(name="mask-bool-causal-197x33", seqlen_q=197, seqlen_k=33, causal=True, mask=MaskCase("bool")),
        replace(square, name="mask-add-causal-bf16", causal=True, mask=MaskCase("add"), dtype=torch.bfloat16),
        replace(square, name="mask-bool-window", window=(20, 9), mask=MaskCase("bool_empty_rows")),
        replace(square, name="mask-add-window-causal", window=(20, 9), causal=True, mask=MaskCase("add_empty_rows")),
        replace(square, name="mask-add-low-causal-fp32", causal=True, mask=MaskCase("add_lowest"), dtype=torch.float32),
        replace(square, name="mask-add-large-logits", distribution="large", mask=MaskCase("add")),
        replace(square, name="mask-add-negative-scale", scale=-0.3, mask=MaskCase("add")),
        replace(shape, name="mask-bool-bhsd-batch3", batch=3, heads_q=2, heads_k=2, layout="bhsd", mask=MaskCase("bool")),
    ]
    return cases


def _mask_broadcasts() -> list[Case]:
    """Every combination of broadcast dimensions; bool ones have size 1 there, additive ones full size and stride 0."""
    cases = []
    for bits in range(16):
        dims = "".join(d for i, d in enumerate("bhqk") if bits >> i & 1)
        shape = Case(name="", batch=2, seqlen_q=33, seqlen_k=65, layout="bhsd" if bits % 2 else "bshd")
        cases += [
            replace(shape, name=f"mask-dims-{dims or 'none'}-bool", mask=MaskCase("bool_empty_rows", dims)),
            replace(shape, name=f"mask-dims-{dims or 'none'}-add", mask=MaskCase("add", dims, expanded=True)),
        ]
    return cases


def _dead_keys() -> list[Case]:
    """Keys and values that no query may attend, holding NaN and inf: they never reach an output."""
    shape = Case(name="", heads_q=1, heads_k=1, seqlen_q=67, seqlen_k=197, dead_nan=True)
    cases = []
    for dtype in ALL_TYPES:
        cases += [
            replace(shape, name=f"dead-mask-bool-{_short(dtype)}", dtype=dtype, mask=MaskCase("bool_padding")),
            replace(shape, name=f"dead-mask-add-{_short(dtype)}", dtype=dtype, mask=MaskCase("add_padding")),
            replace(shape, name=f"dead-window-{_short(dtype)}", dtype=dtype, window=(8, 8)),
        ]
    cases += [
        replace(shape, name="dead-window-causal", window=(8, -1), causal=True),
        Case(name="dead-window-future", seqlen_q=17, seqlen_k=197, dead_nan=True, window=(100, 0), layout="bhsd"),
        replace(shape, name="dead-everything", mask=MaskCase("bool_none")),
        replace(shape, name="dead-everything-add", mask=MaskCase("add_none")),
        replace(shape, name="dead-mask-key-broadcast", mask=MaskCase("bool_padding", "k")),
        replace(shape, name="dead-mask-batch-key", batch=2, mask=MaskCase("add_padding", "bk", expanded=True)),
        replace(shape, name="dead-mask-gqa", heads_q=4, heads_k=2, mask=MaskCase("bool_padding")),
        replace(shape, name="dead-mask-softcap", softcap=5.0, mask=MaskCase("bool_padding")),
        replace(shape, name="dead-mask-window", window=(30, 30), mask=MaskCase("bool_padding")),
        replace(shape, name="dead-mask-padded", storage="padded", mask=MaskCase("bool_padding")),
        Case(name="dead-padded-lengths", seqlen_q=67, seqlen_k=131, storage="padded", head_dim=96, causal=True),
    ]
    return cases


def _sdpa_entry() -> list[Case]:
    """torch's signature: (B,H,S,D), is_causal aligned top-left, no LSE."""
    cases = []
    for seqlen_q, seqlen_k in ((33, 197), (197, 33), (130, 130)):
        lengths = Case(name="", seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        for dtype in ALL_TYPES:
            name = f"{seqlen_q}x{seqlen_k}-{_short(dtype)}"
            cases += [
                replace(lengths, name=f"sdpa-causal-{name}", dtype=dtype, causal=True),
                replace(lengths, name=f"sdpa-mask-bool-{name}", dtype=dtype, mask=MaskCase("bool", "qk")),
            ]
    shape = Case(name="", seqlen_q=67, seqlen_k=131)
    cases += [
        replace(shape, name="sdpa-plain", batch=2),
        replace(shape, name="sdpa-gqa", heads_q=8),
        replace(shape, name="sdpa-mask-add", mask=MaskCase("add")),
        replace(shape, name="sdpa-scale", scale=0.5, head_dim=40),
        replace(shape, name="sdpa-causal-dead", causal=True, dead_nan=True),
    ]
    return [replace(case, entry="sdpa", layout="bhsd", return_lse=False) for case in cases]


def _past_int32() -> list[Case]:
    """Offsets past 2^31 elements, which 32-bit address arithmetic cannot reach. Little is computed; much is spanned."""
    span = Case(name="", heads_q=1, heads_k=1, needs_bytes=8 * GIB)
    return [
        replace(span, name="far-batch", batch=3, seqlen_q=65, seqlen_k=129, storage="far_batch"),
        replace(
            span,
            name="far-batch-bhsd-causal",
            batch=3,
            seqlen_q=65,
            seqlen_k=65,
            storage="far_batch",
            layout="bhsd",
            causal=True,
        ),
        replace(span, name="far-sequence", seqlen_q=129, seqlen_k=129, storage="far_sequence"),
        replace(span, name="far-sequence-bhsd", seqlen_q=129, seqlen_k=193, storage="far_sequence", layout="bhsd"),
        # 33 * 2^20 * 64 elements of output, whose every batch entry is the same.
        Case(
            name="far-output",
            batch=33,
            heads_q=1,
            heads_k=1,
            seqlen_q=2**20,
            seqlen_k=17,
            storage="expanded",
            needs_bytes=32 * GIB,
        ),
    ]
