"""What tests of every folder share."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from flashcore import cli


@pytest.fixture
def tuned_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the tuned tables lie, in place of the package's: of which there are none yet."""
    from flashcore import tuned

    folder = tmp_path_factory.mktemp("tuned")
    monkeypatch.setattr(tuned, "FOLDER", folder)
    tuned.forget()
    yield folder
    tuned.forget()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`flashcore` in this process: (exit code, output, errors)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flashcore", *arguments])
        # a command may set variables of its own process, which here is that of other tests too
        with mock.patch.dict(os.environ), pytest.raises(SystemExit) as stopped:
            cli.main()
        output, errors = capsys.readouterr()
        return int(stopped.value.code or 0), output, errors

    return run
