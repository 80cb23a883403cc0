"""What a measurement was made on: software, GPU and its clocks, CPU, the commit and the kernels' sources.

Everything that cannot be learnt on a machine is None, never a guess. The host's name is left out on purpose:
artifacts are published.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from flashcore import sources

# A copy of the tree whose .git is missing or another's (a GPU machine, a container) can be told what it is a copy of: SHA or
# SHA+dirty.
GIT_STATE_VARIABLE = "FLASHCORE_GIT_STATE"


class Clocks(BaseModel):
    """The GPU's clocks at one moment, in MHz."""

    model_config = ConfigDict(frozen=True)

    sm_mhz: int | None = None
    memory_mhz: int | None = None


class Gpu(BaseModel):
    """One GPU as the measurement found it."""

    model_config = ConfigDict(frozen=True)

    name: str
    arch: str
    sm_count: int
    l2_bytes: int
    memory_bytes: int
    driver: str | None
    power_limit_w: float | None
    clocks: Clocks


class Git(BaseModel):
    """The commit the package was run from; `dirty` says that the working tree differed from it."""

    model_config = ConfigDict(frozen=True)

    sha: str
    dirty: bool


class Environment(BaseModel):
    """Where, when and with what a measurement was made. `gpu` is None on a machine without one."""

    model_config = ConfigDict(frozen=True)

    time_utc: datetime
    command: list[str]
    git: Git | None
    flashcore: str | None
    python: str
    torch: str
    triton: str | None
    cuda: str | None
    cudnn: str | None
    gpu: Gpu | None
    cpu: str | None
    cpu_cores: int | None
    torch_threads: int
    platform: str
    kernel_sources: dict[str, str]

    @property
    def device_name(self) -> str:
        """The GPU's name, or the CPU's where there is no GPU."""
        return self.gpu.name if self.gpu else (self.cpu or "unknown CPU")


def collect(device: torch.device | None = None) -> Environment:
    """The environment now; `device` picks the GPU (default: the current one, where there is one)."""
    with_gpu = torch.cuda.is_available() and (device is None or device.type == "cuda")
    cudnn = torch.backends.cudnn.version() if with_gpu else None
    return Environment(
        time_utc=datetime.now(timezone.utc).replace(microsecond=0),
        command=[Path(sys.argv[0]).name, *sys.argv[1:]],
        git=_git(),
        flashcore=_version("flashcore"),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_version("triton"),
        cuda=torch.version.cuda,
        cudnn=None if cudnn is None else _cudnn_text(cudnn),
        gpu=_gpu(device) if with_gpu else None,
        cpu=_cpu_model(),
        cpu_cores=os.cpu_count(),
        torch_threads=torch.get_num_threads(),
        platform=platform.platform(),
        kernel_sources=sources.kernel_hashes(),
    )


def read_clocks(device: torch.device | None = None) -> Clocks:
    """The GPU's clocks at this moment; None for each that cannot be read."""
    answers = _nvidia_smi(device, "clocks.sm", "clocks.mem")
    return Clocks(sm_mhz=_whole(answers[0]), memory_mhz=_whole(answers[1]))


def _gpu(device: torch.device | None) -> Gpu:
    properties = torch.cuda.get_device_properties(device if device is not None else torch.cuda.current_device())
    driver, power = _nvidia_smi(device, "driver_version", "power.limit")
    return Gpu(
        name=properties.name,
        arch=f"sm_{properties.major}{properties.minor}",
        sm_count=properties.multi_processor_count,
        l2_bytes=properties.L2_cache_size,
        memory_bytes=properties.total_memory,
        driver=driver,
        power_limit_w=_number(power),
        clocks=read_clocks(device),
    )


def _nvidia_smi(device: torch.device | None, *fields: str) -> list[str | None]:
    """The fields for this GPU (found by UUID, as CUDA may renumber), None for each that nvidia-smi does not tell."""
    nothing: list[str | None] = [None] * len(fields)
    tool = shutil.which("nvidia-smi")
    if tool is None or not torch.cuda.is_available():
        return nothing
    index = device.index if device is not None and device.index is not None else torch.cuda.current_device()
    which = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    query = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "-i", which]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return nothing
    answers = [answer.strip() for answer in done.stdout.strip().split(",")]
    if len(answers) != len(fields):
        return nothing
    return [None if answer.startswith("[") or answer == "N/A" else answer for answer in answers]


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _whole(text: str | None) -> int | None:
    number = _number(text)
    return None if number is None else round(number)


def _git() -> Git | None:
    """What was stated, or the checkout this very file is tracked in; none inside somebody else's checkout."""
    stated, _, dirty = os.environ.get(GIT_STATE_VARIABLE, "").partition("+")
    if stated:
        return Git(sha=stated, dirty=dirty == "dirty")
    here = Path(__file__)
    try:
        _run_git("ls-files", "--error-unmatch", here.name)
        return Git(sha=_run_git("rev-parse", "HEAD"), dirty=bool(_run_git("status", "--porcelain")))
    except (OSError, subprocess.SubprocessError):
        return None


def _run_git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cudnn_text(version: int) -> str:
    """cuDNN 9 and later number themselves MAJOR * 10000 + MINOR * 100 + PATCH; earlier ones used 1000."""
    base = 10000 if version >= 90000 else 1000
    return f"{version // base}.{version % base // 100}.{version % 100}"


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or None
