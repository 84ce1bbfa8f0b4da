"""What a scoring pass is said to take, held against what the process takes meanwhile.

python -m pytest tests/evaluation/test_pass_memory.py
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.tiny_checkpoints import save_tiny
from tests.tiny_evaluations import pair_keys
from tests.tiny_merges import recipe
from tests.tiny_mixtures import save_mixtures
from tests.tiny_pairs import save_tokenizer, write_config
from utils.evaluation.candidates import Candidate
from utils.evaluation.entries import Preparing
from utils.evaluation.pass_memory import passes_line, share_passes
from utils.evaluation.score_settings import ScoreSettings
from utils.evaluation.scoring import Scorer
from utils.evaluation.tasks import evaluation_rows
from utils.evaluation.whole_models import whole_model
from utils.merging.settings import MergeSettings
from utils.pair.config import read_pair_config
from utils.runtime import return_freed_memory

SMALL = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 4096, "layers": 3, "tokens": 256, "rows": 12}
LARGE = {"hidden_size": 640, "intermediate_size": 2560, "vocab_size": 16384, "layers": 6, "tokens": 256, "rows": 12}


def private_bytes() -> int:
    """What this process has in use, pages of files left out."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@contextmanager
def peak(found: list[int]) -> Iterator[None]:
    """Append to `found` by how much the process grows at most."""
    before, stop = private_bytes(), threading.Event()
    most = before

    def watch() -> None:
        nonlocal most
        while not stop.wait(0.001):
            most = max(most, private_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        found.append(most - before)


def save(folder: Path, size: dict[str, int]) -> Path:
    """A pair of models of some size, and rows that fill the sequences."""
    shape = {name: size[name] for name in ("hidden_size", "intermediate_size", "vocab_size", "layers")}
    for seed, name in enumerate(("base", "code", "math")):
        own = save_tiny(
            "llama", folder / name, seed, **shape, num_attention_heads=8, max_position_embeddings=size["tokens"]
        )
        save_tokenizer(own)
    keys = pair_keys(folder)
    for name in ("code", "math"):
        lines = [f'{{"question": "{name} {row}{" is it" * size["tokens"]}", "answer": "yes"}}' for row in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        text = {"path": str(folder / f"{name}.jsonl"), "text": "{question}", "seqlen": size["tokens"]}
        keys["calibration"][name] = keys["evaluation"][name] = text
    return write_config(folder, {**keys, "dataset": keys["calibration"]["code"]})


@pytest.mark.parametrize("size", [SMALL, pytest.param(LARGE, marks=pytest.mark.slow)], ids=["small", "large"])
def test_a_pass_takes_what_it_is_said_to_take(tmp_path, size):
    config = read_pair_config(save(tmp_path, size))
    said: list[str] = []
    tasks = evaluation_rows(config, validation=2, test=size["rows"])
    scorer = Scorer(config, tasks, ScoreSettings(), say=said.append)
    scales = (0.2, 0.4, 0.6, 0.8)
    candidates = [
        Candidate(f"ties {scale}", recipe=recipe(tmp_path, parameters={"lambda": scale, "normalize": True}))
        for scale in scales
    ]
    scorer.score(candidates[:1], {"code": tasks[0].part("validation")})  # what is made once
    rows, found = {task.name: task.part("test") for task in tasks}, []
    with peak(found):
        scorer.score(candidates, rows)
    expected = scorer.memory(candidates[0], len(candidates), rows)
    assert expected == pytest.approx(found[0], rel=0.25)
    assert "4 candidates in one pass" in said[-1] and "memory: about" in said[-1]


class Held:
    """A candidate of which only the hidden states matter."""

    def __init__(self, hidden: int) -> None:
        self.hidden = hidden


@pytest.mark.slow
def test_a_whole_mixture_is_not_in_memory_twice(tmp_path):
    """A recipe's model whose experts are stored each on its own; the merge reads and writes in pieces."""
    wide = {"hidden_size": 256, "moe_intermediate_size": 768, "num_experts": 8, "num_hidden_layers": 4}
    folder, found = save_mixtures(tmp_path, **wide), []
    settings = MergeSettings(Path("unwritten"), Path("recipe"), device="cpu", quiet=True)
    preparing = Preparing(torch.device("cpu"), "float32", settings)
    candidate = Candidate("one", recipe=recipe(folder, "task_arithmetic"))
    preparing.recipe(candidate, preparing.plan(candidate))  # what is made once
    return_freed_memory()
    with peak(found), whole_model(candidate, preparing) as whole:
        size = sum(value.nbytes for value in whole.model.parameters())
        assert all(value.data_ptr() % 64 == 0 for value in whole.model.parameters())
    assert size > 50 * 2**20 and found[0] < 1.8 * size


def test_passes_hold_what_memory_holds():
    riders = [Held(each) for each in (4, 4, 4, 12, 1)]
    assert share_passes(riders, 8, None) == [[0, 1], [2], [3], [4]]  # one that is too large goes alone
    assert share_passes(riders, 100, 2) == [[0, 1], [2, 3], [4]]
    assert share_passes([], 8, None) == []


def test_what_may_not_fit_is_said():
    assert "3 candidates in 2 passes over the inputs, up to 2 at once" in passes_line([[0, 1], [2]], 10**9, 10**10)
    assert "may not be enough" in passes_line([[0]], 10**10, 10**9)
