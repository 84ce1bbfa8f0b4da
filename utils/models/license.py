"""The license that a model states: what the metadata block of its card says."""

import re
from pathlib import Path

from utils.bounded_files import read_bounded
from utils.errors import UserError
from utils.safe_yaml import top_level_text

CARD = "README.md"
_MOST_BYTES = 2**20
_MOST_METADATA = 2**18  # bytes; a card with the results of hundreds of benchmarks has about 200,000
_BLOCK = re.compile(rb"\A(?:\xef\xbb\xbf)?\s*---[ \t]*\r?\n(.*?)^---[ \t]*$", re.S | re.M)


def stated_license(folder: Path) -> str:
    """The license in the card's metadata: the hub's identifier, or the name of one that has none; "" if none is stated.

    A card that cannot be read states nothing: it describes the model and is no part of it. Of its metadata nothing is
    made but the text of the keys that matter, so that the others may hold anything.
    """
    try:
        content = read_bounded(folder / CARD, CARD, _MOST_BYTES)
        block = _BLOCK.match(content.replace(b"\r\n", b"\n"), 0, _MOST_METADATA)
        stated = top_level_text(block[1].decode(), ("license", "license_name"), CARD) if block else {}
    except (UserError, ValueError):
        return ""
    if stated.get("license") == ["other"] and len(stated.get("license_name", ())) == 1:
        return stated["license_name"][0]
    return ", ".join(stated.get("license", ()))
