"""Hashes and JSON of manifests.

python -m pytest tests/publishing/test_manifest.py
"""

import hashlib
import os

import pytest

from tests.refusals import refused
from utils.publishing.manifest import file_sha256, to_json


def test_file_sha256(tmp_path):
    content = os.urandom(2**20) * 9  # more than is read at once
    (tmp_path / "x").write_bytes(content)
    assert file_sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_json_is_stable_and_finite():
    assert to_json({"b": 1, "a": "caf\u00e9"}) == b'{\n  "b": 1,\n  "a": "caf\xc3\xa9"\n}\n'
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON compliant"):
            to_json({"a": value})


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_has_no_end_is_not_hashed(tmp_path, kind):
    if kind == "pipe":
        os.mkfifo(tmp_path / "file")
    else:
        (tmp_path / "file").symlink_to("/dev/zero")
    with refused("file-not-regular"):
        file_sha256(tmp_path / "file")
