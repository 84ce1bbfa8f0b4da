"""What a model's card says of its license.

python -m pytest tests/models/test_license.py
"""

import os
import time

import pytest

from utils.models.license import stated_license


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: apache-2.0\ntags: [merge]\n---\n# A model\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: llama3\n---\n", "llama3"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0"),
        ("---\nlicense: 3\n---\n", ""),
        ("---\ntags: [merge]\n---\n", ""),
        ("\ufeff---  \r\nlicense: mit\r\n---\r\n# A model\r\n", "mit"),
        ("---\nintroduction: |\n  ---\n  license: gpl\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: mit\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense: mit\nx: !!bool maybe\ny: !!timestamp maybe\n---\n", "mit"),
        ("---\nlicense: !!timestamp maybe\n---\n", ""),
        ("---\nlicense: [mit, !!bool maybe]\n---\n", ""),
        ("---\nlicense: {name: mit}\n---\n", ""),
        ("---\nlicense: &a [*a]\n---\n", ""),
        ("---\n? [a, b]\n: c\nlicense: mit\n---\n", "mit"),
        ("---\n- a list\n---\n", ""),
        ("---\nlicense: 'unclosed\n---\n", ""),
        ("# No metadata\nlicense: mit\n", ""),
        ("", ""),
    ],
)
def test_stated_license(tmp_path, card, license):
    (tmp_path / "README.md").write_text(card)
    assert stated_license(tmp_path) == license


def test_no_card_and_one_that_is_not_text(tmp_path):
    assert stated_license(tmp_path) == ""
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\xfe\n---\n")
    assert stated_license(tmp_path) == ""


def test_a_card_of_many_benchmarks(tmp_path):
    results = "".join(f"- name: benchmark {number}\n  value: {number}\n" for number in range(5000))
    (tmp_path / "README.md").write_text(f"---\nresults:\n{results}license: mit\n---\n")
    assert stated_license(tmp_path) == "mit"


@pytest.mark.parametrize(
    "metadata",
    ["license: " + ":".join(["1"] + ["59"] * 150_000), "license: mit\ntags: [" + ",".join(["a"] * 500_000) + "]"],
    ids=["base-60", "long-list"],
)
def test_a_card_that_would_take_long_states_nothing(tmp_path, metadata):
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n")
    before = time.process_time()
    assert stated_license(tmp_path) == ""
    assert time.process_time() - before < 1


def test_a_card_that_is_a_pipe_states_nothing(tmp_path):
    os.mkfifo(tmp_path / "README.md")
    assert stated_license(tmp_path) == ""
