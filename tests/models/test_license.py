"""What a model's card says of its license."""

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
