"""Train a small GPT again and again from the same start on the same bytes, with FlashCore's attention and with PyTorch's.

    python examples/train_gpt --steps 300 --out train-gpt.json --plot train-gpt.png

The text is this repository's own: its Python and Markdown files. Everything but attention is the same, so the loss curves must
lie on one another; how far two computations of PyTorch's own stray from each other (its fused kernels and its plain
mathematics) is the yardstick. Tokens per second are of whole training steps.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from model import GPT, Attention, Size
from record import Comparison, Run, plot
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashcore
from flashcore.environment import collect

ROOT = Path(__file__).resolve().parents[2]


def _plain_mathematics(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attentions(impl: str) -> dict[str, Attention]:
    """What is compared, by name; `impl` is FlashCore's."""
    return {
        "SDPA": partial(F.scaled_dot_product_attention, is_causal=True),
        # without return_lse the result is o alone, which the signature cannot say
        "FlashCore": partial(flashcore.attention, causal=True, layout="bhsd", impl=impl),  # type: ignore[dict-item]
        "SDPA, plain mathematics": _plain_mathematics,
    }


def text() -> torch.Tensor:
    """The bytes of this repository's Python and Markdown files, one after the other."""
    kinds = [f"{folder}/**/*.{kind}" for folder in ("src", "tests", "docs") for kind in ("py", "md")]
    paths = sorted(path for kind in kinds for path in ROOT.glob(kind))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in paths)), dtype=torch.uint8)


def batches(data: torch.Tensor, batch: int, context: int, steps: int, seed: int) -> torch.Tensor:
    """(steps, batch, context + 1) bytes from places drawn with the seed."""
    places = torch.randint(len(data) - context, (steps * batch, 1), generator=torch.Generator().manual_seed(seed))
    return data[places + torch.arange(context + 1)].view(steps, batch, context + 1).long()


def train(
    name: str, attention: Attention, size: Size, given: torch.Tensor, seed: int, device: torch.device, progress: Progress
) -> tuple[Run, int]:
    """One run, and the number of the model's parameters."""
    torch.manual_seed(seed)
    model = GPT(size, attention).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), fused=device.type == "cuda")
    losses, times = [], []
    for batch in progress.track(given, description=name):
        tokens = batch.to(device)
        began = _now(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss.item())
        times.append((_now(device) - began) * 1e3)
    return Run(attention=name, losses=losses, step_ms=times), sum(p.numel() for p in model.parameters())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main(
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of each run.")] = 300,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a step: enough for a GPU to set its time.")] = 64,
    context: Annotated[int, typer.Option(min=2, help="Bytes of a sequence.")] = 1024,
    layers: Annotated[int, typer.Option(min=1)] = 6,
    heads: Annotated[int, typer.Option(min=1, help="Heads of 64.")] = 6,
    seed: Annotated[int, typer.Option(help="Of the start and of the batches.")] = 0,
    impl: Annotated[str, typer.Option(help="FlashCore's: auto, or a kernel with a backward pass by name.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Write the JSON record here.")] = None,
    plot_to: Annotated[Path | None, typer.Option("--plot", help="Write the plot (PNG) here.")] = None,
) -> None:
    """Train with each attention and compare losses and tokens per second."""
    console = Console(stderr=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        console.print("No GPU here: FlashCore hands training on a CPU to PyTorch, so this shows that it runs.", style="yellow")
    size = Size(layers, heads, 64 * heads, context)
    data = text()
    given = batches(data, batch, context, steps, seed)
    q = torch.empty(batch, heads, context, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
    plan = str(flashcore.explain(q, q, q, causal=True, layout="bhsd", impl=impl))
    with Progress(console=console) as progress:
        results = [train(name, attention, size, given, seed, device, progress) for name, attention in attentions(impl).items()]
    comparison = Comparison(
        environment=collect(),
        parameters=results[0][1],
        batch=batch,
        context=context,
        heads=heads,
        head_dim=64,
        seed=seed,
        plan=plan,
        runs=[run for run, _ in results],
    )
    _print(comparison, len(data))
    if out is not None:
        comparison.save(out)
    if plot_to is not None:
        plot(comparison, plot_to)


def _print(comparison: Comparison, size: int) -> None:
    table = Table(title=f"{comparison.parameters / 1e6:.1f} million parameters, {size / 1e6:.1f} MB of text, bf16 autocast")
    for column in ("attention", "first loss", "last loss", "ms a step", "tokens per second", "furthest from SDPA's loss"):
        table.add_column(column, justify="left" if column == "attention" else "right")
    for run in comparison.runs:
        table.add_row(
            run.attention,
            f"{run.losses[0]:.4f}",
            f"{run.losses[-1]:.4f}",
            f"{run.median_ms:.2f}",
            f"{comparison.tokens_per_second(run):,.0f}",
            f"{comparison.apart(run.attention, 'SDPA'):.4f}",
        )
    Console().print(table)
    Console().print(comparison.plan, markup=False, highlight=False)


if __name__ == "__main__":
    typer.run(main)
