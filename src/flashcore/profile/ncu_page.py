"""Nsight Compute's raw page as CSV, read: from all that was printed to one record for each kernel.

The page is a header, a row of units and a row for each kernel. Before, between and after them stand ncu's own lines
(`==PROF== ...`) and whatever the program printed.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Collection

from flashcore.errors import ProfilerError
from flashcore.profile import metrics
from flashcore.profile.records import KernelRecord, Reading

# What each unit is in the unit that records have. ncu has called a nanosecond both "nsecond" and "ns".
TIME_US = {
    "ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6,
}  # fmt: skip
BYTES = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12}
_GROUPED = re.compile(r"-?[1-9]\d{0,2}(?P<mark>[.,])\d{3}((?P=mark)\d{3})*")


def parse(text: str, asked: Collection[str]) -> list[KernelRecord]:
    """The kernels of a raw page, with the metrics that were asked for.

    Raises:
        ProfilerError: there is no such page, a row or a value of it cannot be read, it has no kernel, or a kernel without
            a duration.
    """
    header: list[str] | None = None
    units: list[str] | None = None
    kernels = []
    # line by line, so that a quotation mark in one of the program's own lines cannot swallow what follows
    for line in text.splitlines():
        fields = next(csv.reader([line]), [])
        if fields[:1] == ["ID"] and "Kernel Name" in fields:
            header, units = _checked(fields), None
        elif header is None or not fields or line.startswith("=="):
            continue
        elif units is None:
            if len(fields) != len(header) or fields[0].strip():
                raise ProfilerError(f"ncu's table has no row of units under its header, but: {line[:120]}")
            units = fields
        elif fields[0].strip().isdigit() and line.startswith('"'):
            kernels.append(_kernel(header, units, fields, asked))
    if header is None:
        raise ProfilerError("ncu printed no table of metrics; its first lines were: " + _first_lines(text))
    if not kernels:
        raise ProfilerError("ncu printed a table with no kernel in it: the call launched none while it was profiled")
    return kernels


def number(text: str) -> float | None:
    """The number in a cell, whatever the locale's marks; None where ncu has none.

    Both marks: the later one is the decimal's. One mark before groups of three: thousands, if it is a comma or there are
    several. Raises ValueError for what is no number.
    """
    # a metric with instances prints them in brackets after its value
    plain = re.sub(r"[\s\u00a0\u202f']", "", text.partition(" (")[0])
    if plain.lower() in ("", "n/a", "(!)n/a", "nan", "-nan", "inf", "-inf"):
        return None
    comma, point = plain.rfind(","), plain.rfind(".")
    if comma >= 0 and point >= 0:
        mark = "," if comma < point else "."
        plain = plain.replace(mark, "").replace(",", ".")
    elif _GROUPED.fullmatch(plain) and (comma >= 0 or plain.count(".") > 1):
        plain = plain.replace(",", "").replace(".", "")
    else:
        plain = plain.replace(",", ".")
    value = float(plain)
    return value if math.isfinite(value) else None


def _checked(header: list[str]) -> list[str]:
    if "Metric Name" in header:
        raise ProfilerError(
            "ncu printed its details page, not the raw page that it was asked for: this ncu is too old or too new"
        )
    return header


def _kernel(header: list[str], units: list[str], fields: list[str], asked: Collection[str]) -> KernelRecord:
    if len(fields) != len(header):
        raise ProfilerError(f"ncu's table has a row of {len(fields)} cells under a header of {len(header)}: it was cut off")
    cells = dict(zip(header, zip(fields, units, strict=True), strict=True))
    readings = {name: _reading(name, *cells[name]) for name in asked if name in cells}
    kernel = KernelRecord(
        name=cells["Kernel Name"][0],
        grid=cells.get("Grid Size", ("", ""))[0],
        block=cells.get("Block Size", ("", ""))[0],
        readings=readings,
    )
    if not kernel.value(metrics.DURATION):
        raise ProfilerError(f"ncu measured no duration of {kernel.name}, so nothing can be said of it")
    return kernel


def _reading(name: str, text: str, unit: str) -> Reading:
    try:
        value = number(text)
    except ValueError:
        raise ProfilerError(f"ncu's value of {name} cannot be read: {text!r}") from None
    what, slash, per = unit.partition("/")
    for base, factors in (("us", TIME_US), ("byte", BYTES)):
        if what in factors:
            return Reading(value=None if value is None else value * factors[what], unit=f"{base}{slash}{per}")
    if name in metrics.DURATION.names:
        raise ProfilerError(f"ncu gives {name} in {unit!r}; allowed: {', '.join(TIME_US)}")
    return Reading(value=value, unit=unit)


def _first_lines(text: str) -> str:
    return " | ".join(line.strip() for line in text.splitlines()[:3] if line.strip()) or "none at all"
