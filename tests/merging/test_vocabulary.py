"""Tokenizers of several models: told apart, aligned where they differ, left alone where they do not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_checkpoints import VOCABULARY, save_tiny
from tests.tiny_merges import assert_refused, assert_same_tensors, merge_here, merge_stock, recipe, save_models, tensors
from tests.tiny_mixtures import save_mixtures
from tests.tiny_pairs import CHATML, save_tokenizer
from utils.models.tokenizer_files import copy_tokenizer, fingerprint, has_chat_template, has_tokenizer


def add_tokens(folder: Path, *tokens: str, special: bool = False) -> None:
    """Give a model's tokenizer more tokens, and its embeddings rows for them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    torch.manual_seed(len(tokenizer))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rows_of(folder: Path) -> int:
    rows = {tensor.shape[0] for name, tensor in tensors(folder).items() if "embed" in name or "lm_head" in name}
    assert len(rows) == 1
    return rows.pop()


def tokenizer_of(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "edit", "same"),
    [
        ("tokenizer.json", lambda data: data | {"added_tokens": []}, False),
        ("tokenizer.json", lambda data: data | {"normalizer": {"type": "Lowercase"}}, False),
        ("tokenizer_config.json", lambda data: data | {"pad_token": "<pad>"}, False),
        ("tokenizer_config.json", lambda data: data | {"added_tokens_decoder": {"96": {"content": "<x>"}}}, False),
        ("tokenizer_config.json", lambda data: data | {"chat_template": "{{ messages }}"}, True),
        ("tokenizer_config.json", lambda data: data | {"model_max_length": 7, "padding_side": "left"}, True),
    ],
)
def test_fingerprints(llamas, tmp_path, file, edit, same):
    shutil.copytree(llamas / "base", tmp_path / "other")
    path = tmp_path / "other" / file
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    assert (fingerprint(llamas / "base") == fingerprint(tmp_path / "other")) is same


def test_templates_and_copies(llamas, tmp_path):
    assert has_tokenizer(llamas / "base") and not has_tokenizer(tmp_path) and not has_chat_template(llamas / "base")
    source = save_tokenizer(tmp_path / "source", chat_template=CHATML)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("x")
    assert has_chat_template(source)
    target = tmp_path / "target"
    target.mkdir()
    (target / "tokenizer_config.json").write_text("{}")
    copy_tokenizer(source, target)
    assert (target / "tokenizer_config.json").read_text() == "{}"  # what is there stays
    for name in ("tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"):
        assert (target / name).read_bytes() == (source / name).read_bytes()


# --- differences in words ---------------------------------------------------------------------------------------------

TABLES = st.dictionaries(st.text(min_size=1, max_size=3), st.integers(0, 20), max_size=8)


@given(TABLES, TABLES)
def test_tables_differ_exactly_if_something_is_said(ours, theirs):
    from utils.merging.vocabulary import vocabulary_difference

    assert (vocabulary_difference(ours, theirs) == "") == (ours == theirs)
    assert vocabulary_difference(ours, ours) == ""


def test_differences_are_counted_with_examples():
    from utils.merging.vocabulary import vocabulary_difference

    text = vocabulary_difference({"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 3, "x": 1, "y": 2})
    assert text == (
        "3 and 4 tokens; 1 have other ids ('b'); 1 are only in the first ('c'); 2 are only in the second ('x', 'y')"
    )


# --- merges -----------------------------------------------------------------------------------------------------------


def test_the_same_tokens_under_other_settings_are_merged_as_they_are(copies, capsys):
    """Fine-tunes are often saved with another pad token, or by another release; no token has moved."""
    path = copies / "math" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "</s>"}))
    data = recipe(copies, "task_arithmetic", tokenizer_source="union", dtype="float32")
    ours = merge_here(copies, data, quiet=False)
    assert "tokenizers have the same tokens" in " ".join(capsys.readouterr().out.split())
    assert_same_tensors(ours, stock := merge_stock(copies, data))
    assert tokenizer_of(ours).get_vocab() == tokenizer_of(stock).get_vocab()


def test_a_token_that_one_model_keeps_whole_is_kept_whole_by_the_result(copies):
    from tokenizers import AddedToken

    tokenizer = tokenizer_of(copies / "math")
    tokenizer.add_tokens([AddedToken("#", special=True)])  # a token of every model, an added one of this
    tokenizer.save_pretrained(copies / "math")
    assert tokenizer.get_vocab() == tokenizer_of(copies / "base").get_vocab()
    data = recipe(copies, "task_arithmetic", tokenizer_source="union", dtype="float32")
    ours, stock = (tokenizer_of(one(copies, data)) for one in (merge_here, merge_stock))
    assert ours.added_tokens_decoder == stock.added_tokens_decoder
    assert "#" in {str(token) for token in ours.added_tokens_decoder.values()}


def test_padding_rows_are_dropped_as_stock_mergekit_does(tmp_path, capsys):
    save_models(tmp_path, vocab_size=VOCABULARY + 32)
    data = recipe(tmp_path, tokenizer_source="union")
    ours = merge_here(tmp_path, data, quiet=False)
    printed = capsys.readouterr().out
    assert "aligned by token, 128 rows become 96" in printed and "128 rows became 96 (tokenizer 96)" in printed
    assert rows_of(ours) == 96 == json.loads((ours / "config.json").read_text())["vocab_size"]
    assert len(tokenizer_of(ours)) == 96
    assert (ours / "generation_config.json").exists()
    assert "by mergekit (" not in printed  # rows that keep their places are merged in pieces, too
    assert_same_tensors(ours, merge_stock(tmp_path, data))


def test_padding_rows_stay_where_the_vectors_of_a_recipe_belong_to_rows(tmp_path, capsys):
    save_models(tmp_path, vocab_size=VOCABULARY + 32)
    parameters = {"weight": 0.5, "saliency": ""}
    models = [{"model": str(tmp_path / name), "parameters": parameters} for name in ("code", "math")]
    data = {"models": models, "merge_method": "guided_mean", "base_model": str(tmp_path / "base"), "dtype": "float32"}
    merged = merge_here(tmp_path, data | {"tokenizer_source": "base"}, quiet=False)
    assert "all 128 are merged as they are, with those of no token (96 tokens)" in " ".join(
        capsys.readouterr().out.split()
    )
    assert rows_of(merged) == 128 == json.loads((merged / "config.json").read_text())["vocab_size"]
    base, code, math = (tensors(tmp_path / name) for name in ("base", "code", "math"))
    for name, value in tensors(merged).items():
        wanted = sum(one[name].float() for one in (code, math)) / 2
        assert torch.allclose(value.float(), wanted, atol=1e-2) and value.shape == base[name].shape


def test_rows_beyond_the_vocabulary_of_a_class_stay(tmp_path, capsys):
    """Some classes have an embedding row that their config does not count; cut off, the result would not load."""
    save_mixtures(tmp_path, "moshi")
    data = recipe(tmp_path, method="task_arithmetic", tokenizer_source="base", dtype="float32")
    merged = merge_here(tmp_path, data, quiet=False)
    assert "embed_tokens.weight has rows that stand for no token" in " ".join(capsys.readouterr().out.split())
    assert {name: value.shape for name, value in tensors(merged).items()} == {
        name: value.shape for name, value in tensors(tmp_path / "base").items()
    }


def test_rows_without_a_tokenizer_block_stay(tmp_path):
    save_models(tmp_path, vocab_size=VOCABULARY + 32)
    assert rows_of(merge_here(tmp_path, recipe(tmp_path))) == 128


@pytest.mark.parametrize("source", ["union", "base"])
def test_added_tokens_follow_their_text(copies, source):
    """Each token's merged row is the same as stock mergekit's, wherever either of them put it."""
    add_tokens(copies / "code", "<code>", "<more>")
    add_tokens(copies / "math", "<math>", special=True)
    data = recipe(copies, "task_arithmetic", tokenizer_source=source, dtype="float32")
    ours, stock = merge_here(copies, data), merge_stock(copies, data)
    mine, theirs = tokenizer_of(ours).get_vocab(), tokenizer_of(stock).get_vocab()
    assert mine.keys() == theirs.keys()
    assert len(mine) == rows_of(ours) == (99 if source == "union" else 96)
    left, right = tensors(ours), tensors(stock)
    for name, tensor in left.items():
        if "embed" in name or "lm_head" in name:
            for token, place in mine.items():
                assert torch.equal(tensor[place], right[name][theirs[token]]), token
        else:
            assert torch.equal(tensor, right[name])


def test_a_union_numbers_its_tokens_the_same_way_every_time(copies):
    for name, tokens in (("code", ("<c>", "<d>", "<e>")), ("math", ("<m>", "<n>", "<o>"))):
        add_tokens(copies / name, *tokens)
        # as ordinary tokens of the model's own vocabulary, which come out of a hash table
        path = copies / name / "tokenizer.json"
        data = json.loads(path.read_text())
        data["model"]["vocab"] |= {entry["content"]: entry["id"] for entry in data["added_tokens"] if entry["id"] > 95}
        data["added_tokens"] = [entry for entry in data["added_tokens"] if entry["id"] <= 95]
        path.write_text(json.dumps(data))
        settings = json.loads((copies / name / "tokenizer_config.json").read_text())
        settings.pop("added_tokens_decoder", None)
        (copies / name / "tokenizer_config.json").write_text(json.dumps(settings))
    found = set()
    for output in ("x", "y", "z"):
        vocabulary = tokenizer_of(merge_here(copies, recipe(copies, tokenizer_source="union"), output)).get_vocab()
        found.add(tuple(vocabulary[token] for token in ("<c>", "<d>", "<e>", "<m>", "<n>", "<o>")))
    assert found == {(96, 97, 98, 99, 100, 101)}


def test_different_tokenizers_without_a_block_are_explained(copies, capsys):
    path = copies / "math" / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(data))
    ours = merge_here(copies, recipe(copies))
    errors = capsys.readouterr().err
    assert "differ: 2 have other ids ('a', 'b'). Rows are merged by id; to align them by token" in errors
    assert_same_tensors(ours, merge_stock(copies, recipe(copies)))
    aligned = merge_here(copies, recipe(copies, tokenizer_source="union"), "aligned")
    assert_same_tensors(aligned, merge_stock(copies, recipe(copies, tokenizer_source="union"), "stock2"))


def test_different_row_counts_without_a_block_are_refused(copies):
    add_tokens(copies / "code", "<code>")
    assert_refused(copies, recipe(copies), "merge-shapes", "add tokenizer_source: union")
    ours = merge_here(copies, recipe(copies), unsafe_truncate_embeddings=True)
    assert rows_of(ours) == 96 == json.loads((ours / "config.json").read_text())["vocab_size"]
    assert_same_tensors(ours, merge_stock(copies, recipe(copies), unsafe_truncate_embeddings=True))


def test_tokens_beyond_the_embeddings_are_refused(copies):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(copies / "code")
    tokenizer.add_tokens(["<code>"])
    tokenizer.save_pretrained(copies / "code")
    add_tokens(copies / "math", "<code>")
    data = recipe(copies, tokenizer_source="union")
    assert_refused(copies, data, "merge-tokens-without-rows", "'<code>'")


def test_missing_and_broken_tokenizers(copies, capsys):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (copies / "math" / file).unlink()
    merge_here(copies, recipe(copies, tokenizer_source="union"))
    assert "math has no tokenizer; its token ids are taken to be those of base" in capsys.readouterr().err
    (copies / "code" / "tokenizer.json").write_text("{}")
    data = recipe(copies, tokenizer_source="union")
    assert_refused(copies, data, "merge-tokenizer-unreadable", "code: its tokenizer cannot be loaded", overwrite=True)
    (copies / "base" / "tokenizer.json").unlink()
    assert_refused(copies, data, "merge-no-tokenizer", "base has no tokenizer", overwrite=True)


# --- templates and other small files ----------------------------------------------------------------------------------


def test_chat_template_and_generation_config_of_the_base_survive_alignment(tmp_path):
    save_models(tmp_path, vocab_size=VOCABULARY + 8)
    save_tokenizer(tmp_path / "base", chat_template=CHATML)
    ours = merge_here(tmp_path, recipe(tmp_path, tokenizer_source="union"))
    assert tokenizer_of(ours).chat_template == CHATML
    assert (ours / "generation_config.json").read_bytes() == (tmp_path / "base/generation_config.json").read_bytes()


def test_a_template_that_only_an_expert_has(copies, capsys):
    save_tokenizer(copies / "math", chat_template=CHATML)
    merge_here(copies, recipe(copies, tokenizer_source="union"), "plain")
    assert "base has no chat template, " in capsys.readouterr().err
    assert tokenizer_of(copies / "plain").chat_template is None
    auto = merge_here(copies, recipe(copies, tokenizer_source="union", chat_template="auto"), "auto")
    assert tokenizer_of(auto).chat_template == CHATML
    named = merge_here(copies, recipe(copies, chat_template="chatml"), "named")
    assert "<|im_start|>" in tokenizer_of(named).chat_template


def test_without_copy_tokenizer_none_is_written(copies):
    ours = merge_here(copies, recipe(copies), copy_tokenizer=False)
    assert not has_tokenizer(ours) and (ours / "generation_config.json").exists()


def test_special_tokens_that_move_are_said(copies, capsys):
    path = copies / "math" / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["</s>"], vocabulary["z"] = vocabulary["z"], vocabulary["</s>"]
    data["added_tokens"] = [e | {"id": vocabulary[e["content"]]} for e in data["added_tokens"]]
    path.write_text(json.dumps(data))
    merge_here(copies, recipe(copies, tokenizer_source=str(copies / "math")))
    assert "says eos_token_id 1 ('</s>'), which has id" in capsys.readouterr().err


def test_a_vocabulary_in_the_older_form_is_copied(tmp_path):
    """GPT-2 tokenizers are vocab.json and merges.txt; mergekit re-serializes them, we copy the files."""
    for name in ("base", "code"):
        folder = save_tiny("gpt2", tmp_path / name)
        letters = {chr(33 + place): place for place in range(VOCABULARY - 2)}
        (folder / "vocab.json").write_text(json.dumps(letters | {"<|endoftext|>": 94, "ab": 95}))
        (folder / "merges.txt").write_text("#version: 0.2\na b\n")
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 0.5}} for name in ("base", "code")]
    ours = merge_here(tmp_path, {"models": models, "merge_method": "linear", "tokenizer_source": "base"})
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (ours / file).read_bytes() == (tmp_path / "base" / file).read_bytes()
    assert tokenizer_of(ours)("ab").input_ids == [95]


@pytest.mark.slow  # mergekit reads its conversions anew for every tensor
def test_a_table_over_token_ids_keeps_the_rows_it_belongs_to(tmp_path, capsys):
    """DeepSeek-V4 routes its first blocks by token id."""
    save_mixtures(tmp_path, "deepseek_v4", vocab_size=100)
    data = recipe(tmp_path, method="task_arithmetic", tokenizer_source="base", dtype="float32")
    merged = merge_here(tmp_path, data, quiet=False)
    assert "tid2eid has an entry for each row" in " ".join(capsys.readouterr().out.split())
    for name, value in tensors(tmp_path / "base").items():
        if value.dtype == torch.int64:
            assert torch.equal(tensors(merged)[name], value)
