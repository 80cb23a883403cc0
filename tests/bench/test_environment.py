"""The environment of a measurement: what is known is there, what is not is None, and the host stays unnamed."""

import platform
import subprocess

import torch

from flashcore import environment


def test_collect_here() -> None:
    found = environment.collect(torch.device("cpu"))
    assert found.gpu is None and found.torch == torch.__version__ and found.python == platform.python_version()
    assert found.kernel_sources and all(len(digest) == 64 for digest in found.kernel_sources.values())
    assert found.device_name == found.cpu
    node = platform.node()
    assert len(node) < 4 or node not in found.model_dump_json()


def test_git_state_may_be_stated_and_then_holds(monkeypatch) -> None:
    def no_git(*arguments: str) -> str:
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(environment, "_run_git", no_git)
    monkeypatch.delenv(environment.GIT_STATE_VARIABLE, raising=False)
    assert environment.collect(torch.device("cpu")).git is None
    for text, dirty in (("abc123", False), ("abc123+dirty", True)):
        monkeypatch.setenv(environment.GIT_STATE_VARIABLE, text)
        assert environment.collect(torch.device("cpu")).git == environment.Git(sha="abc123", dirty=dirty)
    monkeypatch.setattr(environment, "_run_git", lambda *arguments: "another commit")
    assert environment.collect(torch.device("cpu")).git == environment.Git(sha="abc123", dirty=True)


def test_nvidia_smi_answers_are_read_field_by_field(monkeypatch) -> None:
    class Properties:
        uuid = "1234"

    monkeypatch.setattr(environment.shutil, "which", lambda tool: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties())
    asked: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="1980, [N/A]\n")

    monkeypatch.setattr(environment.subprocess, "run", run)
    clocks = environment.read_clocks(torch.device("cuda", 0))
    assert clocks == environment.Clocks(sm_mhz=1980, memory_mhz=None)
    assert "GPU-1234" in asked[0]


def test_cudnn_versions() -> None:
    assert environment._cudnn_text(91900) == "9.19.0"
    assert environment._cudnn_text(8907) == "8.9.7"
