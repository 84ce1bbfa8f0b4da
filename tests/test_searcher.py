"""The search as a user runs it: real processes, real files, kills, bad input. The losses are of tiny models, fine-tuned here.

python -m pytest tests/test_searcher.py
"""

import fcntl
import hashlib
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file, save_file

pytest.importorskip("optuna")

from tests.commands_here import done_here
from tests.conftest import ROOT
from tests.refusals import refusal_code, refused
from tests.tiny_experts import save_experts
from tests.tiny_mixtures import save_mixtures
from tests.tiny_pairs import contents, write_config
from utils.commands import change_pictures, search, search_results
from utils.commands.evaluate_generation import generate
from utils.commands.search import search_pair
from utils.commands.search_options import SearchOptions
from utils.evaluation import entries
from utils.models.weight_source import build_skeleton
from utils.pair.config import read_pair_config
from utils.reports.page import render
from utils.runtime import gigabytes
from utils.searching.winners import choose

ROWS = ("--validation_rows", 24, "--test_rows", 24, "--first_rows", 6)
UNGUIDED = {"guidance": ["uniform", "lines"], "depth_groups": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return save_experts(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def pair(made, tmp_path, monkeypatch) -> Path:
    """A copy of the pair to work in."""
    folder = tmp_path / "pair"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder


def settings(folder: Path, **changes) -> Path:
    """The pair's config with some keys replaced."""
    return write_config(folder, {**yaml.safe_load((folder / "pair.yaml").read_text()), **changes})


def options(folder: Path, **changes) -> SearchOptions:
    """A search of the unguided ways, in this process."""
    rows = {"validation_rows": 16, "test_rows": 16, "first_rows": 4}
    given = {"out_dir": folder / "out/search", "trials": 6, "device": "cpu", "quiet": True, **rows, **changes}
    return SearchOptions(read_pair_config(folder / "pair.yaml"), **given)


def test_two_commands_from_models_and_text_to_a_better_merge(pair, run_command_line):
    """Three models and two JSONL files: the search measures, searches and judges; the command it prints merges."""
    settings(pair, search={"guidance": ["uniform", "lewis", "gram_mean"]})
    words = ("--config", "pair.yaml", "--out_dir", "out/search", *ROWS, "--trials", 12)
    done = run_command_line("utils/searcher.py", *words, "--measure", cwd=pair, timeout=900)
    assert done.returncode == 0, done.stderr
    out = pair / "out/search"
    written = {
        "best.yaml",
        "best.manifest.json",
        "best_uniform.yaml",
        "best_uniform.manifest.json",
        "trials.csv",
        "scores.csv",
        "report.html",
        "manifest.json",
        "study.db",
    }
    assert written <= {path.name for path in out.iterdir()}
    scores = pd.read_csv(out / "scores.csv")
    best = json.loads((out / "manifest.json").read_text())["best"]
    gains = scores[(scores.task == "all tasks") & (scores.measure == "gain_kept")].set_index("candidate")
    assert gains.loc["code", "value"] != gains.loc["math", "value"]
    winner = next(iter(best))
    assert gains.loc[winner, "value"] > gains.loc["base", "value"] + 0.1
    assert f"{winner}" in done.stdout and "95% interval" in done.stdout and "points" in done.stdout
    forecast = next(line for line in done.stdout.splitlines() if line.startswith("forecast:"))
    assert " s for the " in forecast or " min for the " in forecast
    assert "of disk; memory: about" in forecast and done.stdout.index(forecast) < done.stdout.index("batch 0:")
    trials = pd.read_csv(out / "trials.csv")
    assert len(trials) == 12 and {"lambda", "gain.code", "gain.math", "merge_method", "guidance"} <= set(trials.columns)
    whole = trials[(trials.seen_rows == trials.all_rows) & (trials.state == "complete")]
    assert (
        whole["value"].max() == trials.loc[best[winner]["trial"], "value"] >= whole[whole.known.notna()]["value"].max()
    )
    page = (out / "report.html").read_text()
    assert "The search" in page and winner in page and "No held-out prompts are answered" in page
    following = shlex.split(done.stdout.split("next:\n")[1].replace("\\\n", ""))[2:]
    done_here("utils/merger.py", *following, cwd=pair)
    result = Path(pair, following[following.index("--output_path") + 1])
    assert (result / "model.safetensors").exists()
    record = json.loads((out / "best.manifest.json").read_text())
    assert record["search"]["trial"] == best[winner]["trial"] and record["search"]["trials"] == 12
    card = (result / "README.md").read_text()
    assert f"| **{winner}** |" in card.replace("\\_", "_") and (result / "report.html").is_file()
    written = {hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("best*.yaml")}
    assert {one["recipe_sha256"] for one in json.loads((out / "manifest.json").read_text())["candidates"]} == written
    assert f"Found by a search: trial {best[winner]['trial']} of 12" in card
    assert json.loads((result / "manifest.json").read_text())["origin"]["search"]["validation_rows"]["code"] == 24
    before = contents(out / "losses")
    done_here("utils/searcher.py", *words, cwd=pair)
    assert contents(out / "losses") == before
    assert pd.read_csv(out / "scores.csv").equals(scores)


def test_a_pair_that_cannot_be_scored_leaves_the_storage_in_one_file(pair):
    weights = load_file(pair / "base/model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, pair / "base/model.safetensors", metadata={"format": "pt"})
    with refused("search-pair-not-finite"):
        search_pair(options(pair))
    assert [one.name for one in (pair / "out/search").glob("study.db*")] == ["study.db"]


def test_a_guidance_that_refuses_the_text_is_left_out_unless_it_was_named(pair, capsys, monkeypatch):
    texts = yaml.safe_load((pair / "pair.yaml").read_text())["calibration"]
    swapped = {"code": texts["math"], "math": texts["code"]}
    own = {"code": texts["code"], "math": texts["math"]}
    settings(pair, calibration=swapped, evaluation=own, search={"guidance": ["gram_mean"]})
    with refused("text-without-gain"):
        search_pair(options(pair, measure=True))
    settings(pair, calibration=swapped, evaluation=own, search={})
    search_pair(options(pair, measure=True, trials=4, out_dir=pair / "out/all"))
    assert "guidance gram_mean is left out" in (said := capsys.readouterr().err) and "[text-without-gain]" in said
    assert (pair / "out/all/best.yaml").exists()
    monkeypatch.setattr(search, "measure_pair", lambda *given, **named: pytest.fail("measured again"))
    search_pair(options(pair, measure=True, trials=4, out_dir=pair / "out/all"))
    assert "guidance gram_mean is left out" in (said := capsys.readouterr().err) and "[text-without-gain]" in said


def test_a_mixtures_routers_stand_on_the_page_and_its_stock_recipe_has_figures(tmp_path, monkeypatch):
    folder = save_mixtures(tmp_path, num_hidden_layers=2)
    rows = [{"question": f"What is {i} and {i}?", "answer": f"It is {i + i}."} for i in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(folder)
    settings(
        folder, search={"guidance": ["uniform"], "merge_method": ["task_arithmetic"], "depth_groups": 1, "weights": 1}
    )
    search_pair(options(folder, trials=4, validation_rows=8, test_rows=8, samples=False))
    out = folder / "out/search"
    assert "routers of unguided recipes" in (out / "report.html").read_text()
    stock = hashlib.sha256((out / "best_stock.yaml").read_bytes()).hexdigest()
    assert stock in {one["recipe_sha256"] for one in json.loads((out / "manifest.json").read_text())["candidates"]}
    evaluate = ("utils/evaluator.py", "--config", "pair.yaml", "--out_dir", "out/evaluation", "--no-samples")
    done_here(*evaluate, "--validation_rows", 8, "--test_rows", 8, "out/search/best.yaml", cwd=folder)
    assert "routers of the uniform merges" in (folder / "out/evaluation/report.html").read_text()


def test_the_page_shows_how_much_of_each_experts_change_is_in_a_winner_by_vectors(pair, monkeypatch):
    """Its recipe has no numbers to draw; those of the page are the written model's. Typed again it computes none."""
    pages = []
    monkeypatch.setattr(search_results, "render", lambda page: pages.append(page) or render(page))
    monkeypatch.setattr(search_results, "choose", by_vectors)
    settings(pair, search={"guidance": ["gram_mean"]})
    search_pair(options(pair, measure=True, trials=7, first_rows=16))
    monkeypatch.setattr(change_pictures, "change_shares", lambda *given: pytest.fail("computed again"))
    search_pair(options(pair, trials=7, first_rows=16))
    assert pages[0].recipe.heatmaps == pages[1].recipe.heatmaps
    done_here("utils/merger.py", "--merge_config", "out/search/best.yaml", "--output_path", "merged", cwd=pair)
    base, merged = (load_file(pair / name / "model.safetensors") for name in ("base", "merged"))
    assert [one.title for one in pages[0].recipe.heatmaps] == ["code", "math"]
    for heatmap in pages[0].recipe.heatmaps:
        expert = load_file(pair / heatmap.title / "model.safetensors")
        expected = {}
        for name, before in base.items():
            if ".layers." in name and before.dim() == 2:
                change, made = (one[name].double() - before.double() for one in (expert, merged))
                expected[name.split(".")[2], name.split(".")[-2]] = float((change * made).sum() / (change**2).sum())
        found = {
            (layer, component): value
            for layer, row in zip(heatmap.layers, heatmap.cells, strict=True)
            for component, value in zip(heatmap.components, row, strict=True)
        }
        assert len(found) == 14 and found == pytest.approx(expected, rel=1e-6)
    page = (pair / "out/search/report.html").read_text()
    assert "0 is nothing of it, 1 is all of it, below 0 is against it." in page
    assert page.count(f"code: {change_pictures.QUANTITY}") >= 2  # the picture, and its numbers


def by_vectors(finished, *given, **named):
    """The winners among what was merged by vectors: on so little text uniform merges are ahead."""
    return choose([one for one in finished if one.point.merge_method == "gram_mean"], *given, **named)


@pytest.mark.slow
def test_held_out_prompts_are_answered_on_the_page_unless_that_is_not_wanted(pair):
    evaluation = {}
    for name in ("code", "math"):
        lines = [json.loads(line)["text"].split() for line in (pair / f"{name}.jsonl").read_text().splitlines()]
        rows = [{"question": " ".join(words[:3]), "answer": " ".join(words[3:])} for words in lines]
        (pair / f"{name}_asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = {"path": f"{name}_asked.jsonl", "text": "{question} {answer}", "seqlen": 48}
        evaluation[name] = text | {"answer": "{answer}"}
    settings(pair, search=UNGUIDED, evaluation=evaluation)
    search_pair(options(pair, trials=4))
    page = (pair / "out/search/report.html").read_text()
    assert "Answers to held-out prompts" in page
    before = contents(pair / "out/search/losses")
    search_pair(options(pair, trials=4, samples=False))
    assert "Answers to held-out prompts" not in (pair / "out/search/report.html").read_text()
    search_pair(options(pair, trials=4))  # from what was kept
    assert contents(pair / "out/search/losses") == before


@pytest.mark.slow
def test_rows_whose_answer_is_cut_off_are_in_no_round(pair, capsys):
    evaluation = {}
    for name in ("code", "math"):
        lines = [json.loads(line)["text"].split() for line in (pair / f"{name}.jsonl").read_text().splitlines()]
        rows = [{"question": " ".join(words[:3]), "answer": " ".join(words[3:])} for words in lines]
        (pair / f"{name}_asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = {"path": f"{name}_asked.jsonl", "text": "{question} {answer}", "seqlen": 16}
        evaluation[name] = text | {"answer": "{answer}"}
    settings(pair, search=UNGUIDED, evaluation=evaluation)
    search_pair(options(pair, trials=4))
    manifest = json.loads((pair / "out/search/manifest.json").read_text())
    said = capsys.readouterr().err
    for task in manifest["tasks"]:
        left = {part: len(rows) for part, rows in task["rows"].items()}
        assert left["test"] < 16 and f"task {task['name']}: {16 - left['validation']} of 16 validation rows" in said
    assert manifest["best_on_validation"] in manifest["best"]


@pytest.mark.slow
def test_killed_and_typed_again_it_goes_on_to_the_same_end(pair):
    settings(pair, search=UNGUIDED)
    search_pair(options(pair, trials=14, out_dir=pair / "whole"))
    command = [
        sys.executable,
        ROOT / "utils/searcher.py",
        "--config",
        "pair.yaml",
        "--out_dir",
        "killed",
        "--device",
        "cpu",
    ]
    command += ["--validation_rows", "16", "--test_rows", "16", "--first_rows", "4", "--trials", "14", "--quiet"]
    every = len(list((pair / "whole/losses").glob("*.json")))
    for wanted in sorted(random.Random(1).sample(range(every), 5)):  # kept losses when it is killed
        running = subprocess.Popen(
            [str(word) for word in command], cwd=pair, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 900
        while running.poll() is None and len(list((pair / "killed/losses").glob("*.json"))) < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert running.poll() in (None, 0)
        running.send_signal(signal.SIGKILL)
        running.communicate()
    kept = contents(pair / "killed/losses")
    search_pair(options(pair, trials=14, out_dir=pair / "killed"))
    after = contents(pair / "killed/losses")
    assert {name: after[name] for name in kept if name.endswith(".json")} == {
        name: kept[name] for name in kept if name.endswith(".json")
    }
    timed = "seconds"
    whole, killed = (pd.read_csv(pair / name / "trials.csv").drop(columns=timed) for name in ("whole", "killed"))
    assert killed.equals(whole)
    for name in ("best.yaml", "best_uniform.yaml"):
        assert (pair / "killed" / name).read_bytes() == (pair / "whole" / name).read_bytes()
    scores = [pd.read_csv(pair / name / "scores.csv") for name in ("killed", "whole")]
    pd.testing.assert_frame_equal(*scores, check_exact=True)
    assert {name: value for name, value in after.items() if name.endswith(".json")} == contents(pair / "whole/losses")


def test_more_trials_and_what_is_refused_of_a_folder_in_use(pair, monkeypatch):
    """One folder: extended; then another space, another objective, another pair's weights, a second search at a time."""
    settings(pair, search=UNGUIDED)
    search_pair(options(pair))
    leave_stock(pair / "out/search")
    search_pair(options(pair, trials=8))
    assert not list((pair / "out/search").glob("best_stock.[ym]*"))
    (pair / "out/search/best_stock.yaml").write_text("best_stock.yaml")  # as a kill leaves it just before it is removed
    edited_meanwhile(pair / "out/search/best.yaml", monkeypatch)
    search_pair(options(pair, trials=8))
    assert not list((pair / "out/search").glob("best_stock.[ym]*"))
    assert (pair / "out/search/best_stock_mine.txt").read_text() == "changed since"
    assert len(pd.read_csv(pair / "out/search/trials.csv")) == 8
    best = pair / "out/search/best.yaml"
    own = best.read_text()
    best.write_text("# mine\n" + own)
    with refused("search-edited-result"):
        search_pair(options(pair, trials=20))
    assert best.read_text() == "# mine\n" + own
    best.write_text(own)
    before = contents(pair / "out/search")
    with refused("search-other-study"):
        search_pair(options(pair, objective="worst"))
    settings(pair, search={**UNGUIDED, "lambda": [0.2, 0.9]})
    with refused("search-other-study") as caught:
        search_pair(options(pair))
    assert "space" in str(caught.value)
    settings(pair, search={})
    with refused("search-other-study") as caught:
        search_pair(options(pair, measure=True))
    assert "without --measure" in str(caught.value) and not (pair / "out/search/measurements").exists()
    settings(pair, search=UNGUIDED)
    descriptor = os.open(pair / "out/search", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with refused("out-in-use"):
            search_pair(options(pair))
    finally:
        os.close(descriptor)
    assert {name: value for name, value in contents(pair / "out/search").items() if "study.db" not in name} == {
        name: value for name, value in before.items() if "study.db" not in name
    }


def edited_meanwhile(best: Path, monkeypatch) -> None:
    """A search does not write over a recipe that somebody changes while it runs."""
    own = best.read_text()

    def edit(*given, **named):
        best.write_text("# mine")
        return generate(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(search_results, "generate", edit)
        with refused("search-edited-result"):
            search_pair(options(best.parents[2], trials=8))
    assert best.read_text() == "# mine"
    best.write_text(own)


def leave_stock(folder: Path) -> None:
    """What a search writes of the best stock recipe while a method of this project's leads; one file is changed since."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("best_stock.yaml", "best_stock.manifest.json", "best_stock_mine.txt"):
        (folder / name).write_text(name)
        manifest["files"][name] = hashlib.sha256(name.encode()).hexdigest()
    (folder / "best_stock_mine.txt").write_text("changed since")
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("keys", "flags", "code"),
    [
        ({}, {"objective": "weighted"}, "search-no-weights"),
        ({"search": {**UNGUIDED, "objective_weights": {"maths": 1}}}, {"objective": "weighted"}, "search-unknown-task"),
        ({"search": {"guidance": ["lewis"]}}, {}, "search-not-measured"),
        ({"search": {**UNGUIDED, "measurements": ["nowhere"]}}, {}, "search-no-measurement"),
        ({"nsamples": 120}, {}, "evaluation-no-rows"),
        ({"calibration": {}}, {"pareto": True}, "search-one-task"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_a_study_is_there(pair, keys, flags, code):
    settings(pair, **{"search": UNGUIDED, **keys})
    with refused(code):
        search_pair(options(pair, **flags))
    assert not (pair / "out").exists()


@pytest.mark.parametrize(
    ("keys", "flags", "code"),
    [({"nsamples": 120}, {}, "evaluation-no-rows"), ({"calibration": {}}, {"pareto": True}, "search-one-task")],
)
def test_what_no_measurement_would_mend_is_refused_before_measuring(pair, keys, flags, code):
    settings(pair, search={"guidance": ["lewis"]}, **keys)
    with refused(code):
        search_pair(options(pair, measure=True, **flags))
    assert not (pair / "out").exists()


def test_time_that_is_up_ends_with_what_there_is_and_is_gone_on_with(pair, capsys):
    settings(pair, search=UNGUIDED)
    with refused("search-nothing-finished"):
        search_pair(options(pair, max_hours=1e-7))
    assert not (pair / "out/search/best.yaml").exists()
    search_pair(options(pair))
    search_pair(options(pair, trials=40, max_disk=1000))
    assert "ended early: --max_disk" in capsys.readouterr().out
    assert len(pd.read_csv(pair / "out/search/trials.csv").query("state == 'complete'")) == 6


def test_models_that_have_to_be_written_first_count_for_the_disk(pair, monkeypatch, capsys):
    settings(pair, search=UNGUIDED)
    monkeypatch.setattr(entries.Preparing, "recipe", lambda self, candidate, planned: "it is asked for")
    size = (pair / "base/model.safetensors").stat().st_size
    with monkeypatch.context() as little, refused("disk-full"):
        little.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=size // 2))
        search_pair(options(pair))
    assert not (pair / "out/search/study.db").exists()
    with refused("search-max-disk"):
        search_pair(options(pair, max_disk=size // 2))
    with refused("search-nothing-finished") as caught:
        search_pair(options(pair, max_disk=size + 2**16))
    assert "of models that are written for a while" in str(caught.value)
    assert not (pair / "out/search/best.yaml").exists()
    capsys.readouterr()
    search_pair(options(pair, trials=4, quiet=False))
    assert f"disk: each recipe's model is written first, {gigabytes(size)[:3]}" in capsys.readouterr().out
    assert (pair / "out/search/best.yaml").exists() and not list((pair / "out/search").glob(".model.*"))


def test_files_that_are_in_the_way_are_not_touched(pair):
    settings(pair, search=UNGUIDED)
    (pair / "out/search").mkdir(parents=True)
    (pair / "out/search/best.yaml").write_text("mine")
    with refused("out-exists"):
        search_pair(options(pair))
    assert contents(pair / "out/search") == {"best.yaml": b"mine"}


def test_a_full_disk_is_one_message_and_no_traceback(pair):
    """A limit on file sizes stands for a disk that has no room for the storage."""
    settings(pair, search=UNGUIDED)
    command = [
        sys.executable,
        ROOT / "utils/searcher.py",
        "--config",
        "pair.yaml",
        "--out_dir",
        "out/search",
        "--quiet",
    ]
    done = subprocess.run(
        [*map(str, command), "--trials", "14", *map(str, ROWS)],
        cwd=pair,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert refusal_code(done) == "search-storage-unusable"


@pytest.mark.slow
def test_a_front_over_the_tasks(pair):
    settings(pair, search=UNGUIDED)
    search_pair(options(pair, pareto=True, trials=16))
    manifest = json.loads((pair / "out/search/manifest.json").read_text())
    assert manifest["options"]["pareto"] and len(manifest["best"]) >= 2


def test_the_verdict_is_on_what_the_search_was_asked_for(pair):
    """Weighted gains: the table has them, as the tasks' own gains say, and the page judges by them."""
    weights = {"code": 3, "math": 1}
    settings(pair, search={**UNGUIDED, "objective_weights": weights})
    search_pair(options(pair, objective="weighted", trials=8))
    table = pd.read_csv(pair / "out/search/scores.csv")
    gains = table[(table.measure == "gain_kept") & (table.task != "all tasks")].pivot(
        index="candidate", columns="task", values="value"
    )
    said = table[table.measure == "objective"].set_index("candidate")
    expected = (3 * gains.code + gains.math) / 4
    assert said.value.to_dict() == pytest.approx(expected.to_dict())
    compared = said[said.difference.notna()]
    assert not compared.empty and compared[["difference_low", "difference_high", "p"]].notna().all(axis=None)
    page = (pair / "out/search/report.html").read_text()
    assert "weighted gain kept, validation rows" in page and "the tasks&#39; weighted gain" in page


def test_each_device_scores_its_share(pair, monkeypatch):
    """`cpu,cpu` stands for two GPUs: the same losses, the same end; no model is built while threads score, for that
    changes torch's defaults for all of them."""
    built_by = set()

    def recorded(*given, **named):
        built_by.add(threading.current_thread())
        return build_skeleton(*given, **named)

    monkeypatch.setattr(entries, "build_skeleton", recorded)
    settings(pair, search=UNGUIDED)
    search_pair(options(pair, out_dir=pair / "one"))
    search_pair(options(pair, out_dir=pair / "two", devices="cpu,cpu"))
    one, two = (pd.read_csv(pair / name / "trials.csv").drop(columns="seconds") for name in ("one", "two"))
    assert one.equals(two)
    assert built_by == {threading.main_thread()}
