"""Small files of a folder that somebody else made: no pipe, no device, no link to a private file gets through.

python -m pytest tests/models/test_small_files.py
"""

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest

from tests.refusals import refused
from tests.tiny_checkpoints import VOCABULARY
from tests.tiny_merges import assert_refused, merge_here, recipe, save_models
from tests.tiny_pairs import save_tokenizer
from utils.bounded_files import read_bounded, read_json
from utils.models.checkpoints import read_model_config
from utils.models.small_files import check_copied, check_small_files
from utils.models.tokenizer_files import copy_missing, copy_tokenizer

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(CONFIG))
    return made


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "merges.txt"])
@pytest.mark.parametrize("kind", ["pipe", "device", "nowhere"])
def test_what_is_no_file_is_refused_at_once(folder, name, kind):
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero" if kind == "device" else "nowhere")
    with refused("model-no-config" if (name, kind) == ("config.json", "nowhere") else "model-small-file"):
        read_model_config(folder, "m")


def test_a_small_file_takes_little_memory(folder):
    tracemalloc.start()
    try:
        read_bounded(folder / "config.json", "config")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_file_that_claims_no_size_is_read_whole():
    assert read_bounded(Path("/proc/self/status"), "status").startswith(b"Name:")
    with refused("file-too-large"):
        read_bounded(Path("/proc/self/status"), "status", 100)


def test_a_file_that_is_too_large(folder):
    with open(folder / "tokenizer.json", "wb") as file:
        file.truncate(300 * 2**20)
    with refused("model-small-file"):
        check_small_files(folder, "m")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("tokenizer.json", {"model": {"vocab": {"a": 2**31}}}),
        ("tokenizer.json", {"added_tokens": [{"id": 10**9, "content": "x"}]}),
        ("added_tokens.json", {"x": 10**9}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1000000000": {"content": "x"}}}),
    ],
)
def test_token_ids_beyond_any_vocabulary(folder, name, data):
    (folder / name).write_text(json.dumps(data))
    with refused("tokenizer-token-id"):
        check_small_files(folder, "m")


def test_digits_in_a_token_are_no_id(folder):
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"1234567890": 5, ": 99999999999": 6}}}))
    check_small_files(folder, "m")


@pytest.mark.parametrize("path", ["/dev/zero", "pipe", "large"])
def test_reading_always_ends(tmp_path, path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"x" * 101)
    with refused("file-too-large" if path == "large" else "file-not-regular"):
        read_bounded(tmp_path / path, "it", 100)


@pytest.mark.parametrize(
    ("content", "code"), [("{", "json-invalid"), ("[]", "json-no-object"), ("[" * 10**5, "json-invalid")]
)
def test_json_that_is_none(tmp_path, content, code):
    (tmp_path / "x.json").write_text(content)
    with refused(code):
        read_json(tmp_path / "x.json", "it")


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e400"])
def test_numbers_that_are_not_finite_are_for_configs_alone(tmp_path, value):
    """`time_step_limit` of some architectures is infinite; a manifest could not be written again with it."""
    (tmp_path / "x.json").write_text(f'{{"x": [0.5, {value}]}}')
    assert read_json(tmp_path / "x.json", "it")["x"][0] == 0.5
    with refused("json-invalid"):
        read_json(tmp_path / "x.json", "it", finite=True)


def test_half_of_a_character_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"x": "\\ud83d\\ude00"}')
    assert read_json(tmp_path / "x.json", "it")["x"] == "\U0001f600"
    (tmp_path / "x.json").write_text('{"x": "\\ud83d"}')
    with refused("json-invalid"):
        read_json(tmp_path / "x.json", "it")


# --- copies -----------------------------------------------------------------------------------------------------------


def test_a_link_to_a_private_file_is_not_copied(folder, tmp_path):
    (tmp_path / "private.json").write_text('{"password": "x"}')
    (folder / "generation_config.json").symlink_to(tmp_path / "private.json")
    (tmp_path / "out").mkdir()
    with refused("model-link-outside"):
        copy_missing(folder, tmp_path / "out", ["config.json", "generation_config.json"])
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_of_templates_that_leads_elsewhere(folder, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "key.jinja").write_text("secret")
    (tmp_path / "out").mkdir()
    (folder / "additional_chat_templates").symlink_to(tmp_path / "home")
    with refused("model-link-outside"):
        copy_tokenizer(folder, tmp_path / "out")


def test_links_within_a_folder_and_into_the_hub_cache_are_fine(folder, tmp_path):
    blob = tmp_path / "models--x--y" / "blobs" / ("0" * 40)
    blob.parent.mkdir(parents=True)
    blob.write_text("{}")
    (folder / "generation_config.json").symlink_to(blob)
    (folder / "inner.json").symlink_to("config.json")
    check_copied(folder, ["generation_config.json", "inner.json", "absent.json"])


def test_what_calls_itself_json_is_json(folder):
    (folder / "generation_config.json").write_text("root:x:0:0")
    with refused("json-invalid"):
        check_copied(folder, ["generation_config.json"])


@pytest.mark.parametrize("value", ["NaN", "-Infinity"])
def test_a_merge_refuses_what_other_readers_of_json_cannot_read(tmp_path, value):
    save_models(tmp_path, names=("base", "code"))
    file = tmp_path / "base" / "generation_config.json"
    file.write_text(f'{{"temperature": {value}}}')
    data = recipe(tmp_path, experts=("code",))
    assert_refused(tmp_path, data, "json-invalid", "take its key out", dry_run=True)
    file.write_text("{}")  # as the message advises
    merge_here(tmp_path, data)


def test_a_merge_refuses_a_linked_file_before_any_work(tmp_path):
    save_models(tmp_path, names=("base", "code"))
    (tmp_path / "private.json").write_text('{"password": "x"}')
    (tmp_path / "base" / "generation_config.json").unlink()
    (tmp_path / "base" / "generation_config.json").symlink_to(tmp_path / "private.json")
    data = recipe(tmp_path, experts=("code",))
    assert_refused(tmp_path, data, "model-link-outside", "generation_config.json", dry_run=True)
    (tmp_path / "base" / "generation_config.json").unlink()
    merge_here(tmp_path, data)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("code", {"chat_template": "auto"}),
        ("code", {"tokenizer_source": "NAMED"}),
        ("code", {"tokenizer_source": "union"}),
        ("donor", {"tokenizer_source": "NAMED"}),  # which is not merged
    ],
)
def test_a_linked_template_is_refused_where_it_may_be_written(tmp_path, name, keys):
    """mergekit writes the template of whichever model it takes the tokenizer from."""
    save_models(tmp_path, names=("base", "code"))
    # another vocabulary than the base's: else the recipe's block is skipped
    save_tokenizer(tmp_path / "code", size=VOCABULARY - 1)
    if name == "donor":
        shutil.copytree(tmp_path / "code", tmp_path / name)
    data = recipe(tmp_path, experts=("code",))
    keys = {key: str(tmp_path / name) if value == "NAMED" else value for key, value in keys.items()}
    (tmp_path / "secret.txt").write_text("SECRET {{ messages }}")
    template = tmp_path / name / "chat_template.jinja"
    template.unlink(missing_ok=True)
    template.symlink_to(tmp_path / "secret.txt")
    assert_refused(tmp_path, data | keys, "model-link-outside", f"{name}/chat_template.jinja", dry_run=True)
