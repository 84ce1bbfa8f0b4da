"""The folder that the fault tests run their commands in: a tiny pair, its text, a recipe, and files of a bystander."""

import shutil
from pathlib import Path

from tests.tiny_merges import recipe, save_models, write_recipe
from tests.tiny_pairs import save_pair

BYSTANDERS = {"notes.txt": "mine", "out/notes.txt": "mine, too"}
COMMANDS = {
    "measure": ("lewis_importance.py", "--config", "pair.yaml", "--out_dir", "out/dfs", "--quiet"),
    "decide": ("lewis_merge.py", "--config_file", "pair.yaml", "--delta_dfs_in_dir", "dfs", "--out_dir", "out/recipes", "--quiet"),
    "merge": ("utils/merger.py", "--merge_config", "recipe.yaml", "--output_path", "out/model", "--out_shard_size", "20000", "--quiet"),
}  # fmt: skip
RESULTS = {"measure": "out/dfs", "decide": "out/recipes", "merge": "out/model"}


def make_pair(folder: Path) -> Path:
    """Make the folder."""
    save_pair(folder)
    merged = save_models(folder / "merged", names=("base", "code"), layers=1)
    write_recipe(folder / "recipe.yaml", recipe(merged, "task_arithmetic", experts=("code",)))
    return folder


def copy_of(folder: Path, to: Path) -> Path:
    """A copy to run a command in, with the times of the files, and with a bystander's files."""
    shutil.copytree(folder, to)
    for name, text in BYSTANDERS.items():
        (to / name).parent.mkdir(exist_ok=True)
        (to / name).write_text(text)
    return to
