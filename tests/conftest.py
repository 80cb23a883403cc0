"""What tests of every folder share."""

import sys
from collections.abc import Callable

import pytest

from flashcore import cli


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`flashcore` in this process: (exit code, output, errors)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flashcore", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        output, errors = capsys.readouterr()
        return int(stopped.value.code or 0), output, errors

    return run
