"""Compile what a run will need before it runs, on all cores: one by one, as cases come to them, takes most of its time."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed

from flashcore.kernels.specialisation import Specialisation
from flashcore.target import Target


def missing(needed: Iterable[Specialisation], target: Target) -> list[Specialisation]:
    """Those, each once, whose binary is neither shipped nor cached, and can be compiled."""
    from flashcore.runtime.store import locate

    if target.arch is None:
        return []
    found = {specialisation: locate(specialisation, target.arch) for specialisation in needed}
    return [specialisation for specialisation, place in found.items() if place is not None and place.origin == "compile"]


def compile_ahead(needed: Iterable[Specialisation], target: Target, done: Callable[[], None] = lambda: None) -> int:
    """Compile and cache them; `done` is called after each. Returns how many failed, of which the cases will say how."""
    from flashcore.runtime.store import obtain

    failed = 0
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for compiled in as_completed([pool.submit(obtain, specialisation, target) for specialisation in needed]):
            failed += compiled.exception() is not None
            done()
    return failed
