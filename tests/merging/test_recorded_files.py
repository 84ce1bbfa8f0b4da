"""A recipe is merged by the files it was made of: another expert's, a later measurement's and a damaged one are refused.

python -m pytest tests/merging/test_recorded_files.py
"""

import hashlib
import json
import shutil
import struct
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.commands_here import done_here, refused_here, run_here
from tests.refusals import refusal_code, refused
from tests.tiny_pairs import CALIBRATION, save_pair, write_config
from tests.tiny_recipes import decide_here, measure_here
from utils.evaluation.candidates import read_candidate
from utils.recipes.saliency_vectors import open_vectors

GUIDED = {
    "gram_mean": ("dfs_gram_mean", "{}_grams.safetensors"),
    "guided_mean": (
        "out_guided_mean",
        "pair_generated_guided_mean_saliency_budget_merge_config_{}_saliency.safetensors",
    ),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = save_pair(tmp_path_factory.mktemp("pair"))
    write_config(folder, {"calibration": CALIBRATION})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        measure_here("gram_mean", "dfs_gram_mean", accept_useless_text=True)
        decide_here("gram_mean", "dfs_gram_mean", "out_gram_mean")
        measure_here("saliency_budget", "dfs_saliency")
        decide_here("saliency_budget", "dfs_saliency", "out_guided_mean", merge_method="guided_mean")
    return folder


def recipe_of(method):
    (path,) = Path(f"out_{method}").glob("*.yaml")
    return path


def files_of(method):
    folder, name = GUIDED[method]
    return [Path(folder) / name.format(expert) for expert in ("code", "math")]


def command_3(path, out="merged"):
    return "utils/merger.py", "--merge_config", path, "--output_path", out, "--device", "cpu"


def swap(one, other):
    one.rename("spare")
    other.rename(one)
    Path("spare").rename(other)


@pytest.mark.parametrize("method", GUIDED)
def test_the_files_of_another_expert_are_refused(method, pair):
    path, files = recipe_of(method), files_of(method)
    assert "says which they were" not in done_here(*command_3(path, "before")).stdout
    swap(*files)
    said = refused_here("saliency-other-file", *command_3(path))
    assert str(files[0].resolve()) in said and str(files[1].resolve()) in said
    with refused("saliency-other-file"):
        read_candidate(str(path))
    path.write_text(path.read_text().replace("bfloat16", "float32"))  # edited since: the files are still those it names
    refused_here("saliency-other-file", *command_3(path))
    swap(*files)
    done_here(*command_3(path))


def test_a_recipe_without_a_record_is_merged_and_it_says_so(pair):
    path = recipe_of("gram_mean")
    path.with_name(path.stem + ".manifest.json").unlink()
    swap(*files_of("gram_mean"))
    said = done_here(*command_3(path)).stdout
    assert said.count("(nothing beside the recipe says which they were)") == 2


def test_a_later_measurement_is_refused_until_the_recipe_is_made_again(pair):
    path = recipe_of("gram_mean")
    write_config(pair, {"calibration": CALIBRATION, "nsamples": 5})
    measure_here("gram_mean", "dfs_gram_mean", accept_useless_text=True, overwrite=True)
    refused_here("saliency-other-file", *command_3(path))
    decide_here("gram_mean", "dfs_gram_mean", "out_gram_mean", overwrite=True)
    done_here(*command_3(path))


def test_a_model_that_was_trained_on_is_refused_by_commands_2_and_3(pair):
    """Saved with other numbers in the same layout; a copy of the measured one is welcome."""
    path, kept = recipe_of("gram_mean"), Path("kept")
    shutil.copytree("code", kept)  # later times, the same content
    shutil.rmtree("code")
    shutil.copytree(kept, "code", copy_function=shutil.copyfile)
    done_here(*command_3(path, "copied"))
    tensors = load_file("code/model.safetensors")
    save_file(
        {name: 1.5 * value for name, value in tensors.items()}, "code/model.safetensors", metadata={"format": "pt"}
    )
    said = refused_here("recipe-other-weights", *command_3(path))
    assert "./code" in said and "./math" not in said
    with refused("recipe-other-weights"):
        read_candidate(str(path))
    with refused("measured-other-weights"):
        decide_here("gram_mean", "dfs_gram_mean", "out_gram_mean", overwrite=True, accept_edited=False)
    decide_here("gram_mean", "dfs_gram_mean", "out_gram_mean", overwrite=True, accept_edited=True)
    done_here(*command_3(path))


def test_a_recipe_to_be_tuned_is_refused_too(pair):
    swap(*files_of("gram_mean"))
    flags = ("--guidance", "tuned", "--start_recipe", recipe_of("gram_mean"), "--accept_useless_text")
    refused_here("saliency-other-file", "lewis_importance.py", "--config", "pair.yaml", "--out_dir", "tuned", *flags)


def test_the_header_names_the_content_and_a_damaged_entry_is_not_merged(pair):
    """The whole of a large file is not read to know it; what is read is checked."""
    path, file = recipe_of("gram_mean"), files_of("gram_mean")[0]
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    recorded = json.loads(path.with_name(path.stem + ".manifest.json").read_text())["vectors"]
    assert recorded[f"../{file}"] == hashlib.sha256(content[: 8 + length]).hexdigest()
    with safe_open(file, "pt") as opened:
        digests = json.loads(opened.metadata()["sha256"])
    assert digests.keys() == load_file(file).keys()
    header = json.loads(content[8 : 8 + length])
    end = 8 + length + next(header[key] for key in digests if key.endswith("inputs1"))["data_offsets"][1]
    file.write_bytes(content[: end - 4] + struct.pack("<f", 0.125) + content[end:])
    done = run_here(*command_3(path))
    assert refusal_code(done) == "vectors-damaged" and not Path("merged").exists()


def test_a_file_without_digests_is_known_by_its_bytes(pair):
    file = files_of("guided_mean")[0]
    assert open_vectors(file).content_hash() == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_copy_beside_its_recipe_is_the_same_file(pair):
    """Folders move together; the record goes with the recipe."""
    Path("moved").mkdir()
    for name in ("dfs_gram_mean", "out_gram_mean"):
        shutil.move(name, f"moved/{name}")
    done_here(*command_3(Path("moved") / recipe_of_moved()))


def recipe_of_moved():
    (path,) = Path("moved/out_gram_mean").glob("*.yaml")
    return path.relative_to("moved")
