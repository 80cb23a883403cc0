"""Device time of one contender after another beside the same others, whose graphs are captured once.

Samples are those of `timing`'s device_warm: a replay of a graph of launches, all contenders interleaved, in an order drawn anew
each round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from flashcore.bench.timing import WARMUP, Candidate, Replay, prepare_warm, replay_rounds, shuffled

# name -> microseconds per launch, sample i of each from the same round
Samples = dict[str, list[float]]
# after how many rounds `time` asks whether to go on
PROBE_ROUNDS = 5


class Beside:
    """The others, captured, on a stream of their own. What is timed must not hang: the caller has a watchdog."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._others: dict[str, Replay] = {}

    def keep(self, candidate: Candidate) -> None:
        """Let those to come be timed beside this one. Raises what it raises, and WrongOutputError where its check does."""
        with torch.cuda.stream(self._stream), candidate.context():
            self._others[candidate.name] = prepare_warm(candidate)[0]

    def drop(self, name: str) -> None:
        """Time it no more."""
        del self._others[name]

    def time(
        self,
        rounds: int,
        candidate: Candidate | None = None,
        *,
        warmup: int = WARMUP,
        go_on: Callable[[Mapping[str, list[float]]], bool] = lambda samples: True,
    ) -> Samples:
        """So many samples of each, the candidate's among them; fewer where `go_on` says so after the first PROBE_ROUNDS.

        Raises what the candidate raises, and WrongOutputError where its check does.
        """
        with torch.cuda.stream(self._stream):
            replays = list(self._others.values())
            if candidate is not None:
                with candidate.context():
                    replays.append(prepare_warm(candidate, warmup)[0])
            samples: Samples = {replay.name: [] for replay in replays}
            probe = min(rounds, PROBE_ROUNDS)
            for part in (range(probe), range(probe, rounds)):
                if part and (part.start == 0 or go_on(samples)):
                    for replay, us in replay_rounds(replays, part, None, shuffled):
                        samples[replay.name].append(us)
            torch.cuda.current_stream().synchronize()
        return samples
