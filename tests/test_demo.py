"""The offline example: its text, its small models, its words. The three commands themselves are tested elsewhere.

python -m pytest tests/test_demo.py
"""

import ast
import contextlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from demo import run as demo_run
from demo import texts as texts_module
from demo import train
from demo.arithmetic import PROBLEMS_PER_ROW, TEMPLATES, arithmetic_rows
from demo.texts import (
    CHARACTERS,
    CODE_PER_FILE,
    Sizes,
    Split,
    Texts,
    assert_disjoint,
    build_texts,
    code_chunks,
    prose_chunks,
)
from demo.train import FAST, FOLDERS, FULL, MANIFEST, main, up_to_date
from tests.conftest import ROOT
from tests.refusals import refusal_code, refused

SMALL = Sizes(base_prose=40, base_code=10, base_math=10, train=40, calibration=8, heldout=8)


def demo_script(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


# --- text ---------------------------------------------------------------------------------------------------------


def all_parts(texts: Texts) -> list[tuple[str, ...]]:
    skills = (texts.code, texts.math)
    return [texts.base, *(part for split in skills for part in (split.train, split.calibration, split.heldout))]


def test_text_has_the_sizes_asked_for_and_no_row_twice():
    texts = build_texts(SMALL, seed=3)
    assert [len(part) for part in all_parts(texts)] == [60, 40, 8, 8, 40, 8, 8]
    rows = [row for part in all_parts(texts) for row in part]
    assert len(set(rows)) == len(rows)


def test_text_follows_from_the_seed_alone():
    assert build_texts(SMALL, seed=3) == build_texts(SMALL, seed=3)
    first, second = build_texts(SMALL, seed=3), build_texts(SMALL, seed=4)
    assert first.base != second.base
    assert first.code.heldout != second.code.heldout
    assert first.math.heldout != second.math.heldout


@pytest.mark.parametrize("part", ["train", "calibration", "heldout"])
def test_a_row_in_two_parts_is_noticed(part):
    split = {"train": ("a",), "calibration": ("b",), "heldout": ("c",)}
    math_split = Split(("d",), ("e",), ("f",))
    assert_disjoint(Texts(("g",), Split(**split), math_split))
    with pytest.raises(AssertionError):
        assert_disjoint(Texts(("g",), Split(**{**split, part: ("e",)}), math_split))
    with pytest.raises(AssertionError):
        assert_disjoint(Texts(split[part], Split(**split), math_split))


def test_code_rows_of_the_standard_library_are_python():
    for row in build_texts(SMALL).code.heldout:
        assert isinstance(ast.parse(row).body[0], ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        assert CHARACTERS[0] <= len(row) <= CHARACTERS[1]


def write_library(folder: Path, files: int) -> Path:
    """A made-up standard library: each file holds one function of its own and one that all files share."""
    filler = "\n".join(f"    total = total + value * {i}" for i in range(8))
    for number in range(files):
        own = f'def own_{number}(total, value):\n    """{"Adds things up. " * 12}{number}"""\n{filler}\n    return total\n'
        shared = f"def shared(total, value):\n{filler}\n    return total\n"
        (folder / f"module_{number:03}.py").write_text(own + "\n\n" + shared)
    return folder


def test_a_function_copied_into_every_file_stays_in_one_part(tmp_path):
    sizes = Sizes(base_prose=4, base_code=2, base_math=1, train=4, calibration=2, heldout=2)
    texts = build_texts(sizes, library=write_library(tmp_path, 40))
    rows = [row for part in all_parts(texts) for row in part]
    assert sum(row.startswith("def shared") for row in rows) <= 1
    assert len(set(rows)) == len(rows)


def test_held_out_functions_come_from_files_of_their_own(tmp_path):
    sizes = Sizes(base_prose=10, base_code=2, base_math=1, train=10, calibration=3, heldout=3)
    texts = build_texts(sizes, library=write_library(tmp_path, 40))

    def files(rows):
        owners = [re.search(r"def own_(\d+)|Adds things up. (\d+)$", row.strip()) for row in rows]
        return {owner.group(1) or owner.group(2) for owner in owners if owner}

    heldout = files(texts.code.heldout)
    assert heldout
    assert not heldout & (files(texts.code.train) | files(texts.code.calibration) | files(texts.base))


def test_few_files_give_more_rows_each_where_they_must(tmp_path):
    """Debian's Python has few files; none gives more than its share while all together have enough."""
    sizes = Sizes(base_prose=4, base_code=2, base_math=1, train=4, calibration=2, heldout=18)
    for number in range(20):
        own = [f"def own_{number}_{row}(value):\n" + "    value = value + 1  # once more\n" * 6 for row in range(9)]
        (tmp_path / f"module_{number:03}.py").write_text(
            '"""' + "Words and words. " * 10 + f'{number}"""\n' + "\n".join(own)
        )
    heldout = build_texts(sizes, library=tmp_path).code.heldout  # two files of twenty are held out, with nine rows each
    assert len(set(heldout)) == 18
    assert len({re.search(r"own_(\d+)_", row)[1] for row in heldout}) == 2
    enough = build_texts(replace(sizes, heldout=CODE_PER_FILE + 2), library=tmp_path).code.heldout
    first = [re.search(r"own_(\d+)_", row)[1] for row in enough]
    assert sorted(map(first.count, set(first))) == [2, CODE_PER_FILE]


def test_skipped_folders_count_inside_the_library_only(tmp_path):
    sizes = Sizes(base_prose=1, base_code=1, base_math=1, train=1, calibration=1, heldout=1)
    inside = tmp_path / "test" / "library"
    inside.mkdir(parents=True)
    write_library(inside, 20)
    assert build_texts(sizes, library=inside).code.train
    with refused("demo-too-little-text"):
        build_texts(sizes, library=tmp_path)


def test_a_stripped_installation_is_a_clear_error(tmp_path):
    with refused("demo-too-little-text"):
        build_texts(SMALL, library=write_library(tmp_path, 20))


def test_unreadable_sources_are_passed_over(tmp_path):
    write_library(tmp_path, 30)
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nname = '\xe9'\n")
    (tmp_path / "old.py").write_text("print 'hello'\n")
    assert build_texts(Sizes(2, 2, 1, 2, 2, 2), library=tmp_path).code.train


def test_code_chunks_take_whole_functions_and_open_large_classes():
    body = "\n".join(f"        value = value + {i}" for i in range(10))
    method = f"    @staticmethod\n    def work_{{}}(value):\n{body}\n        return value\n"
    source = "class Large:\n" + "\n".join(method.format(i) for i in range(4)) + "\ndef short():\n    pass\n"
    chunks = code_chunks(source)
    assert [chunk.splitlines()[:2] for chunk in chunks] == [
        ["@staticmethod", f"def work_{i}(value):"] for i in range(4)
    ]
    assert all(chunk.endswith("return value\n") for chunk in chunks)


def test_prose_chunks_are_docstrings_without_console_sessions():
    prose, session = " ".join(["A sentence about nothing."] * 6), ">>> print(1)\n" + "1 and more text " * 10
    source = f'"""{prose}"""\n\ndef f():\n    """{session}"""\n\ndef g():\n    """Short."""\n'
    assert prose_chunks(source) == [prose + "\n"]


# --- arithmetic ---------------------------------------------------------------------------------------------------


def test_every_equation_is_true_and_no_problem_occurs_twice():
    rows = arithmetic_rows(200, seed=5)
    problems = [problem for row in rows for problem in row.split("\n\n")]
    assert len(problems) == 200 * PROBLEMS_PER_ROW == len(set(problems))
    checked = 0
    for left, operator, right, result in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", "\n".join(rows)):
        a, b = int(left), int(right)
        assert int(result) == {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[operator]
        assert operator != "/" or a % b == 0
        checked += 1
    assert checked > 1000


def test_the_last_number_of_an_answer_is_the_result():
    for row in arithmetic_rows(60, seed=1):
        for problem in row.split("\n\n"):
            if problem.startswith("Question"):
                sentence = problem.rsplit(". ", 1)[1]
                results = re.findall(r"= (\d+)", problem)
                assert results[-1] in re.findall(r"\d+", sentence)


def test_all_templates_are_used():
    rows = "\n\n".join(arithmetic_rows(100, seed=0)).split("\n\n")
    shapes = {re.sub(r"[A-Z][a-z]+|\d+|[a-z]+", "", row) for row in rows}
    assert len(shapes) >= len(TEMPLATES) - 2  # gain and loss, or others, may share their punctuation


# --- training -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fast_demo(tmp_path_factory) -> Path:
    """Made in this process, one expert after the other; processes take as long to start as all the rest."""
    out, said = tmp_path_factory.mktemp("demo"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", ["demo/train.py", "--fast", "--out", str(out)])
        patch.setattr(train, "ProcessPoolExecutor", lambda _, context, **keys: ThreadPoolExecutor(1, **keys))
        main()
    assert "wrote data, models/base, models/code, models/math" in said.getvalue()
    return out


def test_each_model_folder_loads_and_its_tokenizer_gives_text_back(fast_demo):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sample = "def f(x):\n\treturn x ** 12  # naïve 東京 🙂\n\nQuestion: 7 + 35 = 42.\r\n"
    weights = {}
    for name in ("base", "code", "math"):
        folder = fast_demo / "models" / name
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids = tokenizer(sample)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == sample
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        assert model.dtype == torch.bfloat16
        assert model.config.vocab_size == len(tokenizer)
        assert torch.isfinite(model(input_ids=torch.tensor([ids])).logits).all()
        weights[name] = load_file(folder / "model.safetensors")
    assert weights["base"].keys() == weights["code"].keys() == weights["math"].keys()
    assert "lm_head.weight" not in weights["base"]  # tied
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(weights["base"][name], weights["code"][name])
    assert not torch.equal(weights["math"][name], weights["code"][name])


def test_data_files_hold_the_text(fast_demo):
    def rows(name: str) -> list[str]:
        return [json.loads(line)["text"] for line in (fast_demo / "data" / name).read_text("utf-8").splitlines()]

    texts = build_texts(FAST.sizes, FAST.seed)
    assert rows("calibration_code.jsonl") == list(texts.code.calibration)
    assert rows("calibration_math.jsonl") == list(texts.math.calibration)
    assert rows("heldout_code.jsonl") == list(texts.code.heldout)
    assert rows("heldout_math.jsonl") == list(texts.math.heldout)


@pytest.mark.slow
def test_a_second_training_gives_the_same_bytes(fast_demo, tmp_path):
    result = demo_script("-m", "demo.train", "--fast", "--out", str(tmp_path))  # the first one was in this process
    assert result.returncode == 0, result.stderr
    for folder in FOLDERS:
        first, second = (json.loads((out / folder / MANIFEST).read_text())["files"] for out in (fast_demo, tmp_path))
        assert first == second


def test_models_that_are_there_are_kept(fast_demo):
    weights = fast_demo / "models/base/model.safetensors"
    before = weights.stat().st_mtime_ns
    result = demo_script("-m", "demo.train", "--fast", "--out", str(fast_demo))
    assert result.returncode == 0
    assert "there already" in result.stdout
    assert weights.stat().st_mtime_ns == before


def test_a_folder_of_other_settings_is_stale_and_a_changed_one_is_refused(fast_demo, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(fast_demo / "models/base", folder)
    assert up_to_date(folder, FAST)
    assert not up_to_date(folder, FULL)
    (folder / "mine.txt").write_text("notes")
    with refused("demo-foreign-files"):
        up_to_date(folder, FAST)
    (folder / "mine.txt").unlink()
    (folder / "config.json").write_text("{}")
    with refused("demo-changed-file"):
        up_to_date(folder, FULL)


def test_a_folder_it_did_not_write_stops_training_before_it_starts(tmp_path):
    foreign = tmp_path / "models/code/weights.bin"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"mine")
    result = demo_script("-m", "demo.train", "--fast", "--out", str(tmp_path))
    assert refusal_code(result) == "demo-foreign-folder"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [foreign]
    assert foreign.read_bytes() == b"mine"


def test_training_lowers_the_loss():
    import torch

    from demo.small_model import Shape, fit, new_model, train_tokenizer, windows

    rows = arithmetic_rows(40, seed=0)
    tokenizer = train_tokenizer(rows, 400)
    model = new_model(Shape(hidden=32, intermediate=64, blocks=1, heads=2), tokenizer, seed=0)
    data = windows(rows, tokenizer, 32)
    with torch.no_grad():
        before = model(input_ids=data, labels=data).loss.item()
    fit(model, data, steps=30, batch=8, rate=1e-2, seed=0, name="test")
    with torch.no_grad():
        after = model(input_ids=data, labels=data).loss.item()
    assert before == pytest.approx(math.log(len(tokenizer)), rel=0.05)
    assert after < before - 1


def test_windows_hold_the_stream_in_order():
    from demo.small_model import train_tokenizer, windows

    rows = arithmetic_rows(10, seed=0)
    tokenizer = train_tokenizer(rows, 300)
    data = windows(rows, tokenizer, 16)
    text = tokenizer.decode(data.flatten().tolist())
    assert text.startswith(f"<s>{rows[0]}</s><s>{rows[1]}</s>")
    assert data.shape[1] == 16


# --- the run ------------------------------------------------------------------------------------------------------


def test_run_from_elsewhere_is_refused(tmp_path):
    result = demo_script(str(ROOT / "demo/run.py"), cwd=tmp_path)
    assert result.returncode == 2
    assert f"cd {ROOT}" in result.stderr
    assert not any(tmp_path.iterdir())


def test_the_commands_are_called_as_documented():
    assert [" ".join(command) for command in demo_run.commands([])] == [
        "-m demo.train",
        "lewis_importance.py --config configs/demo.yaml --out_dir output/demo/delta_dfs",
        "lewis_merge.py --delta_dfs_in_dir output/demo/delta_dfs --config_file configs/demo.yaml "
        "--out_dir output/demo/merge_configs --gamma 0.3 --epsilon 0.8 --merge_method ties --control uniform --plot",
        "utils/evaluator.py --config configs/demo.yaml --out_dir output/demo/evaluation "
        "--validation_rows 8 --test_rows 24 --no-samples",
        "utils/searcher.py --config configs/demo.yaml --out_dir output/demo/search --trials 12 --measure "
        "--validation_rows 8 --test_rows 24 --first_rows 4",
        "utils/merger.py --output_path output/demo/merged_models/search --merge_config output/demo/search/best.yaml",
    ]


def test_steps_run_offline_and_keep_the_users_environment(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    environment = demo_run.environment()
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["OMP_WAIT_POLICY"] == "ACTIVE"
    assert environment["PATH"] == os.environ["PATH"]


def test_the_run_stops_at_the_first_step_that_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_run, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo/run.py"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ok.py").write_text("print('fine')")
    (tmp_path / "bad.py").write_text("raise SystemExit(7)")
    monkeypatch.setattr(demo_run, "commands", lambda ours: [["ok.py"], ["bad.py", "--x", "a b"], ["ok.py"]])
    assert demo_run.main() == 7
    shown = capsys.readouterr()
    assert re.findall(r"^\$ (.*)", shown.out, re.MULTILINE) == ["python3 ok.py", "python3 bad.py --x 'a b'"]
    assert "exit code 7" in shown.err


def test_only_folders_of_an_earlier_run_are_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo_run.RECIPES.mkdir(parents=True)
    (demo_run.RECIPES / "mine.yaml").write_text("")
    assert demo_run.claim_folders() == []
    demo_run.FRAMES.mkdir()
    (demo_run.FRAMES / "norms.csv").write_text("")
    ours = demo_run.claim_folders()
    assert demo_run.FRAMES in ours
    assert demo_run.RECIPES not in ours
    overwriting = [command[0] for command in demo_run.commands(ours) if "--overwrite" in command]
    assert overwriting == ["lewis_importance.py"]


def test_config_names_what_training_writes():
    lines = (ROOT / "configs/demo.yaml").read_text().splitlines()
    assert lines[0] == "# python3 " + " ".join(demo_run.commands([])[1])
    config = yaml.safe_load("\n".join(lines))
    models = {entry["type"]: entry["name"] for entry in config["model_info"]}
    assert models == {name: f"output/demo/models/{name}" for name in ("base", "code", "math")}
    assert config["target_model_names"] == {name: models[name] for name in ("code", "math")}
    assert config["nsamples"] == FULL.sizes.calibration
    for key, part in (("calibration", "calibration"), ("evaluation", "heldout")):
        paths = {name: Path(text["path"]) for name, text in config[key].items()}
        assert paths == {name: demo_run.OUT / f"data/{part}_{name}.jsonl" for name in ("code", "math")}


def test_no_machine_path_in_the_example():
    for path in sorted((ROOT / "demo").glob("*.py")):
        assert not re.search(r"/(home|root|tmp|usr)/", path.read_text())
    assert {"test", "site-packages"} <= texts_module.SKIPPED_FOLDERS
