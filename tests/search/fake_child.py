"""A process that judges nothing, and says of each candidate what its binary's first word tells it to: `python fake_child.py`.

It speaks judge.py's protocol and starts in no time, for tests of the process that keeps the books.
"""

import json
import os
import sys
import time
from pathlib import Path

ENVIRONMENT = {
    "gpu": "NVIDIA Fake",
    "sm_count": 132,
    "driver": "1",
    "torch": "2",
    "cuda": "13",
    "git_sha": "a" * 40,
    "git_dirty": False,
    "time": "now",
    "command": ["the child's own"],
}


def say(message: object) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def judge(folder: Path, built: dict, seen: Path) -> None:
    number, sha256 = built["number"], built["sha256"]
    behaviour = (folder / f"{sha256}.cubin").read_text().split()[0]
    with seen.open("a") as log:
        log.write(f"{number} {behaviour} {os.getpid()}\n")
    judged = {"number": number, "sha256": sha256, "verdict": "measured", "words": None}
    if behaviour == "hang":
        sys.stderr.write("the GPU hangs; ending the process\n")
        sys.exit(3)
    elif behaviour == "silent":
        time.sleep(3600)
    elif behaviour == "dies":
        sys.stderr.write("the CUDA context is lost\n")
        sys.stderr.flush()
        os.abort()
    elif behaviour == "wrong":
        say({"judged": judged | {"verdict": "wrong", "words": "output: off"}})
    elif behaviour == "damages":
        say({"judged": judged | {"verdict": "wrong", "words": "output: off"}})
        sys.exit(5)
    elif behaviour == "swapped":
        say({"judged": judged | {"sha256": "0" * 64}})
    elif behaviour == "nonsense":
        say({"what": "is this"})
    else:
        us = [float(behaviour[3:])] * 8
        ratio = 10.0 / us[0]
        measured = {"us": us, "incumbent_us": [10.0] * 8, "ratio": ratio, "ratio_low": ratio, "ratio_high": ratio}
        say({"judged": judged | measured})


def main(start: str, seen: Path, at_most: int) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if start == "refuses":
            say({"refused": "needs an NVIDIA GPU"})
            continue
        if start == "breaks":
            sys.exit("no torch here")
        if start == "stuck":
            time.sleep(3600)
        folder = Path(request["folder"])
        batch = {one["number"]: one for one in json.loads((folder / "batch.json").read_text())["candidates"]}
        say({"ready": {"environment": ENVIRONMENT, "sdpa": request["sdpa"] or "sdpa-cudnn"}})
        # as where the time is up
        for number in request["numbers"][:at_most]:
            say({"started": number})
            judge(folder, batch[number], seen)
        say({"done": True})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
