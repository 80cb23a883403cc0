"""Install a wheel beside PyTorch but away from Triton, gcc and nvcc, and run attention from it on this machine's GPU.

    python tools/check_wheel.py dist/flashcore-0.1.0-py3-none-any.whl OUT.json

The environment is this Python's packages, linked one by one into a folder that leaves Triton out, with an empty PATH. The
wheel passes when verify's mission suite does there and every binary it ran was a shipped one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

from flashcore.environment import collect

PROBE = """
import importlib.util, json, shutil, sys
import torch, flashcore
q, k, v = (torch.randn(1, 512, 8, 64, device="cuda", dtype=torch.float16) for _ in range(3))
plan = flashcore.explain(q, k, v, impl="portable")
o = flashcore.attention(q, k, v, impl="portable")
reference = flashcore.reference.attention(q, k, v)[0]
print(json.dumps({
    "flashcore": flashcore.__file__,
    "triton": importlib.util.find_spec("triton") is not None,
    "compilers": [tool for tool in ("gcc", "cc", "nvcc", "ptxas") if shutil.which(tool)],
    "gpu": torch.cuda.get_device_name(),
    "origin": plan.origin,
    "binary_sha256": plan.binary_sha256,
    "max_abs_error": (o.double() - reference).abs().max().item(),
}))
"""


def main() -> None:
    wheel, out = Path(sys.argv[1]), Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for source in (*os.environ.get("PYTHONPATH", "").split(os.pathsep), sysconfig.get_paths()["purelib"]):
            if source and Path(source).resolve() != Path("src").resolve():
                _link(Path(source), root / "packages")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(root / "installed")
        (root / "empty").mkdir()
        environment = {
            "PATH": str(root / "empty"),
            "PYTHONPATH": os.pathsep.join((str(root / "installed"), str(root / "packages"))),
            "HOME": folder,
            "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
        }
        # -S: no site-packages but what PYTHONPATH names
        command = [sys.executable, "-S"]
        probe = subprocess.run([*command, "-c", PROBE], env=environment, cwd=folder, capture_output=True, text=True)
        if probe.returncode:
            sys.exit(f"the probe failed:\n{probe.stderr}")
        found = json.loads(probe.stdout)
        verify = subprocess.run(
            [*command, "-m", "flashcore", "verify", "--suite", "mission"],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
        )
    record = {
        "schema_version": 1,
        "environment": collect().model_dump(mode="json"),
        "wheel": wheel.name,
        "wheel_bytes": wheel.stat().st_size,
        **found,
        "flashcore": "from the wheel" if found["flashcore"].startswith(folder) else found["flashcore"],
        "verify_mission": {"exit": verify.returncode, "summary": verify.stdout.strip().splitlines()[-1:]},
    }
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    good = (
        record["flashcore"] == "from the wheel"
        and not found["triton"]
        and not found["compilers"]
        and found["origin"] == "shipped"
        and verify.returncode == 0
    )
    sys.exit(0 if good else f"the wheel does not stand alone\n{verify.stdout[-2000:]}{verify.stderr[-2000:]}")


def _link(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for entry in source.iterdir():
        name = entry.name.lower()
        if not name.startswith(("triton", "flashcore", "__editable__")) and not (target / entry.name).exists():
            (target / entry.name).symlink_to(entry)


if __name__ == "__main__":
    main()
