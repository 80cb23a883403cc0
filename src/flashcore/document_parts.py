"""What generated blocks have in common: an artifact's place, origin and age, and how a table is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from flashcore import evidence
from flashcore.environment import Environment
from flashcore.kernels.registry import BACKWARDS, KERNELS, LADDER
from flashcore.sources import kernel_hash

NOTHING = "no artifact recorded"


def recorded(name: str) -> list[Path]:
    """The artifacts of that name, one a GPU."""
    return sorted(evidence.FOLDER.glob(f"*/{name}.json"))


def each(name: str, text: Callable[[Path], str]) -> str:
    """The text of each GPU's artifact of that name."""
    paths = recorded(name)
    return "\n\n".join(map(text, paths)) if paths else f"{name}.json: {NOTHING}"


def place(path: Path) -> str:
    """An artifact's place in the repository."""
    return f"src/flashcore/evidence/{path.relative_to(evidence.FOLDER)}"


def origin(path: Path, found: Environment, sources: dict[str, str] | None = None) -> str:
    """The artifact, when, where and with what it was made, and whether a kernel has changed since.

    `sources`: the kernels that it is of, with the hashes of their sources; by default those of the environment.
    """
    parts = [f"{found.time_utc:%Y-%m-%d}", found.device_name]
    parts += [f"driver {found.gpu.driver}"] if found.gpu else []
    versions = (("CUDA", found.cuda), ("cuDNN", found.cudnn), ("torch", found.torch), ("Triton", found.triton))
    parts += [f"{name} {version}" for name, version in versions if version]
    parts += [f"commit {found.git.sha[:12]}{' and changes' if found.git.dirty else ''}"] if found.git else []
    known = {**KERNELS, **LADDER}
    of = found.kernel_sources if sources is None else sources
    changed = [kernel for kernel, source in of.items() if kernel in known and source != kernel_hash(kernel)]
    parts += [f"**before the present source of {', '.join(changed)}**"] if changed else []
    return f"`{place(path)}`: {', '.join(parts)}"


def sources_of(found: Environment, direction: evidence.Direction) -> dict[str, str]:
    """The kernels that an artifact of a direction may have run, with the hashes of their sources then: forward none of the
    gradients'."""
    if direction != "fwd":
        return found.kernel_sources
    of_gradients = {kernel for binding in BACKWARDS.values() for kernel in binding.KERNELS}
    return {kernel: source for kernel, source in found.kernel_sources.items() if kernel not in of_gradients}


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
