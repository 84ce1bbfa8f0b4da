"""Command 2 in this process, in a folder with a copy of a golden measurement (`work` of conftest.py)."""

import hashlib
import json

import pandas as pd
import yaml

from tests.commands_here import refused_here, run_here

TIES = "pair_0.3_0.8_generated_ties_merge_config.yaml"


def call(*arguments):
    """Run the command in this process: (exit code, stdout, stderr)."""
    done = run_here("lewis_merge.py", *arguments)
    return done.returncode, done.stdout, done.stderr


def refuses(code, work, *more):
    """The command refuses with this code and writes nothing; its message."""
    return refused_here(code, "lewis_merge.py", *flags(work, *more))


def flags(work, *more):
    """The command line of a decision in this folder."""
    return ["--delta_dfs_in_dir", work / "dfs", "--config_file", work / "pair.yaml", "--out_dir", work / "out", *more]


def edit_config(work, **changes):
    """Set keys of the pair config; None removes one."""
    config = yaml.safe_load((work / "pair.yaml").read_text())
    for key, value in changes.items():
        if value is None:
            del config[key]
        else:
            config[key] = value
    (work / "pair.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def edit_csv(work, change, name="math"):
    """Change an expert's delta table as a whole."""
    path = work / "dfs" / f"{name}_delta.csv"
    frame = change(pd.read_csv(path))
    frame.to_csv(path, index=False)


def write_norms(work, golden, **manifest):
    """Add what command 1 records beside the delta tables: norms.csv and a manifest."""
    config = yaml.safe_load((work / "pair.yaml").read_text())
    from utils.guidance.csv_files import csv_bytes
    from utils.models.checkpoints import weight_file_record
    from utils.models.opening import open_checkpoint
    from utils.pair.config import read_pair_config

    rows, models = [], []
    for entry in config["model_info"]:
        checkpoint = open_checkpoint(str(golden / entry["name"]))
        models.append({"type": entry["type"], **weight_file_record(checkpoint)})
        for component in config["components"]:
            for layer in range(3):
                name = f"model.layers.{layer}.{config['prefix_mapping'][component]}.weight"
                shape = checkpoint.tensors[name].shape
                rows.append((entry["type"], layer, component, name, 1.0, shape[0] * shape[1]))
    norms = pd.DataFrame(rows, columns=["model", "layer", "component", "tensor", "norm", "params"])
    (work / "dfs" / "norms.csv").write_bytes(csv_bytes(norms))
    content = {
        "options": read_pair_config(work / "pair.yaml").options(),
        "models": models,
        "files": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((work / "dfs").glob("*.csv"))
        },
        **manifest,
    }
    (work / "dfs" / "manifest.json").write_text(json.dumps(content))
