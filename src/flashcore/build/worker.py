"""The compile worker: `python -m flashcore.build.worker`, one JSON request a line in, one JSON answer a line out.

Request: {"key": Specialisation.key, "arch": "sm_90a", "out": path}. Answer: {"info": BinaryInfo} once the cubin is at
`out`, or {"error": text}. A process of its own because the compiler may abort it, and because its environment differs.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Serve requests until standard input ends."""
    # Compiler chatter goes to stderr: standard output belongs to the protocol.
    protocol = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory(prefix="flashcore-triton-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
        os.environ.pop("TRITON_INTERPRET", None)
        from flashcore.build.compile import compile_specialisation
        from flashcore.errors import CompileError
        from flashcore.kernels.specialisation import Specialisation

        for line in sys.stdin:
            request = json.loads(line)
            answer: dict[str, object]
            try:
                binary = compile_specialisation(Specialisation.from_key(request["key"]), request["arch"])
                Path(request["out"]).write_bytes(binary.cubin)
                answer = {"info": binary.info.model_dump()}
            except (CompileError, OSError) as error:
                answer = {"error": str(error)}
            protocol.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
