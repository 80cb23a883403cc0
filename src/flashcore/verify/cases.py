"""What is verified: a case is one call of attention, described by values alone, so the same on every machine.

`mission_cases` are the 15 of the mission; the edge cases are in edge_cases.py, those for large tiles and persistent blocks
in tile_cases.py, those for short sequences in short_cases.py, those that reach every shipped binary in shipped_cases.py and
tuned_cases.py, and what only a backward pass shows in backward_cases.py.
`inputs.py` turns a case into tensors.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, TypedDict

import torch

from flashcore.errors import ArgumentValueError

MaskKind = Literal[
    "bool",  # attends with probability 0.7, the first key always
    "bool_empty_rows",  # as bool; every third query row attends nothing
    "bool_padding",  # the last third of the keys is masked for every query
    "bool_none",  # nothing attends anything
    "add",  # finite, standard normal
    "add_empty_rows",  # as add, with -inf at random and every third row wholly -inf
    "add_padding",  # 0, and -inf on the last third of the keys
    "add_none",  # -inf everywhere
    "add_low",  # -1e30 everywhere on every second row, 0 elsewhere: each row is a plain softmax
    "add_lowest",  # the dtype's most negative finite value, on every second row
    "add_lows",  # the dtype's lowest value and 0.9 of it on alternate keys, everywhere: only the latter weigh
    "add_low_keys",  # -1e30 on the last third of the keys: these weigh nothing, but are attended
]
Storage = Literal[
    "contiguous",
    "transposed",  # memory in the order of the other layout
    "strided",  # every second position and head of a larger NaN buffer
    "packed",  # q, k and v interleaved in one buffer, as a fused projection leaves them (MHA only)
    "unaligned",  # starts one element into its storage; odd row stride
    "padded",  # inside a buffer of NaN: rows before and after, heads after, columns after
    "expanded",  # batch stride 0
    "far_batch",  # the last batch entry lies past 2^31 elements
    "far_sequence",  # the last positions lie past 2^31 elements
]
Distribution = Literal[
    "normal",
    "large",  # scaled scores of standard deviation about 12
    "rising",  # scores grow with the key's position: every tile moves the running maximum
    "constant",  # every key the same
]


class CallOptions(TypedDict):
    """The keyword arguments of `flashcore.attention` that a case fixes, and that are not tensors."""

    causal: bool
    scale: float | None
    window: tuple[int, int] | None
    softcap: float


@dataclass(frozen=True)
class MaskCase:
    """A mask: what it holds, in which dtype (None: bool, or the inputs' own), and the dimensions that it varies along.

    dims is a subset of "bhqk" in that order; the others have size 1, or with `expanded` full size and stride 0.
    """

    kind: MaskKind
    dims: str = "bhqk"
    dtype: torch.dtype | None = None
    expanded: bool = False


@dataclass(frozen=True)
class Case:
    """One call. Lengths are per batch entry; head_dim_v None means head_dim.

    entry: which function is called; "sdpa" has torch's semantics, so its layout is "bhsd" and its causal top-left.
    dead_nan: keys and values that no query may attend hold NaN and inf.
    dead_rows: of a backward pass, queries that may attend nothing, and the gradients of their outputs, do.
    wrt: whose gradients a backward pass is asked for; "m", the mask's, where that is additive.
    needs_bytes: device memory wanted, 0 when negligible; a case that wants any runs on a GPU only.
    """

    name: str
    batch: int = 1
    heads_q: int = 2
    heads_k: int = 2
    seqlen_q: int = 64
    seqlen_k: int = 64
    head_dim: int = 64
    head_dim_v: int | None = None
    dtype: torch.dtype = torch.float16
    causal: bool = False
    window: tuple[int, int] | None = None
    softcap: float = 0.0
    mask: MaskCase | None = None
    scale: float | None = None
    layout: Literal["bshd", "bhsd"] = "bshd"
    storage: Storage = "contiguous"
    distribution: Distribution = "normal"
    dead_nan: bool = False
    dead_rows: bool = False
    wrt: Literal["qkvm", "qkv", "q", "kv"] = "qkvm"
    return_lse: bool = True
    entry: Literal["attention", "sdpa"] = "attention"
    seed: int = 0
    needs_bytes: int = 0

    @property
    def dim_v(self) -> int:
        """The values' head dim."""
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def top_left(self) -> bool:
        """Whether row i is aligned with key i, as SDPA does it, rather than the last row with the last key."""
        return self.entry == "sdpa"

    @property
    def options(self) -> CallOptions:
        """The arguments that attention and the oracle share."""
        return {"causal": self.causal, "scale": self.scale, "window": self.window, "softcap": self.softcap}


MISSION_SHAPES = {
    "tiny": (1, 1, 32, 64),
    "small": (1, 2, 64, 64),
    "medium": (1, 4, 128, 64),
    "mission": (1, 8, 512, 64),
    "multi_batch": (4, 8, 256, 64),
}
MISSION_SEEDS = (0, 42, 12345)
SUITES = ("mission", "edge", "tile", "short", "shipped", "tuned", "all")
# What a backward pass is put to: every case of the forward's but the tuned ones, whose forms it has none of, and these.
BACKWARD_SUITES = ("mission", "edge", "tile", "short", "shipped", "backward", "all")


def mission_cases() -> list[Case]:
    """The 15 cases of the mission: fp16, not causal, scale 1/8."""
    return [
        Case(
            name=f"{name}-seed{seed}",
            batch=batch,
            heads_q=heads,
            heads_k=heads,
            seqlen_q=seqlen,
            seqlen_k=seqlen,
            head_dim=head_dim,
            scale=0.125,
            seed=seed,
        )
        for name, (batch, heads, seqlen, head_dim) in MISSION_SHAPES.items()
        for seed in MISSION_SEEDS
    ]


def select(suite: str = "all", only: str | None = None, *, backward: bool = False) -> list[Case]:
    """The cases of a suite (one of SUITES, or for a backward pass of BACKWARD_SUITES) whose names match the glob `only`.

    Raises:
        ArgumentValueError: there is no such suite, or the glob matches none of its cases.
    """
    from flashcore.verify.backward_cases import backward_cases
    from flashcore.verify.edge_cases import edge_cases
    from flashcore.verify.shipped_cases import shipped_cases
    from flashcore.verify.short_cases import short_cases
    from flashcore.verify.tile_cases import tile_cases
    from flashcore.verify.tuned_cases import tuned_cases

    suites = BACKWARD_SUITES if backward else SUITES
    if suite not in suites:
        raise ArgumentValueError(f"suite: got {suite!r}; allowed: {', '.join(suites)}")
    groups = {
        "mission": mission_cases,
        "edge": edge_cases,
        "tile": tile_cases,
        "short": short_cases,
        "shipped": shipped_cases,
        "tuned": tuned_cases,
        "backward": backward_cases,
    }
    cases = [case for name, group in groups.items() if name in suites and suite in (name, "all") for case in group()]
    if only is None:
        return cases
    chosen = [case for case in cases if fnmatchcase(case.name, only)]
    if not chosen:
        raise ArgumentValueError(f"only: {only!r} matches none of the {len(cases)} cases of suite {suite!r} (see --list)")
    return chosen
