"""The table of what a call costs the host, from a record of either schema."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flashcore.document_blocks import BLOCKS
from flashcore.errors import ArgumentValueError

TIME = {"median": 6.5, "min": 6.25, "max": 9.0}


def _with(record: Callable[[], Path], **changes: object) -> str:
    path = record() / "launch-cost.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return BLOCKS["launch"]()


def test_a_record_without_streams_has_no_column_of_them(record: Callable[[], Path]) -> None:
    text = _with(record)
    assert text.startswith("| call | host us, median | min | max |\n") and "| our launcher | 4.50 | 4.25 | 6.00 |" in text


def test_the_time_of_a_stream_stands_beside_the_hosts(record: Callable[[], Path]) -> None:
    times = {"our launcher": TIME, "SDPA": TIME | {"median": 14.0}}
    streams = {"our launcher": {"median": 7.5, "min": 7.0, "max": 8.0}}
    text = _with(record, schema_version=2, host_us_per_call=times, stream_us_per_call=streams)
    assert "| our launcher | 6.50 | 6.25 | 9.00 | 7.50 |" in text
    assert "| SDPA | 14.0 | 6.25 | 9.00 | - |" in text


def test_another_schema_is_refused(record: Callable[[], Path]) -> None:
    with pytest.raises(ArgumentValueError, match=r"launch-cost\.json is not what tools/launch_cost\.py writes"):
        _with(record, schema_version=3)
