"""Cases of what only a backward pass shows: which gradients are wanted, what comes in, what must be summed and what left out;
and cases that between them reach every backward binary of the shipped set.

Training asks for no log-sum-exp, so these have none unless they are about its gradient.
"""

from dataclasses import replace

import torch

from flashcore.verify.cases import Case, MaskCase

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
GIB = 2**30
# Enough rows and keys for several blocks a multiprocessor of a GPU of up to 140, and for rings to come round.
MANY = {"batch": 2, "heads_q": 24, "heads_k": 12, "seqlen_q": 1157, "seqlen_k": 1285, "needs_bytes": 8 * GIB}


def backward_cases() -> list[Case]:
    """All of them, by group; those with many rows and keys are for GPUs only."""
    cases = [*_wanted(), *_log_sum_exp(), *_sums(), *_empty_rows(), *_lengths(), *_masks(), *_softcap()]
    return [*cases, *_shipped()]


def _wanted() -> list[Case]:
    shape = Case(name="", heads_q=4, heads_k=2, seqlen_q=67, seqlen_k=131, return_lse=False)
    return [
        replace(shape, name="backward-only-dq", wrt="q", causal=True),
        replace(shape, name="backward-only-dkv", wrt="kv", causal=True),
        replace(shape, name="backward-only-dkv-lse", wrt="kv", return_lse=True, dtype=torch.bfloat16),
        replace(shape, name="backward-fixed-mask", wrt="qkv", mask=MaskCase("add_empty_rows")),
    ]


def _log_sum_exp() -> list[Case]:
    """The log-sum-exp's gradient comes in, at every head dim with tiles of its own."""
    shape = Case(name="", heads_q=4, heads_k=2, seqlen_q=197, seqlen_k=197)
    return [
        replace(shape, name=f"backward-lse-d{d}-{name}", head_dim=d, dtype=dtype, causal=causal)
        for d in (64, 96, 128, 256)
        for (name, dtype), causal in zip(HALF.items(), (False, True), strict=True)
    ]


def _sums() -> list[Case]:
    """Heads of a group, summed: as many as there are, and one more key head's beside them."""
    shape = Case(name="", seqlen_q=197, seqlen_k=333, return_lse=False)
    return [
        replace(
            shape, name=f"backward-gqa-{heads}-{of}-{name}", heads_q=heads, heads_k=of, dtype=dtype, head_dim=d, causal=True
        )
        for heads, of in ((8, 2), (7, 1), (6, 3))
        for d, (name, dtype) in zip((64, 128), HALF.items(), strict=True)
    ]


def _empty_rows() -> list[Case]:
    """Rows that attend nothing, whole tiles of them among these, with NaN in them and in what comes in for them."""
    shape = Case(name="", seqlen_q=397, seqlen_k=133, return_lse=False, dead_rows=True)
    cases = []
    for name, dtype in (*HALF.items(), ("fp32", torch.float32)):
        cases += [
            replace(shape, name=f"backward-dead-rows-causal-{name}", dtype=dtype, causal=True, return_lse=True),
            replace(shape, name=f"backward-dead-rows-window-{name}", dtype=dtype, window=(20, 3)),
            replace(shape, name=f"backward-dead-rows-mask-{name}", dtype=dtype, seqlen_q=67, mask=MaskCase("bool_empty_rows")),
        ]
    return [
        *cases,
        replace(shape, name="backward-dead-rows-causal-d128-bhsd", causal=True, head_dim=128, layout="bhsd"),
        replace(shape, name="backward-dead-rows-gqa", causal=True, heads_q=6, heads_k=2),
        replace(shape, name="backward-dead-rows-softcap-causal", causal=True, softcap=5.0, return_lse=True),
        replace(shape, name="backward-dead-rows-softcap-window", window=(20, 3), softcap=5.0, head_dim=128),
        replace(shape, name="backward-dead-rows-add", seqlen_q=67, mask=MaskCase("add_empty_rows")),
        replace(shape, name="backward-dead-keys-and-rows", seqlen_q=67, mask=MaskCase("bool_none"), dead_nan=True),
    ]


def _lengths() -> list[Case]:
    """Around the edges of tiles of 64 and 128 rows and keys, where the one that is cut is not the forward's."""
    return [
        Case(
            name=f"backward-{q}x{k}-d{d}-{name}{'-causal' if causal else ''}",
            heads_q=3,
            heads_k=3,
            seqlen_q=q,
            seqlen_k=k,
            head_dim=d,
            dtype=dtype,
            causal=causal,
            return_lse=False,
        )
        for number, (q, k) in enumerate(
            ((1, 1), (64, 64), (63, 129), (129, 63), (128, 128), (127, 257), (257, 127), (65, 1), (1, 65), (385, 321))
        )
        for d, (name, dtype) in zip((64, 128), HALF.items(), strict=True)
        for causal in (bool(number % 2), not number % 2)
    ]


def _masks() -> list[Case]:
    """The mask's gradient summed over many blocks of what it broadcasts along."""
    shape = Case(name="", batch=2, heads_q=6, heads_k=2, seqlen_q=197, seqlen_k=333, return_lse=False)
    return [
        replace(shape, name=f"backward-mask-{dims or 'none'}", mask=MaskCase("add", dims), dtype=dtype)
        for dims, dtype in (
            ("", torch.float32),
            ("k", torch.float16),
            ("q", torch.bfloat16),
            ("hqk", torch.float16),
            ("qk", torch.bfloat16),
        )
    ]


def _softcap() -> list[Case]:
    """Its derivative, at every head dim with tiles of its own; scores of several times the cap."""
    shape = Case(name="", heads_q=4, heads_k=2, seqlen_q=197, seqlen_k=333, softcap=1.5, scale=0.5, return_lse=False)
    return [
        replace(shape, name=f"backward-softcap-{dims}-{name}", head_dim=d, head_dim_v=dv, dtype=dtype, causal=causal)
        for dims, d, dv in (("d64", 64, 64), ("d96", 96, 96), ("d128", 128, 128), ("d192v128", 192, 128), ("d256", 256, 256))
        for (name, dtype), causal in zip(HALF.items(), (True, False), strict=True)
    ]


def _shipped() -> list[Case]:
    cases = []
    for name, dtype in HALF.items():
        for head_dim in (64, 128):
            exact = Case(name=f"backward-shipped-{name}-d{head_dim}", dtype=dtype, head_dim=head_dim, return_lse=False)
            exact = replace(exact, heads_q=4, heads_k=2, seqlen_q=197, seqlen_k=333)
            plain = [
                exact,
                replace(exact, name=f"{exact.name}-causal", causal=True),
                replace(exact, name=f"{exact.name}-window", window=(100, 30)),
                replace(exact, name=f"{exact.name}-lse", return_lse=True),
                replace(exact, name=f"{exact.name}-softcap", softcap=20.0),
            ]
            # mypy does not match a dict of ints with replace's keywords
            # MANY's values are ints, of fields that take ints
            cases += [*plain, *(replace(case, name=f"{case.name}-many", **MANY) for case in plain)]  # type: ignore[arg-type]
            # made apart, by other binaries than all three together
            apart = [case for case in plain if not case.causal and not case.return_lse]
            cases += [replace(case, name=f"{case.name}-only-dq", wrt="q") for case in apart]
            cases += [replace(case, name=f"{case.name}-only-dkv", wrt="kv") for case in apart]
        for head_dim, head_dim_v in ((192, 128), (256, 256)):
            exact = Case(name=f"backward-shipped-{name}-d{head_dim}v{head_dim_v}", dtype=dtype, return_lse=False)
            exact = replace(exact, head_dim=head_dim, head_dim_v=head_dim_v, heads_q=4, heads_k=2, seqlen_q=197, seqlen_k=333)
            causal = replace(exact, name=f"{exact.name}-causal-many", causal=True, **MANY)  # type: ignore[arg-type]  # MANY is of ints
            cases += [exact, replace(exact, name=f"{exact.name}-window", window=(100, 30)), causal]
    return cases
