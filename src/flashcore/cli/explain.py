"""`flashcore explain`: the plan of a call, from its shape alone."""

from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add `flashcore explain`."""
    app.command()(explain)


def explain(
    shape: Annotated[str, typer.Option(help="B,H,S,D; GQA and cross lengths as B,Hq/Hk,Sq/Sk,D.")] = "1,8,512,64",
    dtype: Annotated[str, typer.Option(help="fp16, bf16 or fp32.")] = "fp16",
    causal: Annotated[bool, typer.Option("--causal", help="Bottom-right aligned, as FlashAttention.")] = False,
    window: Annotated[str, typer.Option(help="left,right; -1 is unlimited. Empty: none.")] = "",
    softcap: Annotated[float, typer.Option(help="Cap of the scaled scores; 0: none.")] = 0.0,
    impl: Annotated[str, typer.Option(help="auto, small, hopper, portable or torch.")] = "auto",
    layout: Annotated[str, typer.Option(help="bshd or bhsd.")] = "bshd",
    grad: Annotated[bool, typer.Option("--grad", help="Of a call whose q, k and v need gradients.")] = False,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Bitwise equal gradients from run to run.")] = False,
) -> None:
    """Which kernel a call runs on this machine, why, what was rejected, and the roofline bound."""
    import torch

    import flashcore
    from flashcore import evidence
    from flashcore.bench.shapes import override, parse_shape
    from flashcore.bench.work import roofline
    from flashcore.errors import ArgumentValueError

    (parsed,) = override((parse_shape(shape),), causal=causal, dtype=dtype)
    try:
        sides = tuple(int(side) for side in window.split(",")) if window else None
    except ValueError:
        raise ArgumentValueError(f"--window: got {window!r}; allowed: left,right, two integers >= -1") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def empty(heads: int, length: int, dim: int) -> torch.Tensor:
        size = (parsed.batch, length, heads, dim) if layout == "bshd" else (parsed.batch, heads, length, dim)
        return torch.empty(size, dtype=parsed.torch_dtype, device=device, requires_grad=grad)

    plan = flashcore.explain(
        empty(parsed.heads_q, parsed.seqlen_q, parsed.head_dim),
        empty(parsed.heads_k, parsed.seqlen_k, parsed.head_dim),
        empty(parsed.heads_k, parsed.seqlen_k, parsed.head_dim_v),
        causal=causal,
        window=sides,
        softcap=softcap,
        impl=impl,
        layout=layout,
        deterministic=deterministic or None,
    )
    typer.echo(f"device      {torch.cuda.get_device_name() if device == 'cuda' else 'cpu'}")
    typer.echo(str(plan))
    peaks = evidence.peaks(torch.cuda.get_device_name()) if device == "cuda" else None
    if peaks is None:
        typer.echo("roofline    unknown: no measured peaks of this device in the evidence")
    else:
        bound = roofline(parsed, peak_tflops=peaks.matrix_tflops[parsed.dtype], peak_tbytes=peaks.copy_tbytes)
        typer.echo(f"roofline    {bound.us:.2f} us forward, set by {bound.limit} (peaks measured on this GPU)")
