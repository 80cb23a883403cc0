"""Configurations that a search found and a retest confirmed, by GPU. The planner takes them before the kernels' own tables.

A file a GPU (`nvidia-h200.json`), written by `flashcore search promote`. An entry holds for the calls of its kernel and
features (both half dtypes take the same code) that are near it in size, on GPUs of the arch and with as many
multiprocessors. Where the hand-chosen form was not beaten an entry says that too, so that no neighbour's reaches there. An
entry that was found with another source of the kernel is stale: it is ignored, and `flashcore evidence --check` fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ConfigDict, model_validator

from flashcore.errors import ArgumentValueError
from flashcore.nearness import Sizes, distance
from flashcore.search.schema import Problem, Strict, Value
from flashcore.sources import kernel_hash
from flashcore.spec import AttentionSpec
from flashcore.stored import Stored, read, write_whole

if TYPE_CHECKING:
    from flashcore.search.kernels import Searchable

FOLDER = Path(__file__).parent
# How far from its problem an entry holds (nearness.distance): retests go as far as 1, a factor of two in work or parallelism,
# and the next power of two in both is beyond.
REACH = 1.5

# "half" (fp16 and bf16 take the same configurations) or "fp32"
Precision = Literal["half", "fp32"]
DTYPES: dict[Precision, tuple[Literal["fp16", "bf16", "fp32"], ...]] = {"half": ("fp16", "bf16"), "fp32": ("fp32",)}


def precision(problem: Problem) -> Precision:
    """Which dtypes what is found at a problem holds for."""
    return "fp32" if problem.dtype == "fp32" else "half"


class Ratio(Strict):
    """The hand-chosen form's time over another's, medians, and its 95 % bootstrap interval: above 1 the other is faster."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


class Entry(Strict):
    """What a search came to at one problem. config None: the hand-chosen table stands, `words` say why.

    features: the problem's, as the kernel's binding names them. ratio: at the problem itself; unseen: at those that the
    search did not see, by name. sha256: of the binary, by dtype. search, retests: the files beside the GPU's evidence.
    """

    problem: Problem
    features: str
    config: dict[str, Value] | None
    ratio: Ratio | None
    unseen: dict[str, Ratio]
    source_sha256: str
    sha256: dict[str, str]
    search: str
    retests: list[str]
    words: str

    @model_validator(mode="after")
    def _whole(self) -> Entry:
        if (self.config is None) != (self.ratio is None) or set(self.sha256) != set(self.dtypes if self.config else ()):
            raise ValueError("a config comes with its ratio and a sha256 for each dtype; no config comes with neither")
        return self

    @property
    def precision(self) -> Precision:
        return precision(self.problem)

    @property
    def dtypes(self) -> tuple[Literal["fp16", "bf16", "fp32"], ...]:
        """Those that it holds for."""
        return DTYPES[self.precision]

    @property
    def sizes(self) -> Sizes:
        p = self.problem
        return Sizes(p.batch * p.heads, p.seqlen_q, p.seqlen_k, max(p.head_dim, p.head_dim_v))

    @property
    def place(self) -> tuple[object, ...]:
        """Its order in a table, which has one entry with it: the kernel, the features, the sizes."""
        p = self.problem
        window = (-1, -1) if p.window is None else p.window
        return (p.impl, self.features, self.precision, *self.sizes, p.batch, p.heads_k, *window, p.softcap, p.causal)

    @property
    def stale(self) -> bool:
        """Whether it was found with another source of its kernel than is there."""
        return self.source_sha256 != kernel_hash(_searchable(self.problem.impl).binding.KERNEL)

    @property
    def why(self) -> str:
        """Where the form of a call near it comes from, for people."""
        if self.config is None:
            return f"hand-chosen: from search {self.search}, {self.words}"
        return f"tuned: from search {self.search}, {self.ratio} times as fast as the hand-chosen form at {self.problem.name}"


class Table(Stored):
    """The entries of a GPU."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["tuned"] = "tuned"
    schema_version: Literal[1] = 1
    gpu: str
    arch: str
    sm_count: int
    entries: list[Entry]

    def save(self, path: Path) -> None:
        """Write it, a line a value, because people read what changed; the file appears whole or not at all."""
        write_whole(path, self.model_dump_json(indent=1) + "\n")


@cache
def tables() -> dict[Path, Table]:
    """Every table by its file. Raises ArgumentValueError for a damaged one."""
    return {path: read(Table, path) for path in sorted(FOLDER.glob("*.json"))}


@dataclass(frozen=True, slots=True)
class Tuned:
    """An entry whose configuration was made and found to fit; `config` is its kernel's dataclass, None: hand-chosen.

    sizes: without the head dim, because the features have what the kernel pads it to, and that is what it computes.
    """

    entry: Entry
    sizes: Sizes
    config: Any | None


@cache
def _ready(impl: str, arch: str, sm_count: int | None) -> dict[tuple[str, Precision], tuple[Tuned, ...]]:
    """What holds for a kernel on such GPUs (sm_count None: with any number of multiprocessors), by features and precision.

    Raises:
        ArgumentValueError: a table is damaged, or an entry's configuration is none of its kernel's or does not fit.
    """
    found: dict[tuple[str, Precision], tuple[Tuned, ...]] = {}
    for path, table in tables().items():
        if table.arch != arch or sm_count not in (None, table.sm_count):
            continue
        for entry in table.entries:
            if entry.problem.impl == impl and not entry.stale:
                key = (entry.features, entry.precision)
                found[key] = (*found.get(key, ()), _checked(entry, path))
    return found


def _checked(entry: Entry, path: Path) -> Tuned:
    searchable, problem = _searchable(entry.problem.impl), entry.problem
    try:
        features = searchable.binding.features(searchable.spec(problem))
        if features != entry.features:
            raise ArgumentValueError(f"features: got {entry.features}; allowed: the problem's, {features}")
        config = None if entry.config is None else searchable.configure(entry.config)
        if config is not None and not searchable.fits(problem, config):
            raise ArgumentValueError(f"config: got {config}; allowed: one that fits the problem and the GPU")
    except ArgumentValueError as error:
        raise ArgumentValueError(f"{path}: entry {problem.name}: {error}") from error
    return Tuned(entry, entry.sizes._replace(head_dim=1), config)


def find(impl: str, spec: AttentionSpec, arch: str, sm_count: int) -> Tuned | None:
    """The entry that says which form a call takes: of those of its features in which it can run, the nearest; None: none is
    near. Raises ArgumentValueError for a table that cannot be used."""
    ready = _ready(impl, arch, sm_count)
    if not ready:
        return None
    searchable, sizes = _searchable(impl), Sizes.of(spec)._replace(head_dim=1)
    alike = ready.get((searchable.binding.features(spec), _precision(spec.dtype)), ())
    if not alike or 0 in sizes:
        return None
    near = [one for one in alike if distance(sizes, one.sizes) <= REACH]
    for one in sorted(near, key=lambda one: distance(sizes, one.sizes)):
        if one.config is None or searchable.form.fits(spec, one.config):
            return one
    return None


def config(impl: str, spec: AttentionSpec, arch: str, sm_count: int) -> Any | None:
    """The form of a call that a search found; None where the hand-chosen table has the say. Raises as `find`."""
    found = find(impl, spec, arch, sm_count)
    return None if found is None else found.config


def why(impl: str, spec: AttentionSpec, arch: str, sm_count: int) -> str:
    """Where the form of a call comes from, for people. Raises as `find`."""
    found = find(impl, spec, arch, sm_count)
    return "hand-chosen: nothing near this call was searched" if found is None else found.entry.why


def configs(impl: str, features: str, dtype: torch.dtype, arch: str) -> Iterator[Any]:
    """Every form that a search found for these features, which a wheel for the arch holds too. Raises as `find`."""
    for one in _ready(impl, arch, None).get((features, _precision(dtype)), ()):
        if one.config is not None:
            yield one.config


def _precision(dtype: torch.dtype) -> Precision:
    return "fp32" if dtype == torch.float32 else "half"


def forget() -> None:
    """Read the tables anew at the next call: they, or their folder, changed."""
    tables.cache_clear()
    _ready.cache_clear()


def _searchable(impl: str) -> Searchable:
    # imported here because bindings, which it is made of, ask this module
    from flashcore.search.kernels import SEARCHABLE

    return SEARCHABLE[impl]
