"""What a search writes down: its problem, every candidate with its verdict, and what a batch takes to the GPU and back."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from flashcore.stored import Stored

Value = int | bool | str
# In the order of judgement. The first four need no GPU.
Verdict = Literal["compiler failed", "breaks a limit", "same binary", "built", "wrong", "hang", "crash", "measured"]


class Strict(BaseModel):
    """Immutable, and strict about what it is read from."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Problem(Strict):
    """The call that configurations are searched for. seqlen_q = seqlen_k unless given; `impl` as in `flashcore.attention`."""

    impl: Literal["portable", "hopper", "small"]
    batch: int
    heads: int
    heads_k: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    causal: bool = False
    # keys to the left and right of the diagonal, -1: unlimited
    window: tuple[int, int] | None = None
    softcap: float = 0.0
    mask: Literal["none", "bool", "additive"] = "none"

    @property
    def name(self) -> str:
        """Short, readable, good for a file's name."""
        heads = f"{self.heads}" if self.heads == self.heads_k else f"{self.heads}over{self.heads_k}"
        length = f"{self.seqlen_q}" if self.seqlen_q == self.seqlen_k else f"{self.seqlen_q}x{self.seqlen_k}"
        dim = f"{self.head_dim}" if self.head_dim == self.head_dim_v else f"{self.head_dim}v{self.head_dim_v}"
        parts = [self.impl, self.dtype, f"b{self.batch}h{heads}s{length}d{dim}"]
        parts += ["causal"] if self.causal else []
        parts += [] if self.window is None else [f"window{self.window[0]}_{self.window[1]}"]
        parts += [f"softcap{self.softcap:g}"] if self.softcap else []
        parts += [] if self.mask == "none" else [f"mask{self.mask}"]
        return "-".join(parts)


class Resources(Strict):
    """What a binary takes, by its machine code."""

    registers: int
    spill_loads: int
    spill_stores: int
    shared: int


class Built(Strict):
    """A candidate that a GPU is to judge: its cubin lies in the batch's folder as `<sha256>.cubin`, with `<sha256>.json`
    (runtime.binary.BinaryInfo)."""

    number: int
    config: dict[str, Value]
    name: str
    key: str
    sha256: str


class Batch(Strict):
    """What one visit to a GPU judges. `incumbent` is the hand-chosen form's, always built and timed beside each candidate."""

    schema_version: Literal[1] = 1
    problem: Problem
    arch: str
    incumbent: Built
    candidates: list[Built]
    rounds: int


class Judged(Strict):
    """What a GPU said of a candidate: samples of device time (CUDA-graph replay, L2 warm, microseconds), taken in turns with
    the incumbent and with the fastest backend of PyTorch's SDPA. `words`: what was wrong, where it was not measured.

    ratio, ratio_low, ratio_high: incumbent's time over the candidate's, medians, and its 95 % bootstrap interval.
    """

    number: int
    sha256: str
    verdict: Literal["wrong", "hang", "crash", "measured"]
    words: str | None = None
    us: list[float] = []
    incumbent_us: list[float] = []
    sdpa_us: list[float] = []
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None


class Environment(Strict):
    """Where a batch was judged."""

    gpu: str
    sm_count: int
    driver: str
    torch: str
    cuda: str
    git_sha: str
    git_dirty: bool
    time: str
    command: list[str]


class BatchResult(Strict):
    """What came back from a visit to a GPU."""

    schema_version: Literal[1] = 1
    problem: Problem
    environment: Environment
    # source hash of the kernel that was searched
    source_sha256: str
    # which backend `sdpa_us` is of; None where PyTorch has none for the problem
    sdpa_backend: str | None
    judged: list[Judged]


class Trial(Strict):
    """One candidate from first to last. `number` is its place in the order of sampling."""

    number: int
    config: dict[str, Value]
    name: str
    sampler: str
    seed: int
    verdict: Verdict
    # of "same binary": the trial that had it first, whose time counts for this one too
    same_as: int | None = None
    sha256: str | None = None
    resources: Resources | None = None
    words: str | None = None
    judged: Judged | None = None


class SearchResult(Strict, Stored):
    """A whole search, or as much of it as there is.

    space: of each field the values that it could have; fitting: how many points of their product fit the problem.
    """

    kind: Literal["flashcore-search"] = "flashcore-search"
    schema_version: Literal[1] = 1
    problem: Problem
    arch: str
    sampler: str
    seed: int
    budget: int
    space: dict[str, list[Value]]
    fitting: int
    triton: str
    git_sha: str
    git_dirty: bool
    time: str
    command: list[str]
    source_sha256: str
    # the hand-chosen form's configuration
    incumbent: dict[str, Value]
    visits: list[Environment]
    trials: list[Trial]
