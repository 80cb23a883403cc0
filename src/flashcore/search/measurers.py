"""Who judges a batch: the GPU of this machine, or one elsewhere by way of folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flashcore.errors import BinaryError, FlashCoreError
from flashcore.search.measure import Watcher, measure, results_of
from flashcore.search.schema import BatchResult


class AwaitingGpu(FlashCoreError, RuntimeError):
    """A batch lies in a folder and is to be judged elsewhere: says what to run there, and how to go on."""


class FolderMeasurer:
    """Takes the results that were put into a folder; where there are none, the search stops and says what to do."""

    def __init__(self, results: Path) -> None:
        self._results = results

    def judge(self, folder: Path, waiting: Sequence[int]) -> list[BatchResult]:
        """What GPUs said of a batch so far, of some at least of the candidates that wait.

        Raises:
            AwaitingGpu: nothing yet of any of them.
            BinaryError: a result cannot be read.
        """
        found = results_of(self._results, folder.name)
        if not {judged.number for result in found for judged in result.judged} & set(waiting):
            raise AwaitingGpu(
                f"{len(waiting)} candidates wait for a GPU. Copy {folder} to a machine with one, at this commit; run there\n"
                f"  flashcore search measure {folder} --out {self._results}\n"
                f"copy {self._results} back, and run this search again"
            )
        return found


class LocalMeasurer:
    """Judges on the GPU of this machine, in a process of its own, so that a kernel that breaks it breaks no search."""

    def __init__(self, results: Path, watcher: Watcher | None = None) -> None:
        self._results, self._watcher = results, watcher

    def judge(self, folder: Path, waiting: Sequence[int]) -> list[BatchResult]:
        """What the GPU says of a batch, earlier visits included.

        Raises:
            BinaryError: the batch cannot be judged, or an earlier result of it cannot be read.
        """
        visit = measure([folder], self._results, watcher=self._watcher)
        if visit.failures:
            raise BinaryError(f"{folder}: {visit.failures[folder]}")
        return results_of(self._results, folder.name)
