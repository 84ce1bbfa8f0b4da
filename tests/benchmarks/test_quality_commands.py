"""The recipes that lead, made by the quality benchmark's functions and by the commands, on a tiny pair.

python -m pytest tests/benchmarks/test_quality_commands.py -m ""
"""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.quality_commands import check_commands, repeated
from benchmarks.quality_models import Trained
from benchmarks.quality_pairs import lay_out
from benchmarks.quality_texts import TaskTexts, Texts
from tests.tiny_experts import save_experts
from utils.guidance.method import guidance_methods


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = save_experts(tmp_path_factory.mktemp("pair"))
    tasks = {}
    for task in ("code", "math"):
        rows = [json.loads(line)["text"] for line in Path(folder, f"{task}.jsonl").read_text().splitlines()]
        tasks[task] = TaskTexts(tuple(rows), tuple(rows[:16]), tuple(rows[16:20]), tuple(rows[20:24]))
    trained = Trained(folder / "base", {task: folder / task for task in tasks})
    return lay_out(trained, Texts((), tasks, "a test"), folder / "work")


def test_every_method_is_repeated():
    assert {one.guidance for one in repeated("code").values()} == set(guidance_methods())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gram_mean, refitted", "gram_mean, low rank", "gram_mean, two rounds", "tuned from two rounds"]
)
def test_the_commands_give_the_bits_of_the_functions(pair, name):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        check_commands(pair, "cpu", [name])
    finally:
        torch.set_num_threads(threads)
