"""What the sweep is held against: the record of outcomes, and the rows that it leaves out."""

import hashlib
import importlib.metadata
from functools import cache
from pathlib import Path

import yaml

from tests.architectures.shrinking import Row

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_name("outcomes.json")
ROWS = Path(__file__).with_name("rows.yaml")
LEFT_OUT = Path(__file__).with_name("left_out.yaml")
_SEVERITIES = ("ok", "refused: ", "refused late: ", "wrong: ")


REFUSED = 1  # in time


def severity(outcome: str) -> int:
    """How bad a step's outcome is: 0 it went through, 1 refused in time, 2 refused late, 3 wrong."""
    return next(place for place, start in enumerate(_SEVERITIES) if outcome.startswith(start))


def state(row: Row) -> dict[str, str]:
    """What a row's outcome may depend on, as digests: `sources` (this project's, the sweep's, versions of libraries), and the
    row's own `settings`."""
    return {"sources": _sources(), "settings": hashlib.sha256(repr(row).encode()).hexdigest()[:16]}


@cache
def _sources() -> str:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "mergekit")]
    digest = hashlib.sha256(" ".join(versions).encode())
    here = [Path(__file__).with_name(name) for name in ("shrinking.py", "sweep.py")]
    here.append(ROOT / "tests" / "tiny_pairs.py")
    for path in sorted([*ROOT.glob("*.py"), *(ROOT / "utils").rglob("*.py"), *here]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def known_labels() -> set[str]:
    """The labels of all rows that are run or left out."""
    return {*yaml.safe_load(ROWS.read_text()), *yaml.safe_load(LEFT_OUT.read_text())["rows"]}
