"""README and docs keep their word: every command in them runs, every flag and config key is explained, every page is reached."""

import dataclasses
import functools
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.commands_here import run_here
from tests.conftest import ROOT
from tests.tiny_checkpoints import save_tiny
from tests.tiny_pairs import save_tokenizer
from utils.pair.config import PairSettings, read_pair_config
from utils.pair.search import SearchSettings
from utils.pair.source import CalibrationSource

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
FLAGS = (ROOT / "docs/flags.md").read_text()
CONFIG = (ROOT / "docs/config.md").read_text()
COMMANDS = [path for path in ("utils/merger.py", "utils/evaluator.py", "utils/searcher.py") if (ROOT / path).exists()]


def fenced(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def shell_commands(page: Path) -> list[list[str]]:
    """Every command of every ```sh block as words, as a shell reads it: continued lines joined, comments dropped."""
    lines = "\n".join(fenced(page, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def links(page: Path) -> set[Path]:
    """The files of this project that a page links to."""
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)", page.read_text())
    return {(page.parent / target).resolve() for target in targets}


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with the shipped Gemma config, its hub names and text replaced by local ones and nothing else."""
    for seed, name in enumerate(("gemma-2-2b", "gemma-2-2b-it")):
        save_tokenizer(save_tiny("gemma2", tmp_path / "google" / name, seed=seed, layers=2))
    rows = [{"text": f"Add {i} to {i}.", "code": f"def f():\n    return {i} + {i}", "task_id": i} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = (ROOT / "configs" / "gemma_2b.yaml").read_text()
    local = re.sub(r"^dataset: mbpp.*$", "dataset: {name: mbpp, path: rows.jsonl, seqlen: 48}", config, flags=re.M)
    assert local != config
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "gemma_2b.yaml").write_text(local)
    return tmp_path


def ray_flags(command: str) -> set[str]:
    """Every flag that a command of Ray has."""
    scripts = pytest.importorskip("ray.scripts.scripts")
    return {flag for option in scripts.cli.commands[command].params for flag in option.opts}


def run_page(page: Path, workplace: Path) -> list[str]:
    """Run the commands of a page, those for a cluster on one of this machine; returns their names."""
    ran = []
    for words in shell_commands(page):
        if words[0] == "make":
            # `.ci/run` is `make test`, and the demo has tests of its own: here, that the targets are there.
            done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            continue
        if words[0] == "ray":
            # it starts processes that outlive the test: here, that it has such a command and such flags
            assert {word for word in words[2:] if word.startswith("--")} <= ray_flags(words[1])
            continue
        assert words[0] == "python3", words
        if words[1] == "lewis_importance.py" and "--guidance" in words and "lewis" not in words:
            words = [
                *words,
                "--accept_useless_text",
            ]  # the pages' models gain on their text; those of random numbers do not
        words = ["local" if before == "--ray" else word for before, word in zip(["", *words], words, strict=False)]
        done = run_here(*words[1:], cwd=workplace)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        ran.append(words[1])
    return ran


def test_every_command_of_the_readme_runs(workplace):
    ran = run_page(README, workplace)
    assert ran[:3] == ["lewis_importance.py", "lewis_merge.py", "utils/merger.py"]
    assert (workplace / "output/gemma_2b/merged_models/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in PAGES[1:] if shell_commands(page)])
def test_every_command_of_a_page_runs(page, workplace):
    assert run_page(ROOT / page, workplace)


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in PAGES if shell_commands(page)])
def test_every_command_of_a_page_has_the_flags_it_is_given(page):
    for _, script, *words in (one for one in shell_commands(ROOT / page) if one[0] == "python3"):
        given = {re.sub("^--no-", "--", word.partition("=")[0]) for word in words if word.startswith("--")}
        assert given <= parser_flags(script), script


def test_the_readme_fits_on_a_few_screens():
    assert len(README.read_text().splitlines()) <= 150


def test_the_two_first_commands_do_all_set_up():
    assert [words[:2] for words in shell_commands(README)[:2]] == [["make", "demo"], ["make", "test"]]


def test_every_page_is_reached_from_the_readme():
    assert links(README) >= {page.resolve() for page in PAGES[1:]}


def test_no_command_runs_foreign_code_or_mixes_architectures_without_need():
    """But the reference's own call, whose extra flags the README shows."""
    written = [shlex.join(words) for page in PAGES for words in shell_commands(page)]
    folders = ("configs", "mergekit")
    written += [path.read_text().splitlines()[0] for folder in folders for path in (ROOT / folder).glob("*.yaml")]
    risky = [words for words in written if "--trust_remote_code" in words or "--allow_crimes" in words]
    assert len(risky) == 1 and "--lazy_unpickle False" in risky[0]


@functools.cache
def parser_flags(script: str) -> frozenset[str]:
    """Every flag that a command's `--help` shows, in its first spelling."""
    done = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, check=True)
    return frozenset(re.findall(r"^  (--\w+)", done.stdout, flags=re.M))


@pytest.mark.parametrize("script", ["lewis_importance.py", "lewis_merge.py", *COMMANDS])
def test_every_flag_is_explained(script):
    section = FLAGS.split(f"**`{script}`**")[1].split("\n**`")[0].split("\n## ")[0]
    explained = set(re.findall(r"`(--\w+)`", section))
    assert explained == parser_flags(script)


def test_every_config_key_is_explained():
    for key in (field.name for field in dataclasses.fields(PairSettings)):
        assert f"| `{key}` |" in CONFIG
    for key in (field.name for field in dataclasses.fields(CalibrationSource)):
        assert f"`{key}`" in CONFIG
    for key in (field.name.rstrip("_") for field in dataclasses.fields(SearchSettings)):
        assert re.search(rf"^\|[^|]*`{key}`[^|]*\|", CONFIG, flags=re.M), key


def test_the_yaml_in_it_is_valid(tmp_path):
    whole, dataset, sought = fenced(ROOT / "docs/config.md", "yaml")
    (search,) = fenced(ROOT / "docs/search.md", "yaml")
    path = tmp_path / "pair.yaml"
    path.write_text(whole)
    assert read_pair_config(path).experts[0].revision == "main"
    path.write_text(yaml.safe_dump(yaml.safe_load(whole) | yaml.safe_load(dataset)))
    assert read_pair_config(path).dataset.path == "data/my_task.jsonl"
    path.write_text(whole + search)
    assert read_pair_config(path).search.depth_groups == 3
    path.write_text(whole + sought)
    found = read_pair_config(path).search
    assert found.density.fixed and found.options["saliency_budget"]["mask"] == ("magnitude", "saliency")


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page):
    for target in links(ROOT / page):
        assert target.exists(), target
    for path in re.findall(r"^\| `([\w./]+/)`", (ROOT / page).read_text(), flags=re.M):
        assert (ROOT / path).is_dir(), path


def test_the_lines_that_a_page_names_are_there():
    """`file.py`: `name` is a definition in that file; every package of the library has a line."""
    page = (ROOT / "docs/code.md").read_text()
    named = re.findall(r"`(utils/[\w/]+\.py)`: `(\w+)`", page)
    for path, name in named:
        assert re.search(rf"^(def|class) {name}\b", (ROOT / path).read_text(), flags=re.M), f"{path}: {name}"
    assert len(named) > 12
    assert {path.parent.name for path in (ROOT / "utils").glob("*/__init__.py")} <= set(
        re.findall(r"`utils/(\w+)/", page)
    )


@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_each_config_says_the_command_that_uses_it_and_is_valid(config):
    first = (ROOT / "configs" / config).read_text().splitlines()[0]
    assert first.startswith(f"# python3 lewis_importance.py --config configs/{config} --out_dir output/")
    assert read_pair_config(ROOT / "configs" / config).experts


def test_the_top_level_mergekit_folder_does_not_shadow_the_package():
    assert not list((ROOT / "mergekit").rglob("*.py"))
    assert Path(importlib.import_module("mergekit").__file__).parent != ROOT / "mergekit"
