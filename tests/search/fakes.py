"""A compiler and a GPU that are none: what a search is tested with, on the real space of a kernel."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

from flashcore.search.kernels import SEARCHABLE
from flashcore.search.measurers import AwaitingGpu
from flashcore.search.schema import Batch, BatchResult, Built, Environment, Judged, Problem
from flashcore.sources import kernel_hash

ENVIRONMENT = Environment(
    gpu="NVIDIA Fake",
    sm_count=132,
    driver="1",
    torch="2",
    cuda="13",
    git_sha="a" * 40,
    git_dirty=False,
    time="t",
    command=["m"],
)

Config = dict[str, int | bool | str]
Us = Callable[[Config], float | str]


def us(config: Config) -> float:
    """A made-up time of a Hopper form with one best point: each option helps or costs, and two of them depend on others."""
    time = {2: 100.0, 3: 96.0}[config["warpgroups"]] * {64: 1.08, 128: 1.0}[config["block_n"]]
    time *= {1: 1.03, 2: 1.0}[config["q_slots"]] * {2: 1.04, 3: 1.0, 4: 1.01}[config["kv_slots"]]
    time *= 0.96 if config["join_tiles"] else 1.0
    time *= 0.97 if config["emulate_exp2"] == (config["warpgroups"] == 2) else 1.02
    time *= 1.04 if config["hold_wait"] else 1.0
    time *= 0.98 if config["skip_rescale"] and config["block_n"] == 64 else 1.0
    return time * (1.05 if config["o_shares_q"] else 1.0) * (1.02 if config["q_registers"] else 1.0)


def digest(text: object) -> str:
    return sha256(str(text).encode()).hexdigest()


@dataclass
class FakeBuilder:
    """Builds nothing. `us` says of a configuration how long it takes, or which verdict it gets. `same`: of which a
    configuration has the machine code. `stop`: raised at the build of that candidate."""

    problem: Problem
    us: Us = us
    same: Callable[[Config], object] = lambda config: sorted(config.items())
    stop: dict[int, BaseException] = field(default_factory=dict)
    built: list[Config] = field(default_factory=list)

    def build(self, configs: Sequence[object], numbers: Sequence[int], seen: dict[str, int]) -> list[SimpleNamespace]:
        found, seen = [], dict(seen)
        for number, config in zip(numbers, map(SEARCHABLE[self.problem.impl].values, configs), strict=True):
            if number in self.stop:
                raise self.stop.pop(number)
            self.built.append(config)
            verdict, code = self.us(config), digest(self.same(config))
            outcome = SimpleNamespace(
                number=number,
                config=config,
                name=f"f{number}",
                verdict="built",
                same_as=None,
                sha256=code,
                resources=None,
                words=None,
            )
            if verdict in ("compiler failed", "breaks a limit"):
                outcome.verdict, outcome.words, outcome.sha256 = verdict, "as told", None
            elif code in seen:
                outcome.verdict, outcome.same_as = "same binary", seen[code]
            else:
                seen[code] = number
            found.append(outcome)
        return found

    def batch(self, folder: Path, outcomes: Sequence[SimpleNamespace]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        made = [one for one in outcomes if one.verdict == "built"]
        candidates = [Built(number=o.number, config=o.config, name=o.name, key="{}", sha256=o.sha256) for o in made]
        batch = Batch(problem=self.problem, arch="sm_90a", incumbent=candidates[0], candidates=candidates, rounds=3)
        (folder / "batch.json").write_text(batch.model_dump_json())

    def read(self, folder: Path) -> Batch:
        return Batch.model_validate_json((folder / "batch.json").read_text())


@dataclass
class FakeMeasurer:
    """A GPU that needs no time. `stop`: raised at a candidate, after what came before it was judged; `most`: candidates that a
    visit judges; `away`: that there is no GPU now."""

    us: Us = us
    stop: dict[int, BaseException] = field(default_factory=dict)
    most: int = 10**6
    away: bool = False
    visits: int = 0
    source: str | None = None
    judged: list[int] = field(default_factory=list)
    results: dict[Path, list[BatchResult]] = field(default_factory=dict)

    def judge(self, folder: Path, waiting: Sequence[int]) -> list[BatchResult]:
        if self.away:
            raise AwaitingGpu(f"{len(waiting)} candidates wait")
        batch = Batch.model_validate_json((folder / "batch.json").read_text())
        self.visits += 1
        found = []
        for built in [one for one in batch.candidates if one.number in waiting][: self.most]:
            if built.number in self.stop:
                raise self.stop.pop(built.number)
            self.judged.append(built.number)
            found.append(judged(built.number, built.sha256, self.us(built.config)))
        kernel = SEARCHABLE[batch.problem.impl].binding.KERNEL
        result = BatchResult(
            problem=batch.problem,
            environment=ENVIRONMENT.model_copy(update={"time": f"visit {self.visits}"}),
            source_sha256=self.source or kernel_hash(kernel),
            sdpa_backend="cudnn",
            judged=found,
        )
        self.results.setdefault(folder, []).append(result)
        return self.results[folder]


def judged(number: int, code: str, time: float | str, incumbent: float = 100.0) -> Judged:
    """What a GPU would say of a candidate that takes `time`, or has that verdict."""
    if isinstance(time, str):
        return Judged(number=number, sha256=code, verdict=time, words="as told")
    ratio = incumbent / time
    return Judged(
        number=number,
        sha256=code,
        verdict="measured",
        us=[time] * 3,
        incumbent_us=[incumbent] * 3,
        sdpa_us=[120.0] * 3,
        ratio=ratio,
        ratio_low=ratio,
        ratio_high=ratio,
    )
