"""Results in a file of JSON lines, each with what was asked, so that nothing is asked twice."""

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Records = dict[str, Record]  # Key of what was asked -> what came out.


def key(asked: Record) -> str:
    """Of a record."""
    return json.dumps(asked, sort_keys=True)


def read(path: Path) -> Records:
    """The results so far."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {key(record["asked"]): record for record in map(json.loads, lines)}


def append(path: Path, record: Record) -> None:
    """One more; record["asked"] says of what."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
