"""The evaluator as a user runs it: real processes, real files, bad input.

python -m pytest tests/test_evaluator.py
"""

import hashlib
import json
import math
import os
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml

from tests.commands_here import done_here, run_here
from tests.refusals import refusal_code
from tests.tiny_evaluations import plain_losses, save_evaluated_pair, task_file, write_rows
from tests.tiny_merges import merge_here, recipe, write_recipe
from tests.tiny_pairs import ASKING_CHAT, contents, save_tokenizer, write_config
from utils.commands.evaluation_folder import read_evaluation
from utils.evaluation import entries
from utils.merging.recipe_file import read_recipe
from utils.recipes.recipe_manifest import RecipeManifest

ROWS = ("--validation_rows", 4, "--test_rows", 8)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """A pair with two recipes beside its output folder; read only but for new output folders."""
    folder = save_evaluated_pair(tmp_path_factory.mktemp("pair"))
    (folder / "out" / "recipes").mkdir(parents=True)
    write_recipe(folder / "out" / "recipes" / "first.yaml", recipe(folder))
    write_recipe(folder / "out" / "recipes" / "second.yaml", recipe(folder, "task_arithmetic"))
    return folder


@pytest.fixture
def run(pair):
    def start(*arguments, out="out/evaluation", config=None):
        given = "--config", config or pair / "pair.yaml", "--out_dir", pair / out, *ROWS
        quick = () if "--samples" in arguments else ("--no-samples",)
        return run_here("utils/evaluator.py", *given, *quick, *arguments, cwd=pair)

    return start


def table(pair: Path, out: str = "out/evaluation") -> pd.DataFrame:
    return pd.read_csv(pair / out / "scores.csv")


def test_from_recipes_to_a_page(run, pair, run_command_line):
    """The first time as a process, then in this one."""
    words = ("--config", "pair.yaml", "--out_dir", "out/evaluation", *ROWS, "--no-samples")
    done = run_command_line("utils/evaluator.py", *words, cwd=pair)
    assert done.returncode == 0, done.stderr
    assert "scoring test rows: " in done.stderr and "\r" not in done.stderr
    out = pair / "out" / "evaluation"
    assert sorted(path.name for path in out.iterdir()) == [
        "best_uniform.yaml",
        "losses",
        "manifest.json",
        "report.html",
        "samples.parquet",
        "scores.csv",
    ]
    scores = table(pair)
    assert list(dict.fromkeys(scores["role"])) == ["base", "expert", "control", "candidate"]
    assert {"first", "second"} <= set(scores["candidate"])
    samples = pd.read_parquet(out / "samples.parquet")
    for (name, task), rows in samples.groupby(["candidate", "task"]):
        cell = scores[(scores.candidate == name) & (scores.task == task) & (scores.measure == "loss")]
        assert cell["value"].item() == pytest.approx(rows["nll"].sum() / rows["tokens"].sum())
        assert cell["low"].item() <= cell["value"].item() <= cell["high"].item()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["command"] == "utils/evaluator.py"
    for task in manifest["tasks"]:
        assert len(task["rows"]["test"]) == 8 and not set(task["rows"]["test"]) & set(task["rows"]["validation"])
    following = shlex.split(done.stdout.split("next:\n")[1].replace("\\\n", " "))
    assert following[0] == sys.executable and following[1].endswith("utils/merger.py")
    assert following[2:7:2] == ["--output_path", "--merge_config", "--evaluation"] and (pair / following[5]).is_file()
    found = read_evaluation(out)  # what a model card takes from here
    recipe_file = read_recipe(pair / "out" / "recipes" / "first.yaml")
    assert found.candidate_of(Path("renamed.yaml"), recipe_file.sha256) == "first"
    scored = {(one.contender, task.name): one.value.value for task in found.page.tasks for one in task.scores}
    losses = scores[scores.measure == "loss"]
    assert scored == {(row.candidate, row.task): row.value for row in losses.itertuples()}
    uniform = yaml.safe_load((out / "best_uniform.yaml").read_text())
    assert uniform["merge_method"] in ("task_arithmetic", "ties")
    before = contents(out / "losses")
    again = run("--quiet")  # nothing is scored again, nor is the base as a candidate
    assert again.returncode == 0 and contents(out / "losses") == before
    assert (scores["value"].equals(table(pair)["value"])) and "block" not in again.stderr
    more = run(pair / "out/recipes/first.yaml", pair / "out/recipes/second.yaml", pair / "base")
    assert more.returncode == 0, more.stderr
    grown = contents(out / "losses")
    assert "scored 0 models and merges anew" in more.stdout and grown == before


def test_a_written_model_stands_beside_its_recipe_with_the_same_figures(run, pair, tmp_path):
    written = merge_here(tmp_path, recipe(pair))
    done = run("out/recipes/first.yaml", written, "--no-controls", "--against", written, out="out/written")
    assert done.returncode == 0, done.stderr
    scores = table(pair, "out/written").set_index(["candidate", "task", "measure"])["value"]
    for task in ("code", "math"):
        assert scores["first", task, "loss"] == scores["merged", task, "loss"]
    assert "control" not in set(table(pair, "out/written")["role"])
    assert set(table(pair, "out/written")["against"].dropna()) == {"merged"}


def test_the_printed_line_merges_the_winner_whoever_is_the_reference(run, pair, tmp_path):
    """Beside it a recipe that is called like a control."""
    worse = write_recipe(tmp_path / "task arithmetic 0.35.yaml", recipe(pair, parameters={"lambda": 9.0}))
    best = {}
    for reference in (None, "base"):
        out = f"out/against {reference}/evaluation"
        done = run(worse, *(["--against", reference] if reference else []), out=out)
        assert done.returncode == 0, done.stderr
        assert "task arithmetic 0.35 (2)" in set(table(pair, out)["candidate"])
        manifest = json.loads((pair / out / "manifest.json").read_text())
        best[manifest["best_on_validation"]] = (pair / out / "best_uniform.yaml").read_bytes()
        if reference is None:
            assert manifest["reference"] in best and manifest["reference_is"] == "the best uniform merge"
    assert len(best) == 1 and (pair / "out/against None/evaluation/best_uniform.yaml").read_bytes() in best.values()
    assert (manifest["reference"], manifest["reference_is"]) == ("base", "")
    words = shlex.split(done.stdout.split("next:\n")[1].replace("\\\n", " "))[2:]
    done_here("utils/merger.py", *words, cwd=pair)
    merged = pair / words[words.index("--output_path") + 1]
    assert f"**{next(iter(best))}**" in (merged / "README.md").read_text() and (merged / "report.html").is_file()


def test_a_recipe_of_another_pair_is_left_out_where_it_was_only_found(run, pair, tmp_path):
    (pair / "out/mixed/recipes").mkdir(parents=True)
    shutil.copytree(pair / "code", tmp_path / "stranger")
    theirs = recipe(pair)
    theirs["models"][1]["model"] = str(tmp_path / "stranger")
    for name, data in (("theirs", theirs), ("ours", recipe(pair))):
        write_recipe(pair / f"out/mixed/recipes/{name}.yaml", data)
    (pair / "out/mixed/recipes/theirs.manifest.json").write_text("no manifest")  # nobody looks: it is of another pair
    done = run("--no-controls", out="out/mixed/evaluation")
    assert done.returncode == 0, done.stderr
    assert "out/mixed/recipes/theirs.yaml is left out: " in done.stderr
    assert set(table(pair, "out/mixed/evaluation")["candidate"]) == {"base", "code", "math", "ours"}
    (pair / "out/mixed/recipes/theirs.manifest.json").unlink()
    assert refusal_code(run("out/mixed/recipes/theirs.yaml", out="out/bad")) == "candidate-other-models"


def test_a_recipe_that_was_measured_on_rows_of_a_task_is_left_out_where_it_was_only_found(run, pair):
    (pair / "out/seen/recipes").mkdir(parents=True)
    written = read_recipe(write_recipe(pair / "out/seen/recipes/seen.yaml", recipe(pair)))
    samples = {"path": str(pair / "code.jsonl"), "subset": None, "split": None, "seed": 42, "rows": list(range(40))}
    record = RecipeManifest(
        recipe={"name": "seen.yaml", "sha256": written.sha256}, vectors={}, guidance="lewis", guidance_options={},
        measure_options={}, control=None, merge_method="ties", mean_density=None, lambda_=None, dtype="bfloat16",
        out_dtype=None, options={}, samples=[samples], measurement=None, versions={},
    )  # fmt: skip
    (pair / "out/seen/recipes/seen.manifest.json").write_bytes(record.as_bytes())
    done = run("--no-controls", out="out/seen/evaluation")
    assert done.returncode == 0, done.stderr
    assert "out/seen/recipes/seen.yaml is left out: it was measured on 12 of the 12 rows of task code" in done.stderr
    assert set(table(pair, "out/seen/evaluation")["candidate"]) == {"base", "code", "math"}
    named = run("out/seen/recipes/seen.yaml", "--no-controls", out="out/bad")
    assert refusal_code(named) == "evaluation-rows-measured"


def test_against_takes_a_found_recipe_by_its_path_and_any_control(run, pair):
    """Two searches lie beside each other: what both call best is told apart by their folders."""
    for folder, scale in (("search", 0.3), ("pareto", 0.6)):
        (pair / "out/searches" / folder).mkdir(parents=True)
        own = recipe(pair, "task_arithmetic", parameters={"lambda": scale})
        write_recipe(pair / f"out/searches/{folder}/best.yaml", own)
    done = run("--against", "out/searches/search/best.yaml", out="out/searches/evaluation")
    assert done.returncode == 0, done.stderr
    scores = table(pair, "out/searches/evaluation")
    assert {"search/best", "pareto/best"} <= set(scores["candidate"])
    assert set(scores["against"].dropna()) == {"search/best"}
    assert "task_arithmetic recipe, pareto/best.yaml" in (pair / "out/searches/evaluation/report.html").read_text()
    assert "candidate search/best: recipe, task_arithmetic, out/searches/search/best.yaml" in done.stdout
    for control in ("task arithmetic 1", "TIES density 0.2, 1"):
        done = run("--against", control, out="out/searches/evaluation")
        assert done.returncode == 0, done.stderr
        assert set(table(pair, "out/searches/evaluation")["against"].dropna()) == {control}


def test_a_killed_run_goes_on_where_it_stopped(run, pair, monkeypatch):
    whole = run("--no-controls", out="out/whole")
    assert whole.returncode == 0
    shutil.copytree(pair / "out/whole/losses", pair / "out/half/losses")
    kept = sorted((pair / "out/half/losses").iterdir())
    for path in kept[::2]:
        path.unlink()
    kept[1].write_text("{")  # torn
    unpublished = pair / "out/half/.publish.x.part"
    unpublished.mkdir()
    (unpublished / ".journal.json").write_text('{"scores.csv": nu')  # killed while it wrote what it would publish
    done = run("--no-controls", out="out/half")
    assert done.returncode == 0, done.stderr
    assert "removed what a killed run has left" in done.stderr and not unpublished.exists()
    pd.testing.assert_frame_equal(table(pair, "out/half"), table(pair, "out/whole"))


def test_two_devices_give_the_same_figures(run, pair):
    for out, devices in (("out/one", ()), ("out/two", ("--devices", "cpu,cpu"))):
        done = run("out/recipes/first.yaml", "out/recipes/second.yaml", "--no-controls", *devices, out=out)
        assert done.returncode == 0, done.stderr
    assert "side by side on 2" in done.stdout
    pd.testing.assert_frame_equal(table(pair, "out/two"), table(pair, "out/one"), check_exact=True)
    assert contents(pair / "out/two/losses") == contents(pair / "out/one/losses")


def test_files_of_somebody_else_are_kept(run, pair):
    out = pair / "out" / "theirs"
    out.mkdir()
    (out / "manifest.json").write_text('{"command": "utils/merger.py", "files": {}}')
    assert refusal_code(run("--overwrite", "--no-controls", out="out/theirs")) == "out-not-ours"
    (out / "manifest.json").unlink()
    (out / "scores.csv").write_text("mine")
    assert refusal_code(run(out="out/theirs")) == "out-exists"
    assert contents(out) == {"scores.csv": b"mine"}
    done = run("--overwrite", "--no-controls", out="out/theirs")
    assert done.returncode == 0, done.stderr
    (out / "scores.csv").write_text("changed by hand")
    assert refusal_code(run("--no-controls", out="out/theirs")) == "out-exists"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["absent.yaml"], "file-missing"),
        (["./absent"], "candidate-not-found"),
        (["out/recipes/first.yaml", "--against", "nobody"], "evaluate-against-unknown"),
        (["pair.yaml"], "recipe-pair-config"),
        (["--test_rows", "1"], "flag-invalid"),
        (["--device", "cuda:9"], "device-missing"),
    ],
)
def test_bad_words(run, pair, words, code):
    assert refusal_code(run(*words, out="out/bad")) == code
    assert not (pair / "out/bad").exists()


def test_a_text_that_is_missing_is_refused_before_the_libraries_load(run, pair, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.commands.evaluate.quiet_libraries", None)
    config = write_config(tmp_path, dict(read_keys(pair)) | {"evaluation": {"code": {"path": "gone.jsonl"}}})
    assert refusal_code(run(config=config, out="out/bad")) == "text-missing"


def test_bad_recipes_and_texts_are_refused_before_work(run, pair, tmp_path):
    shutil.copytree(pair / "base", tmp_path / "stranger")
    other = recipe(pair)
    other["models"][1]["model"] = str(tmp_path / "stranger")
    misspelt = recipe(pair)
    misspelt["models"][1]["parameters"]["densitiy"] = 0.5
    for data, code in ((other, "candidate-other-models"), (misspelt, "recipe-unknown-parameter")):
        assert refusal_code(run(write_recipe(tmp_path / "bad.yaml", data), out="out/bad")) == code
    config = tmp_path / "config"
    config.mkdir()
    (config / "empty.jsonl").write_text("")
    text = {"path": str(config / "empty.jsonl"), "text": "{question}"}
    keys = json.loads(json.dumps(dict(read_keys(pair))))
    done = run(config=write_config(config, keys | {"evaluation": {"code": text}}), out="out/bad")
    assert refusal_code(done) == "evaluation-no-rows"
    done = run(config=write_config(config, keys | {"nsamples": 39}), out="out/bad")
    assert refusal_code(done) == "evaluation-no-rows"
    assert not (pair / "out/bad").exists()


def test_little_disk_is_refused_before_anything_is_scored_unless_all_is(run, pair, monkeypatch):
    assert run().returncode == 0
    monkeypatch.setattr(entries.Preparing, "recipe", lambda self, candidate, planned: "it is asked for")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    assert refusal_code(run(out="out/little")) == "disk-full"
    assert not list((pair / "out/little").glob("losses/*"))
    assert run().returncode == 0


def read_keys(pair: Path) -> dict:
    return yaml.safe_load((pair / "pair.yaml").read_text())


def test_forgetting_is_measured_on_a_third_text(run, pair, tmp_path):
    write_rows(tmp_path / "prose.jsonl", "prose", 40)
    general = {"path": str(tmp_path / "prose.jsonl"), "text": "{question}", "seqlen": 48}
    config = write_config(tmp_path, read_keys(pair) | {"general": general})
    done = run("out/recipes/first.yaml", "--no-controls", config=config, out="out/general")
    assert done.returncode == 0, done.stderr
    scores = table(pair, "out/general").set_index(["candidate", "task", "measure"])["value"]
    expected = scores["first", "general", "loss"] - scores["base", "general", "loss"]
    assert scores["first", "general", "forgetting"] == pytest.approx(expected)


def test_a_candidate_that_is_not_finite_is_said_and_stops_nothing(run, pair, tmp_path):
    bad = write_recipe(tmp_path / "bad.yaml", recipe(pair, dtype="float16", parameters={"lambda": 1e30}))
    done = run(bad, "out/recipes/first.yaml", "--no-controls", out="out/nan")
    assert done.returncode == 0, done.stderr
    assert "bad has no losses" in done.stdout + done.stderr
    alone = run(bad, "--no-controls", out="out/nan_alone")
    assert alone.returncode == 0 and "utils/merger.py" not in alone.stdout  # a merge by it would be refused
    scores = table(pair, "out/nan")
    assert scores[scores.candidate == "bad"].query("measure == 'loss'")["value"].isna().all()
    assert scores[scores.candidate == "first"].query("measure == 'loss'")["value"].notna().all()


def test_answers_stand_on_the_page_and_are_given_once(run, pair):
    words = "out/recipes/first.yaml", "--no-controls", "--samples"
    done = run(*words, out="out/answers")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("answers 8 prompts") == 4  # base, two experts, the best candidate
    page = (pair / "out/answers/report.html").read_text()
    assert "Answers to held-out prompts" in page
    again = run(*words, out="out/answers")
    assert again.returncode == 0 and "prompts" not in again.stdout
    assert "Answers to held-out prompts" in (pair / "out/answers/report.html").read_text()


def test_a_task_of_lm_eval_by_a_local_file(run, pair, tmp_path, capfd):
    pytest.importorskip("lm_eval", reason="lm-eval is optional: pip install -r requirements-eval.txt")
    files = [str(task_file(tmp_path)), str(tmp_path / "tiny_perplexity.yaml")]
    settings = yaml.safe_load(Path(files[0]).read_text()) | {
        "task": "tiny_perplexity",
        "metric_list": [{"metric": "perplexity"}],
    }
    settings |= {"output_type": "loglikelihood", "doc_to_target": "{{choices[label]}}", "doc_to_choice": None}
    write_recipe(Path(files[1]), settings)
    keys = read_keys(pair) | {"evaluation": {"arithmetic": {"lm_eval": files}}}
    done = run("out/recipes/first.yaml", "--no-controls", config=write_config(tmp_path, keys), out="out/lm_eval")
    assert done.returncode == 0, done.stderr
    assert "git" not in capfd.readouterr().err  # lm-eval asks it for the current folder's commit, and there is none
    losses = table(pair, "out/lm_eval").query("measure == 'loss'")
    assert set(losses["task"]) == {"code", "math"}  # each expert's own text, where no task names one
    scores = table(pair, "out/lm_eval").query("measure == 'acc'")
    samples = pd.read_parquet(pair / "out/lm_eval/lm_eval_samples.parquet").query("metric == 'acc'")
    assert scores.set_index("candidate")["value"].to_dict() == samples.groupby("candidate")["value"].mean().to_dict()
    assert len(scores) == 4 and "tiny_choice acc: first" in done.stdout
    samples = pd.read_parquet(pair / "out/lm_eval/lm_eval_samples.parquet").query("metric == 'perplexity'")
    scores = table(pair, "out/lm_eval").query("measure == 'perplexity' and task == 'tiny_perplexity'")
    expected = (-samples.groupby("candidate")["value"].mean()).map(math.exp).to_dict()
    assert scores.set_index("candidate")["value"].to_dict() == pytest.approx(expected) and len(expected) == 4
    assert "tiny_perplexity perplexity (lower is better): first" in done.stdout
    page = read_evaluation(pair / "out/lm_eval").page
    assert {one.name: one.higher_is_better for one in page.tasks if one.name.startswith("tiny")} == {
        "tiny_choice": True, "tiny_perplexity": False,
    }  # fmt: skip
    unsafe = task_file(tmp_path, "tiny_unsafe", "unsafe_code: true")
    keys["evaluation"]["arithmetic"]["lm_eval"] = [str(unsafe)]
    refused = run(config=write_config(tmp_path, keys), out="out/bad")
    assert refusal_code(refused) == "lm-eval-unsafe-code"


@pytest.mark.slow  # two processes that import everything
def test_tasks_of_lm_eval_on_two_devices_give_what_one_gives(run, pair, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is optional: pip install -r requirements-eval.txt")
    keys = read_keys(pair) | {"evaluation": {"arithmetic": {"lm_eval": [str(task_file(tmp_path))]}}}
    found = {}
    for devices in ("cpu", "cpu,cpu"):
        out = f"out/lm_eval_{devices}"
        words = ("out/recipes/first.yaml", "out/recipes/second.yaml", "--no-controls", "--devices", devices)
        done = run(*words, "--lm_eval_batch", 3, config=write_config(tmp_path, keys), out=out)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("does tiny_choice") == 5
        samples = pd.read_parquet(pair / out / "lm_eval_samples.parquet")
        found[devices] = samples.sort_values(["candidate", "doc", "metric"]).reset_index(drop=True)
    pd.testing.assert_frame_equal(*found.values())
    again = run(*words, "--lm_eval_batch", 3, config=write_config(tmp_path, keys), out=out)
    assert again.returncode == 0 and "does tiny_choice" not in again.stdout


def test_chat_rows_are_what_the_template_makes_of_them(run, tmp_path):
    """Calibrated on and scored: written out here by hand, with one token per character."""
    folder = save_evaluated_pair(tmp_path / "chat")
    for name in ("base", "code", "math"):
        save_tokenizer(folder / name, chat_template=ASKING_CHAT)
    asked = [("hi " + "?" * (n % 5), f"yes {n}.") for n in range(40)]
    lines = [
        {"turns": [{"role": "user", "content": one}, {"role": "assistant", "content": other}]} for one, other in asked
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    columns = [{"question": one, "answer": other} for one, other in asked[:20]]
    (folder / "columns.jsonl").write_text("".join(json.dumps(line) + "\n" for line in columns))
    turns = [{"role": "user", "content": "{question}"}, {"role": "assistant", "content": "{answer}"}]
    chat = {"path": str(folder / "chat.jsonl"), "messages": "turns", "seqlen": 64}
    made = {"path": str(folder / "columns.jsonl"), "chat": turns, "seqlen": 64}
    keys = read_keys(folder) | {"calibration": {"code": made, "math": made}, "evaluation": {"chat": chat}}
    config = write_config(folder, keys | {"dataset": made})
    done = run("--no-controls", config=config, out=tmp_path / "out")
    assert done.returncode == 0, done.stderr

    def ids(text: str) -> list[int]:
        return [3 + ord(letter) - 32 for letter in text]

    samples = pd.read_parquet(tmp_path / "out/samples.parquet").query("candidate == 'code'")
    expected = []
    for place in samples["place"]:
        question, answer = asked[int(place.split(":")[1])]
        prompt = [0, *ids("<|user|>"), *ids(question), 1, *ids("<|assistant|>")]
        expected.append(([*prompt, *ids(answer), 1], len(prompt)))
    assert samples["tokens"].tolist() == [len(whole) - first for whole, first in expected]
    assert samples["nll"].tolist() == pytest.approx(plain_losses(folder / "code", expected), rel=1e-3)
    measured = run_here("lewis_importance.py", "--config", config, "--out_dir", tmp_path / "dfs", cwd=folder)
    assert measured.returncode == 0, measured.stderr
    manifest = json.loads((tmp_path / "dfs/manifest.json").read_text())
    encoded = []
    for question, answer in (asked[row] for row in manifest["samples"]["rows"]):
        prompt = [0, *ids("<|user|>"), *ids(question), 1, *ids("<|assistant|>")]
        encoded.append([*prompt, *ids(answer), 1])
    digests = {one["token_sha256"] for one in manifest["models"]}
    assert digests == {hashlib.sha256(repr(encoded).encode()).hexdigest()}


def test_help_explains_every_flag(run_command_line):
    done = run_command_line("utils/evaluator.py", "--help", cwd=Path(os.sep))
    assert done.returncode == 0 and "--against" in done.stdout
