"""A record of launch costs that the present table cannot be made of."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flashcore.document_blocks import BLOCKS
from flashcore.errors import ArgumentValueError


def test_another_schema_is_refused(record: Callable[[], Path]) -> None:
    path = record() / "launch-cost.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 1}))
    with pytest.raises(ArgumentValueError, match=r"launch-cost\.json is not what tools/launch_cost\.py writes"):
        BLOCKS["launch"]()
