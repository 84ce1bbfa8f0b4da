"""The folder that the fault tests run their commands in: a tiny pair, its text, a recipe, and files of a bystander."""

import json
import shutil
from pathlib import Path

import yaml

from tests.tiny_merges import recipe, save_models, write_recipe
from tests.tiny_pairs import pair_settings, save_pair

BYSTANDERS = {"notes.txt": "mine", "out/notes.txt": "mine, too"}
COMMANDS = {
    "measure": ("lewis_importance.py", "--config", "pair.yaml", "--out_dir", "out/dfs", "--quiet"),
    "decide": ("lewis_merge.py", "--config_file", "pair.yaml", "--delta_dfs_in_dir", "dfs", "--out_dir", "out/recipes", "--quiet"),
    "merge": ("utils/merger.py", "--merge_config", "recipe.yaml", "--output_path", "out/model", "--out_shard_size", "20000", "--quiet"),
    "evaluate": ("utils/evaluator.py", "--config", "judged.yaml", "--out_dir", "out/evaluation", "--test_rows", "4", "--validation_rows", "4",
                 "--no-samples", "--quiet"),
    "search": ("utils/searcher.py", "--config", "judged.yaml", "--out_dir", "out/search", "--trials", "4", "--batch", "2", "--test_rows", "4",
               "--validation_rows", "4", "--first_rows", "4", "--no-samples", "--quiet"),
}  # fmt: skip
RESULTS = {
    "measure": "out/dfs",
    "decide": "out/recipes",
    "merge": "out/model",
    "evaluate": "out/evaluation",
    "search": "out/search",
}
JUDGED_TEXTS = {"code": "{question} {answer}", "math": "Tell me: {question} {answer}"}


def make_pair(folder: Path) -> Path:
    """Make the folder."""
    save_pair(folder)
    merged = save_models(folder / "merged", names=("base", "code"), layers=1)
    write_recipe(folder / "recipe.yaml", recipe(merged, "task_arithmetic", experts=("code",)))
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace(f"{folder}/", ""))  # so that a copy merges its own models
    _write_judged(folder)
    return folder


def _write_judged(folder: Path) -> None:
    """A config of the pair with held-out text, and a small space to search."""
    rows = [{"question": f"What is {i} and {i}?", "answer": f"It is {i + i}."} for i in range(24)]
    (folder / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = {name: {"path": "judged.jsonl", "text": text, "seqlen": 32} for name, text in JUDGED_TEXTS.items()}
    keys = {
        "dataset": texts["code"],
        "calibration": texts,
        "evaluation": {name: {**text, "answer": "{answer}"} for name, text in texts.items()},
        "search": {"guidance": ["uniform"], "depth_groups": 1},
    }
    (folder / "judged.yaml").write_text(yaml.safe_dump(pair_settings() | keys, sort_keys=False))


def copy_of(folder: Path, to: Path) -> Path:
    """A copy to run a command in, with the times of the files, and with a bystander's files."""
    shutil.copytree(folder, to)
    for name, text in BYSTANDERS.items():
        (to / name).parent.mkdir(exist_ok=True)
        (to / name).write_text(text)
    return to
