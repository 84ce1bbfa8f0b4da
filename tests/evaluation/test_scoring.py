"""Losses of candidates: against plain transformers, and a recipe's against the model that command 3 writes from it.

python -m pytest tests/evaluation/test_scoring.py
"""

import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.refusals import refused
from tests.selected import few
from tests.tiny_checkpoints import VOCABULARY, save_tiny
from tests.tiny_evaluations import by_name, pair_keys, plain_losses, save_evaluated_pair, write_rows
from tests.tiny_merges import merge_here, recipe, tensors, write_recipe
from tests.tiny_mixtures import save_mixtures
from tests.tiny_pairs import CHATML, edit_json, save_tokenizer, write_config
from utils.evaluation import pass_memory
from utils.evaluation.candidates import Candidate, found_recipes, models_of_pair, read_candidate
from utils.evaluation.entries import Preparing, sweep_written
from utils.evaluation.score_settings import ScoreSettings
from utils.evaluation.scoring import COLUMNS, Scorer
from utils.evaluation.store import LossStore, score_new
from utils.evaluation.tasks import evaluation_rows
from utils.evaluation.weights import CandidateWeights
from utils.merging.settings import MergeSettings
from utils.models.tensor_files import TensorFiles
from utils.pair.config import read_pair_config
from utils.publishing.siblings import stage_of
from utils.recipes.saliency_vectors import vector_file_bytes

FAMILIES = ("llama", "qwen2", "gemma2", "gemma3", "gpt2", "gpt_neox", "phi3_tied")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pairs by family; read only."""
    pairs = {}

    def pair(family: str = "llama") -> Path:
        if family not in pairs:
            pairs[family] = save_evaluated_pair(tmp_path_factory.mktemp(family), family)
        return pairs[family]

    return pair


def scorer(folder: Path, **settings) -> Scorer:
    config = read_pair_config(folder / "pair.yaml")
    return Scorer(config, evaluation_rows(config, validation=6, test=12), ScoreSettings(**settings))


def rows_of(scoring: Scorer, part: str = "test") -> dict[str, list[int]]:
    return {task.name: task.part(part) for task in scoring.tasks}


def with_method(folder: Path, method: str, **keys) -> dict:
    """A recipe of any method over base, code and math."""
    if method == "slerp":
        models = [{"model": str(folder / name)} for name in ("base", "code")]
        data = {"models": models, "merge_method": "slerp", "base_model": str(folder / "base"), "dtype": "float32"}
        return {**data, "parameters": {"t": 0.4}, **keys}
    if method not in ("guided_ties", "guided_mean"):
        return recipe(folder, method, **keys)
    data = recipe(folder, "ties", dtype="float32", **keys) | {"merge_method": method}
    for place, model in enumerate(data["models"][1:]):
        path = Path(model["model"]).with_suffix(".vectors")
        generator = torch.Generator().manual_seed(place)
        named = tensors(Path(model["model"])).items()
        vectors = {
            name: tuple(torch.rand(n, generator=generator) * 1e-3 + 1e-6 for n in value.shape) for name, value in named
        }
        path.write_bytes(vector_file_bytes(vectors))
        model["parameters"]["saliency"] = str(path)
    return data


@pytest.mark.parametrize("family", few(FAMILIES, "llama", "gemma3", "gpt2"))
def test_losses_are_those_of_a_plain_forward(made, family):
    folder = made(family)
    scoring = scorer(folder, dtype="float32")
    table = scoring.score(models_of_pair(scoring.config), rows_of(scoring))
    assert list(table.columns) == list(COLUMNS)
    for name, losses in by_name(table).items():
        _, encoded = scoring.encoded(folder / name, name)
        rows = [encoded[task][number] for task, numbers in rows_of(scoring).items() for number in numbers]
        assert losses == pytest.approx(plain_losses(folder / name, [(row.ids, row.first) for row in rows]), rel=2e-5)
        assert table[table.candidate == name].tokens.tolist() == [row.tokens for row in rows]


@pytest.mark.parametrize("family", few(FAMILIES, "llama", "gemma3", "gpt2"))
def test_a_recipe_scores_as_its_written_model(made, tmp_path, family):
    assert_scores_as_written(made(family), tmp_path, plain(made(family)), 0)


@pytest.mark.parametrize("kind", few(["mixtral", "qwen3_moe", "deepseek_v3"], "qwen3_moe"))
def test_a_mixture_is_scored_without_a_written_model(tmp_path, kind):
    """Its experts are stored each on their own, and transformers stacks them while it loads."""
    folder = save_mixtures(tmp_path / "pair", kind)
    for name in ("code", "math"):
        write_rows(folder / f"{name}.jsonl", name, 40)
    write_config(folder, pair_keys(folder))
    data = plain(folder)
    assert scorer(folder).written_bytes([Candidate("recipe", recipe=data)]) == 0
    assert_scores_as_written(folder, tmp_path, data, 0)


METHODS = ("ties", "task_arithmetic", "dare_ties", "della", "guided_mean", "guided_ties", "linear", "slerp")


@pytest.mark.parametrize("method", few(METHODS, "task_arithmetic", "dare_ties", "guided_mean", "slerp"))
def test_a_recipe_of_any_method_scores_as_its_written_model(made, tmp_path, method):
    assert_scores_as_written(made(), tmp_path, with_method(made(), method), 3)


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    few([("float32", None), ("float32", "bfloat16"), ("bfloat16", "float32")], ("bfloat16", "float32")),
)
def test_the_output_dtype_is_the_recipes(made, tmp_path, dtype, out_dtype):
    assert_scores_as_written(made(), tmp_path, recipe(made(), dtype=dtype, out_dtype=out_dtype), 0)


def plain(folder: Path) -> dict:
    parameters = {"weight": 0.7, "density": 0.4}
    models = [{"model": str(folder / name), "parameters": parameters} for name in ("code", "math")]
    return {"models": models, "merge_method": "ties", "base_model": str(folder / "base"), "dtype": "bfloat16"}


def assert_scores_as_written(folder: Path, place: Path, data: dict, seed: int) -> None:
    merge = MergeSettings(Path("unwritten"), Path("recipe"), device="cpu", random_seed=seed, quiet=True)
    scoring = scorer(folder, merge=merge)
    written = merge_here(place, data, random_seed=seed)
    candidates = [Candidate("recipe", recipe=data), Candidate("written", model=str(written))]
    losses = by_name(scoring.score(candidates, rows_of(scoring)))
    assert losses["recipe"] == losses["written"]
    assert losses["recipe"] != by_name(scoring.score(models_of_pair(scoring.config)[:1], rows_of(scoring)))["base"]


def test_many_candidates_in_several_passes_are_those_scored_alone(made):
    folder = made()
    data = [recipe(folder, method) for method in ("ties", "task_arithmetic", "dare_ties", "linear")]
    candidates = [Candidate(f"r{place}", recipe=one) for place, one in enumerate(data)]
    together, by_two, alone = scorer(folder), scorer(folder, most_at_once=2), scorer(folder)
    said = []
    by_two.say = said.append
    whole = by_name(together.score(candidates, rows_of(together)))
    assert by_name(by_two.score(candidates, rows_of(together))) == whole
    (line,) = said
    assert line.startswith("4 candidates in 2 passes over the inputs, up to 2 at once; memory: about ")
    for candidate in candidates:
        assert by_name(alone.score([candidate], rows_of(alone)))[candidate.name] == whole[candidate.name]


@pytest.mark.parametrize("kind", ["slices", "passthrough", "padded union", "other tokenizers"])
def test_recipes_of_other_layers_or_tokens_are_scored_without_a_written_model(made, tmp_path, kind):
    folder = made() if kind != "other tokenizers" else with_another_tokenizer(tmp_path / "pair")
    said = []
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    scoring = scorer(folder, scratch=scratch)
    scoring.say = said.append
    data = recipe(folder)
    if kind == "padded union":
        data["tokenizer"] = {"source": "union", "pad_to_multiple_of": 64}
    elif kind == "other tokenizers":
        data["tokenizer_source"] = "union"
    else:
        sources = [[{"model": str(folder / "code"), "layer_range": layers}] for layers in ([0, 2], [1, 3])]
        data = {"slices": [{"sources": one} for one in sources], "merge_method": "passthrough", "dtype": "bfloat16"}
    if kind == "slices":
        both = [{"model": str(folder / name), "layer_range": [0, 2]} for name in ("base", "code")]
        data = {"slices": [{"sources": both}], "merge_method": "ties", "dtype": "bfloat16"}
        data |= {"base_model": str(folder / "base"), "parameters": {"density": 0.5, "weight": 1.0}}
    written = merge_here(tmp_path, data)
    candidates = [Candidate("recipe", recipe=data), Candidate("written", model=str(written))]
    losses = by_name(scoring.score(candidates, rows_of(scoring)))
    assert losses["recipe"] == losses["written"]
    assert not any("temporary folder" in line for line in said)
    assert not list(scratch.iterdir())


def test_a_model_that_has_to_be_written_needs_space_on_the_disk(made, tmp_path, monkeypatch):
    folder = made()
    monkeypatch.setattr(Preparing, "recipe", lambda self, candidate, planned: "it is asked for")
    scoring, candidate = scorer(folder, scratch=tmp_path), Candidate("recipe", recipe=recipe(folder))
    needed = scoring.written_bytes([candidate, *models_of_pair(scoring.config)])
    assert needed == sum(value.nbytes for value in tensors(merge_here(tmp_path, recipe(folder))).values())
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=needed - 1))
    with refused("disk-full"):
        scoring.score([candidate], rows_of(scoring))
    assert not list(tmp_path.glob(".model.*"))


def test_a_block_that_does_not_fit_is_refused_before_weights_are_read(made, monkeypatch):
    folder = made()
    uniform = Candidate("uniform", recipe=recipe(folder, "ties", dtype="float32"))
    monkeypatch.setattr(pass_memory, "available_bytes", lambda device: 1000)
    monkeypatch.setattr(TensorFiles, "read", None)
    for one in (uniform, Candidate("model", model=str(folder / "code"))):
        with refused("memory-block-too-large", "a machine with more memory"):
            scorer(folder, dtype="float32").check(one)


def with_another_tokenizer(folder: Path) -> Path:
    """A pair of which one expert knows fewer tokens, so that a union moves rows."""
    save_evaluated_pair(folder)
    save_tokenizer(folder / "code", size=VOCABULARY - 8)
    return folder


def test_a_union_of_tokenizers_that_differ_in_a_chat_template_alone_needs_no_folder(tmp_path):
    folder = save_evaluated_pair(tmp_path / "pair")
    save_tokenizer(folder / "code", chat_template=CHATML)
    data = recipe(folder) | {"tokenizer_source": "union"}
    said = []
    scoring = scorer(folder)
    scoring.say = said.append
    written = merge_here(tmp_path, data)
    candidates = [Candidate("recipe", recipe=data), Candidate("written", model=str(written))]
    losses = by_name(scoring.score(candidates, rows_of(scoring)))
    assert losses["recipe"] == losses["written"]
    assert not any("temporary folder" in line for line in said)


def test_a_merge_that_is_not_finite_has_no_losses_and_stops_no_other(made):
    folder = made()
    scoring = scorer(folder)
    bad = recipe(folder, dtype="float16", parameters={"lambda": 1e30})
    candidates = [Candidate("bad", recipe=bad), Candidate("good", recipe=recipe(folder))]
    losses = by_name(scoring.score(candidates, rows_of(scoring)))
    assert all(math.isnan(loss) for loss in losses["bad"])
    assert losses["good"] == by_name(scoring.score(candidates[1:], rows_of(scoring)))["good"]


def test_the_rows_asked_for_in_their_order(made):
    scoring = scorer(made())
    table = scoring.score(models_of_pair(scoring.config)[:2], {"math": [3, 1], "code": [7]})
    assert table[["candidate", "task", "row"]].values.tolist() == [
        ["base", "math", 3],
        ["base", "math", 1],
        ["base", "code", 7],
        ["code", "math", 3],
        ["code", "math", 1],
        ["code", "code", 7],
    ]


def test_rows_whose_answer_is_cut_off_are_left_out_and_counted(tmp_path):
    folder = save_evaluated_pair(tmp_path)
    rows = [{"question": "long " * (1 if n % 3 else 20) + str(n), "answer": f"yes {n}"} for n in range(40)]
    (folder / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = evaluation_rows(read_pair_config(folder / "pair.yaml"), validation=6, test=12)
    scoring = scorer(folder)
    code, math_task = scoring.tasks
    short = {
        part: [n for n in tasks[0].part(part) if len(tasks[0].rows[n].prompt) < 40] for part in ("validation", "test")
    }
    assert [len(code.part(part)) for part in short] == [len(numbers) for numbers in short.values()] and short["test"]
    assert [row.place for row in code.rows] == [tasks[0].rows[n].place for part in short.values() for n in part]
    assert math_task == tasks[1] and code.digest != tasks[0].digest
    (said,) = scoring.warnings
    left = {part: len(tasks[0].part(part)) - len(numbers) for part, numbers in short.items()}
    assert f"{left['validation']} of 6 validation rows and {left['test']} of 12 test rows" in said
    table = scoring.score(models_of_pair(scoring.config)[:1], rows_of(scoring))
    assert (table["tokens"] > 0).all() and len(table) == len(short["test"]) + 12
    longer = {**pair_keys(folder)["evaluation"]["code"], "text": "long " * 20 + "{question} {answer}"}
    write_config(folder, pair_keys(folder) | {"evaluation": {"code": longer | {"answer": "{answer}"}}})
    with refused("evaluation-nothing-scored"):
        scorer(folder)


def test_names_in_a_recipe_begin_at_its_folder(made, monkeypatch, tmp_path):
    folder = made()
    relative = with_method(folder, "guided_mean")
    absolute = Candidate("absolute", recipe=relative)
    text = repr(relative).replace(f"{folder}/", "")
    monkeypatch.chdir(tmp_path)
    scoring = scorer(folder)
    candidates = [absolute, Candidate("relative", recipe=eval(text), folder=folder)]
    losses = by_name(scoring.score(candidates, rows_of(scoring)))
    assert losses["absolute"] == losses["relative"]


def test_a_recipe_file_finds_what_lies_beside_it_from_anywhere(made, tmp_path, monkeypatch):
    """As command 2 and a search write it: files of vectors beside the recipe, called from there."""
    folder = made()
    data, beside = with_method(folder, "guided_mean"), tmp_path / "recipes"
    beside.mkdir()
    for model in data["models"][1:]:
        kept = Path(shutil.copy(model["parameters"]["saliency"], beside))
        model["parameters"]["saliency"] = kept.name
    path = write_recipe(beside / "guided.yaml", data)
    monkeypatch.chdir(tmp_path)
    scoring = scorer(folder)
    (found,) = found_recipes(tmp_path)
    for candidate in (read_candidate(str(path)), found):
        scoring.check(candidate)
        assert candidate.recipe == data
        losses = by_name(scoring.score([candidate], rows_of(scoring)))["guided"]
    monkeypatch.chdir(beside)
    again = scorer(folder)
    assert by_name(again.score([read_candidate("guided.yaml")], rows_of(again)))["guided"] == losses
    (tmp_path / "other").mkdir()
    shutil.copy(folder / "math.vectors", tmp_path / "other" / kept.name)
    monkeypatch.chdir(tmp_path / "other")
    with refused("recipe-ambiguous-name"):
        read_candidate(str(path))


def test_a_measurements_record_of_a_start_is_no_recipe(tmp_path):
    """`tuned` keeps what it started from beside its tables, with a merge method but no models."""
    (tmp_path / "dfs_tuned").mkdir()
    (tmp_path / "dfs_tuned" / "tuned_start.yaml").write_text("merge_method: task_arithmetic\nweights: {code: 1.0}\n")
    assert found_recipes(tmp_path) == []


def test_words_of_the_tokenizers_keys_are_no_folders_beside_the_recipe(tmp_path, monkeypatch):
    data = recipe(Path(), tokenizer_source="base", models=[{"model": "base"}, {"model": "code"}], base_model="base")
    data["tokenizer"] = {"source": "union", "tokens": {"a": {"source": "base"}}}
    for place in ("recipes", "here"):
        for name in ("base", "union"):
            (tmp_path / place / name).mkdir(parents=True)
    (tmp_path / "recipes/code").mkdir()
    path = write_recipe(tmp_path / "recipes/one.yaml", data)
    monkeypatch.chdir(tmp_path)
    found = read_candidate(str(path)).merge_recipe().data
    assert found["tokenizer_source"] == "base" and found["tokenizer"] == data["tokenizer"]
    assert [one["model"] for one in found["models"]] == [str(path.parent / name) for name in ("base", "code")]
    monkeypatch.chdir(tmp_path / "here")
    data |= {"models": [{"model": "code"}], "base_model": "code"}
    found = read_candidate(str(write_recipe(path, data))).merge_recipe().data
    assert found["tokenizer_source"] == "base" and found["tokenizer"] == data["tokenizer"]


def test_a_candidates_names_lead_where_command_3_takes_them(tmp_path, monkeypatch):
    names = ("base", "~nobody/model", "x" * 300)
    data = recipe(Path(), models=[{"model": name} for name in names], base_model="base")
    (tmp_path / "linked").mkdir()
    (tmp_path / "kept").mkdir()
    write_recipe(tmp_path / "kept/one.yaml", data)
    (tmp_path / "linked/one.yaml").symlink_to("../kept/one.yaml")
    for place in ("linked", "kept"):
        (tmp_path / place / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    found = read_candidate("linked/one.yaml").merge_recipe().data
    assert [one["model"] for one in found["models"]] == [str(tmp_path / "linked/base"), *names[1:]]


def test_recipes_of_other_models_are_refused_before_work(made, tmp_path):
    folder = made()
    save_tokenizer(save_tiny("llama", tmp_path / "other", seed=9))
    scoring = scorer(folder)
    other = recipe(folder)
    other["models"][2]["model"] = str(tmp_path / "other")
    with refused("candidate-other-models"):
        scoring.check(Candidate("other", recipe=other))
    base = recipe(folder)
    base["base_model"] = str(folder / "math")
    with refused("candidate-other-base"):
        scoring.check(Candidate("base", recipe=base))
    scoring.check(Candidate("good", recipe=recipe(folder)))
    scoring.check(Candidate("model", model=str(tmp_path / "other")))


def test_a_model_that_a_killed_run_had_written_is_swept(tmp_path):
    (tmp_path / ".scored.ab_cd123.part").mkdir()
    (tmp_path / ".scored.ab_cd123.part/model.safetensors").touch()
    others = ["mine.part", ".scored.mine.part", ".model.ab_cd123.part", stage_of(tmp_path / "model", "0" * 12).name]
    for name in others:  # the last one is a merge that may be at work beside the scores
        (tmp_path / name).mkdir()
    sweep_written(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_losses_on_file_are_of_one_number_of_threads(made, tmp_path):
    """The last bits of a product depend on how many threads share it."""
    store, rows = LossStore(tmp_path / "losses"), {"code": [7, 8]}
    one, two = scorer(made(), threads=1), scorer(made(), threads=2)
    base = models_of_pair(one.config)[:1]
    assert [score_new(each, store, base, rows)[1] for each in (one, two, one, two)] == [1, 1, 0, 0]


def test_weights_are_known_by_their_content(tmp_path):
    """As they are after an archive with fixed times was unpacked: models of one shape have the sizes and headers of each
    other."""
    folder = save_evaluated_pair(tmp_path)
    for name in ("base", "code", "math"):
        os.utime(folder / name / "model.safetensors", ns=(1, 1))
    one = scorer(folder)
    pair = models_of_pair(one.config)
    found = [one.fingerprint(candidate) for candidate in pair]
    assert len(set(found)) == 3
    os.utime(folder / "code/model.safetensors", ns=(2, 2))
    assert [one.fingerprint(candidate) for candidate in pair] == found
    shutil.copy(folder / "base/model.safetensors", folder / "code/model.safetensors")
    assert one.fingerprint(pair[1]) == found[0]


@pytest.mark.parametrize(
    ("file", "changes"), [("config.json", {"rms_norm_eps": 0.5}), ("tokenizer_config.json", {"eos_token": "<unk>"})]
)
def test_a_model_with_other_settings_or_another_tokenizer_has_no_losses_on_file(tmp_path, monkeypatch, file, changes):
    folder = save_evaluated_pair(tmp_path)
    pair = models_of_pair(scorer(folder).config)
    donor = shutil.copytree(folder / "code", folder / "donor")
    merged = Candidate("ties", recipe=recipe(folder))
    with_tokens = Candidate("tokens", recipe=recipe(folder, experts=("math",), tokenizer={"source": str(donor)}))
    before = [scorer(folder).fingerprint(one) for one in (*pair, merged)]
    of_tokens = scorer(folder).fingerprint(with_tokens)
    edit_json(donor / "tokenizer_config.json", eos_token="<unk>")
    assert scorer(folder).fingerprint(with_tokens) != of_tokens
    with monkeypatch.context() as patched:
        patched.setattr("utils.evaluation.scoring.versions", lambda: {"torch": "another"})
        assert scorer(folder).fingerprint(pair[0]) != before[0]
    edit_json(folder / "code" / file, **changes)
    after = [scorer(folder).fingerprint(one) for one in (*pair, merged)]
    assert [then == now for then, now in zip(before, after, strict=True)] == [True, False, True, False]


def test_weights_of_a_file_begin_where_torch_would_have_put_them():
    class File:
        """Tensors in a file's pages: 8 bytes behind where torch's own would begin."""

        def fetch(self, names):
            whole = torch.arange(34, dtype=torch.float32)
            assert whole.data_ptr() % 64 == 0
            return dict.fromkeys(names, whole[2:])

    (found,) = CandidateWeights([File()], torch.device("cpu")).fetch([0], [["a"]])
    assert found["a"].data_ptr() % 64 == 0 and found["a"].tolist() == list(range(2, 34))
