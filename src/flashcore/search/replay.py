"""What a sampler would have found, by the times of a search that was exhaustive: many seeds, and no GPU."""

from __future__ import annotations

from collections.abc import Mapping

from flashcore.search.sampling import NO_TIME, POPULATION, Sampler, Space, Study, point_key
from flashcore.search.schema import Value


def replay(space: Space, scores: Mapping[tuple[Value, ...], float], sampler: Sampler, seed: int, budget: int) -> list[float]:
    """The best score so far after each of `budget` evaluations, in generations as a search has them.

    scores: of each point that fits, by `point_key`; the lower the better, NO_TIME where it has none.
    """
    study = Study(space, sampler, seed)
    best, found = NO_TIME, list[float]()
    while len(found) < budget and (proposals := study.propose(min(POPULATION, budget - len(found)))):
        for proposal in proposals:
            score = scores[point_key(proposal.values)]
            study.tell(proposal, score)
            best = min(best, score)
            found.append(best)
    return found
