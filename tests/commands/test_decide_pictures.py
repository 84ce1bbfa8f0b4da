"""What is drawn of a recipe: every tensor has its place, and the mean is the printed one.

python -m pytest tests/commands/test_decide_pictures.py
"""

import numpy as np
import pandas as pd
import pytest

from utils.commands.decide_pictures import by_place
from utils.recipes.coefficients import COLUMNS

ROWS = [
    ("math", "embed", -1, "", 1.0, 0.5, 1000),
    ("math", "l0.q", 0, "q", 1.0, 0.9, 100),
    ("math", "l0.up", 0, "up", 1.0, 0.8, 300),
    ("math", "l0.norm1", 0, "", 1.0, 0.2, 10),
    ("math", "l0.norm2", 0, "", 1.0, 0.4, 30),
    ("math", "l1.q", 1, "q", 1.0, 0.7, 100),
    ("math", "l1.up", 1, "up", 1.0, 0.6, 300),
    ("math", "head", 2, "", 1.0, 0.1, 1000),
]


def test_embeddings_norms_and_head_have_their_cells():
    table = by_place(pd.DataFrame(ROWS, columns=list(COLUMNS)), "weight")
    assert list(table.index) == ["before", 0, 1, "behind"] and list(table.columns) == ["q", "up", "other"]
    assert table.loc["before", "other"] == 0.5 and table.loc["behind", "other"] == 0.1
    assert table.loc[0, "other"] == pytest.approx((10 * 0.2 + 30 * 0.4) / 40)
    assert table["q"].tolist()[1:3] == [0.9, 0.7] and table["up"].tolist()[1:3] == [0.8, 0.6]
    assert np.isnan(table.loc[1, "other"]) and np.isnan(table.loc["before", "q"])


def test_without_sizes_cells_are_means_over_tensors():
    table = by_place(pd.DataFrame(ROWS, columns=list(COLUMNS)).assign(params=0), "weight")
    assert table.loc[0, "other"] == pytest.approx(0.3)
