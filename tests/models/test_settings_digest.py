"""A copy has the settings of the original, whoever saved it; another epsilon, or other code, is another one.

python -m pytest tests/models/test_settings_digest.py
"""

import json
import shutil

from tests.tiny_checkpoints import save_tiny
from tests.tiny_pairs import edit_json
from utils.models.opening import open_checkpoint
from utils.models.settings_digest import settings_digest


def digest(folder):
    return settings_digest(open_checkpoint(str(folder)))


def test_settings_are_known_by_what_is_computed_with_them(tmp_path):
    model = save_tiny("llama", tmp_path / "model", layers=1)
    copy = shutil.copytree(model, tmp_path / "copy")
    turned = dict(reversed(json.loads((model / "config.json").read_text()).items()))
    (copy / "config.json").write_text(json.dumps(turned))
    edit_json(copy / "config.json", transformers_version="5.99", _name_or_path="elsewhere")
    before = digest(model)
    assert digest(copy) == before
    (copy / "modeling_own.py").write_text("EPSILON = 1")
    with_code = digest(copy)
    (copy / "modeling_own.py").write_text("EPSILON = 2")
    edit_json(model / "config.json", rms_norm_eps=0.5)
    assert len({before, with_code, digest(copy), digest(model)}) == 4
