"""Where what tuning starts from is merged; what it takes on a device is in `tests/guidance/test_memory.py`.

python -m pytest tests/guidance/tuned/test_memory.py
"""

from types import SimpleNamespace

import pytest
import torch

from utils.guidance.tuned.start import Start
from utils.guidance.tuned.tuning import settings_of
from utils.recipes.method_rules import GRAM_MEAN, TASK_ARITHMETIC


@pytest.mark.parametrize(("method", "device"), [(TASK_ARITHMETIC, "cpu"), (GRAM_MEAN, "cuda:0")])
def test_plain_changes_are_merged_where_their_files_are(method, device):
    start = Start(method.name, {}, {"code": 0.5}, {})
    assert settings_of(SimpleNamespace(trust_remote_code=False), torch.device("cuda", 0), start).device == device
