"""`flashcore info`: what this machine can run, and how far each binary is backed."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add `flashcore info`."""
    app.command()(info)


def info() -> None:
    """The device, the software, where binaries come from, and the evidence for each."""
    import torch
    from rich.console import Console
    from rich.table import Table

    import flashcore
    from flashcore import evidence
    from flashcore.build.compile import triton_version
    from flashcore.kernels.registry import KERNELS, SHIPPED_ARCHS, shipped_set
    from flashcore.runtime.fast_path import ways
    from flashcore.runtime.store import cache_folder, locate
    from flashcore.sources import kernel_hash
    from flashcore.target import SHARED_MEMORY_LIMIT, Target

    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    target = Target.of(device)
    facts = {
        "flashcore": flashcore.__version__,
        "torch": torch.__version__,
        "triton": triton_version() or "not installed: only shipped binaries run",
        "eager calls": ways(device),
        "device": f"{target.name}, {target.arch or 'no kernel of ours runs on it, but for the interpreter'}",
        "cache": str(cache_folder()),
        "shipped for": ", ".join(SHIPPED_ARCHS),
        "evidence of": ", ".join(f"{index.gpu} ({len(index.verified)} binaries)" for index in evidence.indexes()) or "no GPU",
    }
    for name, fact in facts.items():
        console.print(f"{name:12s} {fact}", markup=False)
    for kernel in KERNELS.values():
        if kernel.computes:
            archs = "every arch" if kernel.archs == tuple(SHARED_MEMORY_LIMIT) else ", ".join(kernel.archs)
            console.print(f"{'kernel':12s} {kernel.id}, for {archs}, source {kernel_hash(kernel.id)[:16]}", markup=False)
    # without a GPU, what a wheel holds for the one that there is evidence of
    shown = target if target.arch else Target(target.name, SHIPPED_ARCHS[-1], None, 0, False)
    arch = shown.arch or SHIPPED_ARCHS[-1]
    table = Table(title=f"binaries for {arch}", title_justify="left")
    for column in ("kernel", "from", "evidence"):
        table.add_column(column)
    for specialisation in shipped_set(arch):
        if not KERNELS[specialisation.kernel].computes:
            continue
        location = locate(specialisation, arch)
        sha256 = location.info.sha256 if location and location.info else None
        state = evidence.state(specialisation.kernel, sha256, shown)
        table.add_row(specialisation.name, location.origin if location else "nowhere", state)
    console.print(table)
