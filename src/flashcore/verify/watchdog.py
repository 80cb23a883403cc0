"""End the process when a GPU call hangs, and say which.

A kernel that waits for ever on a barrier cannot be cancelled: not by an exception (the host thread sits in a driver
call that never returns), not by a normal exit (interpreter shutdown waits for the device). So the way out is
`os._exit`, which runs no clean-up: the operating system then takes the process and its GPU context down. A Python
thread does it, so that the message can name the case; should the hung call hold the interpreter lock, no Python
thread runs, and faulthandler's C thread ends the process a little later, with a traceback of where it hung.
"""

import faulthandler
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 3
_GRACE_SECONDS = 5.0


@contextmanager
def watchdog(seconds: float, what: str) -> Iterator[None]:
    """Give the body `seconds` to finish; after that print that `what` hung and end the process with EXIT_CODE.

    Not to be nested: there is one faulthandler timer in a process. The body must end with a device synchronisation,
    or a hang shows up later, outside.
    """

    def bark() -> None:
        sys.stderr.write(f"\nflashcore: {what} did not finish in {seconds:g} s: the GPU hangs; ending the process\n")
        sys.stderr.flush()
        os._exit(EXIT_CODE)

    timer = threading.Timer(seconds, bark)
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(seconds + _GRACE_SECONDS, exit=True, file=sys.__stderr__ or 2)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()
