"""Cases that between them reach every binary of the shipped set: each dtype, head dim and feature, with few rows and with
many, with few keys and with many, because the planner takes other tiles for these. Evidence demands that none is left out
(flashcore.evidence)."""

from dataclasses import replace

import torch

from flashcore.verify.cases import Case, MaskCase

GIB = 2**30
# Enough rows for the "many" tiles on a GPU of up to 140 multiprocessors (2 * 128 rows each).
MANY = {"batch": 2, "heads_q": 36, "heads_k": 12, "seqlen_q": 499, "seqlen_k": 577}
# Enough keys, and tiles for a GPU of up to 140 multiprocessors, for what the kernel for Hopper takes for long sequences
# (LONG and `wide_fill` in kernels/hopper/config.py).
LONG = {"batch": 2, "heads_q": 36, "heads_k": 12, "seqlen_q": 333, "seqlen_k": 2111, "needs_bytes": 8 * GIB}
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


def shipped_cases() -> list[Case]:
    """All of them; those with many rows or keys are for GPUs only."""
    cases = []
    for name, dtype in HALF.items():
        for head_dim in (64, 128, 256):
            # 5/8 of the block: a head dim that is masked at its end, and still allows 16-byte loads
            partial = head_dim * 5 // 8
            exact = Case(name=f"shipped-{name}-d{head_dim}", dtype=dtype, head_dim=head_dim, seqlen_q=197, seqlen_k=333)
            plain = [
                exact,
                replace(exact, name=f"{exact.name}-causal", causal=True),
                replace(exact, name=f"{exact.name}-window", window=(100, 30)),
            ]
            cases += plain
            cases += [
                # mypy does not match a dict of ints with replace's keywords
                replace(case, name=f"{case.name}-many", needs_bytes=4 * GIB, **MANY)  # type: ignore[arg-type]
                for case in plain
            ]
            if head_dim == 64:
                # as above
                # LONG's values are ints, of fields that take ints
                cases += [replace(case, name=f"{case.name}-long", **LONG) for case in plain[:2]]  # type: ignore[arg-type]
            cases += [
                replace(exact, name=f"{exact.name}-partial", head_dim=partial),
                replace(exact, name=f"{exact.name}-softcap", softcap=20.0),
                replace(exact, name=f"{exact.name}-mask-bool", mask=MaskCase("bool_empty_rows")),
                replace(exact, name=f"{exact.name}-mask-add", mask=MaskCase("add_empty_rows", dtype=dtype)),
            ]
    cases += [
        Case(name=f"shipped-fp32-d{d}", dtype=torch.float32, head_dim=d, heads_q=1, heads_k=1, seqlen_q=67, seqlen_k=131)
        for d in (64, 128, 256)
    ]
    return cases
