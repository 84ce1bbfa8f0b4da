"""A model with a vision tower as base, and an expert of its language tower alone, through the three commands.

What the language tower becomes is what the same commands make of the tower as a model of its own.
"""

import json

import pytest
import torch
import yaml

from tests.architectures.shrinking import save_changed, tiny_model
from tests.architectures.sweep import read_rows
from tests.commands_here import done_here, refused_here
from tests.tiny_mixtures import weights
from tests.tiny_pairs import save_tokenizer, write_config
from tests.tiny_towers import text_model

ROWS = {row.label: row for row in read_rows()}
TOWERS = {"llava:image-text": "llama", "mistral3:image-text": "mistral"}


def tower_name(name):
    """What the language tower calls a tensor that the whole model stores; None of one that is not its own."""
    for before, after in (
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("model.language_model.", "model."),
        ("lm_head.", "lm_head."),
    ):
        if name.startswith(before):
            return after + name.removeprefix(before)
    return None


@pytest.fixture(scope="module", params=TOWERS)
def folder(request, tmp_path_factory):
    """`whole` is the base of one pair, `tower` that of another; `code`, and `math` where two are needed, the experts."""
    folder = tmp_path_factory.mktemp("text_expert")
    model = tiny_model(ROWS[request.param])
    text = text_model(model)
    assert text.config.model_type == TOWERS[request.param]
    model.save_pretrained(folder / "whole")
    text.save_pretrained(folder / "tower")
    for seed, name in enumerate(("code", "math"), 1):
        save_changed(text, folder / name, seed)
    for name in ("whole", "tower", "code", "math"):
        save_tokenizer(folder / name, size=90)
    rows = [{"question": f"What is {i} and {i}?", "answer": f"It is {i + i}."} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, base in (("alone", "tower"), ("pair", "whole")):
        for few, experts in (("", ("code",)), ("two_", ("code", "math"))):
            models = [{"name": f"./{base}", "type": "base"}, *({"name": f"./{one}", "type": one} for one in experts)]
            write_config(folder, {"model_info": models}).rename(folder / f"{few}{name}_config.yaml")
    return folder


def recipes(folder, guidance, *flags):
    """The recipes of both pairs by one guidance."""
    found = {}
    for name in ("pair", "alone"):
        out, config = f"{name}_{guidance}", f"{'two_' if guidance == 'sens_merging' else ''}{name}_config.yaml"
        measure = ("--config", config, "--out_dir", out, "--guidance", guidance, *flags)
        done_here("lewis_importance.py", *measure, cwd=folder)
        decide = ("--delta_dfs_in_dir", out, "--config_file", config, "--out_dir", f"{out}_r", "--guidance", guidance)
        done_here("lewis_merge.py", *decide, "--dtype", "float32", cwd=folder)
        (found[name],) = (folder / f"{out}_r").glob("*.yaml")
    return found


_OTHERS = ("sens_merging", "submodule_linearity", "saliency_budget", "gram_mean")


@pytest.mark.parametrize("guidance", ["lewis", *(pytest.param(one, marks=pytest.mark.slow) for one in _OTHERS)])
def test_vision_stays_and_language_is_merged(folder, guidance):
    made = recipes(folder, guidance, *(("--accept_useless_text",) if guidance != "lewis" else ()))
    merged = {}
    for name, recipe in made.items():
        out = f"{name}_{guidance}_merged"
        done_here("utils/merger.py", "--merge_config", recipe, "--output_path", out, "--device", "cpu", cwd=folder)
        merged[name] = weights(folder / out)
    base, whole, alone = weights(folder / "whole"), merged["pair"], merged["alone"]
    assert whole.keys() == base.keys()
    own = {name: tower_name(name) for name in whole}
    for name, value in whole.items():
        if own[name] is None:
            assert torch.equal(value, base[name]), name  # vision tower and projector
        else:
            torch.testing.assert_close(value, alone[own[name]], rtol=0, atol=1e-6, msg=name)
    assert {name for name in own.values() if name} == set(alone)
    assert sum(name is None for name in own.values()) > 10
    changed = [name for name, value in whole.items() if not torch.equal(value, base[name])]
    assert len(changed) == len(alone)
    if guidance == "lewis":  # a density for every matrix of the tower's blocks, and none for the other tower
        filters = [
            [one["filter"] for one in yaml.safe_load(recipe.read_text())["models"][1]["parameters"]["density"][:-1]]
            for recipe in made.values()
        ]
        assert len(filters[0]) == len(filters[1]) > 10
        assert [tower_name(f"{one}.") for one in filters[0]] == [f"{one}." for one in filters[1]]


def test_an_expert_of_another_width_is_refused_before_measuring(folder):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder / "code")
    config.intermediate_size += 8
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "wide")
    save_tokenizer(folder / "wide", size=90)
    models = [{"name": "./whole", "type": "base"}, {"name": "./wide", "type": "code"}]
    write_config(folder, {"model_info": models})
    refused_here(
        "model-architectures-differ", "lewis_importance.py", "--config", "pair.yaml", "--out_dir", "x", cwd=folder
    )
