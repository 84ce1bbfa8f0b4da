"""Models that no guidance can measure are refused while they are made ready, before any weight is read.

python -m pytest tests/passes/test_preparation.py
"""

import pytest
import torch

from tests.refusals import refused
from tests.tiny_mixtures import save_mixtures
from utils.pair.calibration import choose_samples
from utils.pair.config import read_pair_config
from utils.passes.preparation import Precision, prepare_subjects


@pytest.mark.parametrize(
    ("model_type", "kind", "code", "says"),
    [
        ("zamba2", "causal", "model-unsupported", "are shared with other blocks"),
        ("paligemma", "image-text", "model-not-causal", "its tokens attend to later ones"),
    ],
)
def test_what_cannot_be_measured(tmp_path, monkeypatch, model_type, kind, code, says):
    monkeypatch.chdir(save_mixtures(tmp_path, model_type, kind))
    config = read_pair_config("pair.yaml")
    samples = {source: choose_samples(source, config.nsamples) for source in config.texts}
    with refused(code, says):
        prepare_subjects(config, samples, Precision(torch.device("cpu"), "float32", None), False)
