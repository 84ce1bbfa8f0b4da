"""Checksums of stretches of files, piece by piece, are those of the whole.

python -m pytest tests/publishing/test_checksums.py
"""

import os
import zlib

import pytest

from utils.publishing import checksums
from utils.publishing.checksums import checksum, file_checksum


@pytest.mark.parametrize(("start", "nbytes"), [(0, 1000), (3, 500), (999, 1), (5, 0), (990, 100)])
def test_a_stretch_in_pieces(tmp_path, monkeypatch, start, nbytes):
    monkeypatch.setattr(checksums, "CHUNK", 64)
    content = os.urandom(1000)
    (tmp_path / "file").write_bytes(content)
    assert file_checksum(tmp_path / "file", start, nbytes) == zlib.crc32(content[start : start + nbytes])
    assert file_checksum(tmp_path / "file") == zlib.crc32(content)
    with open(tmp_path / "file", "rb") as file:
        assert checksum(file.fileno(), 300, 700, zlib.crc32(content[:300])) == zlib.crc32(content)


def test_an_error_names_the_file(tmp_path):
    with pytest.raises(OSError) as caught:
        file_checksum(tmp_path)
    assert caught.value.filename == str(tmp_path)
